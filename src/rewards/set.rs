//! The rewards that a process knows, by name.

use std::collections::BTreeMap;
use std::sync::Arc;

use image::RgbImage;
use serde_json::{Map, Value, json};

use super::Reward;
use crate::util::Listing;
use crate::{Error, Result};

/// Rewards in the order they were added; scores images that were decoded once.
#[derive(Clone, Default)]
pub struct RewardSet {
    rewards: Vec<Arc<dyn Reward>>,
}

impl RewardSet {
    /// # Errors
    /// `Error::Invalid` when two rewards share a name.
    pub fn new(rewards: Vec<Arc<dyn Reward>>) -> Result<Self> {
        let mut set = Self::default();
        for reward in rewards {
            set.add(reward)?;
        }
        Ok(set)
    }

    /// # Errors
    /// `Error::Invalid` when the name is taken.
    pub fn add(&mut self, reward: Arc<dyn Reward>) -> Result<()> {
        if self.names().any(|name| name == reward.name()) {
            return Err(Error::invalid("reward", format!("two are called '{}'", reward.name())));
        }
        self.rewards.push(reward);
        Ok(())
    }

    pub fn is_empty(&self) -> bool {
        self.rewards.is_empty()
    }

    pub fn iter(&self) -> impl Iterator<Item = &Arc<dyn Reward>> {
        self.rewards.iter()
    }

    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.rewards.iter().map(|reward| reward.name())
    }

    /// # Errors
    /// `Error::Unknown` listing the known names.
    pub fn get(&self, name: &str) -> Result<&Arc<dyn Reward>> {
        let found = self.rewards.iter().find(|reward| reward.name() == name);
        found.ok_or_else(|| Error::unknown("reward", "reward", name, self.names()))
    }

    /// Scores of every reward: name → one per image.
    ///
    /// # Errors
    /// A reward's.
    pub fn score(
        &self,
        images: &[RgbImage],
        prompts: &[&str],
    ) -> Result<BTreeMap<String, Vec<f64>>> {
        let named = |reward: &Arc<dyn Reward>| {
            Ok((reward.name().to_owned(), checked(reward.as_ref(), images, prompts)?))
        };
        self.rewards.iter().map(named).collect()
    }

    pub fn listings(&self) -> Vec<Listing> {
        let listing = |reward: &Arc<dyn Reward>| {
            let mut params = Map::new();
            let range = reward.range().map_or(Value::Null, |(low, high)| json!([low, high]));
            params.insert("range".into(), range);
            params.insert("higher_is_better".into(), json!(reward.higher_is_better()));
            Listing { name: reward.name().into(), summary: reward.summary().into(), params }
        };
        self.rewards.iter().map(listing).collect()
    }
}

/// A reward's scores, with the contract checked.
///
/// # Errors
/// The reward's, or that it gave another number of scores than there are images.
pub fn checked(reward: &dyn Reward, images: &[RgbImage], prompts: &[&str]) -> Result<Vec<f64>> {
    if prompts.len() != images.len() {
        let message = format!("{} prompts for {} images", prompts.len(), images.len());
        return Err(Error::invalid("reward", message));
    }
    let scores = reward.score(images, prompts)?;
    if scores.len() != images.len() {
        let (name, n) = (reward.name(), scores.len());
        let message = format!("'{name}' gave {n} scores for {} images", images.len());
        return Err(Error::invalid("reward", message));
    }
    Ok(scores)
}
