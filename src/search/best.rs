//! The best finished image so far.

use candle_core::Tensor;
use image::RgbImage;
use serde_json::{Value, json};

use super::env::{Judged, SearchEnv};
use super::method::{CurvePoint, Outcome};
use super::weights::first_max;
use crate::rewards::ensemble::Marks;
use crate::{Error, Result};

/// Keeps the winner of a stream of finished images. Ties go to the earlier one, an image whose
/// score failed never wins, and if all failed the first stays. Where values are relative to the
/// other candidates, all images are kept until the end and compared with each other.
#[derive(Debug, Default)]
pub struct Best {
    kept: Vec<Finished>,
    offered: u64,
    curve: Vec<CurvePoint>,
    trace: Vec<Value>,
}

#[derive(Debug)]
struct Finished {
    candidate: u64,
    value: f64,
    marks: Marks,
    latents: Tensor,
    image: RgbImage,
}

impl Best {
    /// Offers finished images: `latents` [B, C, h, w] and what became of them, in order of
    /// candidate. Tells the caller of each improvement.
    ///
    /// # Errors
    /// When tensors cannot be sliced.
    pub fn offer(&mut self, env: &mut SearchEnv, latents: &Tensor, judged: Judged) -> Result<()> {
        let relative = env.verifier.is_relative();
        let Judged { images, marks, values } = judged;
        for (i, ((image, marks), value)) in images.into_iter().zip(marks).zip(values).enumerate() {
            let candidate = self.offered;
            self.offered += 1;
            let improves = self.kept.last().is_none_or(|best| value > best.value);
            if !improves && !relative {
                continue;
            }
            if !relative {
                self.kept.clear();
            }
            let latents = latents.narrow(0, i, 1)?;
            let finished = Finished { candidate, value, marks, latents, image };
            if !relative && value.is_finite() {
                self.improved(env, &finished);
            }
            self.kept.push(finished);
        }
        Ok(())
    }

    /// Whether nothing was offered.
    pub fn is_empty(&self) -> bool {
        self.kept.is_empty()
    }

    fn improved(&mut self, env: &mut SearchEnv, finished: &Finished) {
        let Finished { candidate, value, marks, .. } = finished;
        let (spent, score) = (env.meter().spent(), env.verifier.score_of(*value, marks));
        self.curve.push(CurvePoint { spent, best: score });
        let entry = json!({"candidate": candidate, "score": score, "spent": spent});
        self.note(env, entry);
    }

    /// Records a decision, and tells the caller of it.
    pub fn note(&mut self, env: &mut SearchEnv, entry: Value) {
        env.tell(Some(entry.clone()));
        self.trace.push(entry);
    }

    /// Offers the last finished latents [B, C, h, w] and finishes.
    ///
    /// # Errors
    /// As [`SearchEnv::judge`] and [`Best::finish`].
    pub fn finish_with(mut self, env: &mut SearchEnv, latents: &Tensor) -> Result<Outcome> {
        let judged = env.judge(latents)?;
        self.offer(env, latents, judged)?;
        self.finish(env)
    }

    /// Scores the winner with the remaining rewards.
    ///
    /// # Errors
    /// `Error::Invalid` when nothing was offered; the rewards'.
    pub fn finish(mut self, env: &mut SearchEnv) -> Result<Outcome> {
        if self.kept.len() > 1 {
            let marks: Vec<Marks> = self.kept.iter().map(|f| f.marks.clone()).collect();
            let values = env.verifier.values(&marks);
            let (at, value) = first_max(&values);
            let mut winner = self.kept.swap_remove(at);
            winner.value = value;
            if value.is_finite() {
                self.improved(env, &winner);
            }
            self.kept = vec![winner];
        }
        let Some(Finished { value, marks, latents, image, .. }) = self.kept.pop() else {
            return Err(Error::invalid("method", "finished without an image"));
        };
        let mut scores = env.verifier.report(&image, env.prompt, &marks)?;
        let score = env.verifier.score_of(value, &marks);
        if let Some(ensemble) = env.verifier.searched().filter(|ensemble| !ensemble.is_relative()) {
            scores.entry(ensemble.name()).or_insert(score);
        }
        let unused_f = env.meter().budget().f.map(|f| f - env.meter().spent().f);
        Ok(Outcome {
            latents,
            image,
            score,
            scores,
            curve: self.curve,
            trace: self.trace,
            failed_scores: env.failed_scores,
            unused_f,
        })
    }
}
