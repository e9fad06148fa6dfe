//! Budgets in seconds: what of them U-Net forwards, scores and decodes take, as measured.

use serde::{Deserialize, Serialize};

use crate::diffusion::cost::{Cost, Units};
use crate::{Error, Result};

/// Seconds of the units of an image, and of what is in none of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Rates {
    /// Of a U-Net forward.
    pub f: f64,
    /// Of scoring an image.
    pub v: f64,
    /// Of decoding one.
    pub y: f64,
    /// Of an image besides: text, and the search's own work.
    pub rest: f64,
}

impl Rates {
    /// What an image measured that cost this and took `seconds` of wall-clock time.
    ///
    /// # Errors
    /// `Error::Invalid` on "contract" when it says nothing of a forward's time.
    pub fn measured(cost: &Cost, seconds: f64) -> Result<Self> {
        let of = |stage: &str, count: u64| {
            let spent = cost.seconds.get(stage).copied().unwrap_or(0.0);
            if count == 0 { 0.0 } else { spent / count as f64 }
        };
        let units = cost.units;
        let (f, v, y) = (of("unet", units.f), of("reward", units.v), of("vae_decode", units.y));
        if !(f.is_finite() && f > 0.0) {
            let message = format!("{} forwards took no time that was measured", units.f);
            return Err(Error::invalid("contract", message));
        }
        let rates = Self { f, v, y, rest: 0.0 };
        Ok(Self { rest: (seconds - rates.seconds(units)).max(0.0), ..rates })
    }

    /// Seconds that an image of this cost takes.
    #[must_use]
    pub fn seconds(&self, units: Units) -> f64 {
        let Units { f, v, y, .. } = units;
        self.f * f as f64 + self.v * v as f64 + self.y * y as f64 + self.rest
    }

    /// The largest budget of F whose plan takes at most `seconds`; none where not even the least
    /// plan does. `plan` says what a budget costs: more for more.
    ///
    /// # Errors
    /// `plan`'s, but for `Error::Budget`, which is that of a budget too small.
    pub fn most_forwards(
        &self,
        seconds: f64,
        mut plan: impl FnMut(u64) -> Result<Units>,
    ) -> Result<Option<u64>> {
        // What leaves no time for anything else is too much.
        let (mut low, mut high) = (0, (seconds / self.f).max(0.0) as u64);
        let mut found = None;
        while low < high {
            let middle = high - (high - low) / 2;
            match plan(middle) {
                Ok(units) if self.seconds(units) > seconds => high = middle - 1,
                Ok(_) => (low, found) = (middle, Some(middle)),
                Err(Error::Budget(_)) => low = middle,
                Err(error) => return Err(error),
            }
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn trajectories(f: u64) -> Result<Units> {
        let n = f / 100;
        if n == 0 {
            return Err(Error::Budget("one costs 100".into()));
        }
        Ok(Units { f: 100 * n, v: n, y: n, l: 0 })
    }

    #[test]
    fn budgets_fill_the_time_and_no_more() {
        let seconds = [("unet", 4.0), ("reward", 0.2), ("vae_decode", 0.6)];
        let seconds: BTreeMap<_, _> = seconds.map(|(name, s)| (name.to_owned(), s)).into();
        let cost = Cost { units: trajectories(200).unwrap(), seconds };
        let rates = Rates::measured(&cost, 5.0).unwrap();
        let close = |a: f64, b: f64| assert!((a - b).abs() < 1e-12, "{a} {b}");
        close(rates.f, 0.02);
        close(rates.v, 0.1);
        close(rates.y, 0.3);
        close(rates.rest, 0.2);
        // A trajectory takes 2.4 s, and 0.2 s are spent in any case.
        for (seconds, n) in [(2.59, 0), (2.61, 1), (4.9, 1), (5.1, 2), (24.3, 10)] {
            let f = rates.most_forwards(seconds, trajectories).unwrap();
            assert_eq!(f.map_or(0, |f| f / 100), n, "{seconds}");
            if let Some(f) = f {
                assert!(rates.seconds(trajectories(f).unwrap()) <= seconds);
                assert!(rates.seconds(trajectories(f + 100).unwrap()) > seconds);
            }
        }
        let broken = |_| Err(Error::invalid("steps", "wrong"));
        assert!(rates.most_forwards(9.0, broken).is_err());
        let timeless = Cost { seconds: BTreeMap::new(), ..cost };
        assert!(Rates::measured(&timeless, 5.0).is_err());
    }
}
