//! A CLIP dual encoder in transformers' `CLIPModel` layout: image and text to
//! unit vectors whose product is their similarity (arXiv 2103.00020).

use std::path::Path;

use candle_core::{D, DType, Device, Tensor};
use image::RgbImage;
use image::imageops::FilterType;
use serde::Deserialize;

use super::clip_text::{ClipLayer, ClipText};
use super::config::{ClipTextConfig, read_json};
use super::tokenizer::ClipTokenizer;
use super::weights::{Scope, Weights, sha256_of, weight_files};
use crate::nn::{Activation, Conv2d, LayerNorm, Linear};
use crate::{Error, Result};

#[derive(Clone, Debug, Deserialize)]
struct ClipVisionConfig {
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    image_size: usize,
    patch_size: usize,
    #[serde(default = "quick_gelu")]
    hidden_act: String,
    #[serde(default = "eps")]
    layer_norm_eps: f64,
}

fn quick_gelu() -> String {
    "quick_gelu".into()
}

fn eps() -> f64 {
    1e-5
}

#[derive(Clone, Debug, Deserialize)]
struct ClipConfig {
    text_config: ClipTextConfig,
    vision_config: ClipVisionConfig,
    projection_dim: usize,
}

#[derive(Clone, Debug)]
struct Vision {
    patches: Conv2d,
    class: Tensor,
    positions: Tensor,
    norm_in: LayerNorm,
    layers: Vec<ClipLayer>,
    norm_out: LayerNorm,
    projection: Linear,
    size: usize,
}

impl Vision {
    fn load(root: &Scope, config: &ClipVisionConfig, projection: usize) -> Result<Self> {
        let scope = root.at("vision_model");
        let width = config.hidden_size;
        let Some(activation) = Activation::from_name(&config.hidden_act) else {
            let known = ["quick_gelu", "gelu", "silu"];
            return Err(Error::unknown("hidden_act", "activation", &config.hidden_act, known));
        };
        let (patch, size) = (config.patch_size, config.image_size);
        if patch == 0 || size == 0 || size % patch != 0 {
            let message = format!("{patch} does not divide the image size {size}");
            return Err(Error::invalid("patch_size", message));
        }
        let tokens = (size / patch).pow(2) + 1;
        let embeddings = scope.at("embeddings");
        let norm = |name: &str| scope.at(name).layer_norm(width, config.layer_norm_eps);
        let layers = (0..config.num_hidden_layers)
            .map(|i| {
                let scope = scope.at(format!("encoder.layers.{i}"));
                let widths = (width, config.intermediate_size);
                let heads = config.num_attention_heads;
                ClipLayer::load(&scope, widths, heads, config.layer_norm_eps, activation)
            })
            .collect::<Result<_>>()?;
        Ok(Self {
            patches: Conv2d::new(
                embeddings.tensor("patch_embedding.weight", &[width, 3, patch, patch])?,
                None,
                patch,
                0,
                None,
            ),
            class: embeddings.tensor("class_embedding", &[width])?,
            positions: embeddings.tensor("position_embedding.weight", &[tokens, width])?,
            // The misspelling is transformers' own.
            norm_in: norm("pre_layrnorm")?,
            layers,
            norm_out: norm("post_layernorm")?,
            projection: root.at("visual_projection").linear_no_bias(width, projection)?,
            size,
        })
    }

    /// `x` [B, size, size, 3], normalised → [B, projection].
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let patches = self.patches.forward(x)?.flatten(1, 2)?;
        let (batch, _, width) = patches.dims3()?;
        let class = self.class.reshape((1, 1, width))?.broadcast_as((batch, 1, width))?;
        let x = Tensor::cat(&[&class.contiguous()?, &patches], 1)?;
        let mut x = self.norm_in.forward(&x.broadcast_add(&self.positions)?)?;
        for layer in &self.layers {
            x = layer.forward(&x, None)?;
        }
        let class = x.narrow(1, 0, 1)?.squeeze(1)?.contiguous()?;
        Ok(self.projection.forward(&self.norm_out.forward(&class)?)?)
    }
}

/// Both encoders, the tokenizer and the image normalisation.
#[derive(Clone, Debug)]
pub struct Clip {
    text: ClipText,
    vision: Vision,
    tokenizer: ClipTokenizer,
    mean: [f32; 3],
    std: [f32; 3],
    sha256: String,
}

#[derive(Deserialize)]
struct Preprocessor {
    image_mean: [f32; 3],
    image_std: [f32; 3],
}

impl Clip {
    /// Reads a `CLIPModel` folder with its tokenizer and `preprocessor_config.json`.
    ///
    /// # Errors
    /// Names the file that is missing or does not fit.
    pub fn from_folder(folder: &Path) -> Result<Self> {
        let config: ClipConfig = read_json(&folder.join("config.json"))?;
        let preprocessor: Preprocessor = read_json(&folder.join("preprocessor_config.json"))?;
        let text_config =
            ClipTextConfig { projection_dim: config.projection_dim, ..config.text_config.clone() };
        let weights = Weights::from_folder(folder, DType::F32, &Device::Cpu)?;
        let (text, vision) = weights.build(None, |scope| {
            scope.ignore("logit_scale");
            let vision = Vision::load(scope, &config.vision_config, config.projection_dim)?;
            Ok((ClipText::load(scope, &text_config)?, vision))
        })?;
        let tokenizer = ClipTokenizer::from_folder(folder)?;
        let length = tokenizer.max_length().min(text_config.max_position_embeddings);
        Ok(Self {
            text,
            vision,
            tokenizer: tokenizer.with_max_length(length),
            mean: preprocessor.image_mean,
            std: preprocessor.image_std,
            sha256: sha256_of(&weight_files(folder)?)?,
        })
    }

    pub fn sha256(&self) -> &str {
        &self.sha256
    }

    /// Unit vectors [B, P] of texts.
    pub fn embed_texts(&self, texts: &[&str]) -> Result<Tensor> {
        let ids = texts.iter().map(|t| self.tokenizer.encode(t)).collect::<Result<Vec<_>>>()?;
        unit(&self.text.forward(&ids)?.pooled)
    }

    /// Unit vectors [B, P] of images of any size (scaled bicubically to the encoder's square).
    pub fn embed_images(&self, images: &[RgbImage]) -> Result<Tensor> {
        let size = self.vision.size;
        let mut pixels = Vec::with_capacity(images.len() * 3 * size * size);
        for image in images {
            let side = size as u32;
            let scaled = if image.dimensions() == (side, side) {
                image.clone()
            } else {
                image::imageops::resize(image, side, side, FilterType::CatmullRom)
            };
            let normal = |p: &image::Rgb<u8>| {
                [0, 1, 2].map(|c| (f32::from(p.0[c]) / 255.0 - self.mean[c]) / self.std[c])
            };
            pixels.extend(scaled.pixels().flat_map(normal));
        }
        let x = Tensor::from_vec(pixels, (images.len(), size, size, 3), &Device::Cpu)?;
        unit(&self.vision.forward(&x)?)
    }
}

fn unit(x: &Tensor) -> Result<Tensor> {
    Ok(x.broadcast_div(&x.sqr()?.sum_keepdim(D::Minus1)?.sqrt()?)?)
}
