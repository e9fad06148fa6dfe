//! Diffusion-Sharpening: fine-tuning SDXL on whole denoising trajectories, and
//! the server and bench that compare it with inference-time search.
//!
//! The modules are floors; each uses only those listed before it.

pub mod error;
pub mod progress;
pub mod util;

pub mod nn;
pub mod sdxl;

pub mod diffusion;

pub mod data;
pub mod rewards;

pub mod search;
pub mod train;

pub mod engine;

pub mod bench;
pub mod serve;

pub use error::{Error, Result};
