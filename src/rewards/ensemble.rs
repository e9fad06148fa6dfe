//! What a search maximises: one reward, or several put together.

use std::sync::Arc;

use image::RgbImage;

use super::{Reward, RewardSet, checked};
use crate::{Error, Result};

/// How several rewards become one value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    /// Their weighted sum.
    Sum,
    /// The same of values that are scaled to [0, 1] among the candidates (Free2Guide).
    Normalised,
    /// The same of ranks among the candidates, ties in the middle (Ma et al. 2025; Free2Guide's
    /// consensus).
    Rank,
}

const MODES: [(&str, Mode); 2] = [("normalised", Mode::Normalised), ("rank", Mode::Rank)];

/// Rewards with weights. As text: `name`, `name:weight+name:weight`, `rank(name+name)` or
/// `normalised(name+name)`; a weight that is not given is 1.
#[derive(Clone)]
pub struct Ensemble {
    members: Vec<(Arc<dyn Reward>, f64)>,
    mode: Mode,
}

/// What the members say of one image, in their order, as each gives it.
pub type Marks = Vec<f64>;

impl Ensemble {
    /// # Errors
    /// `Error::Unknown` for a reward that the set lacks, `Error::Invalid` on "reward" for a text
    /// that is none.
    pub fn parse(text: &str, set: &RewardSet) -> Result<Self> {
        let (mode, list) = read(text)?;
        let member = |(name, weight)| Ok((set.get(name)?.clone(), weight));
        Ok(Self { members: list.into_iter().map(member).collect::<Result<_>>()?, mode })
    }

    /// The text that this is read from.
    pub fn name(&self) -> String {
        let member = |(reward, weight): &(Arc<dyn Reward>, f64)| match weight {
            1.0 => reward.name().to_owned(),
            weight => format!("{}:{weight}", reward.name()),
        };
        let list = self.members.iter().map(member).collect::<Vec<_>>().join("+");
        match MODES.iter().find(|(_, mode)| *mode == self.mode) {
            Some((name, _)) => format!("{name}({list})"),
            None => list,
        }
    }

    pub fn members(&self) -> impl Iterator<Item = &Arc<dyn Reward>> {
        self.members.iter().map(|(reward, _)| reward)
    }

    /// Calls to graders outside the process for an image.
    pub fn external_calls(&self) -> u64 {
        self.members().map(|reward| reward.external_calls()).sum()
    }

    /// Whether a candidate's value depends on the others.
    pub fn is_relative(&self) -> bool {
        self.mode != Mode::Sum
    }

    /// # Errors
    /// A reward's.
    pub fn score(&self, images: &[RgbImage], prompts: &[&str]) -> Result<Vec<Marks>> {
        let mut marks = vec![Vec::with_capacity(self.members.len()); images.len()];
        for reward in self.members() {
            let scores = checked(reward.as_ref(), images, prompts)?;
            marks.iter_mut().zip(scores).for_each(|(marks, score)| marks.push(score));
        }
        Ok(marks)
    }

    /// What candidates are worth, by the marks of all of them: higher is better, -inf where a
    /// member failed.
    pub fn values(&self, marks: &[Marks]) -> Vec<f64> {
        let sound: Vec<bool> =
            marks.iter().map(|m| m.iter().all(|mark| mark.is_finite())).collect();
        let mut values: Vec<f64> =
            sound.iter().map(|sound| if *sound { 0.0 } else { f64::NEG_INFINITY }).collect();
        for (at, (reward, weight)) in self.members.iter().enumerate() {
            let sign = if reward.higher_is_better() { 1.0 } else { -1.0 };
            let oriented: Vec<f64> = marks.iter().map(|marks| sign * marks[at]).collect();
            let among: Vec<f64> = oriented
                .iter()
                .zip(&sound)
                .filter_map(|(value, sound)| sound.then_some(*value))
                .collect();
            for (value, own) in values.iter_mut().zip(&oriented) {
                if value.is_finite() {
                    *value += weight * scaled(self.mode, *own, &among);
                }
            }
        }
        // Sums of large numbers overflow.
        values.iter_mut().filter(|v| !v.is_finite()).for_each(|v| *v = f64::NEG_INFINITY);
        values
    }
}

/// The rewards that a text names.
///
/// # Errors
/// `Error::Invalid` on "reward" for a text that is no ensemble.
pub fn names(text: &str) -> Result<Vec<&str>> {
    Ok(read(text)?.1.into_iter().map(|(name, _)| name).collect())
}

/// The mode of a text, and the names and weights of its members.
fn read(text: &str) -> Result<(Mode, Vec<(&str, f64)>)> {
    let invalid = |what: &str| {
        let message = format!(
            "'{text}': {what}; expected NAME, NAME:WEIGHT+NAME:WEIGHT, rank(…) or normalised(…)"
        );
        Error::invalid("reward", message)
    };
    let (mode, list) = match text.trim().strip_suffix(')').and_then(|t| t.split_once('(')) {
        Some((name, list)) => {
            let mode = MODES.iter().find(|(mode, _)| *mode == name);
            (mode.ok_or_else(|| invalid("no such ensemble"))?.1, list)
        }
        None => (Mode::Sum, text.trim()),
    };
    let mut members: Vec<(&str, f64)> = Vec::new();
    for part in list.split('+') {
        let (name, weight) = match part.split_once(':') {
            None => (part.trim(), 1.0),
            Some((name, weight)) => {
                let weight: Option<f64> = weight.trim().parse().ok();
                let weight = weight.filter(|w| w.is_finite() && *w > 0.0);
                (name.trim(), weight.ok_or_else(|| invalid("a weight is no number above 0"))?)
            }
        };
        if members.iter().any(|(member, _)| *member == name) {
            return Err(invalid("a reward is there twice"));
        }
        members.push((name, weight));
    }
    Ok((mode, members))
}

/// A value as the mode has it, among all.
fn scaled(mode: Mode, value: f64, among: &[f64]) -> f64 {
    match mode {
        Mode::Sum => value,
        Mode::Normalised => {
            let low = among.iter().copied().fold(f64::INFINITY, f64::min);
            let high = among.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            if high > low { (value - low) / (high - low) } else { 0.0 }
        }
        Mode::Rank => {
            let below = among.iter().filter(|other| **other < value).count();
            let equal = among.iter().filter(|other| **other == value).count();
            below as f64 + (equal as f64 - 1.0) / 2.0
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Named(&'static str, bool);

    impl Reward for Named {
        fn name(&self) -> &str {
            self.0
        }

        fn summary(&self) -> &str {
            ""
        }

        fn range(&self) -> Option<(f64, f64)> {
            None
        }

        fn higher_is_better(&self) -> bool {
            self.1
        }

        fn score(&self, images: &[RgbImage], _prompts: &[&str]) -> Result<Vec<f64>> {
            Ok(vec![0.5; images.len()])
        }
    }

    fn set() -> RewardSet {
        let rewards: [Arc<dyn Reward>; 3] =
            [Arc::new(Named("a", true)), Arc::new(Named("b", true)), Arc::new(Named("low", false))];
        RewardSet::new(rewards.to_vec()).unwrap()
    }

    #[test]
    fn texts_come_back_and_bad_ones_are_named() {
        let set = set();
        for text in ["a", "a:0.75+b:0.25", "rank(a+b)", "normalised(a+low:2)"] {
            assert_eq!(Ensemble::parse(text, &set).unwrap().name(), text);
        }
        assert_eq!(Ensemble::parse(" a : 1 + b", &set).unwrap().name(), "a+b");
        for bad in ["", "a+", "c", "a+a", "a:0", "a:x", "best(a)", "rank(a"] {
            let error = Ensemble::parse(bad, &set).err().unwrap().to_string();
            assert!(error.contains("reward"), "{bad}: {error}");
        }
    }

    #[test]
    fn values_by_hand() {
        let set = set();
        let values = |text: &str, marks: &[[f64; 2]]| {
            let marks: Vec<Marks> = marks.iter().map(|m| m.to_vec()).collect();
            Ensemble::parse(text, &set).unwrap().values(&marks)
        };
        let marks = [[1.0, 10.0], [3.0, 0.0], [2.0, 0.0]];
        assert_eq!(values("a:2+b:0.5", &marks), [7.0, 6.0, 4.0]);
        assert_eq!(values("normalised(a+b)", &marks), [1.0, 1.0, 0.5]);
        assert_eq!(values("rank(a+b)", &marks), [2.0, 2.5, 1.5]);
        assert_eq!(values("rank(a+low)", &marks), [0.0, 3.5, 2.5]);
        // A failed mark loses, and does not count among the others.
        let failed = [[1.0, 10.0], [3.0, f64::NAN], [2.0, 0.0]];
        assert_eq!(values("normalised(a+b)", &failed), [1.0, f64::NEG_INFINITY, 1.0]);
        assert_eq!(values("a+b", &[[f64::INFINITY, 0.0]]), [f64::NEG_INFINITY]);
        assert_eq!(values("normalised(a+b)", &[[1.0, 1.0]]), [0.0]);
    }

    /// With ranks a new candidate may turn round which of two others is better.
    #[test]
    fn ranks_depend_on_the_others() {
        let set = set();
        let rank = Ensemble::parse("rank(a+b)", &set).unwrap();
        let (x, y) = (vec![3.0, 1.0], vec![1.0, 2.0]);
        let two = rank.values(&[x.clone(), y.clone()]);
        assert_eq!(two[0], two[1]);
        let three = rank.values(&[x, y, vec![2.0, 1.5]]);
        assert!(three[0] == three[1]);
        let (x, y, z) = (vec![3.0, 1.0], vec![2.0, 2.0], vec![1.0, 1.5]);
        let with = rank.values(&[x, y, z]);
        assert!(with[1] > with[0]);
        assert!(rank.is_relative() && !Ensemble::parse("a+b", &set).unwrap().is_relative());
    }
}
