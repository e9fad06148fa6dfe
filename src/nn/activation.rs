//! Activations.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, WithDType};
use rayon::prelude::*;

use super::kernel::{PARALLEL_FROM, Real, dispatch, fused, sigmoid, slice, with_slice};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// x · sigmoid(x)
    Silu,
    /// x · Φ(x) with the error function (`gelu` in transformers and diffusers).
    Gelu,
    /// x · sigmoid(1.702 x), as in CLIP.
    QuickGelu,
}

impl Activation {
    /// Reads transformers' `hidden_act` names.
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "silu" | "swish" => Some(Self::Silu),
            "gelu" => Some(Self::Gelu),
            "quick_gelu" => Some(Self::QuickGelu),
            _ => None,
        }
    }

    pub fn forward(self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Gelu => x.gelu_erf(),
            Self::Silu => gated(x, 1.0),
            Self::QuickGelu => gated(x, 1.702),
        }
    }
}

/// x · sigmoid(slope · x).
fn gated(x: &Tensor, slope: f64) -> Result<Tensor> {
    if fused(x) {
        return x.contiguous()?.apply_op1(SigmoidGate { slope });
    }
    // Spelled out, exp(-x) overflows far below zero and its gradient is 0 · ∞.
    (x * slope)?.silu()? / slope
}

struct SigmoidGate {
    slope: f64,
}

fn map<T: Real>(x: &[T], y: &mut [T], f: impl Fn(T, &mut T) + Sync) {
    const CHUNK: usize = 4096;
    let each = |(y, x): (&mut [T], &[T])| y.iter_mut().zip(x).for_each(|(y, x)| f(*x, y));
    if x.len() >= PARALLEL_FROM {
        y.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK)).for_each(each);
    } else {
        each((y, x));
    }
}

fn gate<T: Real>(slope: f64, x: &[T]) -> Vec<T> {
    let (slope, mut y) = (T::from_f64(slope), vec![T::ZERO; x.len()]);
    map(x, &mut y, |x, y| *y = x * sigmoid(slope * x));
    y
}

fn gate_backward<T: Real>(slope: f64, x: &[T], dy: &[T]) -> Vec<T> {
    let (slope, mut dx) = (T::from_f64(slope), dy.to_vec());
    map(x, &mut dx, |x, d| {
        let s = sigmoid(slope * x);
        *d *= s * (T::ONE + slope * x * (T::ONE - s));
    });
    dx
}

impl CustomOp1 for SigmoidGate {
    fn name(&self) -> &'static str {
        "sigmoid-gate"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let storage = dispatch!(storage.dtype(), T => {
            T::to_cpu_storage_owned(gate::<T>(self.slope, slice(storage, layout)?))
        });
        Ok((storage, layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _res: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        dispatch!(x.dtype(), T => {
            let dx = with_slice::<T, _>(x, |x| {
                with_slice::<T, _>(grad, |dy| Ok(gate_backward(self.slope, x, dy)))
            })?;
            Ok(Some(Tensor::from_vec(dx, x.shape(), x.device())?))
        })
    }
}
