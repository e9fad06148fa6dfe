//! Search over paths: paths are taken back to a higher noise level, each several times, and the
//! best go on (Ma et al. 2025, arXiv 2501.09732, sec. 3).

use candle_core::Tensor;
use serde_json::{Map, Value, json};

use super::best::Best;
use super::chain::{pick, repeat};
use super::edm::{denoise, euler, plus};
use super::env::{EnvSpec, Kernel, SearchEnv};
use super::method::{Outcome, Plan, SearchMethod};
use super::params::{Params, entry, largest};
use super::weights::ranking;
use crate::diffusion::cost::{Budget, Units};
use crate::diffusion::noise::{NoiseKey, Purpose};
use crate::diffusion::schedule::NoiseSchedule;
use crate::{Error, Result};

const MOST: u64 = 1 << 10;
/// Budget in trajectories from which there are four paths; four times that, eight.
const FOUR_PATHS: u64 = 80;

/// E = N n0 + R N M (L + 1) - N M for N paths, M branches and R rounds; V = Y = R N M. Without
/// branches it is plain sampling.
#[derive(Clone, Copy, Debug)]
pub struct Paths;

#[derive(Clone, Copy, Debug)]
struct Choice {
    paths: Option<u64>,
    branches: Option<u64>,
    /// Flow times: where the search starts, how far it goes up and down.
    start: f64,
    forward: f64,
    backward: f64,
    leg_steps: Option<u64>,
}

fn choice(params: &Map<String, Value>) -> Result<Choice> {
    let params = Params::new(params, &Paths.params())?;
    let choice = Choice {
        paths: params.integer("paths", 1..=MOST)?,
        branches: params.integer("branches", 0..=MOST)?,
        start: params.number("start", 0.001..=0.9)?.unwrap_or(0.11),
        forward: params.number("forward", 0.0..=0.99)?.unwrap_or(0.78),
        backward: params.number("backward", 0.001..=1.0)?.unwrap_or(0.81),
        leg_steps: params.integer("leg_steps", 1..=1000)?,
    };
    if choice.backward - choice.forward < 1e-3 {
        return Err(Error::invalid("method.backward", "expected to be above method.forward"));
    }
    if choice.start + choice.forward > 0.99 {
        return Err(Error::invalid("method.forward", "expected at most 0.99 - method.start"));
    }
    Ok(choice)
}

/// A choice with its numbers.
struct Search {
    choice: Choice,
    paths: u64,
    branches: u64,
    first: u64,
    leg: u64,
}

impl Choice {
    fn search(&self, steps: usize, paths: u64, branches: u64) -> Search {
        let part = |share: f64| ((share * steps as f64 - 1e-9).ceil() as u64).max(1);
        let leg = self.leg_steps.unwrap_or_else(|| part(self.backward));
        Search { choice: *self, paths, branches, first: part(1.0 - self.start), leg }
    }

    fn within(&self, spec: &EnvSpec, budget: &Budget) -> Search {
        let with = |paths: u64, branches: u64| self.search(spec.steps, paths, branches);
        let branches =
            |paths: u64| largest(1..=MOST, budget, |branches| with(paths, branches).cost(spec));
        match (self.paths, self.branches) {
            (Some(paths), Some(given)) => with(paths, given),
            (None, Some(0)) => with(1, 0),
            (paths, given) if !budget.bounds() => with(paths.unwrap_or(2), given.unwrap_or(2)),
            (None, Some(given)) => {
                let most = largest(1..=MOST, budget, |paths| with(paths, given).cost(spec));
                with(most.unwrap_or(1), given)
            }
            (Some(paths), None) => with(paths, branches(paths).unwrap_or(0)),
            (None, None) => {
                let enough = FOUR_PATHS * spec.steps as u64 * spec.forwards_per_eval;
                let f = budget.f.unwrap_or(0);
                let tried = [(8, 4 * enough), (4, enough), (2, 0), (1, 0)].into_iter();
                let found = tried
                    .filter(|(_, least)| f >= *least)
                    .find_map(|(paths, _)| Some((paths, branches(paths)?)));
                found.map_or_else(|| with(1, 0), |(paths, branches)| with(paths, branches))
            }
        }
    }
}

impl Search {
    /// Flow times of the legs: from, through noise, to.
    fn legs(&self) -> Vec<[f64; 3]> {
        let mut legs = Vec::new();
        let mut t = self.choice.start;
        while t > 0.0 {
            let above = t + self.choice.forward;
            let below = above - self.choice.backward;
            let below = if below < 1e-6 { 0.0 } else { below };
            legs.push([t, above, below]);
            t = below;
        }
        legs
    }

    fn cost(&self, spec: &EnvSpec) -> Units {
        if self.branches == 0 {
            return spec.cost(spec.trajectory_f(Kernel::Ode), 1);
        }
        let (rounds, images) = (self.legs().len() as u64, self.paths * self.branches);
        let evaluations = self.paths * self.first + rounds * images * (self.leg + 1) - images;
        spec.cost(evaluations * spec.forwards_per_eval, rounds * images)
    }
}

impl SearchMethod for Paths {
    fn name(&self) -> &'static str {
        "paths"
    }

    fn summary(&self) -> &'static str {
        "Nearly finished images are noised and denoised again, and the best go on"
    }

    fn params(&self) -> Map<String, Value> {
        let budget = "absent: what the budget affords, or 2";
        Map::from_iter([
            entry("paths", "integer", Value::Null, &format!("N, {budget}")),
            entry("branches", "integer", Value::Null, &format!("M of a path, {budget}; 0: none")),
            entry("start", "number", json!(0.11), "flow time sigma/(1+sigma) of the first round"),
            entry("forward", "number", json!(0.78), "flow time that noise takes a path up"),
            entry("backward", "number", json!(0.81), "flow time that a round takes it down"),
            entry("leg_steps", "integer", Value::Null, "absent: as dense as the request's steps"),
        ])
    }

    fn needs_reward(&self) -> bool {
        true
    }

    fn plan(&self, params: &Map<String, Value>, spec: &EnvSpec, budget: &Budget) -> Result<Plan> {
        let choice = choice(params)?;
        spec.needs_search(self.name())?;
        spec.check_steps(Kernel::Ode, spec.steps)?;
        let search = choice.within(spec, budget);
        let params = Map::from_iter([
            ("paths".to_owned(), json!(search.paths)),
            ("branches".to_owned(), json!(search.branches)),
            ("start".to_owned(), json!(choice.start)),
            ("forward".to_owned(), json!(choice.forward)),
            ("backward".to_owned(), json!(choice.backward)),
            ("leg_steps".to_owned(), json!(search.leg)),
        ]);
        Plan::new(self.name(), params, search.cost(spec), budget)
    }

    fn run(&self, plan: &Plan, env: &mut SearchEnv, key: &NoiseKey) -> Result<Outcome> {
        let choice = choice(&plan.params)?;
        let (paths, branches) = (choice.paths.unwrap_or(1), choice.branches.unwrap_or(0));
        let search = choice.search(env.steps, paths, branches);
        let mut best = Best::default();
        let ends = match branches {
            0 => env.sample(key, Kernel::Ode, &[0])?,
            _ => search.run(env, key, &mut best)?,
        };
        best.finish_with(env, &ends)
    }
}

fn sigma(flow: f64) -> f64 {
    flow / (1.0 - flow)
}

/// Noise levels of `steps` steps from `from` down to `to`, evenly spaced in the network's
/// timesteps, as DDIM's are.
fn levels(schedule: &NoiseSchedule, from: f64, to: f64, steps: u64) -> Vec<f64> {
    let (high, low) = (schedule.t_of_sigma(from), schedule.t_of_sigma(to));
    // Below the schedule's least level there are no timesteps.
    let at =
        |i: u64| schedule.sigma(high + (low - high) * i as f64 / steps as f64).min(from).max(to);
    let between = (1..steps).map(at);
    std::iter::once(from).chain(between).chain([to]).collect()
}

impl Search {
    /// The last round's finished latents, [paths * branches, C, h, w].
    fn run(&self, env: &mut SearchEnv, key: &NoiseKey, best: &mut Best) -> Result<Tensor> {
        let candidates: Vec<u64> = (0..self.paths).collect();
        let top = env.schedule.sigma((env.schedule.num_train_timesteps() - 1) as f64);
        // Unit noise in VP coordinates, as a trajectory begins.
        let unit = (top * top + 1.0).sqrt();
        let noise = env.initial_noise(key, &candidates)?.affine(unit, 0.0)?;
        let first = levels(env.schedule, top, sigma(self.choice.start), self.first);
        let mut paths = euler(env, noise, &first)?;
        env.tell(None);
        for (round, [from, above, below]) in self.legs().into_iter().enumerate() {
            let (from, above, below) = (sigma(from), sigma(above), sigma(below));
            let noised = self.noised(env, key, &paths, round, (from, above))?;
            let leg = levels(env.schedule, above, below, self.leg);
            let ends = euler(env, noised, &leg)?;
            if below == 0.0 {
                return Ok(ends);
            }
            let looks = denoise(env, &ends, below)?.x0;
            let values = env.values(&looks)?;
            let kept: Vec<usize> = ranking(&values)[..self.paths as usize].to_vec();
            best.note(env, json!({"round": round, "kept": kept, "estimate": values[kept[0]]}));
            paths = pick(&ends, &kept)?;
        }
        Ok(paths)
    }

    /// Every path `branches` times, each with noise of its own up to a higher level.
    fn noised(
        &self,
        env: &SearchEnv,
        key: &NoiseKey,
        paths: &Tensor,
        round: usize,
        (from, above): (f64, f64),
    ) -> Result<Tensor> {
        let rows = (0..self.paths as usize)
            .map(|path| repeat(&pick(paths, &[path])?, self.branches as usize))
            .collect::<Result<Vec<_>>>()?;
        let rows = Tensor::cat(&rows, 0)?;
        // A key for each, however many branches there are.
        let candidates: Vec<u64> = (0..self.paths)
            .flat_map(|path| (0..self.branches).map(move |branch| path << 32 | branch))
            .collect();
        let (shape, device) = (env.latent_shape, env.denoiser.device());
        let noise = key.normal_rows(Purpose::Renoise, round as u64, &candidates, shape, device)?;
        plus(&rows, (above * above - from * from).max(0.0).sqrt(), &noise)
    }
}
