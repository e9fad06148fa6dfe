//! Writes rendered scenes with their captions, for training elsewhere.

use std::path::Path;

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::json;

use super::{Caption, Category, Scene, Split, render::render};
use crate::util::write_atomic;
use crate::{Error, Result};

/// Scene `index` of the stream `seed`: captions go round the six categories.
pub fn example(split: Split, seed: u64, index: u64) -> (Caption, Scene) {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(index);
    let category = Category::ALL[(index % Category::ALL.len() as u64) as usize];
    let caption = split.sample(category, &mut rng);
    let scene = Scene::sample(&caption, &mut rng);
    (caption, scene)
}

/// Renders `count` scenes of `split` into `out` (safetensors: `images` u8
/// [N, H, W, 3]) and their captions into `out` with the extension `jsonl`.
///
/// # Errors
/// When a file cannot be written.
pub fn export(out: &Path, split: Split, seed: u64, count: u64, size: u32) -> Result<()> {
    if size < 16 {
        return Err(Error::invalid("size", format!("expected at least 16 pixels, got {size}")));
    }
    let drawn: Vec<(Caption, Vec<u8>)> = (0..count)
        .into_par_iter()
        .map(|i| {
            let (caption, scene) = example(split, seed, i);
            (caption, render(&scene, size, size).into_raw())
        })
        .collect();
    let mut captions = String::new();
    let mut pixels = Vec::with_capacity(drawn.len() * (size * size * 3) as usize);
    for (caption, image) in drawn {
        let line = json!({"text": caption.to_string(), "category": caption.category()});
        captions.push_str(&line.to_string());
        captions.push('\n');
        pixels.extend_from_slice(&image);
    }
    let shape = vec![count as usize, size as usize, size as usize, 3];
    let view = TensorView::new(Dtype::U8, shape, &pixels).map_err(|e| Error::file(out, e))?;
    let bytes =
        safetensors::serialize([("images", view)], None).map_err(|e| Error::file(out, e))?;
    write_atomic(&out.with_extension("jsonl"), captions.as_bytes())?;
    write_atomic(out, &bytes)
}
