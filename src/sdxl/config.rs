//! The parts of diffusers' and transformers' `config.json` that decide the
//! networks. Values that would need code we do not have are refused by name.

use std::path::Path;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::{Error, Result};

/// Reads a JSON file into `T`.
///
/// # Errors
/// Names the file, and the field when one is wrong.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let text = std::fs::read_to_string(path).map_err(|e| Error::file(path, e))?;
    parse_json(&text).map_err(|e| Error::file(path, e))
}

/// Reads JSON as Python writes it: `Infinity`, `-Infinity` and `NaN` (in
/// diffusers' scheduler configurations) become null.
///
/// # Errors
/// Names the field and the place.
pub fn parse_json<T: DeserializeOwned>(text: &str) -> Result<T, String> {
    let mut clean = String::with_capacity(text.len());
    let (mut rest, mut quoted) = (text, false);
    while let Some(c) = rest.chars().next() {
        let word =
            ["-Infinity", "Infinity", "NaN"].iter().find(|w| !quoted && rest.starts_with(**w));
        let taken = match (word, c) {
            (Some(word), _) => word.len(),
            (None, '\\') => 1 + rest[1..].chars().next().map_or(0, char::len_utf8),
            (None, c) => c.len_utf8(),
        };
        clean.push_str(if word.is_some() { "null" } else { &rest[..taken] });
        quoted ^= c == '"';
        rest = &rest[taken..];
    }
    let mut reader = serde_json::Deserializer::from_str(&clean);
    let value = serde_path_to_error::deserialize(&mut reader).map_err(|e| e.to_string())?;
    reader.end().map_err(|e| e.to_string())?;
    Ok(value)
}

/// One value for every level, or one each.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
pub enum PerLevel<T> {
    One(T),
    Each(Vec<T>),
}

impl<T: Copy> PerLevel<T> {
    /// The value at `level`; a list that is too short repeats its last value.
    pub fn at(&self, level: usize) -> Option<T> {
        match self {
            Self::One(value) => Some(*value),
            Self::Each(values) => values.get(level).or(values.last()).copied(),
        }
    }

    fn length(&self) -> Option<usize> {
        match self {
            Self::One(_) => None,
            Self::Each(values) => Some(values.len()),
        }
    }
}

/// `UNet2DConditionModel`.
#[derive(Clone, Debug, Deserialize)]
pub struct UNetConfig {
    #[serde(default = "four")]
    pub in_channels: usize,
    #[serde(default = "four")]
    pub out_channels: usize,
    #[serde(default)]
    pub sample_size: Option<PerLevel<usize>>,
    pub block_out_channels: Vec<usize>,
    pub down_block_types: Vec<String>,
    pub up_block_types: Vec<String>,
    #[serde(default = "cross_mid")]
    pub mid_block_type: Option<String>,
    #[serde(default = "two")]
    pub layers_per_block: PerLevel<usize>,
    #[serde(default = "one")]
    pub transformer_layers_per_block: PerLevel<usize>,
    /// Heads per level, whatever its name says (diffusers' historical naming).
    #[serde(default = "eight")]
    pub attention_head_dim: PerLevel<usize>,
    #[serde(default)]
    pub num_attention_heads: Option<PerLevel<usize>>,
    pub cross_attention_dim: usize,
    #[serde(default = "groups")]
    pub norm_num_groups: usize,
    #[serde(default = "eps_5")]
    pub norm_eps: f64,
    #[serde(default)]
    pub use_linear_projection: bool,
    #[serde(default)]
    pub addition_embed_type: Option<String>,
    #[serde(default)]
    pub addition_time_embed_dim: Option<usize>,
    #[serde(default)]
    pub projection_class_embeddings_input_dim: Option<usize>,
    #[serde(default = "yes")]
    pub flip_sin_to_cos: bool,
    #[serde(default)]
    pub freq_shift: f64,
    #[serde(default = "unit")]
    pub downsample_padding: usize,
    /// Everything else, to refuse what is set to something unsupported.
    #[serde(flatten)]
    pub rest: serde_json::Map<String, Value>,
}

/// `AutoencoderKL`.
#[derive(Clone, Debug, Deserialize)]
pub struct VaeConfig {
    #[serde(default = "three")]
    pub in_channels: usize,
    #[serde(default = "three")]
    pub out_channels: usize,
    #[serde(default = "four")]
    pub latent_channels: usize,
    pub block_out_channels: Vec<usize>,
    #[serde(default = "unit")]
    pub layers_per_block: usize,
    #[serde(default = "groups")]
    pub norm_num_groups: usize,
    /// Side of the images that the VAE was trained on, in pixels.
    #[serde(default = "vae_sample")]
    pub sample_size: PerLevel<usize>,
    #[serde(default = "vae_scale")]
    pub scaling_factor: f64,
    #[serde(default)]
    pub shift_factor: Option<f64>,
    #[serde(default = "yes")]
    pub use_quant_conv: bool,
    #[serde(default = "yes")]
    pub use_post_quant_conv: bool,
    #[serde(default = "yes")]
    pub mid_block_add_attention: bool,
    /// Its activations overflow in f16.
    #[serde(default = "yes")]
    pub force_upcast: bool,
    #[serde(flatten)]
    pub rest: serde_json::Map<String, Value>,
}

/// `CLIPTextModel` and `CLIPTextModelWithProjection`.
#[derive(Clone, Debug, Deserialize)]
pub struct ClipTextConfig {
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    #[serde(default = "positions")]
    pub max_position_embeddings: usize,
    pub vocab_size: usize,
    #[serde(default = "quick_gelu")]
    pub hidden_act: String,
    #[serde(default = "eps_5")]
    pub layer_norm_eps: f64,
    #[serde(default = "eos")]
    pub eos_token_id: u32,
    #[serde(default = "projection")]
    pub projection_dim: usize,
    #[serde(default)]
    pub architectures: Option<Vec<String>>,
}

fn unit() -> usize {
    1
}
fn three() -> usize {
    3
}
fn four() -> usize {
    4
}
fn one() -> PerLevel<usize> {
    PerLevel::One(1)
}
fn two() -> PerLevel<usize> {
    PerLevel::One(2)
}
fn eight() -> PerLevel<usize> {
    PerLevel::One(8)
}
fn groups() -> usize {
    32
}
fn eps_5() -> f64 {
    1e-5
}
fn yes() -> bool {
    true
}
/// diffusers takes 32 here, which no published VAE means and which is too small for tiles.
fn vae_sample() -> PerLevel<usize> {
    PerLevel::One(512)
}
fn vae_scale() -> f64 {
    0.18215
}
fn positions() -> usize {
    77
}
fn eos() -> u32 {
    49407
}
fn projection() -> usize {
    512
}
fn quick_gelu() -> String {
    "quick_gelu".into()
}
fn cross_mid() -> Option<String> {
    Some("UNetMidBlock2DCrossAttn".into())
}

/// Equal values; 1 and 1.0 are the same.
fn same(a: &Value, b: &Value) -> bool {
    a == b || (a.is_number() && a.as_f64() == b.as_f64())
}

/// Refuses any listed key whose value is not the one (or absent) that our code implements.
fn refuse(rest: &serde_json::Map<String, Value>, only: &[(&str, Value)]) -> Result<()> {
    for (key, expected) in only {
        match rest.get(*key) {
            None => {}
            Some(value) if same(value, expected) || value.is_null() => {}
            Some(value) => {
                return Err(Error::invalid(
                    *key,
                    format!("only {expected} is supported, got {value}"),
                ));
            }
        }
    }
    Ok(())
}

impl UNetConfig {
    /// Heads of the attentions at `level`.
    pub fn heads(&self, level: usize) -> usize {
        let source = self.num_attention_heads.as_ref().unwrap_or(&self.attention_head_dim);
        source.at(level).unwrap_or(1)
    }

    /// # Errors
    /// Names the first field whose value is inconsistent or unsupported.
    pub fn check(&self) -> Result<()> {
        let levels = self.block_out_channels.len();
        if levels == 0 {
            return Err(Error::invalid("block_out_channels", "expected at least one level"));
        }
        for (field, length) in [
            ("down_block_types", Some(self.down_block_types.len())),
            ("up_block_types", Some(self.up_block_types.len())),
            ("layers_per_block", self.layers_per_block.length()),
            ("transformer_layers_per_block", self.transformer_layers_per_block.length()),
            ("attention_head_dim", self.attention_head_dim.length()),
            ("num_attention_heads", self.num_attention_heads.as_ref().and_then(PerLevel::length)),
        ] {
            if length.is_some_and(|n| n != levels) {
                let message =
                    format!("expected {levels} values, one per level of block_out_channels");
                return Err(Error::invalid(field, message));
            }
        }
        for (types, name, known) in [
            (&self.down_block_types, "down_block_types", ["DownBlock2D", "CrossAttnDownBlock2D"]),
            (&self.up_block_types, "up_block_types", ["UpBlock2D", "CrossAttnUpBlock2D"]),
        ] {
            if let Some(other) = types.iter().find(|t| !known.contains(&t.as_str())) {
                return Err(Error::unknown(name, "block type", other, known));
            }
        }
        match self.mid_block_type.as_deref() {
            None | Some("UNetMidBlock2DCrossAttn") => {}
            Some(other) => {
                let known = ["UNetMidBlock2DCrossAttn"];
                return Err(Error::unknown("mid_block_type", "block type", other, known));
            }
        }
        match self.addition_embed_type.as_deref() {
            None => {}
            Some("text_time") => {
                for (field, value) in [
                    ("addition_time_embed_dim", self.addition_time_embed_dim),
                    (
                        "projection_class_embeddings_input_dim",
                        self.projection_class_embeddings_input_dim,
                    ),
                ] {
                    if value.is_none() {
                        return Err(Error::invalid(
                            field,
                            "needed by addition_embed_type \"text_time\"",
                        ));
                    }
                }
            }
            Some(other) => {
                return Err(Error::unknown(
                    "addition_embed_type",
                    "embedding",
                    other,
                    ["text_time"],
                ));
            }
        }
        for &channels in &self.block_out_channels {
            if !channels.is_multiple_of(self.norm_num_groups) {
                let message = format!(
                    "{channels} channels do not split into {} groups",
                    self.norm_num_groups
                );
                return Err(Error::invalid("norm_num_groups", message));
            }
        }
        for level in 0..levels {
            let crossed = self.down_block_types[level] == "CrossAttnDownBlock2D"
                || self.up_block_types[levels - 1 - level] == "CrossAttnUpBlock2D"
                || (level + 1 == levels && self.mid_block_type.is_some());
            let (channels, heads) = (self.block_out_channels[level], self.heads(level));
            if crossed && (heads == 0 || !channels.is_multiple_of(heads)) {
                let field = match self.num_attention_heads {
                    Some(_) => "num_attention_heads",
                    None => "attention_head_dim",
                };
                let message =
                    format!("{heads} heads do not divide level {level}'s {channels} channels");
                return Err(Error::invalid(field, message));
            }
        }
        refuse(
            &self.rest,
            &[
                ("act_fn", "silu".into()),
                ("center_input_sample", false.into()),
                ("class_embed_type", Value::Null),
                ("conv_in_kernel", 3.into()),
                ("conv_out_kernel", 3.into()),
                ("cross_attention_norm", Value::Null),
                ("dual_cross_attention", false.into()),
                ("encoder_hid_dim_type", Value::Null),
                ("mid_block_scale_factor", 1.into()),
                ("only_cross_attention", false.into()),
                ("resnet_skip_time_act", false.into()),
                ("resnet_time_scale_shift", "default".into()),
                ("reverse_transformer_layers_per_block", Value::Null),
                ("time_cond_proj_dim", Value::Null),
                ("time_embedding_type", "positional".into()),
                ("time_embedding_act_fn", Value::Null),
                ("time_embedding_dim", Value::Null),
                ("timestep_post_act", Value::Null),
                ("attention_type", "default".into()),
            ],
        )
    }
}

impl VaeConfig {
    /// Pixels per latent position along one side.
    pub fn factor(&self) -> usize {
        1 << self.block_out_channels.len().saturating_sub(1)
    }

    /// Latent positions along the side of a tile: those of an image of `sample_size`, as in
    /// diffusers, in whole quarters. (Other sizes give diffusers images of the wrong size.)
    pub fn tile_latents(&self) -> usize {
        let pixels = self.sample_size.at(0).unwrap_or(0);
        (pixels / self.factor() / 4 * 4).max(4)
    }

    /// # Errors
    /// Names the first field whose value is inconsistent or unsupported.
    pub fn check(&self) -> Result<()> {
        if self.block_out_channels.is_empty() {
            return Err(Error::invalid("block_out_channels", "expected at least one level"));
        }
        if self.scaling_factor == 0.0 || !self.scaling_factor.is_finite() {
            return Err(Error::invalid("scaling_factor", "expected a number other than zero"));
        }
        for (key, word) in
            [("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")]
        {
            let types = self.rest.get(key).and_then(Value::as_array);
            if let Some(other) = types.into_iter().flatten().find(|t| *t != word) {
                return Err(Error::unknown(key, "block type", other.to_string(), [word]));
            }
        }
        refuse(
            &self.rest,
            &[
                ("act_fn", "silu".into()),
                ("latents_mean", Value::Null),
                ("latents_std", Value::Null),
            ],
        )
    }
}
