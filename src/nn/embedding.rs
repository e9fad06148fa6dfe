//! Sinusoidal embeddings of numbers.

use candle_core::{DType, Result, Tensor};

/// diffusers' `Timesteps`: values [N] (f32 or f64) → [N, dim], frequencies
/// 10000^(−i / (dim/2 − shift)). `flip` puts the cosines first, as SDXL does.
/// Computed in f32 whatever the model's dtype: half precision cannot hold a
/// timestep of 981 or a size of 1025.
pub fn sinusoidal(values: &Tensor, dim: usize, flip: bool, shift: f64) -> Result<Tensor> {
    let half = dim / 2;
    let scale = -(10_000_f64.ln()) / (half as f64 - shift);
    let frequencies: Vec<f32> = (0..half).map(|i| (scale * i as f64).exp() as f32).collect();
    let frequencies = Tensor::from_vec(frequencies, (1, half), values.device())?;
    let wide = values.dtype() == DType::F64;
    let dtype = if wide { DType::F64 } else { DType::F32 };
    let angles =
        values.to_dtype(dtype)?.reshape(((), 1))?.broadcast_mul(&frequencies.to_dtype(dtype)?)?;
    let (sin, cos) = (angles.sin()?, angles.cos()?);
    let out = if flip { Tensor::cat(&[cos, sin], 1)? } else { Tensor::cat(&[sin, cos], 1)? };
    if dim % 2 == 1 { out.pad_with_zeros(1, 0, 1) } else { Ok(out) }
}
