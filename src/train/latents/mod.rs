//! A set of images as the VAE's latents, kept on disk: how each image is scaled, cropped and
//! mirrored ([`transform`]), the files ([`cache`]), and the order in which training takes the
//! latents from them ([`batches`]).

pub mod batches;
pub mod cache;
mod encode;
pub mod transform;

pub use batches::Batches;
pub use cache::{CacheKey, LatentCache, LatentExample};
pub use encode::pixels;
pub use transform::{Crop, Transform, View};
