//! The metered handle through which methods reach rewards.

use std::collections::BTreeMap;
use std::sync::Arc;

use image::RgbImage;

use super::set::checked;
use super::{Reward, RewardSet};
use crate::Result;
use crate::diffusion::cost::Units;
use crate::diffusion::meter::Meter;

/// Scores with the searched reward while searching, and with all others once, on the
/// image that is returned. V counts images, not rewards.
#[derive(Clone)]
pub struct MeteredVerifier<'a> {
    set: &'a RewardSet,
    searched: Option<Arc<dyn Reward>>,
    meter: &'a Meter,
}

impl<'a> MeteredVerifier<'a> {
    /// `searched`: the reward that a search maximises.
    ///
    /// # Errors
    /// `Error::Unknown` when the set lacks it.
    pub fn new(set: &'a RewardSet, searched: Option<&str>, meter: &'a Meter) -> Result<Self> {
        let searched = searched.map(|name| set.get(name).cloned()).transpose()?;
        Ok(Self { set, searched, meter })
    }

    pub fn searched(&self) -> Option<&str> {
        self.searched.as_ref().map(|reward| reward.name())
    }

    /// Whether a returned image is scored at all.
    pub fn reports(&self) -> bool {
        !self.set.is_empty()
    }

    /// L of scoring one image with the searched reward.
    pub fn search_calls(&self) -> u64 {
        self.searched.as_ref().map_or(0, |reward| reward.external_calls())
    }

    /// L of scoring one image with all other rewards.
    pub fn report_calls(&self) -> u64 {
        let others = self.set.iter().filter(|reward| Some(reward.name()) != self.searched());
        others.map(|reward| reward.external_calls()).sum()
    }

    /// A score of the searched reward such that higher is better.
    pub fn orient(&self, score: f64) -> f64 {
        if self.searched.as_ref().is_none_or(|reward| reward.higher_is_better()) {
            score
        } else {
            -score
        }
    }

    /// Scores of the searched reward as it gives them; NaN for all without one.
    /// Costs one V per image.
    ///
    /// # Errors
    /// `Error::Budget` before running, or the reward's.
    pub fn score(&self, images: &[RgbImage], prompt: &str) -> Result<Vec<f64>> {
        let Some(reward) = &self.searched else {
            return Ok(vec![f64::NAN; images.len()]);
        };
        let n = images.len() as u64;
        let l = n * reward.external_calls();
        self.meter.reserve(Units { v: n, l, ..Units::default() })?;
        let prompts = vec![prompt; images.len()];
        self.meter.time("reward", || checked(reward.as_ref(), images, &prompts))
    }

    /// Scores of every reward on the returned image. `known`: its score by the searched
    /// reward, if the search has it; then no V is charged, as V counts images.
    ///
    /// # Errors
    /// `Error::Budget` before running, or a reward's.
    pub fn report(
        &self,
        image: &RgbImage,
        prompt: &str,
        known: Option<f64>,
    ) -> Result<BTreeMap<String, f64>> {
        let known = self.searched().zip(known);
        let mut scores = BTreeMap::new();
        if let Some((name, score)) = known {
            scores.insert(name.to_owned(), score);
        }
        let rest: Vec<_> =
            self.set.iter().filter(|reward| !scores.contains_key(reward.name())).collect();
        let v = u64::from(known.is_none() && !rest.is_empty());
        let l = rest.iter().map(|reward| reward.external_calls()).sum();
        self.meter.reserve(Units { v, l, ..Units::default() })?;
        for reward in rest {
            let image = std::slice::from_ref(image);
            let score = self.meter.time("reward", || checked(reward.as_ref(), image, &[prompt]))?;
            scores.extend(score.first().map(|score| (reward.name().to_owned(), *score)));
        }
        Ok(scores)
    }
}
