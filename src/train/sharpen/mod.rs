//! Diffusion-Sharpening (arXiv 2502.12146): several denoising trajectories from noised latents,
//! scored along the way; training on the best (SFT), or on the best against the worst (RLHF).

mod chain;
mod draw;
mod select;
mod step;
mod tracks;

pub use chain::{Chain, Level, Row};
pub use draw::{Start, key as group_key, starts, stride};
pub use select::{Pick, Skip, aggregate, select};
pub use step::{Group, Models, Report, Sharpening};
