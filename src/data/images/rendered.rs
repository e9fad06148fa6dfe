//! The scene world's images.

use super::fingerprint::Fingerprint;
use super::{Example, ImageTextSet};
use crate::data::scenes::Split;
use crate::data::scenes::export::example;
use crate::data::scenes::render::render;
use crate::{Error, Result};

/// The first `count` of one stream of scenes, rendered when they are asked for.
pub(super) struct Scenes {
    split: Split,
    count: usize,
    seed: u64,
    size: u32,
    fingerprint: String,
}

impl Scenes {
    pub fn new(split: Split, count: usize, seed: u64, size: u32) -> Result<Self> {
        if count == 0 {
            return Err(Error::invalid("images", "at least one scene is needed"));
        }
        // The number is that of the world: raised when the same seed draws or renders otherwise.
        let text = format!("{split} {count} {seed} {size}");
        let fingerprint = Fingerprint::new("scenes 1").text(&text).finish();
        Ok(Self { split, count, seed, size, fingerprint })
    }
}

impl ImageTextSet for Scenes {
    fn summary(&self) -> String {
        let Self { split, count, seed, size, .. } = self;
        format!("{count} scenes of the {split} split, seed {seed}, {size} px")
    }

    fn len(&self) -> usize {
        self.count
    }

    fn name(&self, index: usize) -> String {
        format!("scene {index}")
    }

    fn example(&self, index: usize) -> Result<Example> {
        let (caption, scene) = example(self.split, self.seed, index as u64);
        Ok(Example {
            name: self.name(index),
            caption: caption.to_string(),
            image: render(&scene, self.size, self.size),
        })
    }

    fn fingerprint(&self) -> &str {
        &self.fingerprint
    }
}
