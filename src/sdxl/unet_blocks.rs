//! The U-Net's residual blocks and its down, middle and up levels.

use candle_core::Tensor;

use super::transformer::{Transformer2D, TransformerShape};
use super::weights::Scope;
use crate::Result;
use crate::nn::{Activation, Conv2d, GroupNorm, Linear, resample};

/// diffusers' `ResnetBlock2D`, with the time embedding (U-Net) or without (VAE).
#[derive(Clone, Debug)]
pub struct ResnetBlock {
    norm1: GroupNorm,
    conv1: Conv2d,
    time: Option<Linear>,
    norm2: GroupNorm,
    conv2: Conv2d,
    shortcut: Option<Conv2d>,
}

impl ResnetBlock {
    pub fn load(
        scope: &Scope,
        (input, output): (usize, usize),
        time: Option<usize>,
        groups: usize,
        eps: f64,
    ) -> Result<Self> {
        let shortcut = if input == output {
            None
        } else {
            Some(scope.at("conv_shortcut").conv(input, output, 1, 1, 0)?)
        };
        Ok(Self {
            norm1: scope.at("norm1").group_norm(groups, input, eps)?,
            conv1: scope.at("conv1").conv(input, output, 3, 1, 1)?,
            time: time.map(|t| scope.at("time_emb_proj").linear(t, output)).transpose()?,
            norm2: scope.at("norm2").group_norm(groups, output, eps)?,
            conv2: scope.at("conv2").conv(output, output, 3, 1, 1)?,
            shortcut,
        })
    }

    /// `x` [B, in, H, W]; `time` [B, T], already through its SiLU.
    pub fn forward(&self, x: &Tensor, time: Option<&Tensor>) -> Result<Tensor> {
        let mut h = self.conv1.forward(&self.norm1.forward_silu(x)?)?;
        if let (Some(projection), Some(time)) = (&self.time, time) {
            let shift = projection.forward(time)?;
            let (batch, channels) = shift.dims2()?;
            h = h.broadcast_add(&shift.reshape((batch, channels, 1, 1))?)?;
        }
        let h = self.conv2.forward(&self.norm2.forward_silu(&h)?)?;
        match &self.shortcut {
            Some(conv) => Ok((conv.forward(x)? + h)?),
            None => Ok((x + h)?),
        }
    }
}

/// What every block of one U-Net shares.
#[derive(Clone, Copy, Debug)]
pub struct BlockShape {
    pub time: usize,
    pub groups: usize,
    pub eps: f64,
    pub downsample_padding: usize,
}

#[derive(Clone, Debug)]
struct Layer {
    resnet: ResnetBlock,
    attention: Option<Transformer2D>,
}

impl Layer {
    fn load(
        scope: &Scope,
        index: usize,
        channels: (usize, usize),
        shape: BlockShape,
        attention: Option<TransformerShape>,
    ) -> Result<Self> {
        let resnet = scope.at(format!("resnets.{index}"));
        Ok(Self {
            resnet: ResnetBlock::load(
                &resnet,
                channels,
                Some(shape.time),
                shape.groups,
                shape.eps,
            )?,
            attention: attention
                .map(|a| {
                    Transformer2D::load(&scope.at(format!("attentions.{index}")), channels.1, a)
                })
                .transpose()?,
        })
    }

    fn forward(&self, x: &Tensor, time: &Tensor, context: &Tensor) -> Result<Tensor> {
        let x = self.resnet.forward(x, Some(time))?;
        match &self.attention {
            Some(attention) => attention.forward(&x, context),
            None => Ok(x),
        }
    }
}

#[derive(Clone, Debug)]
pub struct DownLevel {
    layers: Vec<Layer>,
    downsample: Option<Conv2d>,
}

impl DownLevel {
    pub fn load(
        scope: &Scope,
        layers: usize,
        (input, output): (usize, usize),
        shape: BlockShape,
        attention: Option<TransformerShape>,
        last: bool,
    ) -> Result<Self> {
        let downsample = if last {
            None
        } else {
            let padding = shape.downsample_padding;
            Some(scope.at("downsamplers.0.conv").conv(output, output, 3, 2, padding)?)
        };
        let layers = (0..layers)
            .map(|i| {
                Layer::load(
                    scope,
                    i,
                    (if i == 0 { input } else { output }, output),
                    shape,
                    attention,
                )
            })
            .collect::<Result<_>>()?;
        Ok(Self { layers, downsample })
    }

    /// Pushes every intermediate state onto `skips`.
    pub fn forward(
        &self,
        x: &Tensor,
        time: &Tensor,
        context: &Tensor,
        skips: &mut Vec<Tensor>,
    ) -> Result<Tensor> {
        let mut x = x.clone();
        for layer in &self.layers {
            x = layer.forward(&x, time, context)?;
            skips.push(x.clone());
        }
        if let Some(conv) = &self.downsample {
            x = conv.forward(&x)?;
            skips.push(x.clone());
        }
        Ok(x)
    }
}

#[derive(Clone, Debug)]
pub struct MidLevel {
    resnets: [ResnetBlock; 2],
    transformer: Transformer2D,
}

impl MidLevel {
    pub fn load(
        scope: &Scope,
        channels: usize,
        shape: BlockShape,
        attention: TransformerShape,
    ) -> Result<Self> {
        let resnet = |i: usize| {
            let scope = scope.at(format!("resnets.{i}"));
            ResnetBlock::load(
                &scope,
                (channels, channels),
                Some(shape.time),
                shape.groups,
                shape.eps,
            )
        };
        let transformer = Transformer2D::load(&scope.at("attentions.0"), channels, attention)?;
        Ok(Self { resnets: [resnet(0)?, resnet(1)?], transformer })
    }

    pub fn forward(&self, x: &Tensor, time: &Tensor, context: &Tensor) -> Result<Tensor> {
        let x = self.resnets[0].forward(x, Some(time))?;
        self.resnets[1].forward(&self.transformer.forward(&x, context)?, Some(time))
    }
}

#[derive(Clone, Debug)]
pub struct UpLevel {
    layers: Vec<Layer>,
    upsample: Option<Conv2d>,
}

impl UpLevel {
    /// `skips` are the channels of the states that each layer takes in, in the
    /// order in which it takes them.
    pub fn load(
        scope: &Scope,
        skips: &[usize],
        (input, output): (usize, usize),
        shape: BlockShape,
        attention: Option<TransformerShape>,
        last: bool,
    ) -> Result<Self> {
        let layers = skips
            .iter()
            .enumerate()
            .map(|(i, skip)| {
                let from = if i == 0 { input } else { output };
                Layer::load(scope, i, (from + skip, output), shape, attention)
            })
            .collect::<Result<_>>()?;
        let upsample = if last {
            None
        } else {
            Some(scope.at("upsamplers.0.conv").conv(output, output, 3, 1, 1)?)
        };
        Ok(Self { layers, upsample })
    }

    /// Pops its states off `skips`; grows to the size of the next one, so that
    /// odd sizes come back as they went in.
    pub fn forward(
        &self,
        x: &Tensor,
        time: &Tensor,
        context: &Tensor,
        skips: &mut Vec<Tensor>,
    ) -> Result<Tensor> {
        let mut x = x.clone();
        for layer in &self.layers {
            let Some(skip) = skips.pop() else {
                return Err(crate::Error::Weights("U-Net: more up layers than down states".into()));
            };
            x = layer.forward(&Tensor::cat(&[&x, &skip], 1)?.contiguous()?, time, context)?;
        }
        if let Some(conv) = &self.upsample {
            let (_, _, h, w) = x.dims4()?;
            let (height, width) = match skips.last() {
                Some(next) => (next.dim(2)?, next.dim(3)?),
                None => (2 * h, 2 * w),
            };
            x = conv.forward(&resample::nearest(&x, height, width)?)?;
        }
        Ok(x)
    }
}

/// SiLU of the time embedding, shared by all residual blocks.
pub fn activate_time(time: &Tensor) -> Result<Tensor> {
    Ok(Activation::Silu.forward(time)?)
}
