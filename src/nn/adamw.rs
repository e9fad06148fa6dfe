//! Gradient sums and the AdamW update, in place.
//!
//! AdamW (Loshchilov & Hutter, <https://arxiv.org/abs/1711.05101>, algorithm 2)
//! in the operations and the order of PyTorch's `torch.optim.AdamW`; moments are
//! f32. An optimizer step is bound by memory, so it is one pass over the
//! parameter, its gradient and both moments.
//!
//! The kernels take plain slices. Those on tensors are in place for contiguous
//! f32 on the CPU; for the rest they compute the same from candle's operations.
//! Nothing here depends on the number of threads: updates are elementwise, and a
//! sum adds the sums of fixed blocks in their order.

use std::cell::Cell;

use candle_core::{CpuStorage, DType, InplaceOp1, InplaceOp2, Layout, Result, Storage};
use candle_core::{Tensor, Var, bail};
use rayon::prelude::*;

use super::kernel::{PARALLEL_FROM, View, slice};

/// Elements that one thread takes at a time, and that one partial sum covers:
/// changing it changes the last bits of every norm.
const BLOCK: usize = 1 << 14;

/// What an update depends on besides the tensors; dimensionless.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Hyper {
    pub lr: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    pub weight_decay: f64,
    /// Multiplies the gradient before anything else, as clipping would.
    pub gradient_scale: f64,
}

/// A step's scalars: computed in f64, used in f32, as PyTorch does.
#[derive(Clone, Copy, Debug)]
pub(super) struct Scalars {
    pub scale: f32,
    /// 1 − lr · weight_decay
    pub keep: f32,
    /// 1 − beta1
    pub rest1: f32,
    pub beta2: f32,
    /// 1 − beta2
    pub rest2: f32,
    /// −lr / (1 − beta1^t)
    pub step_size: f32,
    /// √(1 − beta2^t)
    pub root: f32,
    pub eps: f32,
}

impl Scalars {
    fn new(hyper: &Hyper, step: u64) -> Result<Self> {
        if step == 0 {
            bail!("adamw: steps count from 1, got 0")
        }
        let Hyper { lr, beta1, beta2, eps, weight_decay, gradient_scale } = *hyper;
        let t = step as f64;
        Ok(Self {
            scale: gradient_scale as f32,
            keep: (1.0 - lr * weight_decay) as f32,
            rest1: (1.0 - beta1) as f32,
            beta2: beta2 as f32,
            rest2: (1.0 - beta2) as f32,
            step_size: (-lr / (1.0 - beta1.powf(t))) as f32,
            root: (1.0 - beta2.powf(t)).sqrt() as f32,
            eps: eps as f32,
        })
    }

    /// PyTorch's `lerp` leaves from the nearer end.
    fn leaves_from_moment(&self) -> bool {
        self.rest1 < 0.5
    }
}

fn same_length(what: &str, lengths: &[usize]) -> Result<()> {
    if lengths.windows(2).any(|pair| pair[0] != pair[1]) {
        bail!("{what}: expected as many values of each, got {lengths:?}")
    }
    Ok(())
}

/// One AdamW update of `p` from the gradient `g`, with first moment `m` and
/// second moment `v`, all of one length. `step` counts this parameter's updates from 1.
///
/// ```text
/// p ← p · (1 − lr · weight_decay)
/// m ← beta1 · m + (1 − beta1) · g          as m + (1 − beta1) · (g − m)
/// v ← beta2 · v + (1 − beta2) · g²
/// p ← p − lr / (1 − beta1^t) · m / (√v / √(1 − beta2^t) + eps)
/// ```
///
/// # Errors
/// Slices of different lengths, or step 0.
pub fn update(
    p: &mut [f32],
    g: &[f32],
    m: &mut [f32],
    v: &mut [f32],
    hyper: &Hyper,
    step: u64,
) -> Result<()> {
    same_length("adamw", &[p.len(), g.len(), m.len(), v.len()])?;
    let scalars = Scalars::new(hyper, step)?;
    if p.len() < PARALLEL_FROM {
        update_block(p, g, m, v, &scalars);
        return Ok(());
    }
    p.par_chunks_mut(BLOCK)
        .zip(g.par_chunks(BLOCK))
        .zip(m.par_chunks_mut(BLOCK))
        .zip(v.par_chunks_mut(BLOCK))
        .for_each(|(((p, g), m), v)| update_block(p, g, m, v, &scalars));
    Ok(())
}

#[inline(always)]
fn update_block(p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32], s: &Scalars) {
    if s.leaves_from_moment() {
        update_loop(p, g, m, v, s, |m, g| m + s.rest1 * (g - m));
    } else {
        update_loop(p, g, m, v, s, |m, g| g - (g - m) * (1.0 - s.rest1));
    }
}

#[inline(always)]
fn update_loop(
    p: &mut [f32],
    g: &[f32],
    m: &mut [f32],
    v: &mut [f32],
    s: &Scalars,
    lerp: impl Fn(f32, f32) -> f32,
) {
    let s = *s;
    for (((p, g), m), v) in p.iter_mut().zip(g).zip(m.iter_mut()).zip(v.iter_mut()) {
        let g = *g * s.scale;
        let first = lerp(*m, g);
        let second = *v * s.beta2 + s.rest2 * g * g;
        let denominator = second.sqrt() / s.root + s.eps;
        *p = *p * s.keep + s.step_size * first / denominator;
        *m = first;
        *v = second;
    }
}

/// `into` += `scale` · `gradient`.
///
/// # Errors
/// Slices of different lengths.
pub fn accumulate(into: &mut [f32], gradient: &[f32], scale: f32) -> Result<()> {
    same_length("accumulate", &[into.len(), gradient.len()])?;
    if into.len() < PARALLEL_FROM {
        accumulate_block(into, gradient, scale);
    } else {
        into.par_chunks_mut(BLOCK)
            .zip(gradient.par_chunks(BLOCK))
            .for_each(|(into, gradient)| accumulate_block(into, gradient, scale));
    }
    Ok(())
}

#[inline(always)]
fn accumulate_block(into: &mut [f32], gradient: &[f32], scale: f32) {
    for (sum, g) in into.iter_mut().zip(gradient) {
        *sum += scale * *g;
    }
}

/// `values` *= `scale`.
pub fn multiply(values: &mut [f32], scale: f32) {
    if values.len() < PARALLEL_FROM {
        multiply_block(values, scale);
    } else {
        values.par_chunks_mut(BLOCK).for_each(|block| multiply_block(block, scale));
    }
}

#[inline(always)]
fn multiply_block(values: &mut [f32], scale: f32) {
    values.iter_mut().for_each(|v| *v *= scale);
}

/// Σ v², in f64: finite exactly where every value is, at any length that fits in memory.
pub fn squared_norm(values: &[f32]) -> f64 {
    if values.len() < PARALLEL_FROM {
        return values.chunks(BLOCK).map(squared_norm_block).sum();
    }
    let blocks: Vec<f64> = values.par_chunks(BLOCK).map(squared_norm_block).collect();
    blocks.into_iter().sum()
}

/// In sixteen partial sums, so that the loop vectorises.
#[inline(always)]
fn squared_norm_block(values: &[f32]) -> f64 {
    const LANES: usize = 16;
    let mut lanes = [0.0_f64; LANES];
    let chunks = values.chunks_exact(LANES);
    let rest: f64 = chunks.remainder().iter().map(|v| f64::from(*v) * f64::from(*v)).sum();
    for chunk in chunks {
        for (lane, v) in lanes.iter_mut().zip(chunk) {
            *lane += f64::from(*v) * f64::from(*v);
        }
    }
    lanes.into_iter().sum::<f64>() + rest
}

/// Whether the kernels of this file work on `x` in place.
pub fn in_place(x: &Tensor) -> bool {
    x.device().is_cpu() && x.dtype() == DType::F32 && x.is_contiguous()
}

/// Whether the GPU's kernels work on `x` in place.
#[cfg(feature = "cuda")]
fn on_gpu(x: &Tensor) -> bool {
    x.device().is_cuda() && x.dtype() == DType::F32 && x.is_contiguous()
}

fn slice_mut<'a>(storage: &'a mut CpuStorage, layout: &Layout) -> Result<&'a mut [f32]> {
    match (storage, layout.contiguous_offsets()) {
        (CpuStorage::F32(values), Some((from, to))) => match values.get_mut(from..to) {
            Some(values) => Ok(values),
            None => bail!("a layout beyond its storage"),
        },
        _ => bail!("expected a contiguous f32 tensor on the CPU"),
    }
}

/// Calls its function once, with the values of the tensor it is applied to.
struct Write<F>(Cell<Option<F>>);

impl<F: FnOnce(&mut [f32]) -> Result<()>> InplaceOp1 for Write<F> {
    fn name(&self) -> &'static str {
        "write"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        match self.0.take() {
            Some(f) => f(slice_mut(storage, layout)?),
            None => bail!("write: applied twice"),
        }
    }
}

fn with_slice_mut(x: &Tensor, f: impl FnOnce(&mut [f32]) -> Result<()>) -> Result<()> {
    x.inplace_op1(&Write(Cell::new(Some(f))))
}

struct Update<'a> {
    m: &'a Var,
    v: &'a Var,
    hyper: &'a Hyper,
    step: u64,
}

impl InplaceOp2 for Update<'_> {
    fn name(&self) -> &'static str {
        "adamw"
    }

    fn cpu_fwd(
        &self,
        p: &mut CpuStorage,
        p_layout: &Layout,
        g: &CpuStorage,
        g_layout: &Layout,
    ) -> Result<()> {
        let (p, g) = (slice_mut(p, p_layout)?, slice(g, g_layout)?);
        with_slice_mut(self.m, |m| {
            with_slice_mut(self.v, |v| update(p, g, m, v, self.hyper, self.step))
        })
    }
}

struct Accumulate(f32);

impl InplaceOp2 for Accumulate {
    fn name(&self) -> &'static str {
        "accumulate"
    }

    fn cpu_fwd(
        &self,
        into: &mut CpuStorage,
        into_layout: &Layout,
        g: &CpuStorage,
        g_layout: &Layout,
    ) -> Result<()> {
        accumulate(slice_mut(into, into_layout)?, slice(g, g_layout)?, self.0)
    }
}

/// [`update`] on tensors of one shape. `m` and `v` are f32 and share no storage
/// with anything else.
pub fn update_var(p: &Var, g: &Tensor, m: &Var, v: &Var, hyper: &Hyper, step: u64) -> Result<()> {
    for other in [g, m.as_tensor(), v.as_tensor()] {
        if other.shape() != p.shape() {
            bail!("adamw: expected {:?}, got {:?}", p.shape(), other.shape())
        }
    }
    let g = g.detach().contiguous()?;
    if [p.as_tensor(), &g, m.as_tensor(), v.as_tensor()].into_iter().all(in_place) {
        return p.inplace_op2(&g, &Update { m, v, hyper, step });
    }
    #[cfg(feature = "cuda")]
    if [p.as_tensor(), &g, m.as_tensor(), v.as_tensor()].into_iter().all(on_gpu) {
        return super::cuda::update(p, &g, m, v, &Scalars::new(hyper, step)?);
    }
    update_composed(p, &g, m, v, hyper, step)
}

/// What [`update_var`] computes, to the bit, out of candle's operations: on
/// every device, and for parameters of other dtypes.
pub fn update_composed(
    p: &Var,
    g: &Tensor,
    m: &Var,
    v: &Var,
    hyper: &Hyper,
    step: u64,
) -> Result<()> {
    let s = Scalars::new(hyper, step)?;
    let times = |x: &Tensor, y: f32| x.affine(f64::from(y), 0.0);
    let g = times(&g.detach().to_dtype(DType::F32)?, s.scale)?;
    let (first, second) = (m.as_detached_tensor(), v.as_detached_tensor());
    let first = if s.leaves_from_moment() {
        (&first + times(&(&g - &first)?, s.rest1)?)?
    } else {
        (&g - times(&(&g - &first)?, 1.0 - s.rest1)?)?
    };
    let second = (times(&second, s.beta2)? + (times(&g, s.rest2)? * &g)?)?;
    // A division by a number would be a multiplication by its reciprocal.
    let root = Tensor::new(s.root, g.device())?;
    let denominator = second.sqrt()?.broadcast_div(&root)?.affine(1.0, f64::from(s.eps))?;
    let kept = times(&p.as_detached_tensor().to_dtype(DType::F32)?, s.keep)?;
    let updated = (kept + (times(&first, s.step_size)? / denominator)?)?;
    m.set(&first)?;
    v.set(&second)?;
    p.set(&updated.to_dtype(p.dtype())?)
}

/// `scale` · `gradient` in f32, detached, in the gradient's own memory where
/// that is possible: nothing else may read it any more.
pub fn take_scaled(gradient: Tensor, scale: f64) -> Result<Tensor> {
    let gradient = gradient.detach();
    if !in_place(&gradient) {
        let copy = gradient.to_dtype(DType::F32)?.force_contiguous()?;
        return if in_place(&copy) { take_scaled(copy, scale) } else { copy.affine(scale, 0.0) };
    }
    let whole = match &*gradient.storage_and_layout().0 {
        Storage::Cpu(CpuStorage::F32(values)) => values.len() == gradient.elem_count(),
        _ => false,
    };
    // A part of something larger would keep all of it in memory.
    let own = if whole { gradient } else { gradient.force_contiguous()? };
    if scale != 1.0 {
        with_slice_mut(&own, |values| {
            multiply(values, scale as f32);
            Ok(())
        })?;
    }
    Ok(own)
}

/// `sum` + `scale` · `gradient`, in the memory of `sum` where that is possible.
pub fn add_scaled(sum: Tensor, gradient: &Tensor, scale: f64) -> Result<Tensor> {
    let gradient = gradient.detach().to_dtype(DType::F32)?.contiguous()?;
    if in_place(&sum) && in_place(&gradient) {
        sum.inplace_op2(&gradient, &Accumulate(scale as f32))?;
        return Ok(sum);
    }
    #[cfg(feature = "cuda")]
    if on_gpu(&sum) && on_gpu(&gradient) {
        super::cuda::add_scaled(&sum, &gradient, scale as f32)?;
        return Ok(sum);
    }
    sum + gradient.affine(scale, 0.0)?
}

/// [`squared_norm`] of a tensor; its summation order is fixed on the CPU only.
pub fn squared_norm_of(x: &Tensor) -> Result<f64> {
    let x = x.detach();
    if x.device().is_cpu() && x.dtype() == DType::F32 {
        let x = x.contiguous()?;
        return Ok(squared_norm(&View::of(&x)?));
    }
    #[cfg(feature = "cuda")]
    if on_gpu(&x.contiguous()?) {
        return super::cuda::squared_norm(&x.contiguous()?);
    }
    x.to_dtype(DType::F64)?.sqr()?.sum_all()?.to_scalar()
}
