//! Low-rank adapter files, in the key names of diffusers/PEFT and of kohya.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};

use super::weights::read_safetensors;
use crate::nn::LowRank;
use crate::{Error, Result};

/// Adapters of a network by module name (`mid_block.attentions.0.proj_in`).
#[derive(Clone, Debug, Default)]
pub struct LoraMap(Arc<BTreeMap<String, LowRank>>);

#[derive(Default)]
struct Parts {
    down: Option<Tensor>,
    up: Option<Tensor>,
    alpha: Option<f64>,
}

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

    /// Reads a U-Net adapter. diffusers/PEFT keys are
    /// `unet.<module>.lora_A.weight`; kohya's are
    /// `lora_unet_<module with underscores>.lora_down.weight`, for which
    /// `modules` lists the network's module names.
    ///
    /// # Errors
    /// Names the first key that is not understood or has no partner.
    pub fn read(path: &Path, modules: &[String], dtype: DType, device: &Device) -> Result<Self> {
        let flat: HashMap<String, &String> =
            modules.iter().map(|m| (format!("lora_unet_{}", m.replace('.', "_")), m)).collect();
        let mut parts: BTreeMap<String, Parts> = BTreeMap::new();
        for (key, tensor) in read_safetensors(path, device)? {
            let Some((module, kind)) = split_key(&key, &flat) else {
                return Err(Error::file(
                    path,
                    format!("'{key}' is no U-Net adapter key in diffusers' or kohya's names"),
                ));
            };
            let entry = parts.entry(module).or_default();
            match kind {
                Kind::Down => entry.down = Some(tensor.to_dtype(dtype)?),
                Kind::Up => entry.up = Some(tensor.to_dtype(dtype)?),
                Kind::Alpha => {
                    let value = tensor.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
                    entry.alpha = value.first().copied();
                }
            }
        }
        let mut map = BTreeMap::new();
        for (module, part) in parts {
            let (Some(down), Some(up)) = (part.down, part.up) else {
                return Err(Error::file(
                    path,
                    format!("adapter of '{module}' lacks its down or up matrix"),
                ));
            };
            let (&[rank @ (1..), _, ..], &[_, other, ..]) = (down.dims(), up.dims()) else {
                let message = format!(
                    "adapter of '{module}': {:?} and {:?} are no matrices",
                    down.dims(),
                    up.dims()
                );
                return Err(Error::file(path, message));
            };
            if other != rank {
                return Err(Error::file(
                    path,
                    format!("adapter of '{module}': ranks {rank} and {other} differ"),
                ));
            }
            let scale = part.alpha.map_or(1.0, |alpha| alpha / rank as f64);
            map.insert(module, LowRank { down, up, scale });
        }
        Ok(Self::new(map))
    }
}

enum Kind {
    Down,
    Up,
    Alpha,
}

fn split_key(key: &str, flat: &HashMap<String, &String>) -> Option<(String, Kind)> {
    let endings = [
        (".lora_A.weight", Kind::Down),
        (".lora_B.weight", Kind::Up),
        (".lora_down.weight", Kind::Down),
        (".lora_up.weight", Kind::Up),
        (".lora.down.weight", Kind::Down),
        (".lora.up.weight", Kind::Up),
        (".alpha", Kind::Alpha),
    ];
    let (stem, kind) =
        endings.into_iter().find_map(|(end, kind)| Some((key.strip_suffix(end)?, kind)))?;
    let module = match stem.strip_prefix("unet.") {
        Some(module) => module.to_owned(),
        None => flat.get(stem)?.to_string(),
    };
    Some((module, kind))
}
