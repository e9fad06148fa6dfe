//! The same number of children at every guided step, of which the best goes on.

use candle_core::Tensor;
use serde_json::json;

use crate::Result;
use crate::diffusion::cost::Units;
use crate::diffusion::noise::NoiseKey;
use crate::search::best::Best;
use crate::search::chain::{Ahead, Chain, pick, repeat};
use crate::search::env::{EnvSpec, SearchEnv};
use crate::search::method::Outcome;
use crate::search::weights::{first_max, softmax};

/// Which steps are guided, and how.
#[derive(Clone, Debug, PartialEq)]
pub struct Uniform {
    /// One for each step of the sampler; of steps whose children differ alone.
    pub guided: Vec<bool>,
    /// Children of a guided step.
    pub children: u64,
    /// Initial latents, of which the one with the best clean-image estimate is taken.
    pub initial: u64,
    /// Whether the winner's evaluation serves its next step, too.
    pub cached: bool,
    /// Temperature: 0 takes the best child, above 0 their noises' mean by exp(value / alpha).
    pub alpha: f64,
}

impl Uniform {
    /// Guided steps before the last, and whether the last is one.
    fn searched(&self) -> (u64, bool) {
        let Some((last, before)) = self.guided.split_last().filter(|_| self.children > 1) else {
            return (0, false);
        };
        (before.iter().filter(|guided| **guided).count() as u64, *last)
    }

    pub fn cost(&self, spec: &EnvSpec) -> Units {
        let (steps, last) = self.searched();
        let reused = u64::from(self.cached && self.alpha == 0.0);
        let evaluations =
            self.initial + (self.guided.len() as u64 - 1) + steps * (self.children - reused);
        let looks = if self.initial > 1 { self.initial } else { 0 };
        let images = looks + steps * self.children + if last { self.children } else { 1 };
        spec.cost(evaluations * spec.forwards_per_eval, images)
    }

    /// # Errors
    /// The models'.
    pub fn run(&self, chain: &Chain, env: &mut SearchEnv, key: &NoiseKey) -> Result<Outcome> {
        let mut best = Best::default();
        let (mut x, mut known) = self.start(chain, env, key, &mut best)?;
        let last = chain.steps() - 1;
        for step in 0..=last {
            let ahead = match known.take() {
                Some(ahead) => ahead,
                None => chain.look(env, &x, step)?,
            };
            if self.children < 2 || !self.guided[step] {
                let noise = chain.noise(env, key, step, &[0])?;
                x = chain.advance(step, &ahead.mean, &noise)?;
                env.tell(None);
                continue;
            }
            let candidates: Vec<u64> = (0..self.children).collect();
            let noise = chain.noise(env, key, step, &candidates)?;
            let means = repeat(&ahead.mean, candidates.len())?;
            let children = chain.advance(step, &means, &noise)?;
            if step == last {
                return best.finish_with(env, &children);
            }
            let looks = chain.look(env, &children, step + 1)?;
            let values = env.values(&looks.x0)?;
            let (child, value) = first_max(&values);
            best.note(env, json!({"step": step, "child": child, "estimate": value}));
            if self.alpha == 0.0 {
                x = pick(&children, &[child])?;
                known = self.cached.then(|| looks.row(child)).transpose()?;
            } else {
                x = chain.advance(step, &ahead.mean, &mixed(&noise, &values, self.alpha)?)?;
            }
        }
        best.finish_with(env, &x)
    }

    fn start(
        &self,
        chain: &Chain,
        env: &mut SearchEnv,
        key: &NoiseKey,
        best: &mut Best,
    ) -> Result<(Tensor, Option<Ahead>)> {
        let candidates: Vec<u64> = (0..self.initial).collect();
        let x = env.initial_noise(key, &candidates)?;
        if self.initial < 2 {
            return Ok((x, None));
        }
        let looks = chain.look(env, &x, 0)?;
        let (at, value) = first_max(&env.values(&looks.x0)?);
        best.note(env, json!({"initial": at, "estimate": value}));
        Ok((pick(&x, &[at])?, Some(looks.row(at)?)))
    }
}

/// The noises' mean, weighted by exp(value / alpha).
fn mixed(noise: &Tensor, values: &[f64], alpha: f64) -> Result<Tensor> {
    let (_, top) = first_max(values);
    let scaled: Vec<f64> = values.iter().map(|value| (value - top) / alpha).collect();
    let weights: Vec<f32> = softmax(&scaled).into_iter().map(|w| w as f32).collect();
    let weights = Tensor::from_vec(weights, (values.len(), 1, 1, 1), noise.device())?;
    Ok(noise.broadcast_mul(&weights)?.sum_keepdim(0)?)
}
