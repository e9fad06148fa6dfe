//! `AutoencoderKL`: images to latents and back.

use candle_core::{DType, Tensor};

use super::config::VaeConfig;
use super::layout::{to_pixels, to_planes};
use super::resnet::ResnetBlock;
use super::vae_tiling::{Bounds, Direction};
use super::weights::Scope;
use crate::Result;
use crate::nn::conv::Padding;
use crate::nn::{Conv2d, GroupNorm, Linear, attention};

const EPS: f64 = 1e-6;

/// Single-head attention over the positions, with a residual.
#[derive(Clone, Debug)]
struct VaeAttention {
    norm: GroupNorm,
    qkv: [Linear; 3],
    out: Linear,
}

impl VaeAttention {
    /// Reads the present names and those of old checkpoints (`query`, `proj_attn`).
    fn load(scope: &Scope, channels: usize, groups: usize) -> Result<Self> {
        let old = scope.has("query");
        let names = if old {
            ["query", "key", "value", "proj_attn"]
        } else {
            ["to_q", "to_k", "to_v", "to_out.0"]
        };
        let [q, k, v, out] = names.map(|n| scope.at(n).linear(channels, channels));
        Ok(Self {
            norm: scope.at("group_norm").group_norm(groups, channels, EPS)?,
            qkv: [q?, k?, v?],
            out: out?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let tokens = x.flatten(1, 2)?;
        let h = self.norm.forward(&tokens)?;
        let [q, k, v] = [0, 1, 2].map(|i| self.qkv[i].forward(&h));
        let h = self.out.forward_onto(&attention(&q?, &k?, &v?, 1, None)?, &tokens)?;
        Ok(h.reshape(x.shape())?)
    }
}

#[derive(Clone, Debug)]
struct Mid {
    resnets: [ResnetBlock; 2],
    attention: Option<VaeAttention>,
}

impl Mid {
    fn load(scope: &Scope, channels: usize, config: &VaeConfig) -> Result<Self> {
        let groups = config.norm_num_groups;
        let resnet = |i: usize| {
            ResnetBlock::load(
                &scope.at(format!("resnets.{i}")),
                (channels, channels),
                None,
                groups,
                EPS,
            )
        };
        let attention = if config.mid_block_add_attention {
            Some(VaeAttention::load(&scope.at("attentions.0"), channels, groups)?)
        } else {
            None
        };
        Ok(Self { resnets: [resnet(0)?, resnet(1)?], attention })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut x = self.resnets[0].forward(x, None)?;
        if let Some(attention) = &self.attention {
            x = attention.forward(&x)?;
        }
        self.resnets[1].forward(&x, None)
    }
}

#[derive(Clone, Debug)]
struct Level {
    resnets: Vec<ResnetBlock>,
    resample: Option<Conv2d>,
}

#[derive(Clone, Debug)]
struct Encoder {
    conv_in: Conv2d,
    levels: Vec<Level>,
    mid: Mid,
    norm_out: GroupNorm,
    conv_out: Conv2d,
    quant: Option<Conv2d>,
}

impl Encoder {
    fn load(root: &Scope, config: &VaeConfig) -> Result<Self> {
        let scope = root.at("encoder");
        let (channels, groups) = (&config.block_out_channels, config.norm_num_groups);
        let widest = channels[channels.len() - 1];
        let levels = (0..channels.len())
            .map(|level| {
                let scope = scope.at(format!("down_blocks.{level}"));
                let (from, to) = (channels[level.saturating_sub(1)], channels[level]);
                let resample = if level + 1 == channels.len() {
                    None
                } else {
                    // diffusers pads only the right and the bottom here.
                    let padding = Padding { before: 0, after: 1 };
                    Some(scope.at("downsamplers.0.conv").conv(to, to, 3, 2, padding)?)
                };
                Ok(Level {
                    resnets: resnets(&scope, config.layers_per_block, (from, to), groups)?,
                    resample,
                })
            })
            .collect::<Result<_>>()?;
        let moments = 2 * config.latent_channels;
        Ok(Self {
            conv_in: scope.at("conv_in").conv(config.in_channels, channels[0], 3, 1, 1)?,
            levels,
            mid: Mid::load(&scope.at("mid_block"), widest, config)?,
            norm_out: scope.at("conv_norm_out").group_norm(groups, widest, EPS)?,
            conv_out: scope.at("conv_out").conv(widest, moments, 3, 1, 1)?,
            quant: if config.use_quant_conv {
                Some(root.at("quant_conv").conv(moments, moments, 1, 1, 0)?)
            } else {
                None
            },
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut h = self.conv_in.forward(x)?;
        for level in &self.levels {
            for resnet in &level.resnets {
                h = resnet.forward(&h, None)?;
            }
            if let Some(conv) = &level.resample {
                h = conv.forward(&h)?;
            }
        }
        h = self.conv_out.forward(&self.norm_out.forward_silu(&self.mid.forward(&h)?)?)?;
        match &self.quant {
            Some(conv) => Ok(conv.forward(&h)?),
            None => Ok(h),
        }
    }
}

#[derive(Clone, Debug)]
struct Decoder {
    post_quant: Option<Conv2d>,
    conv_in: Conv2d,
    mid: Mid,
    levels: Vec<Level>,
    norm_out: GroupNorm,
    conv_out: Conv2d,
}

impl Decoder {
    fn load(root: &Scope, config: &VaeConfig) -> Result<Self> {
        let scope = root.at("decoder");
        let (channels, groups, latent) =
            (&config.block_out_channels, config.norm_num_groups, config.latent_channels);
        let count = channels.len();
        let widest = channels[count - 1];
        let levels = (0..count)
            .map(|i| {
                let scope = scope.at(format!("up_blocks.{i}"));
                let (from, to) = (channels[(count - i).min(count - 1)], channels[count - 1 - i]);
                let resample = if i + 1 == count {
                    None
                } else {
                    Some(scope.at("upsamplers.0.conv").conv(to, to, 3, 1, 1)?)
                };
                Ok(Level {
                    resnets: resnets(&scope, config.layers_per_block + 1, (from, to), groups)?,
                    resample,
                })
            })
            .collect::<Result<_>>()?;
        Ok(Self {
            post_quant: if config.use_post_quant_conv {
                Some(root.at("post_quant_conv").conv(latent, latent, 1, 1, 0)?)
            } else {
                None
            },
            conv_in: scope.at("conv_in").conv(latent, widest, 3, 1, 1)?,
            mid: Mid::load(&scope.at("mid_block"), widest, config)?,
            levels,
            norm_out: scope.at("conv_norm_out").group_norm(groups, channels[0], EPS)?,
            conv_out: scope.at("conv_out").conv(channels[0], config.out_channels, 3, 1, 1)?,
        })
    }

    fn forward(&self, z: &Tensor) -> Result<Tensor> {
        let h = match &self.post_quant {
            Some(conv) => conv.forward(z)?,
            None => z.clone(),
        };
        let mut h = self.mid.forward(&self.conv_in.forward(&h)?)?;
        for level in &self.levels {
            for resnet in &level.resnets {
                h = resnet.forward(&h, None)?;
            }
            if let Some(conv) = &level.resample {
                let (_, height, width, _) = h.dims4()?;
                h = conv.forward_enlarged(&h, (2 * height, 2 * width))?;
            }
        }
        Ok(self.conv_out.forward(&self.norm_out.forward_silu(&h)?)?)
    }
}

fn resnets(
    scope: &Scope,
    count: usize,
    (from, to): (usize, usize),
    groups: usize,
) -> Result<Vec<ResnetBlock>> {
    (0..count)
        .map(|i| {
            let channels = (if i == 0 { from } else { to }, to);
            ResnetBlock::load(&scope.at(format!("resnets.{i}")), channels, None, groups, EPS)
        })
        .collect()
}

/// The diagonal Gaussian that the encoder gives, in unscaled latent space.
#[derive(Clone, Debug)]
pub struct Posterior {
    /// [B, C, h, w]
    pub mean: Tensor,
    /// [B, C, h, w]
    pub std: Tensor,
}

impl Posterior {
    /// `mean + std · noise`, with unit `noise` [B, C, h, w] of the caller's choosing.
    pub fn sample(&self, noise: &Tensor) -> Result<Tensor> {
        Ok((&self.mean + (&self.std * noise)?)?)
    }
}

#[derive(Clone, Debug)]
pub struct Vae {
    config: VaeConfig,
    computed: DType,
    encoder: Encoder,
    decoder: Decoder,
}

impl Vae {
    pub fn load(scope: &Scope, config: &VaeConfig) -> Result<Self> {
        config.check()?;
        Ok(Self {
            config: config.clone(),
            computed: scope.computed(),
            encoder: Encoder::load(scope, config)?,
            decoder: Decoder::load(scope, config)?,
        })
    }

    pub fn config(&self) -> &VaeConfig {
        &self.config
    }

    /// The numbers in which it works.
    pub fn computed(&self) -> DType {
        self.computed
    }

    /// Images [B, 3, H, W] in [-1, 1] → posterior over unscaled latents.
    pub fn encode(&self, images: &Tensor) -> Result<Posterior> {
        self.posterior(&self.encoder.forward(&self.pixels(images)?)?)
    }

    /// [`Vae::encode`] within `bounds`: the same bits for images that are not tiled.
    pub fn encode_within(&self, images: &Tensor, bounds: &Bounds) -> Result<Posterior> {
        let (batch, _, height, width) = images.dims4()?;
        let size = self.computed.size_in_bytes();
        let plan = bounds.plan(&self.config, Direction::Encode, (height, width), size);
        let slice =
            |part: Result<Tensor>| plan.run(&self.pixels(&part?)?, &|x| self.encoder.forward(x));
        let parts = slices(images, batch, plan.images).map(slice).collect::<Result<Vec<_>>>()?;
        self.posterior(&joined(parts)?)
    }

    /// The encoder's input [B, H, W, 3].
    fn pixels(&self, images: &Tensor) -> Result<Tensor> {
        to_pixels(&images.to_dtype(self.computed)?)
    }

    /// From the encoder's output [B, h, w, 2C].
    fn posterior(&self, moments: &Tensor) -> Result<Posterior> {
        let moments = to_planes(moments)?;
        let channels = self.config.latent_channels;
        let mean = moments.narrow(1, 0, channels)?.contiguous()?;
        let log_variance =
            moments.narrow(1, channels, channels)?.contiguous()?.clamp(-30.0, 20.0)?;
        Ok(Posterior { mean, std: (log_variance * 0.5)?.exp()? })
    }

    /// From unscaled latents to the space that the U-Net works in.
    pub fn scale(&self, latents: &Tensor) -> Result<Tensor> {
        Ok(((latents - self.config.shift_factor.unwrap_or(0.0))? * self.config.scaling_factor)?)
    }

    /// A posterior over unscaled latents as one over those that the U-Net works with.
    pub fn scale_posterior(&self, posterior: &Posterior) -> Result<Posterior> {
        let mean = self.scale(&posterior.mean)?;
        Ok(Posterior { mean, std: (&posterior.std * self.config.scaling_factor)? })
    }

    /// The decoder's input [B, h, w, C].
    fn unscaled(&self, latents: &Tensor) -> Result<Tensor> {
        let z =
            ((latents / self.config.scaling_factor)? + self.config.shift_factor.unwrap_or(0.0))?;
        to_pixels(&z.to_dtype(self.computed)?)
    }

    /// Latents of the U-Net's space [B, C, h, w] → images [B, 3, H, W], nominally in [-1, 1].
    pub fn decode(&self, latents: &Tensor) -> Result<Tensor> {
        to_planes(&self.decoder.forward(&self.unscaled(latents)?)?)
    }

    /// [`Vae::decode`] within `bounds`: the same bits for images that are not tiled.
    pub fn decode_within(&self, latents: &Tensor, bounds: &Bounds) -> Result<Tensor> {
        joined(self.decode_slices(latents, bounds)?.collect::<Result<_>>()?)
    }

    /// The images of [`Vae::decode_within`], as many at a time as are decoded together.
    pub fn decode_slices(
        &self,
        latents: &Tensor,
        bounds: &Bounds,
    ) -> Result<impl Iterator<Item = Result<Tensor>>> {
        let (batch, _, height, width) = latents.dims4()?;
        let (factor, size) = (self.config.factor(), self.computed.size_in_bytes());
        let pixels = (height * factor, width * factor);
        let plan = bounds.plan(&self.config, Direction::Decode, pixels, size);
        Ok(slices(latents, batch, plan.images).map(move |part| {
            to_planes(&plan.run(&self.unscaled(&part?)?, &|z| self.decoder.forward(z))?)
        }))
    }
}

fn slices(x: &Tensor, batch: usize, images: usize) -> impl Iterator<Item = Result<Tensor>> {
    let slice = move |start| Ok(x.narrow(0, start, images.min(batch - start))?);
    (0..batch).step_by(images).map(slice)
}

fn joined(mut parts: Vec<Tensor>) -> Result<Tensor> {
    if parts.len() == 1 { Ok(parts.remove(0)) } else { Ok(Tensor::cat(&parts, 0)?) }
}
