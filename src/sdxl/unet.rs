//! `UNet2DConditionModel` as SDXL uses it (arXiv 2307.01952): per-sample
//! timesteps, text context, pooled text and size conditioning.

use candle_core::Tensor;

use super::config::UNetConfig;
use super::transformer::TransformerShape;
use super::unet_blocks::{BlockShape, DownLevel, MidLevel, UpLevel, activate_time};
use super::weights::Scope;
use crate::nn::embedding::sinusoidal;
use crate::nn::{Activation, Conv2d, GroupNorm, Linear};
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

#[derive(Clone, Debug)]
pub struct UNet {
    config: UNetConfig,
    conv_in: Conv2d,
    time: TwoLayers,
    addition: Option<TwoLayers>,
    down: Vec<DownLevel>,
    mid: Option<MidLevel>,
    up: Vec<UpLevel>,
    norm_out: GroupNorm,
    conv_out: Conv2d,
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
        })
    }

    pub fn config(&self) -> &UNetConfig {
        &self.config
    }

    /// Noise (or v) prediction.
    ///
    /// `x` [B, C, h, w]; `timesteps` [B] f32; `context` [B, T, D]; `pooled`
    /// [B, P] and `time_ids` [B, 6] f32 (original height and width, crop top
    /// and left, target height and width) feed the added embedding.
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
        let (batch, channels, _, _) = x.dims4()?;
        self.check("latents channels", channels, self.config.in_channels)?;
        self.check("timesteps", timesteps.elem_count(), batch)?;
        self.check("context batch", context.dim(0)?, batch)?;
        self.check("context width", context.dim(2)?, self.config.cross_attention_dim)?;
        let (flip, shift) = (self.config.flip_sin_to_cos, self.config.freq_shift);
        let angles = sinusoidal(timesteps, self.config.block_out_channels[0], flip, shift)?;
        let mut time = self.time.forward(&angles.to_dtype(x.dtype())?)?;
        if let (Some(addition), Some(dim)) = (&self.addition, self.config.addition_time_embed_dim) {
            let sizes = sinusoidal(&time_ids.flatten_all()?, dim, flip, shift)?;
            let sizes = sizes.reshape((batch, ()))?.to_dtype(x.dtype())?;
            let joined = Tensor::cat(&[&pooled.to_dtype(x.dtype())?, &sizes], 1)?;
            let expected = self.config.projection_class_embeddings_input_dim.unwrap_or(0);
            self.check("pooled text and time_ids width", joined.dim(1)?, expected)?;
            time = (time + addition.forward(&joined)?)?;
        }
        let time = activate_time(&time)?;
        let mut h = self.conv_in.forward(x)?;
        let mut skips = vec![h.clone()];
        for level in &self.down {
            h = level.forward(&h, &time, context, &mut skips)?;
        }
        if let Some(mid) = &self.mid {
            h = mid.forward(&h, &time, context)?;
        }
        for level in &self.up {
            h = level.forward(&h, &time, context, &mut skips)?;
        }
        Ok(self.conv_out.forward(&self.norm_out.forward_silu(&h)?)?)
    }

    fn check(&self, what: &str, got: usize, expected: usize) -> Result<()> {
        if got == expected {
            return Ok(());
        }
        Err(Error::invalid(what, format!("the U-Net expects {expected}, got {got}")))
    }
}
