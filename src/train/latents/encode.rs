//! Encodes a run of examples.

use std::collections::BTreeMap;
use std::ops::Range;

use candle_core::{DType, Device, Tensor};
use image::RgbImage;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::cache::CacheKey;
use super::transform::View;
use crate::data::Skipped;
use crate::data::images::ImageTextSet;
use crate::sdxl::vae::{Posterior, Vae};
use crate::sdxl::vae_tiling::Bounds;
use crate::util::CancelToken;
use crate::{Error, Result};

/// Images that are decoded and encoded at a time.
const IMAGES: usize = 16;

/// What is known of a latent beside its values.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Record {
    pub example: usize,
    pub variant: u32,
    pub name: String,
    pub caption: String,
    pub time_ids: [f32; 6],
    pub flipped: bool,
}

impl Record {
    /// What the latent's tensors are called.
    pub fn tensors(&self) -> [String; 2] {
        ["mean", "std"].map(|what| format!("{}.{}.{what}", self.example, self.variant))
    }
}

/// Latents in the order of their examples and variants, and the examples that have none.
#[derive(Default)]
pub(super) struct Encoded {
    pub records: Vec<Record>,
    /// Mean and standard deviation of each record, [C, h, w] in f32 on the CPU.
    pub latents: Vec<[Tensor; 2]>,
    pub skipped: Vec<Skipped>,
}

/// An example's views and what is seen in them.
struct Seen {
    example: usize,
    name: String,
    caption: String,
    views: Vec<(View, RgbImage)>,
}

fn see(set: &dyn ImageTextSet, key: &CacheKey, example: usize) -> Result<Seen, Skipped> {
    let broken = |reason: String| Skipped { row: set.name(example), reason };
    let read = set.example(example).map_err(|e| broken(e.to_string()))?;
    let size = [read.image.height(), read.image.width()];
    let view = |variant| {
        let view = key.transform.view(size, key.seed, example, variant).map_err(broken)?;
        Ok((view, view.of(&read.image)))
    };
    let views = (0..key.variants).map(view).collect::<Result<_, _>>()?;
    Ok(Seen { example, name: read.name, caption: read.caption, views })
}

/// Examples `range` of `set`. `done` is told of every example, by number.
pub(super) fn encode(
    set: &dyn ImageTextSet,
    vae: &Vae,
    device: &Device,
    key: &CacheKey,
    range: Range<usize>,
    cancel: &CancelToken,
    done: &mut dyn FnMut(usize),
) -> Result<Encoded> {
    let at_a_time = (IMAGES / key.variants as usize).max(1);
    let mut encoded = Encoded::default();
    for start in range.clone().step_by(at_a_time) {
        cancel.check()?;
        let end = range.end.min(start + at_a_time);
        let seen: Vec<_> = (start..end).into_par_iter().map(|i| see(set, key, i)).collect();
        let (mut usable, mut skipped) = (Vec::new(), Vec::new());
        for example in seen {
            match example {
                Ok(example) => usable.push(example),
                Err(row) => skipped.push(row),
            }
        }
        let images: Vec<&RgbImage> =
            usable.iter().flat_map(|s| s.views.iter().map(|(_, image)| image)).collect();
        let mut latents = latents(&images, vae, device)?.into_iter();
        for Seen { example, name, caption, views } in usable {
            let own: Vec<[Tensor; 2]> = latents.by_ref().take(views.len()).collect();
            if !own.iter().flatten().map(is_finite).collect::<Result<Vec<_>>>()?.contains(&false) {
                encoded.latents.extend(own);
                encoded.records.extend(views.iter().zip(0..).map(|((view, _), variant)| Record {
                    example,
                    variant,
                    name: name.clone(),
                    caption: caption.clone(),
                    time_ids: view.time_ids(),
                    flipped: view.flipped,
                }));
            } else {
                let reason = "the VAE makes numbers of it that are not finite".to_owned();
                skipped.push(Skipped { row: name, reason });
            }
        }
        encoded.skipped.extend(skipped);
        done(end);
    }
    Ok(encoded)
}

fn is_finite(x: &Tensor) -> Result<bool> {
    Ok(x.sum_all()?.to_scalar::<f32>()?.is_finite())
}

/// Mean and standard deviation of each image's latents, those of one size together.
fn latents(images: &[&RgbImage], vae: &Vae, device: &Device) -> Result<Vec<[Tensor; 2]>> {
    let mut sizes: BTreeMap<(u32, u32), Vec<usize>> = BTreeMap::new();
    for (i, image) in images.iter().enumerate() {
        sizes.entry(image.dimensions()).or_default().push(i);
    }
    let mut latents = vec![None; images.len()];
    for places in sizes.into_values() {
        let batch: Vec<&RgbImage> = places.iter().map(|&i| images[i]).collect();
        let pixels = pixels(&batch)?.to_device(device)?;
        let posterior = vae.encode_within(&pixels, &Bounds::default())?;
        let host = |x: &Tensor| x.to_device(&Device::Cpu)?.to_dtype(DType::F32);
        let posterior = Posterior { mean: host(&posterior.mean)?, std: host(&posterior.std)? };
        let Posterior { mean, std } = vae.scale_posterior(&posterior)?;
        for (row, place) in places.into_iter().enumerate() {
            latents[place] = Some([mean.get(row)?, std.get(row)?]);
        }
    }
    let all: Option<Vec<_>> = latents.into_iter().collect();
    all.ok_or_else(|| Error::Weights("the VAE left images out".into()))
}

/// Images of one size as [B, 3, H, W] in [-1, 1], f32 on the CPU.
///
/// # Errors
/// When the images differ in size.
pub fn pixels(images: &[&RgbImage]) -> Result<Tensor> {
    let (width, height) = images.first().map_or((0, 0), |i| i.dimensions());
    let (width, height) = (width as usize, height as usize);
    let mut values = Vec::with_capacity(images.len() * 3 * width * height);
    for image in images {
        for channel in 0..3 {
            values.extend(image.pixels().map(|p| f32::from(p.0[channel]) / 127.5 - 1.0));
        }
    }
    Ok(Tensor::from_vec(values, (images.len(), 3, height, width), &Device::Cpu)?)
}
