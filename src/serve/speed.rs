//! How fast each model is on this machine, learnt from what it generates.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::diffusion::cost::Cost;
use crate::engine::latency::Rates;
use crate::engine::request::Resolved;

/// How much a new measurement counts.
const WEIGHT: f64 = 0.3;

/// For how long a measurement tells how fast a request will be: other load comes and goes, and
/// what is refused by an old measurement is never measured again.
const RECENT: Duration = Duration::from_secs(300);

#[derive(Clone, Copy, Debug)]
struct Known {
    rates: Rates,
    /// When a request was measured last; never while only the first image has been.
    served: Option<Instant>,
}

/// Seconds of a forward, a score and a decode, by model and size.
#[derive(Debug, Default)]
pub struct Speed(Mutex<BTreeMap<(String, u32, u32), Known>>);

impl Speed {
    /// Learns from a request's generation of one or more images that took `seconds`.
    pub fn learn(&self, resolved: &Resolved, cost: &Cost, seconds: f64) {
        self.mix(resolved, cost, seconds, Some(Instant::now()));
    }

    /// Learns from the first image, which also paid for what is done once.
    pub fn learn_first(&self, resolved: &Resolved, cost: &Cost, seconds: f64) {
        self.mix(resolved, cost, seconds, None);
    }

    fn mix(&self, resolved: &Resolved, cost: &Cost, seconds: f64, served: Option<Instant>) {
        // What took no time that was measured says nothing.
        let Ok(mut new) = Rates::measured(cost, seconds) else { return };
        let key = (resolved.model.clone(), resolved.width, resolved.height);
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if new.v == 0.0 && all.get(&key).is_none_or(|old| old.rates.v == 0.0) {
            // Scores for the record, by every reward: not less than one takes.
            let observed = cost.seconds.get("observed").copied().unwrap_or(0.0);
            new.v = observed / f64::from(resolved.n.max(1));
        }
        new.rest /= f64::from(resolved.n.max(1));
        let Some(known) = all.get_mut(&key) else {
            all.insert(key, Known { rates: new, served });
            return;
        };
        known.served = served.or(known.served);
        let old = &mut known.rates;
        let mix = |old: f64, new: f64| (1.0 - WEIGHT) * old + WEIGHT * new;
        // Of what a generation had none, it measured nothing.
        let counted = |old: f64, new: f64, count: u64| match (count, old > 0.0) {
            (_, false) => new,
            (0, _) => old,
            _ => mix(old, new),
        };
        *old = Rates {
            f: mix(old.f, new.f),
            v: counted(old.v, new.v, cost.units.v),
            y: counted(old.y, new.y, cost.units.y),
            rest: mix(old.rest, new.rest),
        };
    }

    /// What was measured of a model at a size.
    pub fn rates(&self, model: &str, width: u32, height: u32) -> Option<Rates> {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.get(&(model.to_owned(), width, height)).map(|known| known.rates)
    }

    /// The same where a request was measured a short while ago.
    pub fn recent(&self, model: &str, width: u32, height: u32) -> Option<Rates> {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let known = all.get(&(model.to_owned(), width, height))?;
        known.served.is_some_and(|at| at.elapsed() < RECENT).then_some(known.rates)
    }
}
