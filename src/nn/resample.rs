//! Nearest-neighbour resampling. candle's own operation loses gradients when
//! its input has a second consumer.

use candle_core::{Result, Tensor};

/// [B, C, H, W] → [B, C, height, width], as PyTorch's `interpolate(mode="nearest")`.
pub fn nearest(x: &Tensor, height: usize, width: usize) -> Result<Tensor> {
    let (batch, channels, h, w) = x.dims4()?;
    if (height, width) == (h, w) {
        return Ok(x.clone());
    }
    if height == 2 * h && width == 2 * w {
        return x
            .contiguous()?
            .reshape((batch * channels, h, 1, w, 1))?
            .broadcast_as((batch * channels, h, 2, w, 2))?
            .contiguous()?
            .reshape((batch, channels, height, width));
    }
    let rows = x.contiguous()?.index_select(&indices(h, height, x)?, 2)?;
    rows.index_select(&indices(w, width, x)?, 3)
}

fn indices(from: usize, to: usize, like: &Tensor) -> Result<Tensor> {
    let scale = from as f32 / to as f32;
    let index =
        (0..to).map(|i| ((i as f32 * scale) as u32).min(from as u32 - 1)).collect::<Vec<_>>();
    Tensor::from_vec(index, to, like.device())
}
