//! Judges many images against their captions and adds up the verdicts.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use image::RgbImage;
use rayon::prelude::*;
use safetensors::SafeTensors;
use safetensors::tensor::Dtype;
use serde::Deserialize;
use serde_json::json;

use super::judge::{ClaimKind, Judgement, judge};
use super::{Caption, Category};
use crate::util::write_atomic;
use crate::{Error, Result};

/// Sums of verdicts over many images.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Summary {
    pub images: usize,
    score: f64,
    all_hold: usize,
    /// For each kind: claims, claims that hold, sum of scores.
    kinds: BTreeMap<ClaimKind, (usize, usize, f64)>,
    /// For each category: images, images on which all claims hold, sum of scores.
    categories: BTreeMap<Category, (usize, usize, f64)>,
}

impl Summary {
    /// Adds one image.
    pub fn add(&mut self, category: Category, judgement: &Judgement) {
        self.images += 1;
        self.score += judgement.score;
        self.all_hold += usize::from(judgement.all_hold);
        let sums = self.categories.entry(category).or_default();
        sums.0 += 1;
        sums.1 += usize::from(judgement.all_hold);
        sums.2 += judgement.score;
        for v in &judgement.verdicts {
            let sums = self.kinds.entry(v.claim.kind).or_default();
            sums.0 += 1;
            sums.1 += usize::from(v.holds);
            sums.2 += v.score;
        }
    }

    /// Mean score of an image.
    pub fn mean_score(&self) -> f64 {
        share(self.score, self.images)
    }

    /// Share of the images on which every claim holds.
    pub fn all_hold(&self) -> f64 {
        share(self.all_hold as f64, self.images)
    }

    /// Share of all claims that hold.
    pub fn claim_accuracy(&self) -> f64 {
        let (n, held) = self.kinds.values().fold((0, 0), |s, k| (s.0 + k.0, s.1 + k.1));
        share(held as f64, n)
    }

    /// Share of the claims of one kind that hold; NaN if there are none.
    pub fn kind_accuracy(&self, kind: ClaimKind) -> f64 {
        self.kinds.get(&kind).map_or(f64::NAN, |s| share(s.1 as f64, s.0))
    }

    /// Mean score of one category; NaN if it has no images.
    pub fn category_score(&self, category: Category) -> f64 {
        self.categories.get(&category).map_or(f64::NAN, |s| share(s.2, s.0))
    }
}

fn share(sum: f64, n: usize) -> f64 {
    if n == 0 { f64::NAN } else { sum / n as f64 }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:<10} {:>7} {:>8} {:>8}", "claim", "n", "holds", "score")?;
        for (kind, s) in &self.kinds {
            let (held, score) = (share(s.1 as f64, s.0), share(s.2, s.0));
            writeln!(f, "{:<10} {:>7} {held:>8.4} {score:>8.4}", kind.word(), s.0)?;
        }
        let claims: usize = self.kinds.values().map(|s| s.0).sum();
        writeln!(f, "{:<10} {claims:>7} {:>8.4}", "all", self.claim_accuracy())?;
        writeln!(f, "\n{:<10} {:>7} {:>8} {:>8}", "category", "images", "all hold", "score")?;
        for (category, s) in &self.categories {
            let (held, score) = (share(s.1 as f64, s.0), share(s.2, s.0));
            writeln!(f, "{:<10} {:>7} {held:>8.4} {score:>8.4}", category.word(), s.0)?;
        }
        let (images, held, score) = (self.images, self.all_hold(), self.mean_score());
        write!(f, "{:<10} {images:>7} {held:>8.4} {score:>8.4}", "all")
    }
}

#[derive(Deserialize)]
struct Line {
    text: String,
}

/// Judges `images` (safetensors: `images` u8 [N, H, W, 3]) against the lines of
/// `captions` (jsonl with `text`), and writes every judgement to `out` (jsonl).
///
/// # Errors
/// When a file cannot be read or written, or a caption is not of the grammar.
pub fn judge_files(images: &Path, captions: &Path, out: Option<&Path>) -> Result<Summary> {
    let bytes = std::fs::read(images).map_err(|e| Error::file(images, e))?;
    let (size, pixels) = tensor(&bytes).map_err(|e| Error::file(images, e))?;
    let text = std::fs::read_to_string(captions).map_err(|e| Error::file(captions, e))?;
    let parsed = text
        .lines()
        .filter(|l| !l.trim().is_empty())
        .enumerate()
        .map(|(i, l)| {
            let at = |e: String| Error::file(captions, format!("line {}: {e}", i + 1));
            let line: Line = serde_json::from_str(l).map_err(|e| at(e.to_string()))?;
            Caption::parse(&line.text).map_err(|e| at(e.to_string()))
        })
        .collect::<Result<Vec<Caption>>>()?;
    if parsed.len() != size[0] {
        let message = format!("{} captions for {} images", parsed.len(), size[0]);
        return Err(Error::file(captions, message));
    }
    let frame = size[1] * size[2] * 3;
    let judged = parsed
        .par_iter()
        .enumerate()
        .map(|(i, caption)| {
            let raw = pixels[i * frame..(i + 1) * frame].to_vec();
            let image = RgbImage::from_raw(size[2] as u32, size[1] as u32, raw)
                .ok_or_else(|| Error::file(images, format!("image {i} has the wrong size")))?;
            Ok(judge(&image, caption))
        })
        .collect::<Result<Vec<Judgement>>>()?;
    let mut summary = Summary::default();
    let mut lines = String::new();
    for (caption, judgement) in parsed.iter().zip(&judged) {
        summary.add(caption.category(), judgement);
        let line = json!({
            "text": caption.to_string(),
            "category": caption.category(),
            "score": judgement.score,
            "all_hold": judgement.all_hold,
            "verdicts": judgement.verdicts,
        });
        lines.push_str(&line.to_string());
        lines.push('\n');
    }
    if let Some(out) = out {
        write_atomic(out, lines.as_bytes())?;
    }
    Ok(summary)
}

/// `[N, H, W]` and the bytes of the tensor `images`.
fn tensor(bytes: &[u8]) -> std::result::Result<([usize; 3], &[u8]), String> {
    let file = SafeTensors::deserialize(bytes).map_err(|e| e.to_string())?;
    let view = file.tensor("images").map_err(|e| e.to_string())?;
    match (view.dtype(), view.shape()) {
        (Dtype::U8, &[n, h, w, 3]) => Ok(([n, h, w], view.data())),
        (dtype, shape) => Err(format!("images: expected U8 [N, H, W, 3], got {dtype:?} {shape:?}")),
    }
}
