//! Low-rank adapters of a checkpoint's networks, and reading them from files.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};

use super::lora_folded::Folded;
use super::lora_names::{AdapterNames, Network, Part, other_kind};
use super::lora_peft::PeftMetadata;
use super::tensor_file::read_metadata;
use super::weights::read_safetensors;
use crate::nn::LowRank;
use crate::{Error, Result};

pub use super::lora_write::LoraFormat;

/// Adapters of a network by module name (`mid_block.attentions.0.proj_in`).
#[derive(Clone, Debug, Default)]
pub struct LoraMap(Arc<BTreeMap<String, LowRank>>);

impl LoraMap {
    pub fn new(modules: BTreeMap<String, LowRank>) -> Self {
        Self(Arc::new(modules))
    }

    pub fn get(&self, module: &str) -> Option<&LowRank> {
        self.0.get(module)
    }

    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }

    pub fn iter(&self) -> impl Iterator<Item = (&str, &LowRank)> {
        self.0.iter().map(|(name, adapter)| (name.as_str(), adapter))
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// What one adapter file holds: low-rank updates of the U-Net, of the text towers, or of all.
#[derive(Clone, Debug, Default)]
pub struct Adapters {
    pub unet: LoraMap,
    /// Of `text_encoder` and `text_encoder_2`.
    pub text: [LoraMap; 2],
}

impl From<LoraMap> for Adapters {
    /// An adapter of the U-Net alone.
    fn from(unet: LoraMap) -> Self {
        Self { unet, text: Default::default() }
    }
}

#[derive(Default)]
struct Parts {
    down: Option<Tensor>,
    up: Option<Tensor>,
    alpha: Option<f64>,
}

impl Adapters {
    pub fn network(&self, network: Network) -> &LoraMap {
        match network {
            Network::UNet => &self.unet,
            Network::Text1 => &self.text[0],
            Network::Text2 => &self.text[1],
        }
    }

    /// Both adapters' matrices mixed, `weight` of the other: (1 - weight) a + weight b. Down and up
    /// matrices are mixed each, which is a mean of updates for checkpoints of one run alone.
    ///
    /// # Errors
    /// `Error::Weights` naming the first module that they do not share in shape and scale.
    pub fn toward(&self, other: &Self, weight: f64) -> Result<Self> {
        let mix = |a: &Tensor, b: &Tensor| -> Result<Tensor> {
            Ok((a.affine(1.0 - weight, 0.0)? + b.affine(weight, 0.0)?)?)
        };
        let maps = Network::ALL.map(|network| {
            let (ours, theirs) = (self.network(network), other.network(network));
            if let Some(name) = theirs.names().find(|name| ours.get(name).is_none()) {
                return Err(Error::Weights(format!("'{name}' is adapted in one file only")));
            }
            let mixed = ours.iter().map(|(name, a)| {
                let b = theirs.get(name).filter(|b| {
                    (b.down.dims(), b.up.dims()) == (a.down.dims(), a.up.dims())
                        && b.scale == a.scale
                });
                let b = b.ok_or_else(|| {
                    Error::Weights(format!("'{name}' is adapted otherwise in another file"))
                })?;
                let (down, up) = (mix(&a.down, &b.down)?, mix(&a.up, &b.up)?);
                Ok((name.to_owned(), LowRank { down, up, scale: a.scale }))
            });
            Ok(LoraMap::new(mixed.collect::<Result<_>>()?))
        });
        let [unet, first, second] = maps;
        Ok(Self { unet: unet?, text: [first?, second?] })
    }

    /// The adapter with its effect multiplied by `factor`: its up matrices are.
    ///
    /// # Errors
    /// When the multiplication fails.
    pub fn scaled(&self, factor: f64) -> Result<Self> {
        let maps = Network::ALL.map(|network| -> Result<LoraMap> {
            let scaled = self.network(network).iter().map(|(name, adapter)| {
                let up = adapter.up.affine(factor, 0.0)?;
                Ok((name.to_owned(), LowRank { up, ..adapter.clone() }))
            });
            Ok(LoraMap::new(scaled.collect::<Result<_>>()?))
        });
        let [unet, first, second] = maps;
        Ok(Self { unet: unet?, text: [first?, second?] })
    }

    /// Reads a LoRA file, of linear layers and convolutions, in the names of
    ///
    /// - kohya: `lora_unet_<module>.lora_down.weight`, `lora_te1_…`, `lora_te2_…`, where
    ///   `<module>` is numbered as in Stability's code or as in diffusers;
    /// - diffusers and PEFT: `unet.<module>.lora_A.weight`, `.lora.down.weight`,
    ///   `.lora_linear_layer.down.weight`, `processor.to_q_lora.down.weight`, with
    ///   `text_encoder.` and `text_encoder_2.`;
    /// - ComfyUI: `diffusion_model.<module>.lora_A.weight` in Stability's numbering.
    ///
    /// The scale is `alpha / rank` with the module's `.alpha`, or what the header's
    /// `lora_adapter_metadata` says, else 1; [`Adapters::write`] notes scales that it multiplies
    /// into up matrices, and these come out again.
    ///
    /// # Errors
    /// Names the first key that is not understood, of another kind of adapter, or without its
    /// partner.
    pub fn read(path: &Path, names: &AdapterNames, dtype: DType, device: &Device) -> Result<Self> {
        let fail = |message: String| Error::file(path, message);
        let header = read_metadata(path)?;
        let (metadata, folded) = (PeftMetadata::read(path, &header)?, Folded::read(path, &header)?);
        let mut parts: BTreeMap<(Network, String), Parts> = BTreeMap::new();
        let tensors: BTreeMap<String, Tensor> =
            read_safetensors(path, device)?.into_iter().collect();
        for (key, tensor) in tensors {
            if let Some(kind) = other_kind(&key) {
                return Err(fail(format!(
                    "'{key}' belongs to {kind}, which is not supported; supported is LoRA of \
                     linear layers and convolutions (a down and an up matrix, and alpha)"
                )));
            }
            let Some((network, module, part)) = names.parse(&key) else {
                return Err(fail(format!(
                    "'{key}' is no key of an SDXL adapter in kohya's, diffusers' or ComfyUI's \
                     names, or there is no such module in this checkpoint"
                )));
            };
            let entry = parts.entry((network, module.to_owned())).or_default();
            let twice = match part {
                Part::Down => entry.down.replace(tensor.to_dtype(dtype)?).is_some(),
                Part::Up => entry.up.replace(tensor.to_dtype(dtype)?).is_some(),
                Part::Alpha => {
                    let value = tensor.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
                    let [value] = value[..] else {
                        return Err(fail(format!("'{key}' is no single number")));
                    };
                    entry.alpha.replace(value).is_some()
                }
            };
            if twice {
                return Err(fail(format!("'{key}' says again what another key says of {module}")));
            }
        }
        let mut maps: [BTreeMap<String, LowRank>; 3] = Default::default();
        for ((network, module), part) in parts {
            let stabilised = |rank| metadata.scale(network, &module, rank);
            let adapter = low_rank(part, stabilised)
                .map_err(|what| fail(format!("adapter of '{module}': {what}")))?;
            let adapter = folded.unfold(&names.diffusers(network, &module), adapter)?;
            maps[network as usize].insert(module, adapter);
        }
        let [unet, text_1, text_2] = maps.map(LoraMap::new);
        Ok(Self { unet, text: [text_1, text_2] })
    }
}

/// What is wrong where an adapter is none for a weight of this shape, [out, in] or
/// [out, in, kh, kw].
pub(super) fn misfits(adapter: &LowRank, weight: &[usize]) -> Vec<String> {
    let rank = adapter.down.dims().first().copied().unwrap_or(0);
    let (mut down, mut up) = (weight.to_vec(), vec![1; weight.len()]);
    down[0] = rank;
    (up[0], up[1]) = (weight[0], rank);
    let parts = [("down", adapter.down.dims(), down), ("up", adapter.up.dims(), up)];
    let wrong = parts.into_iter().filter(|(_, got, expected)| got != expected);
    wrong
        .map(|(name, got, expected)| format!("{name} (expected {expected:?}, got {got:?})"))
        .collect()
}

/// Joins the parts of one module; `scale` is by the rank, for a module without alpha.
fn low_rank(parts: Parts, scale: impl Fn(usize) -> f64) -> Result<LowRank, String> {
    let (Some(down), Some(up)) = (parts.down, parts.up) else {
        return Err("lacks its down or up matrix".into());
    };
    let (&[rank @ (1..), _, ..], &[_, other, ..]) = (down.dims(), up.dims()) else {
        return Err(format!("{:?} and {:?} are no matrices", down.dims(), up.dims()));
    };
    if other != rank {
        return Err(format!("ranks {rank} and {other} differ"));
    }
    let scale = parts.alpha.map_or_else(|| scale(rank), |alpha| alpha / rank as f64);
    Ok(LowRank { down, up, scale })
}
