//! The transformer inside the U-Net's blocks (diffusers' `Transformer2DModel`).

use candle_core::{D, Tensor};

use super::weights::Scope;
use crate::Result;
use crate::nn::{Activation, Conv2d, GroupNorm, LayerNorm, Linear, attention};

/// Self- or cross-attention with separate projections.
#[derive(Clone, Debug)]
pub struct Attention {
    to_q: Linear,
    to_k: Linear,
    to_v: Linear,
    to_out: Linear,
    heads: usize,
}

impl Attention {
    pub fn load(scope: &Scope, width: usize, context: usize, heads: usize) -> Result<Self> {
        Ok(Self {
            to_q: scope.at("to_q").linear_no_bias(width, width)?,
            to_k: scope.at("to_k").linear_no_bias(context, width)?,
            to_v: scope.at("to_v").linear_no_bias(context, width)?,
            to_out: scope.at("to_out.0").linear(width, width)?,
            heads,
        })
    }

    /// `x` [B, T, width], `context` [B, S, context width].
    pub fn forward(&self, x: &Tensor, context: &Tensor) -> Result<Tensor> {
        let (q, k, v) =
            (self.to_q.forward(x)?, self.to_k.forward(context)?, self.to_v.forward(context)?);
        Ok(self.to_out.forward(&attention(&q, &k, &v, self.heads, None)?)?)
    }
}

#[derive(Clone, Debug)]
struct Block {
    norms: [LayerNorm; 3],
    self_attention: Attention,
    cross_attention: Attention,
    gate: Linear,
    out: Linear,
}

impl Block {
    fn load(scope: &Scope, width: usize, context: usize, heads: usize) -> Result<Self> {
        let norm = |i: usize| scope.at(format!("norm{i}")).layer_norm(width, 1e-5);
        Ok(Self {
            norms: [norm(1)?, norm(2)?, norm(3)?],
            self_attention: Attention::load(&scope.at("attn1"), width, width, heads)?,
            cross_attention: Attention::load(&scope.at("attn2"), width, context, heads)?,
            gate: scope.at("ff.net.0.proj").linear(width, 8 * width)?,
            out: scope.at("ff.net.2").linear(4 * width, width)?,
        })
    }

    fn forward(&self, x: &Tensor, context: &Tensor) -> Result<Tensor> {
        let h = self.norms[0].forward(x)?;
        let x = (x + self.self_attention.forward(&h, &h)?)?;
        let x = (&x + self.cross_attention.forward(&self.norms[1].forward(&x)?, context)?)?;
        let h = self.gate.forward(&self.norms[2].forward(&x)?)?;
        let half = h.dim(D::Minus1)? / 2;
        let value = h.narrow(D::Minus1, 0, half)?.contiguous()?;
        let gate = h.narrow(D::Minus1, half, half)?.contiguous()?;
        let h = (value * Activation::Gelu.forward(&gate)?)?;
        Ok((x + self.out.forward(&h)?)?)
    }
}

#[derive(Clone, Debug)]
enum Projection {
    Linear(Linear, Linear),
    Conv(Conv2d, Conv2d),
}

/// Group norm, projection in, blocks over the positions, projection out, residual.
#[derive(Clone, Debug)]
pub struct Transformer2D {
    norm: GroupNorm,
    projection: Projection,
    blocks: Vec<Block>,
}

/// What the transformers of one level have in common.
#[derive(Clone, Copy, Debug)]
pub struct TransformerShape {
    pub depth: usize,
    pub heads: usize,
    pub context: usize,
    pub groups: usize,
    pub linear_projection: bool,
}

impl Transformer2D {
    pub fn load(scope: &Scope, width: usize, shape: TransformerShape) -> Result<Self> {
        let (input, output) = (scope.at("proj_in"), scope.at("proj_out"));
        let projection = if shape.linear_projection {
            Projection::Linear(input.linear(width, width)?, output.linear(width, width)?)
        } else {
            Projection::Conv(
                input.conv(width, width, 1, 1, 0)?,
                output.conv(width, width, 1, 1, 0)?,
            )
        };
        let blocks = (0..shape.depth)
            .map(|i| {
                Block::load(
                    &scope.at(format!("transformer_blocks.{i}")),
                    width,
                    shape.context,
                    shape.heads,
                )
            })
            .collect::<Result<_>>()?;
        Ok(Self {
            norm: scope.at("norm").group_norm(shape.groups, width, 1e-6)?,
            projection,
            blocks,
        })
    }

    /// `x` [B, C, H, W], `context` [B, S, D].
    pub fn forward(&self, x: &Tensor, context: &Tensor) -> Result<Tensor> {
        let (batch, width, height, breadth) = x.dims4()?;
        let to_tokens = |h: &Tensor| -> Result<Tensor> {
            Ok(h.reshape((batch, width, height * breadth))?.transpose(1, 2)?.contiguous()?)
        };
        let to_image = |h: &Tensor| -> Result<Tensor> {
            Ok(h.transpose(1, 2)?.contiguous()?.reshape((batch, width, height, breadth))?)
        };
        let h = self.norm.forward(x)?;
        let mut h = match &self.projection {
            Projection::Linear(input, _) => input.forward(&to_tokens(&h)?)?,
            Projection::Conv(input, _) => to_tokens(&input.forward(&h)?)?,
        };
        for block in &self.blocks {
            h = block.forward(&h, context)?;
        }
        let h = match &self.projection {
            Projection::Linear(_, output) => to_image(&output.forward(&h)?)?,
            Projection::Conv(_, output) => output.forward(&to_image(&h)?)?,
        };
        Ok((h + x)?)
    }
}
