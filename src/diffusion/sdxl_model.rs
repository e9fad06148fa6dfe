//! SDXL behind the contracts of this floor.

use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use image::{Rgb, RgbImage};

use super::denoiser::{Decoder, NoiseModel, TextCond};
use super::text_cache::TextCache;
use crate::nn::threads;
use crate::sdxl::folder::EncodedText;
use crate::sdxl::lora::{Adapters, LoraMap};
use crate::sdxl::vae_tiling::Bounds;
use crate::sdxl::{ClipText, ClipTokenizer, ModelFolder, UNet};
use crate::{Error, Result};

/// A checkpoint, or a checkpoint with adapters in its networks.
#[derive(Clone)]
pub struct SdxlModel {
    folder: Arc<ModelFolder>,
    unet: Arc<UNet>,
    towers: Arc<[ClipText; 2]>,
    /// What this U-Net made of texts.
    texts: Arc<TextCache>,
    device: Device,
    /// What decoding may take.
    bounds: Bounds,
}

impl SdxlModel {
    pub fn new(folder: Arc<ModelFolder>) -> Self {
        let unet = Arc::new(folder.unet.clone());
        let towers = Arc::new([folder.text_1.clone(), folder.text_2.clone()]);
        let (device, bounds) = (folder.device().clone(), Bounds::default());
        Self { unet, towers, folder, texts: Arc::default(), device, bounds }
    }

    /// The same checkpoint with another U-Net.
    pub fn with_unet(&self, unet: UNet) -> Self {
        Self { unet: Arc::new(unet), texts: Arc::default(), ..self.clone() }
    }

    /// The same model, which keeps what it makes of texts for as long as it lives itself.
    pub fn with_own_texts(&self) -> Self {
        Self { texts: Arc::default(), ..self.clone() }
    }

    /// The same model, decoding within other bounds.
    pub fn with_bounds(&self, bounds: Bounds) -> Self {
        Self { bounds, ..self.clone() }
    }

    /// The same checkpoint with adapters in its U-Net and its text towers.
    ///
    /// # Errors
    /// When an adapter does not fit its network.
    fn with_adapters(&self, adapters: &Adapters) -> Result<Self> {
        let model = self.with_unet(self.folder.unet_with(&adapters.unet)?);
        if adapters.text.iter().all(LoraMap::is_empty) {
            return Ok(model);
        }
        Ok(Self { towers: Arc::new(self.folder.towers_with(&adapters.text)?), ..model })
    }

    /// The same checkpoint with the adapter that a file holds, in any naming that is known.
    ///
    /// # Errors
    /// Names the file, which cannot be read or does not fit.
    pub fn with_adapter_file(&self, path: &Path) -> Result<Self> {
        let (dtype, device) = (self.folder.unet_weights.computed(), self.folder.device());
        let adapters = Adapters::read(path, &self.folder.adapter_names(), dtype, device)?;
        self.with_adapters(&adapters).map_err(|e| match e {
            Error::Weights(message) => Error::file(path, message),
            other => other,
        })
    }

    pub fn folder(&self) -> &ModelFolder {
        &self.folder
    }

    /// Encodes prompts, with the micro-conditioning of an uncropped image of this size.
    ///
    /// # Errors
    /// The tokenizer's and the towers'.
    pub fn encode(
        &self,
        tokenizers: &[ClipTokenizer; 2],
        prompts: &[&str],
        (width, height): (u32, u32),
    ) -> Result<Vec<TextCond>> {
        let rows =
            |t: &ClipTokenizer| prompts.iter().map(|p| t.encode(p)).collect::<Result<Vec<_>>>();
        let ids = [rows(&tokenizers[0])?, rows(&tokenizers[1])?];
        let encoded = threads::within(|| {
            EncodedText::of([&self.towers[0], &self.towers[1]], [&ids[0], &ids[1]])
        })?;
        (0..prompts.len())
            .map(|i| {
                Ok(TextCond {
                    context: encoded.context.get(i)?.contiguous()?,
                    pooled: encoded.pooled.get(i)?.contiguous()?,
                    time_ids: time_ids(width, height),
                })
            })
            .collect()
    }

    /// The null conditioning that the checkpoint was made for: zeros, or the encoding of "".
    ///
    /// # Errors
    /// The tokenizer's and the towers'.
    pub fn null(&self, tokenizers: &[ClipTokenizer; 2], size: (u32, u32)) -> Result<TextCond> {
        let empty = self.encode(tokenizers, &[""], size)?.remove(0);
        if !self.folder.force_zeros_for_empty_prompt {
            return Ok(empty);
        }
        Ok(TextCond {
            context: empty.context.zeros_like()?,
            pooled: empty.pooled.zeros_like()?,
            ..empty
        })
    }
}

/// (height, width, 0, 0, height, width): an image that was neither scaled nor cropped.
pub fn time_ids(width: u32, height: u32) -> [f32; 6] {
    let (w, h) = (width as f32, height as f32);
    [h, w, 0.0, 0.0, h, w]
}

impl NoiseModel for SdxlModel {
    fn device(&self) -> &Device {
        &self.device
    }

    fn latent_shape(&self, width: u32, height: u32) -> Result<(usize, usize, usize)> {
        let factor = self.folder.vae.config().factor() as u32;
        for (field, side) in [("width", width), ("height", height)] {
            if side == 0 || side % factor != 0 {
                return Err(Error::invalid(
                    field,
                    format!("expected a positive multiple of {factor}, got {side}"),
                ));
            }
        }
        let channels = self.folder.vae.config().latent_channels;
        Ok((channels, (height / factor) as usize, (width / factor) as usize))
    }

    fn forward(&self, x: &Tensor, t: &Tensor, text: &[&TextCond]) -> Result<Tensor> {
        let timesteps = t.to_vec1::<f32>()?;
        if timesteps.len() != text.len() {
            let message = format!("{} timesteps for {} texts", timesteps.len(), text.len());
            return Err(Error::invalid("timesteps", message));
        }
        let output = threads::within(|| {
            let (states, shifts) = self.texts.batch(&self.unet, &timesteps, text)?;
            Ok(self.unet.forward_encoded(x, &states, &shifts)?.to_dtype(DType::F32)?)
        });
        if output.as_ref().is_err_and(Error::is_out_of_memory) {
            self.texts.clear();
        }
        output
    }
}

impl Decoder for SdxlModel {
    fn decode(&self, latents: &Tensor) -> Result<Vec<RgbImage>> {
        threads::within(|| {
            let mut images = Vec::new();
            for part in self.folder.vae.decode_slices(latents, &self.bounds)? {
                images.extend(to_images(&part?)?);
            }
            Ok(images)
        })
    }
}

/// [B, 3, H, W] in [-1, 1] → 8-bit images; values beyond are clamped, NaN becomes black.
pub fn to_images(x: &Tensor) -> Result<Vec<RgbImage>> {
    let (batch, _, height, width) = x.dims4()?;
    let data = ((x.to_dtype(DType::F32)? + 1.0)? * 127.5)?.flatten_all()?.to_vec1::<f32>()?;
    let plane = height * width;
    Ok((0..batch)
        .map(|b| {
            RgbImage::from_fn(width as u32, height as u32, |px, py| {
                let at = b * 3 * plane + py as usize * width + px as usize;
                // A float cast to u8 saturates, and NaN becomes 0.
                Rgb([0, 1, 2].map(|c| data[at + c * plane].round() as u8))
            })
        })
        .collect())
}
