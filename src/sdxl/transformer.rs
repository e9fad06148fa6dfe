//! The transformer inside the U-Net's blocks (diffusers' `Transformer2DModel`).

use candle_core::Tensor;

use super::weights::Scope;
use crate::nn::{
    Added, Conv2d, GroupNorm, LayerNorm, Linear, Recompute, attention, checkpoint, geglu,
};
use crate::{Error, Result};

/// Keys and values of an attention, [B, S, width] each.
pub type KeyValue = (Tensor, Tensor);

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

    /// Keys and values of `context` [B, S, context width].
    fn sources(&self, context: &Tensor) -> Result<KeyValue> {
        Ok((self.to_k.forward(context)?, self.to_v.forward(context)?))
    }

    /// `residual` plus the attention of `x` [B, T, width] to keys and values.
    fn forward(&self, x: &Tensor, (k, v): &KeyValue, residual: &Tensor) -> Result<Tensor> {
        let h = attention(&self.to_q.forward(x)?, k, v, self.heads, None)?;
        Ok(self.to_out.forward_onto(&h, residual)?)
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

    fn forward(&self, x: &Tensor, text: &KeyValue) -> Result<Tensor> {
        let h = self.norms[0].forward(x)?;
        let x = self.self_attention.forward(&h, &self.self_attention.sources(&h)?, x)?;
        let x = self.cross_attention.forward(&self.norms[1].forward(&x)?, text, &x)?;
        let h = geglu(&self.gate.forward(&self.norms[2].forward(&x)?)?)?;
        Ok(self.out.forward_onto(&h, &x)?)
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

    /// The keys and values of `context` [B, S, D] for every block.
    pub fn sources(&self, context: &Tensor) -> impl Iterator<Item = Result<KeyValue>> {
        self.blocks.iter().map(|block| block.cross_attention.sources(context))
    }

    /// `x` [B, H, W, C]; takes this transformer's keys and values off `text`.
    pub fn forward(
        &self,
        x: &Tensor,
        text: &mut std::slice::Iter<KeyValue>,
        recompute: Recompute,
    ) -> Result<Tensor> {
        let h = self.norm.forward(x)?;
        let h = match &self.projection {
            Projection::Linear(input, _) => input.forward(&h)?,
            Projection::Conv(input, _) => input.forward(&h)?,
        };
        let mut tokens = h.flatten(1, 2)?;
        for block in &self.blocks {
            let Some(text) = text.next() else {
                return Err(Error::Weights("U-Net: keys and values are missing".into()));
            };
            tokens = match recompute {
                Recompute::Off => block.forward(&tokens, text)?,
                Recompute::Blocks => {
                    let block = block.clone();
                    checkpoint(&[&tokens, &text.0, &text.1], move |x| {
                        block.forward(&x[0], &(x[1].clone(), x[2].clone()))
                    })?
                }
            };
        }
        let h = tokens.reshape(h.shape())?;
        Ok(match &self.projection {
            Projection::Linear(_, output) => output.forward_onto(&h, x)?,
            Projection::Conv(_, output) => {
                output.forward_added(&h, Added { shift: None, residual: Some(x) })?
            }
        })
    }
}
