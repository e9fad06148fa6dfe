//! Rewards: images and prompts in, one number per image out.

pub mod ensemble;
pub mod judge;
pub mod registry;
pub mod scene_clip;
mod set;
mod verifier;

use image::RgbImage;

use crate::Result;

pub use set::{RewardSet, checked};
pub use verifier::{MeteredVerifier, OBSERVED};

/// Something that judges images.
pub trait Reward: Send + Sync {
    /// Lower-case, unique: what requests call it.
    fn name(&self) -> &str;

    /// One line for listings.
    fn summary(&self) -> &str;

    /// Smallest and largest possible score; `None`: unbounded.
    fn range(&self) -> Option<(f64, f64)>;

    fn higher_is_better(&self) -> bool {
        true
    }

    /// Calls to a grader outside the process that one image costs.
    fn external_calls(&self) -> u64 {
        0
    }

    /// One score per image; `prompts` has one entry per image. NaN where scoring failed,
    /// never a default value. A score depends on its own image and prompt only.
    ///
    /// # Errors
    /// When no image could be scored at all.
    fn score(&self, images: &[RgbImage], prompts: &[&str]) -> Result<Vec<f64>>;
}
