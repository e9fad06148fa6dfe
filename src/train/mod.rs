//! Fine-tuning.

pub mod latents;
pub mod optimizer;
