//! The scene judge as a reward.

use image::RgbImage;

use super::Reward;
use crate::Result;
use crate::data::scenes::{Caption, judge::judge};

/// Mean soft score of the caption's claims. Sees pixels only, trained on nothing.
pub struct SceneJudge;

impl Reward for SceneJudge {
    fn name(&self) -> &str {
        "judge"
    }

    fn summary(&self) -> &str {
        "Share of the caption's claims that hold in the picture, by exact detection of scene objects"
    }

    fn range(&self) -> Option<(f64, f64)> {
        Some((0.0, 1.0))
    }

    /// NaN for a prompt that is no caption of the scene world.
    fn score(&self, images: &[RgbImage], prompts: &[&str]) -> Result<Vec<f64>> {
        Ok(images
            .iter()
            .zip(prompts)
            .map(|(image, prompt)| {
                Caption::parse(prompt).map_or(f64::NAN, |c| judge(image, &c).score)
            })
            .collect())
    }
}
