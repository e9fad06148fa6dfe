//! Scaled dot-product attention.

use candle_core::{D, DType, Device, Result, Tensor, bail};

use super::autograd::{attach, wanted};
use super::flash::{self, Heads};
use super::kernel::{Place, Real, View, dispatch, place};

/// softmax(q kᵀ / √d + mask) v over `heads` heads, scores in f32 or better, which are never
/// stored as a whole on the CPU (FlashAttention, arXiv 2205.14135).
///
/// `q` [B, T, heads·d], `k` and `v` [B, S, heads·d], `mask` [T, S] added to the scores → [B, T, heads·d].
pub fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    heads: usize,
    mask: Option<&Tensor>,
) -> Result<Tensor> {
    let (batch, targets, width) = q.dims3()?;
    let sources = k.dim(1)?;
    if heads == 0 || !width.is_multiple_of(heads) {
        bail!("attention: {heads} heads do not divide a width of {width}");
    }
    if k.dims() != [batch, sources, width] || v.dims() != k.dims() {
        bail!("attention: q {:?}, k {:?}, v {:?}", q.dims(), k.dims(), v.dims());
    }
    if let Some(mask) = mask
        && mask.dims() != [targets, sources]
    {
        bail!("attention: mask {:?} for {targets} on {sources}", mask.dims());
    }
    let shape = Heads { batch, targets, sources, heads, size: width / heads };
    match place(q) {
        Place::Cpu => dispatch!(q.dtype(), T => run::<T>(shape, [q, k, v], mask)),
        #[cfg(feature = "cuda")]
        Place::Gpu if mask.is_none() && super::cuda::attends(&shape) => {
            super::cuda::attention(shape, [q, k, v])
        }
        _ => composed(q, k, v, heads, mask),
    }
}

fn run<T: Real>(shape: Heads, qkv: [&Tensor; 3], mask: Option<&Tensor>) -> Result<Tensor> {
    let mask = mask.map(|m| m.to_dtype(T::DTYPE)?.contiguous()).transpose()?;
    let [q, k, v] = qkv.map(Tensor::contiguous);
    let inputs = [q?, k?, v?];
    let (out, normalisers) = {
        let [q, k, v] = inputs.each_ref().map(|t| View::<T>::of(t));
        let mask = mask.as_ref().map(View::<T>::of).transpose()?;
        flash::forward(&shape, &q?, &k?, &v?, mask.as_deref())
    };
    let dims = inputs[0].shape().clone();
    if !inputs.iter().any(wanted) {
        return Tensor::from_vec(out, dims, &Device::Cpu);
    }
    let kept = inputs.clone().map(|t| t.detach());
    let wants = inputs.clone().map(|t| wanted(&t));
    let saved = Tensor::from_vec(out.clone(), dims.clone(), &Device::Cpu)?;
    attach(out, dims, &inputs.each_ref(), move |dy| {
        let [q, k, v] = kept.each_ref().map(|t| View::<T>::of(t));
        let (saved, dy) = (View::<T>::of(&saved)?, View::<T>::of(dy)?);
        let mask = mask.as_ref().map(View::<T>::of).transpose()?;
        let given = flash::Saved { out: &saved, normalisers: &normalisers, mask: mask.as_deref() };
        let gradients = flash::backward(&shape, &q?, &k?, &v?, &given, &dy);
        let all = gradients.into_iter().zip(&kept).zip(wants).filter(|(_, wanted)| *wanted);
        all.map(|((g, like), _)| Tensor::from_vec(g, like.shape(), &Device::Cpu)).collect()
    })
}

/// Score elements above which queries are processed in slices.
const SCORES_AT_ONCE: usize = 1 << 26;

/// From candle's operations, for other devices and types.
fn composed(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    heads: usize,
    mask: Option<&Tensor>,
) -> Result<Tensor> {
    let (batch, targets, width) = q.dims3()?;
    let sources = k.dim(1)?;
    let dtype = q.dtype();
    let split = |x: &Tensor| -> Result<Tensor> {
        let length = x.dim(1)?;
        let x = x.contiguous()?.reshape((batch, length, heads, width / heads))?;
        let x = x.transpose(1, 2)?.contiguous()?;
        if dtype == DType::F64 { Ok(x) } else { x.to_dtype(DType::F32) }
    };
    let scale = 1.0 / ((width / heads) as f64).sqrt();
    let (q, k, v) = ((split(q)? * scale)?, split(k)?, split(v)?);
    let kt = k.transpose(2, 3)?.contiguous()?;
    let slice = (SCORES_AT_ONCE / (batch * heads * sources).max(1)).clamp(1, targets.max(1));
    let mut parts = Vec::new();
    for start in (0..targets).step_by(slice) {
        let length = slice.min(targets - start);
        let mut scores = q.narrow(2, start, length)?.contiguous()?.matmul(&kt)?;
        if let Some(mask) = mask {
            let mask = mask.to_dtype(scores.dtype())?.narrow(0, start, length)?;
            scores = scores.broadcast_add(&mask)?;
        }
        let e = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?.detach())?.exp()?;
        parts.push(e.broadcast_div(&e.sum_keepdim(D::Minus1)?)?.matmul(&v)?);
    }
    let out = if parts.len() == 1 { parts.remove(0) } else { Tensor::cat(&parts, 2)? };
    out.to_dtype(dtype)?.transpose(1, 2)?.contiguous()?.reshape((batch, targets, width))
}
