//! Flags that say where a model runs.

use crate::Result;
use crate::nn::device::{DeviceChoice, NumberChoice, Placement};

/// Device and numbers of a model.
#[derive(clap::Args, Clone, Copy, Debug, Default)]
pub struct PlacementArgs {
    /// auto, cpu or cuda:N.
    #[arg(long, env = "DS_BENCH_DEVICE", default_value_t, value_name = "DEVICE")]
    pub device: DeviceChoice,
    /// Numbers of U-Net and text towers: auto, f32, bf16 or f16.
    #[arg(long, env = "DS_BENCH_DTYPE", default_value_t, value_name = "TYPE")]
    pub dtype: NumberChoice,
    /// Numbers of the VAE: auto (f32), f32, bf16 or f16.
    #[arg(long, env = "DS_BENCH_VAE_DTYPE", default_value_t, value_name = "TYPE")]
    pub vae_dtype: NumberChoice,
}

impl PlacementArgs {
    /// # Errors
    /// When the device is not there or does not offer the numbers.
    pub fn placement(&self) -> Result<Placement> {
        Placement::new(self.device, self.dtype, self.vae_dtype)
    }
}
