//! Epsilon-greedy search over a step's noise (Ramesh, Mardani 2025, arXiv 2506.03164): rounds of
//! candidates near the best noise so far, or anywhere.

use candle_core::{Device, Tensor};
use rand::Rng;
use serde_json::json;

use crate::Result;
use crate::diffusion::cost::Units;
use crate::diffusion::noise::{NoiseKey, Purpose};
use crate::rewards::ensemble::Marks;
use crate::search::best::Best;
use crate::search::chain::{Ahead, Chain, repeat};
use crate::search::env::{EnvSpec, SearchEnv};
use crate::search::method::Outcome;
use crate::search::weights::first_max;

/// E = 1 + (T-1) N K, V = Y = (T-1) N K and the image.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct EpsGreedy {
    /// Candidates of a round.
    pub children: u64,
    pub rounds: u64,
    /// Largest step from the pivot, as a share of the noise's norm.
    pub radius: f64,
    /// Probability of a candidate anywhere.
    pub epsilon: f64,
    /// Whether a candidate near the pivot has the norm of a typical noise.
    pub renormalise: bool,
}

/// The best child of a step so far.
struct Found {
    value: f64,
    child: u64,
    marks: Marks,
    look: Ahead,
}

impl EpsGreedy {
    pub fn cost(&self, spec: &EnvSpec, steps: u64) -> Units {
        let tries = (steps - 1) * self.children * self.rounds;
        spec.cost((1 + tries) * spec.forwards_per_eval, tries + 1)
    }

    /// # Errors
    /// The models'.
    pub fn run(&self, chain: &Chain, env: &mut SearchEnv, key: &NoiseKey) -> Result<Outcome> {
        let mut best = Best::default();
        let last = chain.steps() - 1;
        let mut ahead = chain.look(env, &env.initial_noise(key, &[0])?, 0)?;
        for step in 0..last {
            let (device, shape) = (env.denoiser.device().clone(), env.latent_shape);
            let draw = |candidate: u64, purpose: Purpose| {
                key.normal(purpose, step as u64, candidate, shape, &Device::Cpu)
            };
            let mut pivot = draw(u64::MAX, Purpose::SearchProposal)?;
            let mut found: Option<Found> = None;
            for round in 0..self.rounds {
                // A key for each, however many a round has.
                let candidates = (0..self.children).map(|child| round << 32 | child);
                let noises = candidates
                    .map(|candidate| {
                        let mut rng = key.rng(Purpose::SearchSchedule, step as u64, candidate);
                        if rng.random::<f64>() < self.epsilon {
                            return draw(candidate, Purpose::SolverNoise);
                        }
                        let direction = draw(candidate, Purpose::SearchProposal)?;
                        self.near(&pivot, &direction, rng.random())
                    })
                    .collect::<Result<Vec<_>>>()?;
                let noise = Tensor::stack(&noises, 0)?.to_device(&device)?;
                let means = repeat(&ahead.mean, noises.len())?;
                let children = chain.advance(step, &means, &noise)?;
                let looks = chain.look(env, &children, step + 1)?;
                // Compared with the best so far as candidates of one decision.
                let known = found.as_ref().map(|found: &Found| found.marks.clone());
                let before = usize::from(known.is_some());
                let marks: Vec<Marks> = known.into_iter().chain(env.marks(&looks.x0)?).collect();
                let (at, value) = first_max(&env.verifier.values(&marks));
                if let Some(at) = at.checked_sub(before) {
                    pivot = noises[at].clone();
                    let child = round * self.children + at as u64;
                    let marks = marks[at + before].clone();
                    found = Some(Found { value, child, marks, look: looks.row(at)? });
                }
                env.tell(None);
            }
            if let Some(Found { value, child, look, .. }) = found {
                best.note(env, json!({"step": step, "child": child, "estimate": value}));
                ahead = look;
            }
        }
        let noise = chain.noise(env, key, last, &[0])?;
        let x = chain.advance(last, &ahead.mean, &noise)?;
        best.finish_with(env, &x)
    }

    /// pivot + u radius sqrt(d) direction/|direction|, as long as a typical noise.
    fn near(&self, pivot: &Tensor, direction: &Tensor, u: f64) -> Result<Tensor> {
        let norm = |t: &Tensor| -> Result<f64> {
            Ok(f64::from(t.sqr()?.sum_all()?.to_scalar::<f32>()?).sqrt().max(f64::MIN_POSITIVE))
        };
        let typical = (pivot.elem_count() as f64).sqrt();
        let step = u * self.radius * typical / norm(direction)?;
        let near = (pivot + direction.affine(step, 0.0)?)?;
        Ok(match self.renormalise {
            true => near.affine(typical / norm(&near)?, 0.0)?,
            false => near,
        })
    }
}
