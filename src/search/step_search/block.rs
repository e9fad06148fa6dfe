//! CoDe (arXiv 2502.00968): copies that go on by themselves for some steps, then the best by its
//! look ahead is copied again.

use serde_json::json;

use crate::Result;
use crate::diffusion::cost::Units;
use crate::diffusion::noise::NoiseKey;
use crate::search::best::Best;
use crate::search::chain::{Chain, pick};
use crate::search::env::{EnvSpec, SearchEnv};
use crate::search::method::Outcome;
use crate::search::weights::first_max;

/// `children` copies for `length` steps. E = 1 + n(T-1), V = Y = n ceil((T-1)/length) and the
/// image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Block {
    pub children: u64,
    pub length: u64,
}

impl Block {
    pub fn cost(&self, spec: &EnvSpec, steps: u64) -> Units {
        let evaluations = 1 + self.children * (steps - 1);
        let looks = match self.children {
            1 => 0,
            n => n * (steps - 1).div_ceil(self.length),
        };
        spec.cost(evaluations * spec.forwards_per_eval, looks + 1)
    }

    /// # Errors
    /// The models'.
    pub fn run(&self, chain: &Chain, env: &mut SearchEnv, key: &NoiseKey) -> Result<Outcome> {
        let mut best = Best::default();
        let candidates: Vec<u64> = (0..self.children).collect();
        let copies = vec![0; candidates.len()];
        let last = chain.steps() - 1;
        let mut ahead = chain.look(env, &env.initial_noise(key, &[0])?, 0)?;
        for step in 0..last {
            if ahead.mean.dim(0)? < copies.len() {
                ahead = ahead.rows(&copies)?;
            }
            let noise = chain.noise(env, key, step, &candidates)?;
            let x = chain.advance(step, &ahead.mean, &noise)?;
            ahead = chain.look(env, &x, step + 1)?;
            env.tell(None);
            let decides = (step as u64 + 1).is_multiple_of(self.length) || step + 1 == last;
            if decides && self.children > 1 {
                let (child, value) = first_max(&env.values(&ahead.x0)?);
                best.note(env, json!({"step": step, "child": child, "estimate": value}));
                ahead = ahead.row(child)?;
            }
        }
        let noise = chain.noise(env, key, last, &[0])?;
        let x = pick(&chain.advance(last, &ahead.mean, &noise)?, &[0])?;
        best.finish_with(env, &x)
    }
}
