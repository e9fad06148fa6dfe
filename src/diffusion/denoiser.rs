//! The contracts between a diffusion network and everything that samples from it.

use std::sync::Arc;

use candle_core::{Device, Tensor};
use image::RgbImage;

use crate::Result;

/// One encoded prompt with SDXL's micro-conditioning.
#[derive(Clone, Debug)]
pub struct TextCond {
    /// Token states, [T, D].
    pub context: Tensor,
    /// Pooled state, [P].
    pub pooled: Tensor,
    /// Original height and width, crop top and left, target height and width, in pixels.
    pub time_ids: [f32; 6],
}

/// What one image is conditioned on, and how strongly.
#[derive(Clone, Debug)]
pub struct Conditioning {
    pub positive: TextCond,
    pub negative: Option<TextCond>,
    /// w in uncond + w (cond - uncond); 1 is no guidance.
    pub guidance_scale: f64,
    /// phi of Lin et al. 2023, eq. 16; 0 is off.
    pub guidance_rescale: f64,
}

impl Conditioning {
    /// No guidance.
    pub fn plain(positive: TextCond) -> Self {
        Self { positive, negative: None, guidance_scale: 1.0, guidance_rescale: 0.0 }
    }

    /// The unconditional text, when guidance is active.
    pub fn unconditional(&self) -> Option<&TextCond> {
        self.negative.as_ref().filter(|_| self.guidance_scale != 1.0)
    }

    /// Network forwards that one guided evaluation costs: 2 with guidance, else 1.
    pub fn forwards_per_eval(&self) -> u64 {
        if self.unconditional().is_some() { 2 } else { 1 }
    }
}

/// A network: one text per row, no guidance.
pub trait NoiseModel: Send + Sync {
    fn device(&self) -> &Device;

    /// (channels, height, width) of the latent of an image of `width` x `height` pixels.
    ///
    /// # Errors
    /// `Error::Invalid` on `width` or `height` when the model cannot make that size.
    fn latent_shape(&self, width: u32, height: u32) -> Result<(usize, usize, usize)>;

    /// Raw network output [B, C, h, w] in f32, of the schedule's prediction type.
    /// `x`: scaled network input [B, C, h, w], f32. `t`: timesteps [B], f32.
    ///
    /// # Errors
    /// The network's.
    fn forward(&self, x: &Tensor, t: &Tensor, text: &[&TextCond]) -> Result<Tensor>;
}

/// A guided prediction for a batch whose samples each have their own timestep and
/// conditioning. Rows never influence each other.
pub trait Denoiser: Send + Sync {
    fn device(&self) -> &Device;

    /// As `NoiseModel::latent_shape`.
    ///
    /// # Errors
    /// As `NoiseModel::latent_shape`.
    fn latent_shape(&self, width: u32, height: u32) -> Result<(usize, usize, usize)>;

    /// Guided prediction [B, C, h, w] in f32; arguments as `NoiseModel::forward`.
    ///
    /// # Errors
    /// The network's.
    fn predict(&self, x: &Tensor, t: &Tensor, cond: &[&Conditioning]) -> Result<Tensor>;
}

/// Turns latents into images.
pub trait Decoder: Send + Sync {
    /// `latents`: [B, C, h, w] as a trajectory ends; B images.
    ///
    /// # Errors
    /// The decoder's.
    fn decode(&self, latents: &Tensor) -> Result<Vec<RgbImage>>;
}

impl<M: NoiseModel + ?Sized> NoiseModel for Arc<M> {
    fn device(&self) -> &Device {
        (**self).device()
    }

    fn latent_shape(&self, width: u32, height: u32) -> Result<(usize, usize, usize)> {
        (**self).latent_shape(width, height)
    }

    fn forward(&self, x: &Tensor, t: &Tensor, text: &[&TextCond]) -> Result<Tensor> {
        (**self).forward(x, t, text)
    }
}
