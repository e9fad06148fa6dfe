//! A checkpoint in the diffusers folder layout.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use serde::Deserialize;

use super::clip_text::ClipText;
use super::config::{ClipTextConfig, UNetConfig, VaeConfig, read_json};
use super::lora::LoraMap;
use super::lora_names::AdapterNames;
use super::tokenizer::ClipTokenizer;
use super::unet::UNet;
use super::vae::Vae;
use super::weights::{Weights, save_component, sha256_of, weight_files};
use crate::nn::device::Placement;
use crate::util::write_atomic;
use crate::{Error, Result};

#[derive(Clone, Debug, Deserialize)]
struct ModelIndex {
    #[serde(default = "yes")]
    force_zeros_for_empty_prompt: bool,
}

fn yes() -> bool {
    true
}

/// The networks of one SDXL checkpoint and where they lie.
#[derive(Clone, Debug)]
pub struct ModelFolder {
    pub path: PathBuf,
    device: Device,
    /// The null conditioning is zeros (true) or the encoding of "" (false).
    pub force_zeros_for_empty_prompt: bool,
    pub unet_config: UNetConfig,
    pub unet_weights: Weights,
    vae_weights: Weights,
    text_weights: [Weights; 2],
    pub unet: UNet,
    pub vae: Vae,
    pub text_1: ClipText,
    pub text_2: ClipText,
}

/// A prompt as the U-Net takes it.
#[derive(Clone, Debug)]
pub struct EncodedText {
    /// [B, T, D]: both towers' penultimate states, side by side.
    pub context: Tensor,
    /// [B, P]: the second tower's projected pooled output.
    pub pooled: Tensor,
}

impl EncodedText {
    /// Encodes token ids, B rows for each tower.
    pub fn of([first, second]: [&ClipText; 2], ids: [&[Vec<u32>]; 2]) -> Result<Self> {
        let (first, second) = (first.forward(ids[0])?, second.forward(ids[1])?);
        let context = Tensor::cat(&[&first.penultimate, &second.penultimate], 2)?.contiguous()?;
        Ok(Self { context, pooled: second.pooled })
    }
}

impl ModelFolder {
    /// Reads every component but the tokenizers.
    ///
    /// # Errors
    /// Names the folder or file that is missing or does not fit.
    pub fn open(path: &Path, placement: &Placement) -> Result<Self> {
        let Placement { device, weights: dtype, vae: vae_dtype } = placement;
        let index: ModelIndex = read_json(&path.join("model_index.json"))?;
        let unet_config: UNetConfig = component_config(path, "unet")?;
        let unet_weights = Weights::from_folder(&path.join("unet"), *dtype, device)?;
        let unet = unet_weights.build(None, |scope| UNet::load(scope, &unet_config))?;
        let vae_config: VaeConfig = component_config(path, "vae")?;
        if *vae_dtype == DType::F16 && vae_config.force_upcast {
            let message = "this VAE overflows in f16 (force_upcast): expected f32 or bf16";
            return Err(Error::invalid("vae_dtype", message));
        }
        let vae_weights = Weights::from_folder(&path.join("vae"), *vae_dtype, device)?;
        let vae = vae_weights.build(None, |scope| Vae::load(scope, &vae_config))?;
        let tower = |name: &str| -> Result<(Weights, ClipText)> {
            let config: ClipTextConfig = component_config(path, name)?;
            let weights = Weights::from_folder(&path.join(name), *dtype, device)?;
            let tower = weights.build(None, |scope| ClipText::load(scope, &config))?;
            Ok((weights, tower))
        };
        let ((weights_1, text_1), (weights_2, text_2)) =
            (tower("text_encoder")?, tower("text_encoder_2")?);
        let width = text_1.config().hidden_size + text_2.config().hidden_size;
        if width != unet_config.cross_attention_dim {
            let message = format!(
                "the text towers give {width} values a token, the U-Net expects {}",
                unet_config.cross_attention_dim
            );
            return Err(Error::file(path, message));
        }
        let (latent, taken) = (vae.config().latent_channels, unet_config.in_channels);
        if latent != taken {
            let message =
                format!("the VAE has {latent} latent channels, the U-Net expects {taken}");
            return Err(Error::file(path, message));
        }
        Ok(Self {
            path: path.to_path_buf(),
            device: device.clone(),
            force_zeros_for_empty_prompt: index.force_zeros_for_empty_prompt,
            unet_config,
            unet_weights,
            vae_weights,
            text_weights: [weights_1, weights_2],
            unet,
            vae,
            text_1,
            text_2,
        })
    }

    /// Writes this checkpoint in the same layout, weights in `dtype`, in files
    /// of at most `shard_bytes` (an index beside them where one is not enough).
    ///
    /// # Errors
    /// When a file cannot be read or written, or `out` is where this one lies.
    pub fn save(&self, out: &Path, dtype: DType, shard_bytes: usize) -> Result<()> {
        if out.canonicalize().is_ok_and(|o| self.path.canonicalize().is_ok_and(|p| o == p)) {
            return Err(Error::file(out, "is the folder that the checkpoint was read from"));
        }
        let copy = |from: &Path, to: &Path| -> Result<()> {
            write_atomic(to, &std::fs::read(from).map_err(|e| Error::file(from, e))?)
        };
        for folder in ["scheduler", "tokenizer", "tokenizer_2"].map(|name| self.path.join(name)) {
            let Ok(entries) = std::fs::read_dir(&folder) else { continue };
            for entry in entries {
                let from = entry.map_err(|e| Error::file(&folder, e))?.path();
                if let (Some(parent), Some(name)) = (folder.file_name(), from.file_name()) {
                    copy(&from, &out.join(parent).join(name))?;
                }
            }
        }
        for (name, stem, weights) in [
            ("unet", "diffusion_pytorch_model", &self.unet_weights),
            ("vae", "diffusion_pytorch_model", &self.vae_weights),
            ("text_encoder", "model", &self.text_weights[0]),
            ("text_encoder_2", "model", &self.text_weights[1]),
        ] {
            let tensors = weights
                .tensors()
                .iter()
                .map(|(key, t)| {
                    Ok((
                        key.clone(),
                        if t.dtype().is_float() { t.to_dtype(dtype)? } else { t.clone() },
                    ))
                })
                .collect::<Result<_>>()?;
            copy(&self.path.join(name).join("config.json"), &out.join(name).join("config.json"))?;
            save_component(&out.join(name), stem, &tensors, shard_bytes)?;
        }
        // Last, so that an interrupted copy is not taken for a checkpoint.
        copy(&self.path.join("model_index.json"), &out.join("model_index.json"))
    }

    pub fn tokenizers(&self) -> Result<[ClipTokenizer; 2]> {
        let read = |name: &str, tower: &ClipText| {
            let limit = tower.config().max_position_embeddings;
            let tokenizer = ClipTokenizer::from_folder(&self.path.join(name))?;
            let length = tokenizer.max_length().min(limit);
            Ok::<_, Error>(tokenizer.with_max_length(length))
        };
        Ok([read("tokenizer", &self.text_1)?, read("tokenizer_2", &self.text_2)?])
    }

    /// What adapter files call this checkpoint's modules.
    pub fn adapter_names(&self) -> AdapterNames {
        let [first, second] = &self.text_weights;
        let modules = [&self.unet_weights, first, second].map(Weights::modules);
        AdapterNames::new(&self.unet_config, modules)
    }

    /// The U-Net with low-rank adapters in place; the base weights are shared.
    pub fn unet_with(&self, lora: &LoraMap) -> Result<UNet> {
        self.unet_weights.build(Some(lora), |scope| UNet::load(scope, &self.unet_config))
    }

    /// The text towers with low-rank adapters in place; the base weights are shared.
    pub fn towers_with(&self, lora: &[LoraMap; 2]) -> Result<[ClipText; 2]> {
        let tower = |i: usize, plain: &ClipText| {
            self.text_weights[i]
                .build(Some(&lora[i]), |scope| ClipText::load(scope, plain.config()))
        };
        Ok([tower(0, &self.text_1)?, tower(1, &self.text_2)?])
    }

    /// Where the networks are.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Encodes token ids, B rows for each tower.
    pub fn encode_ids(&self, ids_1: &[Vec<u32>], ids_2: &[Vec<u32>]) -> Result<EncodedText> {
        EncodedText::of([&self.text_1, &self.text_2], [ids_1, ids_2])
    }

    /// Default image width and height in pixels.
    pub fn default_size(&self) -> (u32, u32) {
        let side = |i: usize| {
            let latent = self.unet_config.sample_size.as_ref().and_then(|s| s.at(i)).unwrap_or(128);
            (latent * self.vae.config().factor()) as u32
        };
        (side(1), side(0))
    }

    /// SHA-256 over all weight files, in name order of their components.
    pub fn sha256(&self) -> Result<String> {
        let mut files = Vec::new();
        for component in ["text_encoder", "text_encoder_2", "unet", "vae"] {
            files.extend(weight_files(&self.path.join(component))?);
        }
        sha256_of(&files)
    }
}

fn component_config<T: serde::de::DeserializeOwned>(path: &Path, component: &str) -> Result<T> {
    read_json(&path.join(component).join("config.json"))
}
