//! The metered handle through which methods reach rewards.

use std::collections::BTreeMap;

use image::RgbImage;

use super::RewardSet;
use super::ensemble::{Ensemble, Marks};
use super::set::checked;
use crate::Result;
use crate::diffusion::cost::Units;
use crate::diffusion::meter::Meter;

/// The stage of scoring for the record.
pub const OBSERVED: &str = "observed";

/// Scores with the searched rewards while searching, and with all others once, on the
/// image that is returned. V counts images, not rewards.
#[derive(Clone)]
pub struct MeteredVerifier<'a> {
    set: &'a RewardSet,
    searched: Option<Ensemble>,
    meter: &'a Meter,
}

impl<'a> MeteredVerifier<'a> {
    /// `searched`: the reward or ensemble that a search maximises.
    ///
    /// # Errors
    /// As [`Ensemble::parse`].
    pub fn new(set: &'a RewardSet, searched: Option<&str>, meter: &'a Meter) -> Result<Self> {
        let searched = searched.map(|text| Ensemble::parse(text, set)).transpose()?;
        Ok(Self { set, searched, meter })
    }

    pub fn searched(&self) -> Option<&Ensemble> {
        self.searched.as_ref()
    }

    /// Whether values are relative to the other candidates of a decision.
    pub fn is_relative(&self) -> bool {
        self.searched.as_ref().is_some_and(Ensemble::is_relative)
    }

    /// Whether a returned image is scored at all.
    pub fn reports(&self) -> bool {
        !self.set.is_empty()
    }

    /// L of scoring one image with the searched rewards.
    pub fn search_calls(&self) -> u64 {
        self.searched.as_ref().map_or(0, Ensemble::external_calls)
    }

    /// L of scoring one image with all other rewards.
    pub fn report_calls(&self) -> u64 {
        let all: u64 = self.set.iter().map(|reward| reward.external_calls()).sum();
        all - self.search_calls()
    }

    /// What the searched rewards say of each image; nothing without one. Costs one V per image.
    ///
    /// # Errors
    /// `Error::Budget` before running, or a reward's.
    pub fn score(&self, images: &[RgbImage], prompt: &str) -> Result<Vec<Marks>> {
        let Some(ensemble) = &self.searched else {
            return Ok(vec![Vec::new(); images.len()]);
        };
        let n = images.len() as u64;
        let l = n * ensemble.external_calls();
        self.meter.reserve(Units { v: n, l, ..Units::default() })?;
        let prompts = vec![prompt; images.len()];
        self.meter.time("reward", || ensemble.score(images, &prompts))
    }

    /// Candidates' values by their marks: higher is better, -inf where scoring failed.
    pub fn values(&self, marks: &[Marks]) -> Vec<f64> {
        match &self.searched {
            Some(ensemble) => ensemble.values(marks),
            None => vec![f64::NEG_INFINITY; marks.len()],
        }
    }

    /// A value as the reward gives it, where it is but one, NaN where scoring failed.
    pub fn score_of(&self, value: f64, marks: &Marks) -> f64 {
        match marks[..] {
            [mark] => mark,
            _ if value.is_finite() => value,
            _ => f64::NAN,
        }
    }

    /// Scores of every reward that needs no call outside, for the record: nothing is chosen by
    /// them, and nothing charged. `marks`: what the searched rewards say already.
    ///
    /// # Errors
    /// A reward's.
    pub fn observe(
        &self,
        images: &[RgbImage],
        prompt: &str,
        marks: &[Marks],
    ) -> Result<BTreeMap<String, Vec<f64>>> {
        let mut scores = BTreeMap::new();
        for (at, reward) in self.searched.iter().flat_map(|e| e.members()).enumerate() {
            let known = marks.iter().map(|marks| marks[at]).collect();
            scores.insert(reward.name().to_owned(), known);
        }
        let prompts = vec![prompt; images.len()];
        let free = self.set.iter().filter(|reward| reward.external_calls() == 0);
        for reward in free.filter(|r| !scores.contains_key(r.name())).collect::<Vec<_>>() {
            let found = self.meter.time(OBSERVED, || checked(reward.as_ref(), images, &prompts))?;
            scores.insert(reward.name().to_owned(), found);
        }
        Ok(scores)
    }

    /// Scores of every reward on the returned image. `known`: what the searched rewards say of
    /// it, if a search has it; then no V is charged, as V counts images.
    ///
    /// # Errors
    /// `Error::Budget` before running, or a reward's.
    pub fn report(
        &self,
        image: &RgbImage,
        prompt: &str,
        known: &Marks,
    ) -> Result<BTreeMap<String, f64>> {
        let members = self.searched.iter().flat_map(|ensemble| ensemble.members());
        let mut scores: BTreeMap<String, f64> =
            members.zip(known).map(|(reward, mark)| (reward.name().to_owned(), *mark)).collect();
        let rest: Vec<_> =
            self.set.iter().filter(|reward| !scores.contains_key(reward.name())).collect();
        let v = u64::from(known.is_empty() && !rest.is_empty());
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
