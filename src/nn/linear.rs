//! Fully connected layers, and the low-rank adapters that linears and convolutions carry.

use candle_core::{Result, Tensor};

/// A low-rank update (LoRA, arXiv 2106.09685): `W' = W + scale · up · down`,
/// `scale = alpha / rank`.
#[derive(Clone, Debug)]
pub struct LowRank {
    /// [rank, in], or [rank, in, kh, kw] for a convolution.
    pub down: Tensor,
    /// [out, rank], or [out, rank, 1, 1].
    pub up: Tensor,
    pub scale: f64,
}

/// `y = x Wᵀ + b`.
#[derive(Clone, Debug)]
pub struct Linear {
    /// [out, in]
    pub weight: Tensor,
    /// [out]
    pub bias: Option<Tensor>,
    pub adapter: Option<LowRank>,
}

impl Linear {
    /// [..., in] → [..., out].
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let rows = rows(x)?;
        let mut y = rows.matmul(&self.weight.t()?)?;
        if let Some(bias) = &self.bias {
            y = y.broadcast_add(bias)?;
        }
        if let Some(adapter) = &self.adapter {
            let low = rows.matmul(&adapter.down.t()?)?;
            y = (y + (low.matmul(&adapter.up.t()?)? * adapter.scale)?)?;
        }
        let mut dims = x.dims().to_vec();
        if let Some(last) = dims.last_mut() {
            *last = self.weight.dim(0)?;
        }
        y.reshape(dims)
    }
}

/// [..., n] → [rows, n], contiguous: candle's CPU product misreads a
/// transposed left operand against a broadcast right one.
fn rows(x: &Tensor) -> Result<Tensor> {
    x.contiguous()?.reshape(((), x.dim(candle_core::D::Minus1)?))
}
