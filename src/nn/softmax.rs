//! Softmax over the last dimension.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, D, Layout, Result, Shape, Tensor, WithDType};
use rayon::prelude::*;

use super::kernel::{PARALLEL_FROM, Real, dispatch, fused, slice, sum_by, with_slice};

/// exp(x − max) / Σ over the last dimension.
pub fn softmax(x: &Tensor) -> Result<Tensor> {
    if fused(x) {
        return x.contiguous()?.apply_op1(Softmax);
    }
    let e = x.broadcast_sub(&x.max_keepdim(D::Minus1)?.detach())?.exp()?;
    e.broadcast_div(&e.sum_keepdim(D::Minus1)?)
}

struct Softmax;

fn rows<T: Real>(from: &[T], into: &mut [T], n: usize, each: impl Fn(&[T], &mut [T]) + Sync) {
    if from.len() >= PARALLEL_FROM {
        into.par_chunks_mut(n).zip(from.par_chunks(n)).for_each(|(y, x)| each(x, y));
    } else {
        into.chunks_mut(n).zip(from.chunks(n)).for_each(|(y, x)| each(x, y));
    }
}

fn forward<T: Real>(x: &[T], n: usize) -> Vec<T> {
    let mut y = vec![T::ZERO; x.len()];
    rows(x, &mut y, n, |x, y| {
        let max = x.iter().fold(x[0], |m, v| if *v > m { *v } else { m });
        y.iter_mut().zip(x).for_each(|(y, x)| *y = (*x - max).exponential());
        let scale = T::ONE / sum_by(y, |v| v);
        y.iter_mut().for_each(|y| *y *= scale);
    });
    y
}

/// dx = y · (dy − Σ dy·y)
fn backward<T: Real>(y: &[T], dy: &[T], n: usize) -> Vec<T> {
    let mut dx = dy.to_vec();
    rows(y, &mut dx, n, |y, d| {
        let dot = d.iter().zip(y).map(|(d, y)| *d * *y).sum::<T>();
        d.iter_mut().zip(y).for_each(|(d, y)| *d = (*d - dot) * *y);
    });
    dx
}

impl CustomOp1 for Softmax {
    fn name(&self) -> &'static str {
        "softmax"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let n = layout.dims().last().copied().unwrap_or(1).max(1);
        let storage = dispatch!(storage.dtype(), T => {
            T::to_cpu_storage_owned(forward::<T>(slice(storage, layout)?, n))
        });
        Ok((storage, layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let n = x.dims().last().copied().unwrap_or(1).max(1);
        dispatch!(x.dtype(), T => {
            let dx = with_slice::<T, _>(y, |y| {
                with_slice::<T, _>(grad, |dy| Ok(backward(y, dy, n)))
            })?;
            Ok(Some(Tensor::from_vec(dx, x.shape(), x.device())?))
        })
    }
}
