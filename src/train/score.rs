//! Latents to images to one number each: the rewards that a run trains on.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::settings::{RewardScale, Settings};
use crate::diffusion::cost::Units;
use crate::diffusion::meter::MeteredDecoder;
use crate::rewards::{Reward, RewardSet, checked};
use crate::{Error, Result};
use candle_core::Tensor;

/// Weighted rewards.
pub struct Scorer {
    parts: Vec<Part>,
    scale: RewardScale,
    decode_batch: usize,
}

struct Part {
    reward: Arc<dyn Reward>,
    weight: f64,
    spread: Spread,
}

/// The running mean of a reward's variance within sets.
#[derive(Clone, Copy, Debug, Default)]
struct Spread {
    variance: f64,
    weight: f64,
}

/// How much of the running mean one update keeps.
const KEEP: f64 = 0.98;

impl Spread {
    /// Takes in scores set by set; those that are not finite are left out.
    fn update<'a>(&mut self, sets: impl Iterator<Item = &'a [f64]>) {
        let variances: Vec<f64> = sets.filter_map(variance).collect();
        if variances.is_empty() {
            return;
        }
        let mean = variances.iter().sum::<f64>() / variances.len() as f64;
        self.variance = KEEP * self.variance + (1.0 - KEEP) * mean;
        self.weight = KEEP * self.weight + (1.0 - KEEP);
    }

    /// 1 where nothing differed yet.
    fn deviation(&self) -> f64 {
        let deviation = (self.variance / self.weight).sqrt();
        if deviation.is_finite() && deviation > 0.0 { deviation } else { 1.0 }
    }
}

/// Of the finite ones, where there are any.
pub(super) fn finite_mean(scores: &[f64]) -> Option<f64> {
    let finite: Vec<f64> = scores.iter().copied().filter(|s| s.is_finite()).collect();
    (!finite.is_empty()).then(|| finite.iter().sum::<f64>() / finite.len() as f64)
}

/// Unbiased, of the finite ones of at least two.
pub(super) fn variance(scores: &[f64]) -> Option<f64> {
    let finite: Vec<f64> = scores.iter().copied().filter(|s| s.is_finite()).collect();
    let n = finite.len() as f64;
    let mean = finite.iter().sum::<f64>() / n;
    (finite.len() > 1).then(|| finite.iter().map(|s| (s - mean).powi(2)).sum::<f64>() / (n - 1.0))
}

/// Scores of images, images of one group next to each other.
#[derive(Clone, Debug, Default)]
pub struct Scores {
    /// The weighted sum, higher is better; NaN where any part is.
    pub total: Vec<f64>,
    /// Each reward's own scores, by name.
    pub parts: Vec<(String, Vec<f64>)>,
}

impl Scores {
    /// Their mean and deviation (`reward`, `reward_deviation`), and each reward's own mean
    /// (`reward_NAME`); scores that are not finite are left out.
    pub fn means(&self) -> BTreeMap<String, f64> {
        let mut means = BTreeMap::new();
        means.extend(finite_mean(&self.total).map(|mean| ("reward".into(), mean)));
        means.extend(
            self.parts.iter().filter_map(|(name, scores)| {
                Some((format!("reward_{name}"), finite_mean(scores)?))
            }),
        );
        means.extend(variance(&self.total).map(|v| ("reward_deviation".into(), v.sqrt())));
        means
    }
}

impl Scorer {
    /// The rewards that the settings name; none where there is nothing to choose from.
    ///
    /// # Errors
    /// Names `rewards` where one is unknown, given twice, or has no usable weight.
    pub fn new(set: &RewardSet, settings: &Settings) -> Result<Self> {
        let mut parts: Vec<Part> = Vec::new();
        let chooses = settings.n > 1;
        for spec in settings.rewards.iter().filter(|_| chooses) {
            let (name, weight) = match spec.split_once(':') {
                None => (spec.as_str(), 1.0),
                Some((name, weight)) => (name, weight.parse::<f64>().unwrap_or(f64::NAN)),
            };
            if !weight.is_finite() || weight == 0.0 {
                let message = format!("'{spec}' is not like name or name:weight");
                return Err(Error::invalid("rewards", message));
            }
            let known = || Error::unknown("rewards", "reward", name, set.names());
            let reward = set.get(name).map_err(|_| known())?.clone();
            if parts.iter().any(|part| part.reward.name() == name) {
                return Err(Error::invalid("rewards", format!("'{name}' is given twice")));
            }
            let weight = if reward.higher_is_better() { weight } else { -weight };
            parts.push(Part { reward, weight, spread: Spread::default() });
        }
        let (scale, decode_batch) = (settings.reward_scale, settings.decode_batch.max(1));
        Ok(Self { parts, scale, decode_batch })
    }

    pub fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.parts.iter().map(|part| part.reward.name())
    }

    /// Decodes latents [B, C, h, w] and scores the images, one prompt each. `sets` says which
    /// images are compared with each other: each reward's deviation within sets is brought up
    /// to date first. Costs a Y and a V for each image.
    ///
    /// # Errors
    /// The decoder's and the rewards'.
    pub fn score(
        &mut self,
        decoder: &MeteredDecoder,
        latents: &Tensor,
        prompts: &[&str],
        sets: &[usize],
    ) -> Result<Scores> {
        let meter = decoder.meter();
        let mut parts: Vec<(String, Vec<f64>)> =
            self.names().map(|name| (name.to_owned(), Vec::new())).collect();
        let calls: u64 = self.parts.iter().map(|p| p.reward.external_calls()).sum();
        for (i, prompts) in prompts.chunks(self.decode_batch).enumerate() {
            let images =
                decoder.decode(&latents.narrow(0, i * self.decode_batch, prompts.len())?)?;
            let v = images.len() as u64;
            meter.reserve(Units { v, l: v * calls, ..Units::default() })?;
            for (part, (_, scores)) in self.parts.iter().zip(&mut parts) {
                let score = || checked(part.reward.as_ref(), &images, prompts);
                scores.extend(meter.time("reward", score)?);
            }
        }
        let count = sets.iter().max().map_or(0, |last| last + 1);
        let mut total = vec![0.0; prompts.len()];
        for (part, (_, scores)) in self.parts.iter_mut().zip(&parts) {
            let mut by_set = vec![Vec::new(); count];
            scores.iter().zip(sets).for_each(|(score, set)| by_set[*set].push(*score));
            part.spread.update(by_set.iter().map(Vec::as_slice));
            let factor = match self.scale {
                RewardScale::None => part.weight,
                RewardScale::Deviation => part.weight / part.spread.deviation(),
            };
            total.iter_mut().zip(scores).for_each(|(total, score)| *total += factor * score);
        }
        Ok(Scores { total, parts })
    }

    /// What a later run needs to continue to the bit: each reward's spread, as bits.
    pub fn state(&self) -> Vec<[u64; 2]> {
        let bits = |p: &Part| [p.spread.variance.to_bits(), p.spread.weight.to_bits()];
        self.parts.iter().map(bits).collect()
    }

    /// # Errors
    /// When the state is of other rewards.
    pub fn load_state(&mut self, state: &[[u64; 2]]) -> Result<()> {
        if state.len() != self.parts.len() {
            return Err(Error::invalid("rewards", "the checkpoint was made with others"));
        }
        for (part, [variance, weight]) in self.parts.iter_mut().zip(state) {
            part.spread =
                Spread { variance: f64::from_bits(*variance), weight: f64::from_bits(*weight) };
        }
        Ok(())
    }
}
