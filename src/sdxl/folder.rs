//! A checkpoint: in the diffusers folder layout, or in one file.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::clip_text::ClipText;
use super::config::{ClipTextConfig, UNetConfig, read_json};
use super::lora::LoraMap;
use super::lora_names::AdapterNames;
use super::merge::{Addition, merge};
use super::plan::{Networks, default_size};
use super::single_config::Configs;
use super::single_file::{SingleFile, configs_of, parse};
use super::tensor_file::TensorFile;
use super::tensor_file::{Entry, data_sha256};
use super::tokenizer::ClipTokenizer;
use super::unet::UNet;
use super::vae::Vae;
use super::vae_file::VaeSource;
use super::weights::{Weights, save_component, sha256_of, weight_files};
use crate::nn::device::Placement;
use crate::util::write_atomic;
use crate::{Error, Result};

/// The components and what their weight files are called.
const PARTS: [(&str, &str); 4] = [
    ("unet", "diffusion_pytorch_model"),
    ("vae", "diffusion_pytorch_model"),
    ("text_encoder", "model"),
    ("text_encoder_2", "model"),
];
const SCHEDULER: &str = "scheduler/scheduler_config.json";
const INDEX: &str = "model_index.json";
/// Tokens of CLIP's vocabulary.
const CLIP_TOKENS: usize = 49408;

#[derive(Clone, Debug, Deserialize)]
struct ModelIndex {
    #[serde(default = "yes")]
    force_zeros_for_empty_prompt: bool,
}

fn yes() -> bool {
    true
}

/// What [`ModelFolder::open_with`] can be asked for.
#[derive(Clone, Debug, Default)]
pub struct OpenOptions {
    /// A VAE in place of the checkpoint's: a diffusers component folder, or a file in diffusers'
    /// or Stability's names.
    pub vae: Option<PathBuf>,
    /// Adapters that are added into the weights.
    pub adapters: Vec<Addition>,
}

/// The networks of one SDXL checkpoint and where they lie.
#[derive(Clone, Debug)]
pub struct ModelFolder {
    /// The folder or the file.
    pub path: PathBuf,
    device: Device,
    /// The configurations of a single file.
    single: Option<Configs>,
    /// What replaces the checkpoint's VAE.
    other_vae: Option<VaeSource>,
    /// What was added into the weights.
    merged: Vec<Addition>,
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

/// A checkpoint's parts before the networks are built.
struct Parts {
    single: Option<Configs>,
    force_zeros_for_empty_prompt: bool,
    networks: Networks,
    /// U-Net, VAE, the two towers.
    weights: [Weights; 4],
}

impl Parts {
    fn folder(path: &Path, dtypes: [DType; 4], device: &Device) -> Result<Self> {
        let index: ModelIndex = read_json(&path.join(INDEX))?;
        let [unet, vae, first, second] = PARTS.map(|(name, _)| name);
        let networks = Networks {
            unet: component_config(path, unet)?,
            vae: component_config(path, vae)?,
            text: [component_config(path, first)?, component_config(path, second)?],
        };
        networks.announce(path, dtypes[0], device)?;
        let read = |i: usize| Weights::from_folder(&path.join(PARTS[i].0), dtypes[i], device);
        Ok(Self {
            single: None,
            force_zeros_for_empty_prompt: index.force_zeros_for_empty_prompt,
            networks,
            weights: [read(0)?, read(1)?, read(2)?, read(3)?],
        })
    }

    fn file(path: &Path, dtypes: [DType; 4], device: &Device) -> Result<Self> {
        let SingleFile { configs, networks, weights } = SingleFile::read(path, dtypes, device)?;
        let index: ModelIndex =
            parse("model_index", &configs.model_index).map_err(|e| Error::file(path, e))?;
        let force_zeros_for_empty_prompt = index.force_zeros_for_empty_prompt;
        Ok(Self { single: Some(configs), force_zeros_for_empty_prompt, networks, weights })
    }
}

impl ModelFolder {
    /// Reads every component but the tokenizers, from a folder in the diffusers layout or from
    /// one `.safetensors` file in Stability's.
    ///
    /// # Errors
    /// Names the folder or file that is missing or does not fit. `Error::InsufficientMemory`
    /// before weights are read that the device cannot hold.
    pub fn open(path: &Path, placement: &Placement) -> Result<Self> {
        Self::open_with(path, placement, &OpenOptions::default())
    }

    /// [`Self::open`] with options.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_with(path: &Path, placement: &Placement, options: &OpenOptions) -> Result<Self> {
        let Placement { device, weights: dtype, vae: vae_dtype } = placement;
        let dtypes = [*dtype, *vae_dtype, *dtype, *dtype];
        let mut parts = if path.is_file() {
            Parts::file(path, dtypes, device)?
        } else {
            Parts::folder(path, dtypes, device)?
        };
        let read = |other: &PathBuf| VaeSource::read(other, *vae_dtype, device);
        let other_vae = options.vae.as_ref().map(read).transpose()?;
        if let Some(other) = &other_vae {
            parts.networks.vae = other.config.clone();
            parts.weights[1] = other.weights.clone();
        }
        let Networks { unet: unet_config, vae: vae_config, text } = parts.networks;
        if *vae_dtype == DType::F16 && vae_config.force_upcast {
            let message = "this VAE overflows in f16 (force_upcast): expected f32 or bf16";
            return Err(Error::invalid("vae_dtype", message));
        }
        let [mut unet_weights, vae_weights, mut weights_1, mut weights_2] = parts.weights;
        if !options.adapters.is_empty() {
            let weights = [&mut unet_weights, &mut weights_1, &mut weights_2];
            merge(weights, &unet_config, &options.adapters, device)?;
        }
        let unet = unet_weights.build(None, |scope| UNet::load(scope, &unet_config))?;
        let vae = vae_weights.build(None, |scope| Vae::load(scope, &vae_config))?;
        let tower = |weights: &Weights, config: &ClipTextConfig| {
            weights.build(None, |scope| ClipText::load(scope, config))
        };
        let (text_1, text_2) = (tower(&weights_1, &text[0])?, tower(&weights_2, &text[1])?);
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
            single: parts.single,
            other_vae,
            merged: options.adapters.clone(),
            force_zeros_for_empty_prompt: parts.force_zeros_for_empty_prompt,
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

    /// U-Net, VAE and the two towers.
    pub(super) fn weights(&self) -> [&Weights; 4] {
        let [first, second] = &self.text_weights;
        [&self.unet_weights, &self.vae_weights, first, second]
    }

    /// The configuration files, of whatever layout.
    pub(super) fn configs(&self) -> Result<Configs> {
        let mut configs = match &self.single {
            Some(configs) => configs.clone(),
            None => {
                let [unet, vae, text_encoder, text_encoder_2] =
                    PARTS.map(|(name, _)| component_config(&self.path, name));
                Configs {
                    unet: unet?,
                    vae: vae?,
                    text_encoder: text_encoder?,
                    text_encoder_2: text_encoder_2?,
                    scheduler: read_json(&self.path.join(SCHEDULER))?,
                    model_index: read_json(&self.path.join(INDEX))?,
                }
            }
        };
        if let Some(other) = &self.other_vae {
            configs.vae = other.json.clone();
        }
        Ok(configs)
    }

    /// The folder with the adapters of the checkpoint at `path`: `adapters` in a folder,
    /// `NAME.adapters` beside `NAME.safetensors`.
    pub fn adapters_of(path: &Path) -> PathBuf {
        if path.is_file() { path.with_extension("adapters") } else { path.join("adapters") }
    }

    /// The VAE that replaces the own one of the checkpoint at `path`, where there is one:
    /// `vae.safetensors` in a folder, `NAME.vae.safetensors` beside `NAME.safetensors`.
    pub fn vae_of(path: &Path) -> Option<PathBuf> {
        let file = if path.is_file() {
            path.with_extension("vae.safetensors")
        } else {
            path.join("vae.safetensors")
        };
        file.is_file().then_some(file)
    }

    /// Whether a checkpoint seems to lie at `path`: a folder with a `model_index.json`, or a
    /// `.safetensors` file that is no VAE beside one.
    pub fn is_at(path: &Path) -> bool {
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned());
        let named =
            name.is_some_and(|n| n.ends_with(".safetensors") && !n.ends_with(".vae.safetensors"));
        path.join(INDEX).is_file() || (named && path.is_file())
    }

    /// The scheduler's configuration.
    ///
    /// # Errors
    /// Names the file and the field that is missing or wrong.
    pub fn scheduler<T: DeserializeOwned>(&self) -> Result<T> {
        match &self.single {
            Some(configs) => {
                parse("scheduler", &configs.scheduler).map_err(|e| Error::file(&self.path, e))
            }
            None => read_json(&self.path.join(SCHEDULER)),
        }
    }

    /// The scheduler's configuration of the checkpoint at `path`, whose weights are not read.
    ///
    /// # Errors
    /// Names the file and the field that is missing or wrong.
    pub fn scheduler_at<T: DeserializeOwned>(path: &Path) -> Result<T> {
        if !path.is_file() {
            return read_json(&path.join(SCHEDULER));
        }
        let configs = configs_of(&TensorFile::open(path)?);
        let scheduler = configs.and_then(|c| parse("scheduler", &c.scheduler));
        scheduler.map_err(|e| Error::file(path, e))
    }

    /// Writes this checkpoint in the folder layout, weights in `dtype`, in files
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
        let write_json = |name: &str, value: &Value| {
            write_atomic(&out.join(name), format!("{value:#}\n").as_bytes())
        };
        // Files of a folder are copied as they are; what has no file is written anew.
        let config = |name: &str, value: fn(&Configs) -> &Value| match &self.single {
            Some(configs) => write_json(name, value(configs)),
            None => copy(&self.path.join(name), &out.join(name)),
        };
        if let Some(configs) = &self.single {
            write_json(SCHEDULER, &configs.scheduler)?;
        }
        let values: [fn(&Configs) -> &Value; 4] =
            [|c| &c.unet, |c| &c.vae, |c| &c.text_encoder, |c| &c.text_encoder_2];
        for (i, ((name, stem), weights)) in PARTS.into_iter().zip(self.weights()).enumerate() {
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
            let file = format!("{name}/config.json");
            match &self.other_vae {
                Some(other) if name == "vae" => write_json(&file, &other.json)?,
                _ => config(&file, values[i])?,
            }
            save_component(&out.join(name), stem, &tensors, shard_bytes)?;
        }
        // Last, so that an interrupted copy is not taken for a checkpoint.
        config(INDEX, |c| &c.model_index)
    }

    /// The towers' tokenizers: the folder's, or CLIP's own where there are none and the towers
    /// have its vocabulary.
    ///
    /// # Errors
    /// Names the file that is missing or wrong.
    pub fn tokenizers(&self) -> Result<[ClipTokenizer; 2]> {
        let read = |name: &str, pad: &str, tower: &ClipText| {
            let (limit, tokens) =
                (tower.config().max_position_embeddings, tower.config().vocab_size);
            let folder = self.path.join(name);
            let tokenizer = if self.single.is_none() && (folder.is_dir() || tokens != CLIP_TOKENS) {
                ClipTokenizer::from_folder(&folder)?
            } else if tokens == CLIP_TOKENS {
                ClipTokenizer::open_ai(pad)?
            } else {
                let message = format!(
                    "the text towers know {tokens} tokens, and a single file has no tokenizer; \
                     only CLIP's, of {CLIP_TOKENS} tokens, is built in"
                );
                return Err(Error::file(&self.path, message));
            };
            let length = tokenizer.max_length().min(limit);
            Ok::<_, Error>(tokenizer.with_max_length(length))
        };
        let (first, second) = (&self.text_1, &self.text_2);
        Ok([read("tokenizer", "<|endoftext|>", first)?, read("tokenizer_2", "!", second)?])
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

    /// This checkpoint with other weights in its U-Net, all of them.
    ///
    /// # Errors
    /// When they do not fit the configuration.
    pub fn with_unet_weights(&self, tensors: BTreeMap<String, Tensor>) -> Result<Self> {
        let weights = Weights::new(tensors.into_iter().collect(), &self.path)
            .computing_in(self.unet_weights.computed());
        let unet = weights.build(None, |scope| UNet::load(scope, &self.unet_config))?;
        Ok(Self { unet, unet_weights: weights, ..self.clone() })
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
        let (width, height) = default_size(&self.unet_config, self.vae.config());
        (width as u32, height as u32)
    }

    /// The networks' configurations.
    pub fn networks(&self) -> Networks {
        Networks {
            unet: self.unet_config.clone(),
            vae: self.vae.config().clone(),
            text: [self.text_1.config().clone(), self.text_2.config().clone()],
        }
    }

    /// SHA-256 over all weight files, in name order of their components, then those of adapters
    /// that were added into them.
    pub fn sha256(&self) -> Result<String> {
        let mut files = Vec::new();
        if self.single.is_some() {
            files.push(self.path.clone());
        } else {
            for component in ["text_encoder", "text_encoder_2", "unet", "vae"] {
                if component != "vae" || self.other_vae.is_none() {
                    files.extend(weight_files(&self.path.join(component))?);
                }
            }
        }
        files.extend(self.other_vae.iter().flat_map(|other| other.files.clone()));
        files.extend(self.merged.iter().map(|addition| addition.file.clone()));
        sha256_of(&files)
    }

    /// SHA-256 over the VAE's weights as they are in memory, whatever file they came from.
    pub fn vae_sha256(&self) -> Result<String> {
        let tensors = self.vae_weights.tensors().iter();
        data_sha256(tensors.map(|(name, tensor)| Entry::of(name, tensor)).collect())
    }
}

fn component_config<T: DeserializeOwned>(path: &Path, component: &str) -> Result<T> {
    read_json(&path.join(component).join("config.json"))
}
