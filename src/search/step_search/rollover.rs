//! Rollover budget forcing (Kim et al. 2025, arXiv 2503.19385): a step goes on with the first
//! child that improves, and leaves what it did not need to the next.

use candle_core::Tensor;
use serde_json::json;

use crate::Result;
use crate::diffusion::cost::Units;
use crate::diffusion::noise::NoiseKey;
use crate::rewards::ensemble::Marks;
use crate::search::best::Best;
use crate::search::chain::{Ahead, Chain, repeat};
use crate::search::env::{EnvSpec, SearchEnv};
use crate::search::method::Outcome;
use crate::search::weights::first_max;

/// At most `evaluations`: initial latents, and at every step but the last its quota of children.
/// V = Y are as many, and the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rollover {
    pub evaluations: u64,
    pub initial: u64,
    /// Children tried at once; all are paid for, the first that improves is taken.
    pub batch: u64,
}

impl Rollover {
    /// Initial latents for a budget in evaluations.
    pub fn initial_for(evaluations: u64) -> u64 {
        let b = evaluations;
        (b / 10).min(20).max((b / 20).min(100)).max(b / 50).max(1)
    }

    /// An upper bound.
    pub fn cost(&self, spec: &EnvSpec) -> Units {
        spec.cost(self.evaluations * spec.forwards_per_eval, self.evaluations + 1)
    }

    /// # Errors
    /// The models'.
    pub fn run(&self, chain: &Chain, env: &mut SearchEnv, key: &NoiseKey) -> Result<Outcome> {
        let mut best = Best::default();
        let last = chain.steps() - 1;
        let candidates: Vec<u64> = (0..self.initial).collect();
        let latents = env.initial_noise(key, &candidates)?;
        let looks = chain.look(env, &latents, 0)?;
        let marks = env.marks(&looks.x0)?;
        let (at, value) = first_max(&env.verifier.values(&marks));
        let mut top = marks[at].clone();
        best.note(env, json!({"initial": at, "estimate": value}));
        let mut ahead = looks.row(at)?;
        let share = ((self.evaluations - self.initial) / (last as u64).max(1)).max(1);
        let mut quota = share;
        for step in 0..last {
            let mut level = Level { tries: 0, found: None };
            let accepted = loop {
                let count = self.batch.min(quota - level.tries);
                let tried: Vec<u64> = (level.tries..level.tries + count).collect();
                let noise = chain.noise(env, key, step, &tried)?;
                let children = chain.advance(step, &repeat(&ahead.mean, tried.len())?, &noise)?;
                let better = level.add(chain, env, &children, step + 1, &top)?;
                env.tell(None);
                if better || level.tries >= quota {
                    break better;
                }
            };
            quota = share + if accepted { quota - level.tries } else { 0 };
            let tries = level.tries;
            if let Some(Found { value, child, marks, look }) = level.found {
                if accepted {
                    top = marks;
                }
                ahead = look;
                best.note(
                    env,
                    json!({"step": step, "child": child, "tries": tries, "estimate": value}),
                );
            }
        }
        let noise = chain.noise(env, key, last, &[0])?;
        let x = chain.advance(last, &ahead.mean, &noise)?;
        best.finish_with(env, &x)
    }
}

/// The child that goes on, so far.
struct Found {
    value: f64,
    child: u64,
    marks: Marks,
    look: Ahead,
}

/// The children of a state that were tried so far.
struct Level {
    tries: u64,
    found: Option<Found>,
}

impl Level {
    /// Looks at more of them; whether one is better than the best so far, whose marks are `top`.
    /// Then that is the one found.
    fn add(
        &mut self,
        chain: &Chain,
        env: &mut SearchEnv,
        children: &Tensor,
        step: usize,
        top: &Marks,
    ) -> Result<bool> {
        let looks = chain.look(env, children, step)?;
        let tried = env.marks(&looks.x0)?;
        // As candidates of one decision: the best so far, what was found here, and the new ones.
        let known = std::iter::once(top).chain(self.found.as_ref().map(|found| &found.marks));
        let marks: Vec<Marks> = known.chain(&tried).cloned().collect();
        let values = env.verifier.values(&marks);
        let (known, new) = values.split_at(values.len() - tried.len());
        let first = new.iter().position(|value| *value > known[0]);
        let at = first.unwrap_or_else(|| first_max(new).0);
        if first.is_some() || known.get(1).is_none_or(|found| new[at] > *found) {
            self.found = Some(Found {
                value: new[at],
                child: self.tries + at as u64,
                marks: tried[at].clone(),
                look: looks.row(at)?,
            });
        }
        self.tries += tried.len() as u64;
        Ok(first.is_some())
    }
}
