//! `UNet2DConditionModel` as SDXL uses it (arXiv 2307.01952): per-sample
//! timesteps, text context, pooled text and size conditioning.

use candle_core::{DType, Device, Tensor};

use super::config::UNetConfig;
use super::layout::{to_pixels, to_planes};
use super::transformer::{KeyValue, TransformerShape};
use super::unet_blocks::{BlockRef, BlockShape, Conditions, DownLevel, MidLevel, UpLevel};
use super::weights::Scope;
use crate::nn::embedding::sinusoidal;
use crate::nn::{Activation, Conv2d, GroupNorm, Linear, Recompute};
use crate::{Error, Result};

#[derive(Clone, Debug)]
struct TwoLayers {
    first: Linear,
    second: Linear,
}

impl TwoLayers {
    fn load(scope: &Scope, input: usize, width: usize) -> Result<Self> {
        Ok(Self {
            first: scope.at("linear_1").linear(input, width)?,
            second: scope.at("linear_2").linear(width, width)?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(self.second.forward(&Activation::Silu.forward(&self.first.forward(x)?)?)?)
    }
}

/// What a U-Net makes of texts and sizes, before it sees a latent or a timestep.
#[derive(Clone, Debug)]
pub struct TextStates {
    /// Every cross-attention's keys and values, [B, T, width].
    sources: Vec<KeyValue>,
    /// The added embedding, [B, time width].
    added: Option<Tensor>,
}

impl TextStates {
    /// Several batches as one.
    ///
    /// # Errors
    /// When they are of different U-Nets or lengths, or there is none.
    pub fn cat(parts: &[&Self]) -> Result<Self> {
        let Some(first) = parts.first() else {
            return Err(Error::invalid("text states", "expected at least one"));
        };
        let join = |of: &dyn Fn(&Self) -> Option<Tensor>| -> Result<Option<Tensor>> {
            let all: Vec<Tensor> = parts.iter().filter_map(|p| of(p)).collect();
            Ok(if all.is_empty() { None } else { Some(Tensor::cat(&all, 0)?) })
        };
        let source = |i: usize| -> Result<KeyValue> {
            let k = join(&|p| p.sources.get(i).map(|s| s.0.clone()))?;
            let v = join(&|p| p.sources.get(i).map(|s| s.1.clone()))?;
            k.zip(v).ok_or_else(|| Error::invalid("text states", "of different U-Nets"))
        };
        let sources = (0..first.sources.len()).map(source).collect::<Result<_>>()?;
        let added = join(&|p| p.added.clone())?;
        Ok(Self { sources, added })
    }

    pub fn device(&self) -> &Device {
        self.sources.first().map_or(&Device::Cpu, |(k, _)| k.device())
    }

    /// Bytes of the values.
    pub fn bytes(&self) -> usize {
        let size = |t: &Tensor| t.elem_count() * t.dtype().size_in_bytes();
        let sources = self.sources.iter().map(|(k, v)| size(k) + size(v));
        sources.sum::<usize>() + self.added.as_ref().map_or(0, size)
    }
}

#[derive(Clone, Debug)]
pub struct UNet {
    config: UNetConfig,
    computed: DType,
    conv_in: Conv2d,
    time: TwoLayers,
    addition: Option<TwoLayers>,
    down: Vec<DownLevel>,
    mid: Option<MidLevel>,
    up: Vec<UpLevel>,
    norm_out: GroupNorm,
    conv_out: Conv2d,
    recompute: Recompute,
}

impl UNet {
    pub fn load(scope: &Scope, config: &UNetConfig) -> Result<Self> {
        config.check()?;
        let channels = &config.block_out_channels;
        let levels = channels.len();
        let first = channels[0];
        let shape = BlockShape {
            time: 4 * first,
            groups: config.norm_num_groups,
            eps: config.norm_eps,
            downsample_padding: config.downsample_padding,
        };
        let attention = |level: usize| TransformerShape {
            depth: config.transformer_layers_per_block.at(level).unwrap_or(1),
            heads: config.heads(level),
            context: config.cross_attention_dim,
            groups: config.norm_num_groups,
            linear_projection: config.use_linear_projection,
        };
        let layers = |level: usize| config.layers_per_block.at(level).unwrap_or(2);
        let addition = match config.projection_class_embeddings_input_dim {
            Some(width) if config.addition_embed_type.is_some() => {
                Some(TwoLayers::load(&scope.at("add_embedding"), width, shape.time)?)
            }
            _ => None,
        };
        // The channels of every state that the way down leaves for the way up.
        let mut states = vec![first];
        let mut down = Vec::with_capacity(levels);
        for level in 0..levels {
            let crossed = config.down_block_types[level] == "CrossAttnDownBlock2D";
            let (from, to) = (channels[level.saturating_sub(1)], channels[level]);
            let last = level + 1 == levels;
            states.extend(std::iter::repeat_n(to, layers(level) + usize::from(!last)));
            down.push(DownLevel::load(
                &scope.at(format!("down_blocks.{level}")),
                layers(level),
                (from, to),
                shape,
                crossed.then(|| attention(level)),
                last,
            )?);
        }
        let widest = channels[levels - 1];
        let mid = match config.mid_block_type {
            Some(_) => {
                Some(MidLevel::load(&scope.at("mid_block"), widest, shape, attention(levels - 1))?)
            }
            None => None,
        };
        let mut up = Vec::with_capacity(levels);
        let mut from = widest;
        for i in 0..levels {
            let level = levels - 1 - i;
            let crossed = config.up_block_types[i] == "CrossAttnUpBlock2D";
            let taken = states.split_off(states.len() - (layers(level) + 1));
            let skips: Vec<usize> = taken.into_iter().rev().collect();
            up.push(UpLevel::load(
                &scope.at(format!("up_blocks.{i}")),
                &skips,
                (from, channels[level]),
                shape,
                crossed.then(|| attention(level)),
                level == 0,
            )?);
            from = channels[level];
        }
        Ok(Self {
            config: config.clone(),
            computed: scope.computed(),
            conv_in: scope.at("conv_in").conv(config.in_channels, first, 3, 1, 1)?,
            time: TwoLayers::load(&scope.at("time_embedding"), first, shape.time)?,
            addition,
            down,
            mid,
            up,
            norm_out: scope.at("conv_norm_out").group_norm(
                config.norm_num_groups,
                first,
                config.norm_eps,
            )?,
            conv_out: scope.at("conv_out").conv(first, config.out_channels, 3, 1, 1)?,
            recompute: Recompute::Off,
        })
    }

    /// The same network, sharing its weights, with or without gradient checkpoints: segments are
    /// the residual blocks and the transformers' blocks. Of use in training alone; predictions
    /// have the same bits, and [`checkpoint`](crate::nn::checkpoint()) says how gradients are
    /// then taken.
    pub fn with_recompute(self, recompute: Recompute) -> Self {
        Self { recompute, ..self }
    }

    pub fn config(&self) -> &UNetConfig {
        &self.config
    }

    /// Residual blocks and transformers in the order of the forward pass.
    fn blocks(&self) -> impl Iterator<Item = BlockRef<'_>> {
        let down = self.down.iter().flat_map(DownLevel::blocks);
        let mid = self.mid.iter().flat_map(MidLevel::blocks);
        down.chain(mid).chain(self.up.iter().flat_map(UpLevel::blocks))
    }

    /// What depends on text and size alone. `context` [B, T, D]; `pooled` [B, P] and
    /// `time_ids` [B, 6] f32 (original height and width, crop top and left, target height and
    /// width) feed the added embedding. Rows do not influence each other.
    ///
    /// # Errors
    /// When a shape does not fit the configuration.
    pub fn encode_text(
        &self,
        context: &Tensor,
        pooled: &Tensor,
        time_ids: &Tensor,
    ) -> Result<TextStates> {
        let (batch, dtype) = (context.dim(0)?, self.computed);
        let context = &context.to_dtype(dtype)?;
        self.check("context width", context.dim(2)?, self.config.cross_attention_dim)?;
        let mut added = None;
        if let (Some(addition), Some(dim)) = (&self.addition, self.config.addition_time_embed_dim) {
            let (flip, shift) = (self.config.flip_sin_to_cos, self.config.freq_shift);
            let sizes = sinusoidal(&time_ids.flatten_all()?, dim, flip, shift)?;
            let sizes = sizes.reshape((batch, ()))?.to_dtype(dtype)?;
            let joined = Tensor::cat(&[&pooled.to_dtype(dtype)?, &sizes], 1)?;
            let expected = self.config.projection_class_embeddings_input_dim.unwrap_or(0);
            self.check("pooled text and time_ids width", joined.dim(1)?, expected)?;
            added = Some(addition.forward(&joined)?);
        }
        let transformers = self.blocks().filter_map(|(_, transformer)| transformer);
        let sources = transformers.flat_map(|t| t.sources(context)).collect::<Result<_>>()?;
        Ok(TextStates { sources, added })
    }

    /// The residual blocks' shifts, [B, C] each, at `timesteps` [B] f32.
    ///
    /// # Errors
    /// When the batches differ.
    pub fn encode_time(&self, timesteps: &Tensor, text: &TextStates) -> Result<Vec<Tensor>> {
        let (flip, shift) = (self.config.flip_sin_to_cos, self.config.freq_shift);
        let angles = sinusoidal(timesteps, self.config.block_out_channels[0], flip, shift)?;
        let mut time = self.time.forward(&angles.to_dtype(self.computed)?)?;
        if let Some(added) = &text.added {
            self.check("timesteps", timesteps.elem_count(), added.dim(0)?)?;
            time = (time + added)?;
        }
        let time = Activation::Silu.forward(&time)?;
        let projections = self.blocks().filter_map(|(resnet, _)| resnet.time_projection());
        Ok(projections.map(|p| p.forward(&time)).collect::<candle_core::Result<_>>()?)
    }

    /// Noise (or v) prediction of `x` [B, C, h, w], in the type that the network computes in;
    /// the other arguments as for
    /// [`UNet::encode_text`] and [`UNet::encode_time`].
    ///
    /// # Errors
    /// When a shape does not fit the configuration.
    pub fn forward(
        &self,
        x: &Tensor,
        timesteps: &Tensor,
        context: &Tensor,
        pooled: &Tensor,
        time_ids: &Tensor,
    ) -> Result<Tensor> {
        self.check("timesteps", timesteps.elem_count(), x.dim(0)?)?;
        let text = self.encode_text(context, pooled, time_ids)?;
        self.forward_encoded(x, &text, &self.encode_time(timesteps, &text)?)
    }

    /// The prediction from what [`UNet::encode_text`] and [`UNet::encode_time`] gave: the same
    /// bits as [`UNet::forward`].
    ///
    /// # Errors
    /// When a shape does not fit the configuration.
    pub fn forward_encoded(
        &self,
        x: &Tensor,
        text: &TextStates,
        shifts: &[Tensor],
    ) -> Result<Tensor> {
        let (batch, channels, _, _) = x.dims4()?;
        self.check("latents channels", channels, self.config.in_channels)?;
        if let Some((k, _)) = text.sources.first() {
            self.check("context batch", k.dim(0)?, batch)?;
        }
        let mut conditions = Conditions {
            shifts: shifts.iter(),
            text: text.sources.iter(),
            recompute: self.recompute,
        };
        let mut h = self.conv_in.forward(&to_pixels(&x.to_dtype(self.computed)?)?)?;
        let mut skips = vec![h.clone()];
        for level in &self.down {
            h = level.forward(&h, &mut conditions, &mut skips)?;
        }
        if let Some(mid) = &self.mid {
            h = mid.forward(&h, &mut conditions)?;
        }
        for level in &self.up {
            h = level.forward(&h, &mut conditions, &mut skips)?;
        }
        to_planes(&self.conv_out.forward(&self.norm_out.forward_silu(&h)?)?)
    }

    fn check(&self, what: &str, got: usize, expected: usize) -> Result<()> {
        if got == expected {
            return Ok(());
        }
        Err(Error::invalid(what, format!("the U-Net expects {expected}, got {got}")))
    }
}
