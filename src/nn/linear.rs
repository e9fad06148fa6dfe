//! Fully connected layers.

use candle_core::{D, Result, Tensor};

use super::affine::Map;
use super::kernel::{Place, place};
use super::layer::{Added, LowRank, PackedWeight, Weights, apply};

/// `y = x Wᵀ + b`, optionally with a low-rank adapter.
#[derive(Clone, Debug)]
pub struct Linear {
    /// [out, in]
    weight: Tensor,
    /// [out]
    bias: Option<Tensor>,
    adapter: Option<LowRank>,
    packed: PackedWeight,
}

impl Linear {
    /// `weight` [out, in], `bias` [out].
    pub fn new(weight: Tensor, bias: Option<Tensor>, adapter: Option<LowRank>) -> Self {
        Self { weight, bias, adapter, packed: PackedWeight::default() }
    }

    /// [..., in] → [..., out].
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.forward_added(x, Added::default())
    }

    /// `forward(x) + residual`, which has the output's shape.
    pub fn forward_onto(&self, x: &Tensor, residual: &Tensor) -> Result<Tensor> {
        self.forward_added(x, Added { residual: Some(residual), shift: None })
    }

    fn forward_added(&self, x: &Tensor, added: Added) -> Result<Tensor> {
        let (outer, inner) = self.weight.dims2()?;
        let mut shape = x.dims().to_vec();
        let Some(last) = shape.last_mut().filter(|last| **last == inner) else {
            candle_core::bail!("linear: input {:?} for a weight {:?}", x.dims(), self.weight.dims())
        };
        *last = outer;
        if place(x) == Place::Other {
            return self.composed(x, &shape, added);
        }
        let map = Map::rows(x.elem_count() / inner.max(1), inner, outer);
        let weights = Weights {
            weight: &self.weight,
            bias: self.bias.as_ref(),
            adapter: self.adapter.as_ref(),
            packed: &self.packed,
        };
        apply(map, x, weights, added, shape)
    }

    fn composed(&self, x: &Tensor, shape: &[usize], added: Added) -> Result<Tensor> {
        // candle's product misreads a transposed left operand against a broadcast right one.
        let rows = x.contiguous()?.reshape(((), x.dim(D::Minus1)?))?;
        let mut y = rows.matmul(&self.weight.t()?)?;
        if let Some(bias) = &self.bias {
            y = y.broadcast_add(bias)?;
        }
        if let Some(adapter) = &self.adapter {
            let low = rows.matmul(&adapter.down.t()?)?;
            y = (y + (low.matmul(&adapter.up.t()?)? * adapter.scale)?)?;
        }
        let y = y.reshape(shape)?;
        added.residual.map_or(Ok(y.clone()), |residual| y + residual)
    }
}
