//! Whole checkpoints in one safetensors file, as Stability publishes SDXL and ComfyUI and the
//! A1111 family keep it: `model.diffusion_model.…`, `first_stage_model.…`,
//! `conditioner.embedders.0.…` and `.1.…`.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::folder::ModelFolder;
use super::key_names::{self, FUSED, NameMap};
use super::lora_names::with_text_model;
use super::plan::Networks;
use super::single_config::{Configs, Shapes};
use super::tensor_file::{self, Entry, TensorFile};
use super::weights::{Weights, each, is_buffer, place};
use crate::{Error, Result};

/// In the header of our own exports: the checkpoint's configurations, which shapes do not tell.
const CONFIGS: &str = "diffusion-sharpening.configs";
/// Most names in a message.
const SHOWN: usize = 12;

/// The components in the order of [`Layout`].
const PREFIXES: [&str; 4] = [
    "model.diffusion_model.",
    "first_stage_model.",
    "conditioner.embedders.0.transformer.",
    "conditioner.embedders.1.model.",
];

/// Beginnings of what is no weight of an SDXL network: averages, schedules, markers.
const IGNORED: [&str; 12] = [
    "model_ema.",
    "denoiser.",
    "alphas_cumprod",
    "betas",
    "log_one_minus_alphas_cumprod",
    "logvar",
    "posterior_",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "sqrt_recip",
    "v_pred",
    "ztsnr",
];

fn is_ignored(key: &str) -> bool {
    IGNORED.iter().any(|start| key.starts_with(start))
        || is_buffer(key)
        || key.ends_with("logit_scale")
}

/// Tensors by their names in the folder layout.
type Tensors = Vec<(String, Tensor)>;

/// One component's names in the file.
#[derive(Clone, Debug)]
pub struct FileNames {
    prefix: &'static str,
    names: NameMap,
}

impl FileNames {
    pub fn new(prefix: &'static str, names: NameMap) -> Self {
        Self { prefix, names }
    }

    /// The name in the file of a tensor of ours.
    pub fn in_file(&self, name: &str) -> String {
        let theirs = self.names.theirs(name);
        format!("{}{}", self.prefix, theirs.as_deref().unwrap_or(name))
    }

    /// A tensor of the file as those of the folder layout; nothing where the name is unknown.
    pub fn to_folder(&self, key: &str, tensor: &Tensor) -> Result<Option<Tensors>> {
        let Some(rest) = key.strip_prefix(self.prefix) else { return Ok(None) };
        if let Some((layer, kind)) = rest.split_once(".attn.in_proj_") {
            let out = self.names.ours(&format!("{layer}.attn.out_proj"));
            let Some(attention) = out.as_deref().and_then(|name| name.strip_suffix("out_proj"))
            else {
                return Ok(None);
            };
            let width = tensor.dim(0)? / FUSED.len();
            let part = |(i, part): (usize, &&str)| {
                let name = format!("{attention}{part}.{kind}");
                Ok((name, tensor.narrow(0, i * width, width)?))
            };
            return FUSED.iter().enumerate().map(part).collect::<Result<_>>().map(Some);
        }
        let Some(name) = self.names.ours(rest) else { return Ok(None) };
        let tensor = match *tensor.dims() {
            [_, _] if name == "text_projection.weight" => tensor.t()?.contiguous()?,
            // Stability's VAE has convolutions where diffusers' has linear layers.
            [out, into, 1, 1] if is_vae_attention(&name) => tensor.reshape((out, into))?,
            _ => tensor.clone(),
        };
        Ok(Some(vec![(name, tensor)]))
    }

    /// What a component's tensors are in the file, as floats of `dtype`.
    fn entries(&self, weights: &Weights, dtype: DType) -> Result<Vec<Entry<'static>>> {
        let tower = self.prefix.starts_with("conditioner.");
        let mut entries = Vec::new();
        // In the names that today's writers use.
        let canonical = |name: &str| match tower {
            true => with_text_model(name),
            false => present_name(name),
        };
        let tensors: BTreeMap<String, Tensor> = (weights.tensors().iter())
            .filter(|(name, tensor)| !is_buffer(name) && tensor.dtype().is_float())
            .map(|(name, tensor)| (canonical(name), tensor.clone()))
            .collect();
        for (name, tensor) in &tensors {
            let (key, t, shape) = (self.in_file(name), tensor.clone(), tensor.dims().to_vec());
            let fused = key.contains(".attn.in_proj_");
            let entry = if fused && name.contains(".q_proj.") {
                let of = |part: &str| tensors.get(&name.replace(".q_proj.", &format!(".{part}.")));
                let parts: Option<Vec<Tensor>> = FUSED.iter().map(|p| of(p).cloned()).collect();
                let parts = parts.ok_or_else(|| {
                    Error::Weights(format!("'{name}' lacks its key or value projection"))
                })?;
                let mut shape = shape;
                shape[0] *= FUSED.len();
                Entry::new(key, dtype, shape, move || Ok(Tensor::cat(&parts, 0)?))
            } else if fused {
                continue;
            } else if name == "text_projection.weight" {
                let shape: Vec<usize> = shape.into_iter().rev().collect();
                Entry::new(key, dtype, shape, move || Ok(t.t()?))
            } else if shape.len() == 2 && is_vae_attention(name) {
                let shape = [&shape[..], &[1, 1]].concat();
                Entry::new(key, dtype, shape.clone(), move || Ok(t.reshape(shape.as_slice())?))
            } else {
                Entry::new(key, dtype, shape, move || Ok(t.clone()))
            };
            entries.push(entry);
        }
        Ok(entries)
    }
}

fn is_vae_attention(name: &str) -> bool {
    name.contains("coder.mid_block.attentions.0.to_") && name.ends_with(".weight")
}

/// The VAE attention's present names for those of old diffusers checkpoints.
pub fn present_name(name: &str) -> String {
    let pairs = [("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")];
    let Some((stem, layer)) = name.split_once("mid_block.attentions.0.") else {
        return name.to_owned();
    };
    let (layer, kind) = layer.rsplit_once('.').unwrap_or((layer, ""));
    let layer = pairs.iter().find(|(old, _)| *old == layer).map_or(layer, |(_, new)| new);
    format!("{stem}mid_block.attentions.0.{layer}.{kind}")
}

impl Networks {
    /// Those of the checkpoint at `path`, in either layout, without its weights.
    ///
    /// # Errors
    /// Names the file that is missing or unusable.
    pub fn at(path: &Path) -> Result<Self> {
        if !path.is_file() {
            return Self::read(path);
        }
        let configs = configs_of(&TensorFile::open(path)?);
        configs.and_then(|c| Self::of(&c)).map_err(|e| Error::file(path, e))
    }

    /// A checkpoint's configurations, read.
    ///
    /// # Errors
    /// Names the component and the field that is wrong.
    pub fn of(configs: &Configs) -> Result<Self, String> {
        Ok(Self {
            unet: parse("unet", &configs.unet)?,
            vae: parse("vae", &configs.vae)?,
            text: [
                parse("text_encoder", &configs.text_encoder)?,
                parse("text_encoder_2", &configs.text_encoder_2)?,
            ],
        })
    }

    /// The components' names in a single file: U-Net, VAE, the two towers.
    fn file_names(&self) -> Result<[FileNames; 4]> {
        self.unet.check()?;
        self.vae.check()?;
        let maps = [
            key_names::unet(&self.unet),
            key_names::vae(self.vae.block_out_channels.len(), self.vae.layers_per_block),
            key_names::clip(),
            key_names::open_clip(self.text[1].num_hidden_layers),
        ];
        let mut prefixes = PREFIXES.into_iter();
        Ok(maps.map(|names| FileNames::new(prefixes.next().unwrap_or_default(), names)))
    }
}

/// Reads a configuration out of JSON.
///
/// # Errors
/// Names the field.
pub fn parse<T: DeserializeOwned>(part: &str, value: &Value) -> Result<T, String> {
    serde_path_to_error::deserialize(value.clone()).map_err(|e| format!("{part}: {e}"))
}

/// The configurations of a single file: as its header has them, or read off its tensors.
pub(super) fn configs_of(file: &TensorFile) -> Result<Configs, String> {
    match file.metadata().remove(CONFIGS) {
        Some(text) => serde_json::from_str(&text).map_err(|e| format!("{CONFIGS}: {e}")),
        None => Configs::of(&file.shapes().collect::<Shapes>())
            .map_err(|e| format!("this is no SDXL checkpoint in Stability's layout: {e}")),
    }
}

/// What a single file holds.
pub struct SingleFile {
    pub configs: Configs,
    pub networks: Networks,
    /// U-Net, VAE, the two towers, in the folder layout's names.
    pub weights: [Weights; 4],
}

impl SingleFile {
    /// # Errors
    /// Names, as the file does, what is missing or does not belong to SDXL.
    /// `Error::InsufficientMemory` before weights are read that the device cannot hold.
    pub fn read(path: &Path, dtypes: [DType; 4], device: &Device) -> Result<Self> {
        let fail = |message: String| Error::file(path, message);
        let file = TensorFile::open(path)?;
        let configs = configs_of(&file).map_err(fail)?;
        let networks = Networks::of(&configs).map_err(fail)?;
        let names = networks.file_names()?;
        networks.announce(path, dtypes[0], device)?;
        // A tensor's key, and in the folder layout its component and what it is there.
        let read = |key: String| -> Result<(String, Option<(usize, Tensors)>)> {
            let part = PREFIXES.iter().position(|prefix| key.starts_with(prefix));
            let Some(i) = part else { return Ok((key, None)) };
            let found = names[i].to_folder(&key, &file.read(&key, device)?)?;
            let laid = |(name, tensor)| {
                let laid = place(tensor, dtypes[i]).map_err(|e| Error::tensor_file(path, e))?;
                Ok((name, laid))
            };
            let laid = found.map(|all| all.into_iter().map(laid).collect::<Result<Tensors>>());
            Ok((key, laid.transpose()?.map(|tensors| (i, tensors))))
        };
        let keys = file.names().into_iter().filter(|key| !is_ignored(key)).collect();
        let mut parts: [HashMap<String, Tensor>; 4] = Default::default();
        let mut strangers = BTreeSet::new();
        for (key, found) in each::<_, Vec<_>>(keys, device, read)? {
            match found {
                Some((i, tensors)) => parts[i].extend(tensors),
                None => drop(strangers.insert(key)),
            }
        }
        if !strangers.is_empty() {
            let some: Vec<&str> = strangers.iter().take(SHOWN).map(String::as_str).collect();
            let count = strangers.len();
            let more = if count > SHOWN { ", …" } else { "" };
            let some = some.join(", ");
            return Err(fail(format!("{count} tensors that SDXL has not: {some}{more}")));
        }
        let mut names = names.into_iter();
        let weights = parts.map(|tensors| {
            let weights = Weights::new(tensors, path);
            names.next().into_iter().fold(weights, Weights::named)
        });
        Ok(Self { configs, networks, weights })
    }
}

impl ModelFolder {
    /// Writes this checkpoint in one file, floats in `dtype` (half precision is what such files
    /// usually hold), a tensor at a time. `metadata` (title, author, date …) goes into the header
    /// beside the architecture and the configurations, from which [`ModelFolder::open`] restores
    /// them all; other programs know SDXL's. Tokenizers are not part of such a file.
    ///
    /// # Errors
    /// When a tensor has no place in this layout, or the file cannot be written.
    pub fn save_single_file(
        &self,
        path: &Path,
        dtype: DType,
        metadata: &BTreeMap<String, String>,
    ) -> Result<()> {
        let configs = self.configs()?;
        let networks = Networks::of(&configs).map_err(|e| Error::file(&self.path, e))?;
        let mut entries = Vec::new();
        for (names, weights) in networks.file_names()?.iter().zip(self.weights()) {
            entries.extend(names.entries(weights, dtype)?);
        }
        let scheduler = |field: &str| configs.scheduler.get(field);
        let v = scheduler("prediction_type").and_then(Value::as_str) == Some("v_prediction");
        let zero = scheduler("rescale_betas_zero_snr").and_then(Value::as_bool) == Some(true);
        let (width, height) = self.default_size();
        let facts = [
            ("modelspec.sai_model_spec", "1.0.1".to_owned()),
            ("modelspec.architecture", "stable-diffusion-xl-v1-base".to_owned()),
            ("modelspec.prediction_type", if v { "v" } else { "epsilon" }.to_owned()),
            ("modelspec.resolution", format!("{width}x{height}")),
            (CONFIGS, serde_json::to_string(&configs).map_err(|e| Error::file(path, e))?),
        ];
        let mut header: BTreeMap<String, String> =
            facts.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
        header.extend(metadata.iter().map(|(key, value)| (key.clone(), value.clone())));
        // Empty tensors by which other programs tell.
        for (marker, _) in [("v_pred", v), ("ztsnr", zero)].into_iter().filter(|(_, is)| *is) {
            let empty = || Ok(Tensor::zeros(0, DType::F32, &Device::Cpu)?);
            entries.push(Entry::new(marker, DType::F32, [0], empty));
        }
        tensor_file::write(path, entries, &header)
    }
}
