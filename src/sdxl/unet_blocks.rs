//! The U-Net's down, middle and up levels. Their forward passes take what depends on time and
//! text alone from [`Conditions`], in the order in which [`DownLevel::blocks`] and its like
//! list the blocks.

use candle_core::Tensor;

use super::resnet::ResnetBlock;
use super::transformer::{KeyValue, Transformer2D, TransformerShape};
use super::weights::Scope;
use crate::nn::{Conv2d, Recompute, checkpoint};
use crate::{Error, Result};

/// A residual block and the transformer after it.
pub type BlockRef<'a> = (&'a ResnetBlock, Option<&'a Transformer2D>);

/// What the blocks still to come take from time and text.
pub struct Conditions<'a> {
    /// The residual blocks' shifts, [B, C] each.
    pub shifts: std::slice::Iter<'a, Tensor>,
    /// The cross-attentions' keys and values.
    pub text: std::slice::Iter<'a, KeyValue>,
    pub recompute: Recompute,
}

impl<'a> Conditions<'a> {
    fn shift(&mut self) -> Result<&'a Tensor> {
        self.shifts.next().ok_or_else(|| Error::Weights("U-Net: a time shift is missing".into()))
    }

    /// The residual block of `x`, or of `x` and `skip` side by side.
    fn resnet(&mut self, block: &ResnetBlock, x: &Tensor, skip: Option<&Tensor>) -> Result<Tensor> {
        let shift = self.shift()?;
        if self.recompute == Recompute::Off {
            return resnet(block, shift, x, skip);
        }
        let block = block.clone();
        // Nobody keeps the two side by side.
        let inputs: Vec<&Tensor> = [shift, x].into_iter().chain(skip).collect();
        checkpoint(&inputs, move |x| resnet(&block, &x[0], &x[1], x.get(2)))
    }

    fn transformer(&mut self, transformer: &Transformer2D, x: &Tensor) -> Result<Tensor> {
        transformer.forward(x, &mut self.text, self.recompute)
    }
}

fn resnet(
    block: &ResnetBlock,
    shift: &Tensor,
    x: &Tensor,
    skip: Option<&Tensor>,
) -> Result<Tensor> {
    match skip {
        None => block.forward(x, Some(shift)),
        Some(skip) => block.forward(&Tensor::cat(&[x, skip], 3)?, Some(shift)),
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

    fn block(&self) -> BlockRef<'_> {
        (&self.resnet, self.attention.as_ref())
    }

    fn forward(
        &self,
        x: &Tensor,
        skip: Option<&Tensor>,
        conditions: &mut Conditions,
    ) -> Result<Tensor> {
        let x = conditions.resnet(&self.resnet, x, skip)?;
        match &self.attention {
            Some(attention) => conditions.transformer(attention, &x),
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

    pub fn blocks(&self) -> impl Iterator<Item = BlockRef<'_>> {
        self.layers.iter().map(Layer::block)
    }

    /// Pushes every intermediate state onto `skips`.
    pub fn forward(
        &self,
        x: &Tensor,
        conditions: &mut Conditions,
        skips: &mut Vec<Tensor>,
    ) -> Result<Tensor> {
        let mut x = x.clone();
        for layer in &self.layers {
            x = layer.forward(&x, None, conditions)?;
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

    pub fn blocks(&self) -> [BlockRef<'_>; 2] {
        [(&self.resnets[0], Some(&self.transformer)), (&self.resnets[1], None)]
    }

    pub fn forward(&self, x: &Tensor, conditions: &mut Conditions) -> Result<Tensor> {
        let x = conditions.resnet(&self.resnets[0], x, None)?;
        let x = conditions.transformer(&self.transformer, &x)?;
        conditions.resnet(&self.resnets[1], &x, None)
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

    pub fn blocks(&self) -> impl Iterator<Item = BlockRef<'_>> {
        self.layers.iter().map(Layer::block)
    }

    /// Pops its states off `skips`; grows to the size of the next one, so that
    /// odd sizes come back as they went in.
    pub fn forward(
        &self,
        x: &Tensor,
        conditions: &mut Conditions,
        skips: &mut Vec<Tensor>,
    ) -> Result<Tensor> {
        let mut x = x.clone();
        for layer in &self.layers {
            let Some(skip) = skips.pop() else {
                return Err(Error::Weights("U-Net: more up layers than down states".into()));
            };
            x = layer.forward(&x, Some(&skip), conditions)?;
        }
        if let Some(conv) = &self.upsample {
            let (_, h, w, _) = x.dims4()?;
            let size = match skips.last() {
                Some(next) => (next.dim(1)?, next.dim(2)?),
                None => (2 * h, 2 * w),
            };
            x = conv.forward_enlarged(&x, size)?;
        }
        Ok(x)
    }
}
