//! A VAE by itself, in place of a checkpoint's own: a diffusers component folder, or one file in
//! diffusers' or Stability's names (such as the repaired SDXL VAEs that work in half precision).

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use serde_json::Value;

use super::config::{VaeConfig, read_json};
use super::key_names;
use super::single_config::{self, Shapes};
use super::single_file::{FileNames, parse, present_name};
use super::tensor_file::TensorFile;
use super::weights::{Weights, place, weight_files};
use crate::{Error, Result};

/// A VAE's configuration and weights.
#[derive(Clone, Debug)]
pub struct VaeSource {
    /// The configuration file.
    pub json: Value,
    pub config: VaeConfig,
    pub weights: Weights,
    pub files: Vec<PathBuf>,
}

impl VaeSource {
    /// # Errors
    /// Names what is missing or does not belong to a VAE.
    pub fn read(path: &Path, dtype: DType, device: &Device) -> Result<Self> {
        if path.is_dir() {
            let file = path.join("config.json");
            let json: Value = read_json(&file)?;
            return Ok(Self {
                config: parse("vae", &json).map_err(|e| Error::file(&file, e))?,
                json,
                weights: Weights::from_folder(path, dtype, device)?,
                files: weight_files(path)?,
            });
        }
        let fail = |message: String| Error::file(path, message);
        let file = TensorFile::open(path)?;
        let shapes: Shapes = file.shapes().collect();
        // A whole checkpoint's file has the VAE below a prefix, and more beside it.
        let prefix = if shapes.any("first_stage_model.") { "first_stage_model." } else { "" };
        let named_by_diffusers = shapes.any("encoder.down_blocks.");
        let (levels, layers) = if named_by_diffusers {
            (shapes.count("encoder.down_blocks."), shapes.count("encoder.down_blocks.0.resnets."))
        } else {
            let levels = format!("{prefix}encoder.down.");
            (shapes.count(&levels), shapes.count(&format!("{levels}0.block.")))
        };
        let names = FileNames::new(prefix, key_names::vae(levels, layers));
        let (mut kept, mut in_file) = (HashMap::new(), HashMap::new());
        for key in file.names().into_iter().filter(|key| key.starts_with(prefix)) {
            let tensor = file.read(&key, device)?.to_dtype(dtype)?;
            if named_by_diffusers {
                let name = present_name(&key);
                in_file.insert(names.in_file(&name), tensor.clone());
                kept.insert(name, tensor);
            } else {
                let found = names.to_folder(&key, &tensor)?;
                kept.extend(found.ok_or_else(|| fail(format!("'{key}' is no tensor of a VAE")))?);
                in_file.insert(key, tensor);
            }
        }
        let shapes: Shapes = shapes_of(&in_file).collect();
        let json = single_config::vae(&shapes, prefix)
            .map_err(|e| fail(format!("this is no VAE in diffusers' or Stability's names: {e}")))?;
        let laid = |(name, tensor): (String, Tensor)| Ok((name, place(tensor, dtype)?));
        let kept = kept.into_iter().map(laid).collect::<Result<_>>()?;
        let weights = Weights::new(kept, path);
        Ok(Self {
            config: parse("vae", &json).map_err(fail)?,
            json,
            weights: if named_by_diffusers { weights } else { weights.named(names) },
            files: vec![path.to_path_buf()],
        })
    }
}

fn shapes_of(tensors: &HashMap<String, Tensor>) -> impl Iterator<Item = (String, Vec<usize>)> {
    tensors.iter().map(|(name, tensor)| (name.clone(), tensor.dims().to_vec()))
}
