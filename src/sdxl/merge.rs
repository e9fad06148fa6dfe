//! Adapters added into a checkpoint's weights.

use std::path::PathBuf;

use candle_core::{DType, Device, Tensor};

use super::config::UNetConfig;
use super::lora::{Adapters, misfits};
use super::lora_names::{AdapterNames, Network};
use super::weights::{Weights, place};
use crate::nn::LowRank;
use crate::{Error, Result};

/// An adapter file, and how much of it is added.
#[derive(Clone, Debug, PartialEq)]
pub struct Addition {
    pub file: PathBuf,
    /// What its updates are multiplied by; 1 is as it was trained.
    pub scale: f64,
}

impl std::str::FromStr for Addition {
    type Err = Error;

    /// `FILE` or `FILE:SCALE`.
    fn from_str(text: &str) -> Result<Self> {
        let scaled = text.rsplit_once(':').and_then(|(file, s)| Some((file, s.parse().ok()?)));
        let (file, scale): (&str, f64) = scaled.unwrap_or((text, 1.0));
        if file.is_empty() || !scale.is_finite() {
            let message = format!("expected FILE or FILE:SCALE with a finite number, got '{text}'");
            return Err(Error::invalid("adapter", message));
        }
        Ok(Self { file: file.into(), scale })
    }
}

/// Adds adapters into the weights of the U-Net and the two towers: W + scale · alpha/rank · up ·
/// down, all of them in f32 (f64 for weights in f64), rounded once to the weight's own type.
pub(super) fn merge(
    weights: [&mut Weights; 3],
    config: &UNetConfig,
    additions: &[Addition],
    device: &Device,
) -> Result<()> {
    let names = AdapterNames::new(config, weights.each_ref().map(|w| w.modules()));
    let read = |a: &Addition| Adapters::read(&a.file, &names, DType::F32, device);
    let all: Vec<Adapters> = additions.iter().map(read).collect::<Result<_>>()?;
    for (network, weights) in Network::ALL.into_iter().zip(weights) {
        for module in weights.modules() {
            let of = |adapters| Adapters::network(adapters, network).get(&module);
            let here: Vec<(&Addition, &LowRank)> =
                additions.iter().zip(&all).filter_map(|(a, all)| Some((a, of(all)?))).collect();
            if here.is_empty() {
                continue;
            }
            weights.change(&format!("{module}.weight"), |weight| {
                let wide = if weight.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
                let mut sum = weight.to_dtype(wide)?;
                for (addition, adapter) in &here {
                    if let [misfit, ..] = &misfits(adapter, weight.dims())[..] {
                        let network = network.component();
                        let message = format!("adapter of {network}, {module}: {misfit}");
                        return Err(Error::file(&addition.file, message));
                    }
                    sum = (sum + update(adapter, weight.dims(), addition.scale, wide)?)?;
                }
                Ok(place(sum, weight.dtype())?)
            })?;
        }
    }
    Ok(())
}

/// What an adapter adds to a weight of this shape.
fn update(adapter: &LowRank, shape: &[usize], scale: f64, dtype: DType) -> Result<Tensor> {
    let rank = adapter.down.dim(0)?;
    let up = adapter.up.to_dtype(dtype)?.reshape(((), rank))?;
    let down = adapter.down.to_dtype(dtype)?.reshape((rank, ()))?;
    Ok((up.matmul(&down)? * (scale * adapter.scale))?.reshape(shape)?)
}
