//! Noise schedule, solvers, guidance, keyed noise and the cost meter.

pub mod config;
pub mod cost;
pub mod ddim;
pub mod denoiser;
pub mod dpm;
pub mod euler;
pub mod gmm;
pub mod grid;
pub mod guidance;
pub mod heun;
pub mod joining;
pub mod meter;
pub mod noise;
pub mod packed;
pub mod recording;
pub mod schedule;
pub mod sdxl_model;
pub mod solver;
pub mod sparing;
mod text_cache;
pub mod trajectory;
