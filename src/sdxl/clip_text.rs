//! CLIP text towers as SDXL uses them: the penultimate hidden states, and the
//! projected pooled output of the second tower.

use candle_core::{DType, Tensor};

use super::config::ClipTextConfig;
use super::weights::Scope;
use crate::nn::{Activation, LayerNorm, Linear, attention};
use crate::{Error, Result};

/// One pre-norm transformer layer of CLIP (text or vision).
#[derive(Clone, Debug)]
pub struct ClipLayer {
    norms: [LayerNorm; 2],
    qkv: [Linear; 3],
    out: Linear,
    fc1: Linear,
    fc2: Linear,
    heads: usize,
    activation: Activation,
}

impl ClipLayer {
    pub fn load(
        scope: &Scope,
        (width, inner): (usize, usize),
        heads: usize,
        eps: f64,
        activation: Activation,
    ) -> Result<Self> {
        let attn = |name: &str| scope.at("self_attn").at(name).linear(width, width);
        let norm = |name: &str| scope.at(name).layer_norm(width, eps);
        Ok(Self {
            norms: [norm("layer_norm1")?, norm("layer_norm2")?],
            qkv: [attn("q_proj")?, attn("k_proj")?, attn("v_proj")?],
            out: attn("out_proj")?,
            fc1: scope.at("mlp.fc1").linear(width, inner)?,
            fc2: scope.at("mlp.fc2").linear(inner, width)?,
            heads,
            activation,
        })
    }

    /// `x` [B, T, width]; `mask` [T, T] is added to the attention scores.
    pub fn forward(&self, x: &Tensor, mask: Option<&Tensor>) -> Result<Tensor> {
        let h = self.norms[0].forward(x)?;
        let [q, k, v] = [0, 1, 2].map(|i| self.qkv[i].forward(&h));
        let x = self.out.forward_onto(&attention(&q?, &k?, &v?, self.heads, mask)?, x)?;
        let h = self.activation.forward(&self.fc1.forward(&self.norms[1].forward(&x)?)?)?;
        Ok(self.fc2.forward_onto(&h, &x)?)
    }
}

/// What SDXL takes from a text tower.
#[derive(Clone, Debug)]
pub struct TextOutput {
    /// `hidden_states[-2]` [B, T, width], without the final norm.
    pub penultimate: Tensor,
    /// `text_embeds` [B, projection] (of a tower with projection), else the
    /// final-normed state at the end token [B, width].
    pub pooled: Tensor,
}

#[derive(Clone, Debug)]
pub struct ClipText {
    config: ClipTextConfig,
    tokens: Tensor,
    positions: Tensor,
    computed: DType,
    layers: Vec<ClipLayer>,
    final_norm: LayerNorm,
    projection: Option<Linear>,
}

impl ClipText {
    /// Reads names with and without the `text_model.` prefix (transformers 4 and 5).
    pub fn load(scope: &Scope, config: &ClipTextConfig) -> Result<Self> {
        let Some(activation) = Activation::from_name(&config.hidden_act) else {
            let known = ["quick_gelu", "gelu", "silu"];
            return Err(Error::unknown("hidden_act", "activation", &config.hidden_act, known));
        };
        let heads = config.num_attention_heads;
        if config.num_hidden_layers < 1 || heads < 1 || !config.hidden_size.is_multiple_of(heads) {
            let message = "expected at least one layer and a width that the heads divide";
            return Err(Error::invalid(
                "num_hidden_layers, hidden_size, num_attention_heads",
                message,
            ));
        }
        let projection = if scope.has("text_projection") {
            Some(
                scope
                    .at("text_projection")
                    .linear_no_bias(config.hidden_size, config.projection_dim)?,
            )
        } else {
            None
        };
        let inner = if scope.has("embeddings") { scope.clone() } else { scope.at("text_model") };
        let embeddings = inner.at("embeddings");
        let width = config.hidden_size;
        let layers = (0..config.num_hidden_layers)
            .map(|i| {
                let scope = inner.at(format!("encoder.layers.{i}"));
                let widths = (width, config.intermediate_size);
                ClipLayer::load(
                    &scope,
                    widths,
                    config.num_attention_heads,
                    config.layer_norm_eps,
                    activation,
                )
            })
            .collect::<Result<_>>()?;
        Ok(Self {
            config: config.clone(),
            tokens: embeddings.tensor("token_embedding.weight", &[config.vocab_size, width])?,
            positions: embeddings
                .tensor("position_embedding.weight", &[config.max_position_embeddings, width])?,
            computed: scope.computed(),
            layers,
            final_norm: inner.at("final_layer_norm").layer_norm(width, config.layer_norm_eps)?,
            projection,
        })
    }

    pub fn config(&self) -> &ClipTextConfig {
        &self.config
    }

    /// `ids`: B rows of T token ids, all of one length.
    ///
    /// # Errors
    /// When rows differ in length, are too long, or an id is not in the vocabulary.
    pub fn forward(&self, ids: &[Vec<u32>]) -> Result<TextOutput> {
        let (batch, length) = (ids.len(), ids.first().map_or(0, Vec::len));
        let limit = self.config.max_position_embeddings;
        if length == 0 || length > limit || ids.iter().any(|row| row.len() != length) {
            let message = format!("expected rows of equal length, 1 to {limit} tokens");
            return Err(Error::invalid("token ids", message));
        }
        if let Some(id) = ids.iter().flatten().find(|id| **id as usize >= self.config.vocab_size) {
            let message =
                format!("{id} is not below the vocabulary size {}", self.config.vocab_size);
            return Err(Error::invalid("token ids", message));
        }
        let device = self.tokens.device();
        let flat: Vec<u32> = ids.concat();
        let index = Tensor::from_vec(flat, batch * length, device)?;
        let embedded = self.tokens.index_select(&index, 0)?.reshape((batch, length, ()))?;
        let positions = self.positions.narrow(0, 0, length)?.to_dtype(self.computed)?;
        let mut x = embedded.to_dtype(self.computed)?.broadcast_add(&positions)?;
        let mask = causal_mask(length, x.dtype(), device)?;
        let mut penultimate = x.clone();
        for layer in &self.layers {
            penultimate = x;
            x = layer.forward(&penultimate, Some(&mask))?;
        }
        let last = self.final_norm.forward(&x)?;
        let ends: Vec<u32> =
            ids.iter().enumerate().map(|(b, row)| (b * length + self.end_of(row)) as u32).collect();
        let ends = Tensor::from_vec(ends, batch, device)?;
        let pooled = last.reshape((batch * length, ()))?.index_select(&ends, 0)?;
        let pooled = match &self.projection {
            Some(projection) => projection.forward(&pooled)?,
            None => pooled,
        };
        Ok(TextOutput { penultimate, pooled })
    }

    /// transformers' rule: configurations written before its version 4.30 say
    /// `eos_token_id` 2 and mean "the largest id"; others the first end token.
    fn end_of(&self, row: &[u32]) -> usize {
        let wanted = if self.config.eos_token_id == 2 {
            row.iter().max().copied().unwrap_or(0)
        } else {
            self.config.eos_token_id
        };
        row.iter().position(|id| *id == wanted).unwrap_or(0)
    }
}

/// [T, T]: zero where a token may look, a large negative number ahead of it.
fn causal_mask(length: usize, dtype: DType, device: &candle_core::Device) -> Result<Tensor> {
    let values: Vec<f32> = (0..length)
        .flat_map(|i| (0..length).map(move |j| if j > i { f32::NEG_INFINITY } else { 0.0 }))
        .collect();
    let dtype = if dtype == DType::F64 { dtype } else { DType::F32 };
    Ok(Tensor::from_vec(values, (length, length), device)?.to_dtype(dtype)?)
}
