//! Scaled dot-product attention.

use candle_core::{DType, Result, Tensor};

use super::softmax::softmax;

/// Score elements above which queries are processed in slices.
const SCORES_AT_ONCE: usize = 1 << 26;

/// softmax(q kᵀ / √d + mask) v over `heads` heads, scores in f32 or better.
///
/// `q` [B, T, heads·d], `k` and `v` [B, S, heads·d], `mask` [T, S] added to the scores → [B, T, heads·d].
pub fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    heads: usize,
    mask: Option<&Tensor>,
) -> Result<Tensor> {
    attention_in_slices(q, k, v, heads, mask, SCORES_AT_ONCE)
}

/// [`attention`] with at most about `scores` score elements alive at a time.
pub fn attention_in_slices(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    heads: usize,
    mask: Option<&Tensor>,
    scores: usize,
) -> Result<Tensor> {
    let (batch, targets, width) = q.dims3()?;
    if heads == 0 || !width.is_multiple_of(heads) {
        candle_core::bail!("attention: {heads} heads do not divide a width of {width}");
    }
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
    let slice = (scores / (batch * heads * sources).max(1)).clamp(1, targets.max(1));
    let mut parts = Vec::new();
    for start in (0..targets).step_by(slice) {
        let length = slice.min(targets - start);
        let mut scores = q.narrow(2, start, length)?.contiguous()?.matmul(&kt)?;
        if let Some(mask) = mask {
            scores = scores.broadcast_add(&mask.narrow(0, start, length)?)?;
        }
        parts.push(softmax(&scores)?.matmul(&v)?);
    }
    let out = if parts.len() == 1 { parts.remove(0) } else { Tensor::cat(&parts, 2)? };
    out.to_dtype(dtype)?.transpose(1, 2)?.contiguous()?.reshape((batch, targets, width))
}
