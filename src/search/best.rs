//! The best finished image so far.

use candle_core::Tensor;
use image::RgbImage;
use serde_json::{Value, json};

use super::env::SearchEnv;
use super::method::{CurvePoint, Outcome};
use crate::{Error, Result};

/// Keeps the winner of a stream of finished images. Ties go to the earlier one, a
/// non-finite score never wins, and if all are non-finite the first image stays.
#[derive(Debug, Default)]
pub struct Best {
    winner: Option<Winner>,
    offered: u64,
    curve: Vec<CurvePoint>,
    failed: u64,
    trace: Vec<Value>,
}

#[derive(Debug)]
struct Winner {
    score: f64,
    latents: Tensor,
    image: RgbImage,
}

impl Best {
    /// Offers the finished images of one batch: `latents` [B, C, h, w] and their decoded
    /// and scored images, in order of candidate. Tells the caller of each improvement.
    ///
    /// # Errors
    /// When tensors cannot be sliced.
    pub fn offer(
        &mut self,
        env: &mut SearchEnv,
        latents: &Tensor,
        images: Vec<RgbImage>,
        scores: &[f64],
    ) -> Result<()> {
        for (i, (image, score)) in images.into_iter().zip(scores.iter().copied()).enumerate() {
            let candidate = self.offered;
            self.offered += 1;
            let failed = !score.is_finite() && env.verifier.searched().is_some();
            self.failed += u64::from(failed);
            let improves = score.is_finite()
                && self.winner.as_ref().is_none_or(|best| {
                    !best.score.is_finite()
                        || env.verifier.orient(score) > env.verifier.orient(best.score)
                });
            if self.winner.is_none() || improves {
                let latents = latents.narrow(0, i, 1)?;
                self.winner = Some(Winner { score, latents, image });
            }
            if improves {
                let spent = env.meter().spent();
                self.curve.push(CurvePoint { spent, best: score });
                let entry = json!({"candidate": candidate, "score": score, "spent": spent});
                env.tell(Some(entry.clone()));
                self.trace.push(entry);
            }
        }
        Ok(())
    }

    /// Scores the winner with the remaining rewards.
    ///
    /// # Errors
    /// `Error::Invalid` when nothing was offered; the rewards'.
    pub fn finish(self, env: &mut SearchEnv) -> Result<Outcome> {
        let Some(Winner { score, latents, image }) = self.winner else {
            return Err(Error::invalid("method", "finished without an image"));
        };
        let known = env.verifier.searched().map(|_| score);
        let scores = env.verifier.report(&image, env.prompt, known)?;
        let unused_f = env.meter().budget().f.map(|f| f - env.meter().spent().f);
        Ok(Outcome {
            latents,
            image,
            score,
            scores,
            curve: self.curve,
            trace: self.trace,
            failed_scores: self.failed,
            unused_f,
        })
    }
}
