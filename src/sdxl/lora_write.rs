//! Writing adapter files that diffusers, ComfyUI and the A1111 family read.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use candle_core::{DType, Device, Tensor};

use super::lora::Adapters;
use super::lora_folded::{self, Folded};
use super::lora_names::{AdapterNames, Network};
use super::lora_peft;
use super::tensor_file::{self, Entry};
use crate::{Error, Result};

/// What a header says that follows from a file's own tensors, or says how to read them.
pub(super) const COMPUTED: [&str; 7] = [
    "sshs_model_hash",
    "sshs_legacy_hash",
    "modelspec.hash_sha256",
    "ss_network_dim",
    "ss_network_alpha",
    lora_peft::KEY,
    lora_folded::KEY,
];

/// The names in an adapter file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LoraFormat {
    /// `lora_unet_input_blocks_4_1_….lora_down.weight` with `.alpha`: read by ComfyUI, the A1111
    /// family and diffusers.
    Kohya,
    /// `unet.down_blocks.1.attentions.0.….lora_A.weight`: read by diffusers, PEFT and ComfyUI.
    /// It has no place for alpha that all of them read, so the scale goes into the up matrix,
    /// and a note of it into the header.
    Diffusers,
}

impl std::str::FromStr for LoraFormat {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "kohya" => Ok(Self::Kohya),
            "diffusers" => Ok(Self::Diffusers),
            _ => Err(Error::unknown("format", "adapter format", name, ["kohya", "diffusers"])),
        }
    }
}

impl Adapters {
    /// Writes a LoRA file with matrices in `dtype`. `metadata` (training settings, title, date …)
    /// goes into the header beside what follows from the adapters themselves: their ranks and
    /// alphas, the base model's kind and the SHA-256 of the data.
    ///
    /// # Errors
    /// When a module has no name in this format, or the file cannot be written.
    pub fn write(
        &self,
        path: &Path,
        names: &AdapterNames,
        format: LoraFormat,
        dtype: DType,
        metadata: &BTreeMap<String, String>,
    ) -> Result<()> {
        let tensors = self.tensors(names, format, dtype)?;
        if tensors.is_empty() {
            return Err(Error::file(path, "there is no adapter to write"));
        }
        let entries = || tensors.iter().map(|(name, t)| Entry::of(name, t)).collect();
        let mut header = self.facts();
        if format == LoraFormat::Diffusers {
            header.extend(Folded::of(self, names).entry());
        }
        let hash = tensor_file::data_sha256(entries())?;
        header.insert("sshs_model_hash".into(), hash.clone());
        header.insert("modelspec.hash_sha256".into(), format!("0x{hash}"));
        header.extend(metadata.iter().map(|(k, v)| (k.clone(), v.clone())));
        tensor_file::write(path, entries(), &header)
    }

    fn tensors(
        &self,
        names: &AdapterNames,
        format: LoraFormat,
        dtype: DType,
    ) -> Result<BTreeMap<String, Tensor>> {
        let mut tensors = BTreeMap::new();
        for network in Network::ALL {
            for (module, adapter) in self.network(network).iter() {
                let (stem, [down, up]) = match format {
                    LoraFormat::Kohya => {
                        let unnamed = || {
                            let component = network.component();
                            Error::invalid(
                                component,
                                format!("'{module}' has no name in kohya's files"),
                            )
                        };
                        let stem = names.kohya(network, module).ok_or_else(unnamed)?;
                        let rank = adapter.down.dim(0)? as f64;
                        let alpha = Tensor::new((adapter.scale * rank) as f32, &Device::Cpu)?;
                        tensors.insert(format!("{stem}.alpha"), alpha);
                        (stem, ["lora_down", "lora_up"])
                    }
                    LoraFormat::Diffusers => {
                        (names.diffusers(network, module), ["lora_A", "lora_B"])
                    }
                };
                let scaled = match format {
                    LoraFormat::Kohya => adapter.up.clone(),
                    LoraFormat::Diffusers => (&adapter.up * adapter.scale)?,
                };
                let plain = |x: &Tensor| Ok::<_, Error>(x.detach().to_dtype(dtype)?);
                tensors.insert(format!("{stem}.{down}.weight"), plain(&adapter.down)?);
                tensors.insert(format!("{stem}.{up}.weight"), plain(&scaled)?);
            }
        }
        Ok(tensors)
    }

    /// What the header says of the adapters themselves, in kohya's and the model spec's words.
    fn facts(&self) -> BTreeMap<String, String> {
        let (mut ranks, mut alphas) = (BTreeSet::new(), BTreeSet::new());
        for network in Network::ALL {
            for (_, adapter) in self.network(network).iter() {
                let rank = adapter.down.dims().first().copied().unwrap_or(0);
                ranks.insert(rank.to_string());
                alphas.insert((adapter.scale * rank as f64).to_string());
            }
        }
        // kohya's word for what differs from module to module.
        let one = |values: BTreeSet<String>| match values.len() {
            1 => values.into_iter().collect(),
            _ => "Dynamic".to_owned(),
        };
        let mut facts = BTreeMap::from(
            [
                ("ss_network_module", "networks.lora"),
                ("ss_base_model_version", "sdxl_base_v1-0"),
                ("modelspec.sai_model_spec", "1.0.1"),
                ("modelspec.architecture", "stable-diffusion-xl-v1-base/lora"),
            ]
            .map(|(key, value)| (key.to_owned(), value.to_owned())),
        );
        facts.insert("ss_network_dim".into(), one(ranks));
        facts.insert("ss_network_alpha".into(), one(alphas));
        facts
    }
}
