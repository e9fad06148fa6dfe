//! Group and layer normalisation over channels-last tensors, each one fused operation with
//! its backward.

use candle_core::{D, DType, Device, Result, Tensor, bail};

use super::activation::Activation;
use super::autograd::{attach, wanted};
use super::group_norm::{self, Groups};
use super::kernel::{PARALLEL_FROM, Place, Real, View, dispatch, place, sum_by, uninitialised};
use super::simd::{Level, vectorised};
use super::threads;

/// Group normalisation over [B, ..., C].
#[derive(Clone, Debug)]
pub struct GroupNorm {
    pub groups: usize,
    pub eps: f64,
    /// [C]
    pub weight: Tensor,
    /// [C]
    pub bias: Tensor,
}

impl GroupNorm {
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.apply(x, false)
    }

    /// `silu(forward(x))` in one pass.
    pub fn forward_silu(&self, x: &Tensor) -> Result<Tensor> {
        self.apply(x, true)
    }

    fn apply(&self, x: &Tensor, silu: bool) -> Result<Tensor> {
        let (batch, channels) = (x.dim(0)?, x.dim(D::Minus1)?);
        let groups = self.groups;
        if x.rank() < 2 || groups == 0 || !channels.is_multiple_of(groups) {
            bail!("group norm: {:?} does not split into {groups} groups", x.dims());
        }
        check_affine(&self.weight, &self.bias, channels)?;
        let positions = x.elem_count() / (batch * channels).max(1);
        let shape = Groups { batch, positions, channels, groups, eps: self.eps, silu };
        match place(x) {
            Place::Cpu => dispatch!(x.dtype(), T => self.run::<T>(x, shape)),
            #[cfg(feature = "cuda")]
            Place::Gpu => super::cuda::group_norm(x, &self.weight, &self.bias, shape),
            Place::Other => self.composed(x, shape),
        }
    }

    /// From candle's operations, for other devices and types.
    fn composed(&self, x: &Tensor, shape: Groups) -> Result<Tensor> {
        let Groups { batch, channels, groups, silu, .. } = shape;
        let rows = x.to_dtype(DType::F32)?.reshape((batch, (), groups, channels / groups))?;
        let rows = rows.transpose(1, 2)?.contiguous()?;
        let y = standardise(&rows.reshape((batch, groups, ()))?, self.eps)?
            .reshape(rows.shape())?
            .transpose(1, 2)?
            .contiguous()?
            .reshape(x.shape())?
            .to_dtype(x.dtype())?
            .broadcast_mul(&self.weight.to_dtype(x.dtype())?)?
            .broadcast_add(&self.bias.to_dtype(x.dtype())?)?;
        if silu { Activation::Silu.forward(&y) } else { Ok(y) }
    }

    fn run<T: Real>(&self, x: &Tensor, shape: Groups) -> Result<Tensor> {
        let (x, w, b) = (x.contiguous()?, like(&self.weight, x)?, like(&self.bias, x)?);
        let (y, statistics) =
            group_norm::forward::<T>(&shape, &View::of(&x)?, &View::of(&w)?, &View::of(&b)?);
        let inputs = [x, w, b];
        let kept = inputs.clone().map(|t| t.detach());
        let wants = inputs.clone().map(|t| wanted(&t));
        attach(y, inputs[0].shape().clone(), &inputs.each_ref(), move |dy| {
            let [x, w, b] = &kept;
            let (x, w, b) = (View::<T>::of(x)?, View::<T>::of(w)?, View::<T>::of(b)?);
            let (dx, dw, db) =
                group_norm::backward(&shape, &statistics, &x, &w, &b, &View::of(dy)?);
            gradients([dx, dw, db], &kept, wants)
        })
    }
}

/// Layer normalisation over the last dimension.
#[derive(Clone, Debug)]
pub struct LayerNorm {
    pub eps: f64,
    pub weight: Tensor,
    pub bias: Tensor,
}

impl LayerNorm {
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        check_affine(&self.weight, &self.bias, x.dim(D::Minus1)?)?;
        match place(x) {
            Place::Cpu => dispatch!(x.dtype(), T => self.run::<T>(x)),
            #[cfg(feature = "cuda")]
            Place::Gpu => super::cuda::layer_norm(x, &self.weight, &self.bias, self.eps),
            Place::Other => standardise(&x.to_dtype(DType::F32)?, self.eps)?
                .to_dtype(x.dtype())?
                .broadcast_mul(&self.weight.to_dtype(x.dtype())?)?
                .broadcast_add(&self.bias.to_dtype(x.dtype())?),
        }
    }

    fn run<T: Real>(&self, x: &Tensor) -> Result<Tensor> {
        let inputs = [x.contiguous()?, like(&self.weight, x)?, like(&self.bias, x)?];
        let eps = self.eps;
        let y = {
            let [x, w, b] = inputs.each_ref().map(|t| View::<T>::of(t));
            layers(&x?, &w?, &b?, eps)
        };
        let kept = inputs.clone().map(|t| t.detach());
        let wants = inputs.clone().map(|t| wanted(&t));
        attach(y, inputs[0].shape().clone(), &inputs.each_ref(), move |dy| {
            let (x, w) = (View::<T>::of(&kept[0])?, View::<T>::of(&kept[1])?);
            gradients(layers_backward(&x, &w, &View::of(dy)?, eps), &kept, wants)
        })
    }
}

/// The wanted ones of the gradients of input, weight and bias.
fn gradients<T: Real>(
    values: [Vec<T>; 3],
    like: &[Tensor; 3],
    wants: [bool; 3],
) -> Result<Vec<Tensor>> {
    let all = values.into_iter().zip(like).zip(wants).filter(|(_, wanted)| *wanted);
    all.map(|((v, like), _)| Tensor::from_vec(v, like.shape(), &Device::Cpu)).collect()
}

/// A contiguous parameter of the input's type.
fn like(parameter: &Tensor, x: &Tensor) -> Result<Tensor> {
    parameter.to_dtype(x.dtype())?.contiguous()
}

fn check_affine(weight: &Tensor, bias: &Tensor, channels: usize) -> Result<()> {
    if weight.dims() == [channels] && bias.dims() == [channels] {
        return Ok(());
    }
    bail!("norm of {channels} channels: weight {:?}, bias {:?}", weight.dims(), bias.dims())
}

/// Zero mean and unit variance over the last dimension, from differentiable operations.
fn standardise(x: &Tensor, eps: f64) -> Result<Tensor> {
    let centred = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
    let deviation = (centred.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?;
    centred.broadcast_div(&deviation)
}

/// Rows that one task takes.
const ROWS: usize = 64;

fn layers<T: Real>(x: &[T], w: &[T], b: &[T], eps: f64) -> Vec<T> {
    let (level, n) = (Level::current(), w.len().max(1));
    let mut y = uninitialised(x.len());
    threads::chunks(&mut y, ROWS * n, x.len() >= PARALLEL_FROM, |i, y| {
        layer_rows(level, &x[i * ROWS * n..][..y.len()], w, b, eps, y);
    });
    y
}

/// Mean and reciprocal standard deviation of a row.
#[inline(always)]
fn statistics<T: Real>(row: &[T], eps: f64) -> (T, T) {
    let scale = T::from_f64(1.0 / row.len() as f64);
    let mean = sum_by(row, |v| v) * scale;
    let variance = sum_by(row, |v| (v - mean) * (v - mean)).to_f64() / row.len() as f64;
    (mean, T::from_f64(1.0 / (variance + eps).sqrt()))
}

vectorised! {
    fn layer_rows<T: Real>(x: &[T], w: &[T], b: &[T], eps: f64, y: &mut [T]) {
        for (y, x) in y.chunks_exact_mut(w.len()).zip(x.chunks_exact(w.len())) {
            let (mean, scale) = statistics(x, eps);
            for (((y, x), w), b) in y.iter_mut().zip(x).zip(w).zip(b) {
                *y = (*x - mean) * scale * *w + *b;
            }
        }
    }
}

/// dx, dw, db. With x̂ the standardised row: dx = (w·dy − mean(w·dy) − x̂·mean(w·dy·x̂)) / σ.
fn layers_backward<T: Real>(x: &[T], w: &[T], dy: &[T], eps: f64) -> [Vec<T>; 3] {
    let (level, n) = (Level::current(), w.len().max(1));
    let mut dx = uninitialised(x.len());
    // Every task sums into rows of its own; they are added in order.
    let tasks = x.len().div_ceil(ROWS * n);
    let mut sums = vec![T::ZERO; tasks * 2 * n];
    let mut pairs: Vec<_> = dx.chunks_mut(ROWS * n).zip(sums.chunks_mut(2 * n)).collect();
    threads::chunks(&mut pairs, 1, x.len() >= PARALLEL_FROM, |i, pair| {
        for (dx, sums) in pair {
            let rows = i * ROWS * n..i * ROWS * n + dx.len();
            let (dw, db) = sums.split_at_mut(n);
            layer_rows_backward(level, &x[rows.clone()], w, &dy[rows], eps, dx, dw, db);
        }
    });
    let mut total = vec![T::ZERO; 2 * n];
    sums.chunks(2 * n).for_each(|sums| super::gemm::add(level, &mut total, sums));
    let db = total.split_off(n);
    [dx, total, db]
}

vectorised! {
    fn layer_rows_backward<T: Real>(
        x: &[T], w: &[T], dy: &[T], eps: f64, dx: &mut [T], dw: &mut [T], db: &mut [T],
    ) {
        let n = w.len();
        let inverse = T::from_f64(1.0 / n as f64);
        let rows = x.chunks_exact(n).zip(dy.chunks_exact(n));
        for (dx, (x, dy)) in dx.chunks_exact_mut(n).zip(rows) {
            let (mean, scale) = statistics(x, eps);
            for i in 0..n {
                let standard = (x[i] - mean) * scale;
                dx[i] = dy[i] * w[i];
                dw[i] += dy[i] * standard;
                db[i] += dy[i];
            }
            let sum = sum_by(dx, |v| v) * inverse;
            let dot = dot(dx, x, mean) * scale * inverse;
            for i in 0..n {
                dx[i] = (dx[i] - sum - (x[i] - mean) * scale * dot) * scale;
            }
        }
    }
}

/// Σ a · (x − mean), in lanes.
#[inline(always)]
fn dot<T: Real>(a: &[T], x: &[T], mean: T) -> T {
    const LANES: usize = 16;
    let mut lanes = [T::ZERO; LANES];
    let (mut a, mut x) = (a.chunks_exact(LANES), x.chunks_exact(LANES));
    for (a, x) in a.by_ref().zip(x.by_ref()) {
        for i in 0..LANES {
            lanes[i] += a[i] * (x[i] - mean);
        }
    }
    let rest: T = a.remainder().iter().zip(x.remainder()).map(|(a, x)| *a * (*x - mean)).sum();
    lanes.into_iter().sum::<T>() + rest
}
