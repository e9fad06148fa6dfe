//! Group and layer normalisation, each one fused operation with its backward.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp3, D, DType, Layout, Result, Shape, Tensor, WithDType};
use rayon::prelude::*;

use super::activation::Activation;
use super::kernel::{PARALLEL_FROM, Real, dispatch, fused, sigmoid, slice, sum_by, with_slice};

/// Group normalisation over [B, C, ...].
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
        let op = Norm { kind: Kind::Group(self.groups), eps: self.eps, silu };
        if fused(x) {
            return x.contiguous()?.apply_op3(&self.weight, &self.bias, op);
        }
        let (batch, channels) = (x.dim(0)?, x.dim(1)?);
        let rows = x.to_dtype(DType::F32)?.reshape((batch, self.groups, ()))?;
        let mut affine = vec![1; x.rank()];
        affine[1] = channels;
        let y = standardise(&rows, self.eps)?
            .reshape(x.shape())?
            .to_dtype(x.dtype())?
            .broadcast_mul(&self.weight.reshape(affine.clone())?)?
            .broadcast_add(&self.bias.reshape(affine)?)?;
        if silu { Activation::Silu.forward(&y) } else { Ok(y) }
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
        if fused(x) {
            let op = Norm { kind: Kind::Layer, eps: self.eps, silu: false };
            return x.contiguous()?.apply_op3(&self.weight, &self.bias, op);
        }
        standardise(&x.to_dtype(DType::F32)?, self.eps)?
            .to_dtype(x.dtype())?
            .broadcast_mul(&self.weight)?
            .broadcast_add(&self.bias)
    }
}

/// Zero mean and unit variance over the last dimension, from differentiable operations.
fn standardise(x: &Tensor, eps: f64) -> Result<Tensor> {
    let centred = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
    let deviation = (centred.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?;
    centred.broadcast_div(&deviation)
}

#[derive(Clone, Copy)]
enum Kind {
    Group(usize),
    Layer,
}

struct Norm {
    kind: Kind,
    eps: f64,
    silu: bool,
}

/// How a tensor falls into rows that share statistics, and rows into runs
/// that share an affine pair.
struct Geometry {
    /// Elements that share statistics.
    row: usize,
    /// Consecutive elements that share weight and bias.
    run: usize,
    channels: usize,
    groups: usize,
}

impl Geometry {
    /// The channel of run `j` in row `r`.
    #[inline(always)]
    fn channel(&self, r: usize, j: usize) -> usize {
        (r % self.groups) * (self.row / self.run) + j
    }
}

impl Norm {
    fn geometry(&self, shape: &Shape) -> Result<Geometry> {
        let dims = shape.dims();
        match self.kind {
            Kind::Layer => {
                let n = dims.last().copied().unwrap_or(1);
                Ok(Geometry { row: n, run: 1, channels: n, groups: 1 })
            }
            Kind::Group(groups) => {
                if dims.len() < 2 || !dims[1].is_multiple_of(groups) {
                    candle_core::bail!("group norm: {dims:?} does not split into {groups} groups");
                }
                let run = dims[2..].iter().product::<usize>();
                Ok(Geometry { row: dims[1] / groups * run, run, channels: dims[1], groups })
            }
        }
    }
}

/// Mean and reciprocal standard deviation, accumulated in f64 over short f32 runs.
fn statistics<T: Real>(row: &[T], eps: f64) -> (T, T) {
    fn sum<T: Real>(row: &[T], f: impl Fn(T) -> T) -> f64 {
        row.chunks(1024).map(|c| sum_by(c, &f).to_f64()).sum()
    }
    let n = row.len() as f64;
    let mean = T::from_f64(sum(row, |v| v) / n);
    let variance = sum(row, |v| (v - mean) * (v - mean)) / n;
    (mean, T::from_f64(1.0 / (variance + eps).sqrt()))
}

fn for_rows<T: Real>(
    x: &[T],
    y: &mut [T],
    row: usize,
    each: impl Fn(usize, &[T], &mut [T]) + Sync,
) {
    if x.len() >= PARALLEL_FROM {
        y.par_chunks_mut(row)
            .zip(x.par_chunks(row))
            .enumerate()
            .for_each(|(r, (y, x))| each(r, x, y));
    } else {
        y.chunks_mut(row).zip(x.chunks(row)).enumerate().for_each(|(r, (y, x))| each(r, x, y));
    }
}

fn forward<T: Real>(op: &Norm, g: &Geometry, x: &[T], w: &[T], b: &[T]) -> Vec<T> {
    let mut y = vec![T::ZERO; x.len()];
    for_rows(x, &mut y, g.row, |r, x, y| {
        let (mean, scale) = statistics(x, op.eps);
        if g.run == 1 && g.groups == 1 {
            for (((y, x), w), b) in y.iter_mut().zip(x).zip(w).zip(b) {
                *y = (*x - mean) * scale * *w + *b;
            }
            return;
        }
        for (j, (y, x)) in y.chunks_mut(g.run).zip(x.chunks(g.run)).enumerate() {
            let c = g.channel(r, j);
            let (a, b) = (w[c] * scale, b[c] - mean * scale * w[c]);
            y.iter_mut().zip(x).for_each(|(y, x)| *y = *x * a + b);
            if op.silu {
                y.iter_mut().for_each(|y| *y *= sigmoid(*y));
            }
        }
    });
    y
}

/// dx, dw, db. With z = x̂·w + b and y = z or silu(z):
/// dx = (w·dz − mean(w·dz) − x̂·mean(w·dz·x̂)) / σ.
fn backward<T: Real>(
    op: &Norm,
    g: &Geometry,
    x: &[T],
    w: &[T],
    b: &[T],
    dy: &[T],
) -> (Vec<T>, Vec<T>, Vec<T>) {
    let mut dx = vec![T::ZERO; x.len()];
    let (mut dw, mut db) = (vec![T::ZERO; g.channels], vec![T::ZERO; g.channels]);
    let n = T::from_f64(g.row as f64);
    for (r, (dx, (x, dy))) in
        dx.chunks_mut(g.row).zip(x.chunks(g.row).zip(dy.chunks(g.row))).enumerate()
    {
        let (mean, scale) = statistics(x, op.eps);
        let (mut sum, mut dot) = (T::ZERO, T::ZERO);
        for (j, ((dx, x), dy)) in
            dx.chunks_mut(g.run).zip(x.chunks(g.run)).zip(dy.chunks(g.run)).enumerate()
        {
            let c = g.channel(r, j);
            let (mut run_dw, mut run_db) = (T::ZERO, T::ZERO);
            for ((dx, x), dy) in dx.iter_mut().zip(x).zip(dy) {
                let xhat = (*x - mean) * scale;
                let mut dz = *dy;
                if op.silu {
                    let z = xhat * w[c] + b[c];
                    let s = sigmoid(z);
                    dz *= s * (T::ONE + z * (T::ONE - s));
                }
                run_dw += dz * xhat;
                run_db += dz;
                *dx = dz * w[c];
            }
            dw[c] += run_dw;
            db[c] += run_db;
            sum += run_db * w[c];
            dot += run_dw * w[c];
        }
        let (sum, dot) = (sum / n, dot / n);
        for (dx, x) in dx.iter_mut().zip(x) {
            *dx = (*dx - sum - (*x - mean) * scale * dot) * scale;
        }
    }
    (dx, dw, db)
}

impl CustomOp3 for Norm {
    fn name(&self) -> &'static str {
        "norm"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
        s3: &CpuStorage,
        l3: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let g = self.geometry(l1.shape())?;
        let storage = dispatch!(s1.dtype(), T => {
            let (x, w, b) = (slice::<T>(s1, l1)?, slice::<T>(s2, l2)?, slice::<T>(s3, l3)?);
            if w.len() != g.channels || b.len() != g.channels {
                candle_core::bail!("norm: {} weights for {} channels", w.len(), g.channels);
            }
            T::to_cpu_storage_owned(forward::<T>(self, &g, x, w, b))
        });
        Ok((storage, l1.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        b: &Tensor,
        _res: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let g = self.geometry(x.shape())?;
        dispatch!(x.dtype(), T => {
            let (dx, dw, db) = with_slice::<T, _>(x, |x| {
                with_slice::<T, _>(w, |w| {
                    with_slice::<T, _>(b, |b| {
                        with_slice::<T, _>(grad, |dy| Ok(backward::<T>(self, &g, x, w, b, dy)))
                    })
                })
            })?;
            let tensor = |v: Vec<T>, like: &Tensor| -> Result<Option<Tensor>> {
                if !like.track_op() {
                    return Ok(None);
                }
                Tensor::from_vec(v, like.shape(), like.device()).map(Some)
            };
            Ok((tensor(dx, x)?, tensor(dw, w)?, tensor(db, b)?))
        })
    }
}
