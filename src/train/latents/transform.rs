//! How an image becomes one of the size that is trained on.

use image::RgbImage;
use image::imageops::{FilterType, crop_imm, flip_horizontal_in_place, resize};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// Images whose sides differ by more than this factor are refused: scaled to cover the target
/// they would be mostly cropped away.
const LONGEST: u32 = 16;

/// Which part of a scaled image is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Crop {
    Center,
    Random,
}

/// Images are scaled (Lanczos) until they just cover the target, mirrored, and cropped to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Transform {
    /// Pixels along a side of the target, or the root of its area with `buckets`.
    pub resolution: u32,
    pub crop: Crop,
    /// Mirrors every other image, by chance.
    pub flip: bool,
    /// Targets of other shapes: of the [`Transform::targets`] the one that is nearest to the
    /// image's shape.
    pub buckets: bool,
    /// Pixels of which the sides of buckets are multiples; SDXL's are 64.
    pub step: u32,
}

/// How one image is seen. Sizes are [height, width] in pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct View {
    pub original: [u32; 2],
    pub scaled: [u32; 2],
    /// Top and left of the target within the scaled and mirrored image.
    pub offset: [u32; 2],
    pub target: [u32; 2],
    pub flipped: bool,
}

impl Transform {
    /// For a VAE that makes one latent position of `factor` × `factor` pixels.
    ///
    /// # Errors
    /// Names the field that does not fit.
    pub fn check(&self, factor: u32) -> Result<()> {
        let multiple = |field: &str, value: u32, of: u32, whose: &str| {
            if value > 0 && value.is_multiple_of(of.max(1)) {
                return Ok(());
            }
            let message = format!("expected a multiple of {of}, {whose}, got {value}");
            Err(Error::invalid(field, message))
        };
        multiple("resolution", self.resolution, factor, "the VAE's factor")?;
        if self.buckets {
            multiple("step", self.step, factor, "the VAE's factor")?;
            multiple("resolution", self.resolution, self.step, "the step")?;
        }
        Ok(())
    }

    /// Every target, [height, width]: the largest of at most `resolution`² pixels whose sides
    /// are multiples of the step, from half to twice the resolution.
    pub fn targets(&self) -> Vec<[u32; 2]> {
        let Self { resolution, step, .. } = *self;
        if !self.buckets {
            return vec![[resolution, resolution]];
        }
        let area = u64::from(resolution).pow(2);
        let least = (resolution / 2).max(1).next_multiple_of(step);
        let mut targets = Vec::new();
        for side in (least..=2 * resolution).step_by(step as usize) {
            let other = (area / u64::from(side)) as u32 / step * step;
            if other >= least {
                targets.extend([[side, other], [other, side]]);
            }
        }
        targets.sort_unstable();
        targets.dedup();
        targets
    }

    /// How `variant` of example `index` is seen, whose image is `original` [height, width]:
    /// equal calls give equal views.
    ///
    /// # Errors
    /// When the image is far too long for its width, or the other way round.
    pub fn view(
        &self,
        original: [u32; 2],
        seed: u64,
        index: usize,
        variant: u32,
    ) -> Result<View, String> {
        let [height, width] = original;
        let (short, long) = (height.min(width), height.max(width));
        if short == 0 || long / short >= LONGEST {
            return Err(format!("{width} × {height} pixels are too long for their width"));
        }
        let shape = |[h, w]: [u32; 2]| (f64::from(w) / f64::from(h)).ln();
        let off = |target: &[u32; 2]| (shape(*target) - shape(original)).abs();
        let area = |t: &[u32; 2]| t[0] * t[1];
        let targets = self.targets();
        let nearest = targets
            .iter()
            .min_by(|a, b| off(a).total_cmp(&off(b)).then_with(|| area(b).cmp(&area(a))));
        let target = *nearest.ok_or("the resolution is smaller than the step")?;
        let cover = |i: usize| f64::from(target[i]) / f64::from(original[i]);
        let scale = cover(0).max(cover(1));
        let scaled = [0, 1].map(|i| {
            let length = (f64::from(original[i]) * scale).round() as u32;
            length.max(target[i])
        });
        // Always the same draws, so that one option does not change what another chooses.
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(index as u64);
        rng.set_word_pos(u128::from(variant) * 16);
        let flipped = rng.random_bool(0.5) && self.flip;
        let drawn = [0, 1].map(|i| rng.random_range(0..=scaled[i] - target[i]));
        let offset = match self.crop {
            Crop::Random => drawn,
            Crop::Center => [0, 1].map(|i| (scaled[i] - target[i]) / 2),
        };
        Ok(View { original, scaled, offset, target, flipped })
    }
}

impl View {
    /// SDXL's size conditioning: original height and width, top and left of the crop, target
    /// height and width.
    pub fn time_ids(&self) -> [f32; 6] {
        let [[h, w], [top, left], [th, tw]] = [self.original, self.offset, self.target];
        [h, w, top, left, th, tw].map(|v| v as f32)
    }

    /// What is seen of `image`, which has the size `original`.
    pub fn of(&self, image: &RgbImage) -> RgbImage {
        let ([height, width], [top, left]) = (self.scaled, self.offset);
        let mut scaled = if self.scaled == self.original {
            image.clone()
        } else {
            resize(image, width, height, FilterType::Lanczos3)
        };
        if self.flipped {
            flip_horizontal_in_place(&mut scaled);
        }
        crop_imm(&scaled, left, top, self.target[1], self.target[0]).to_image()
    }
}
