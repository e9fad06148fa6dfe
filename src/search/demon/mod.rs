//! Demon: the noise of every stochastic step is put together from noises that promise a better
//! image (Yeh, Lee, Chen 2025, arXiv 2410.05760).

mod noise;

use candle_core::Tensor;
use serde_json::{Map, Value, json};

use self::noise::{Tau, Weighting, synthesised, weights};
use super::best::Best;
use super::chain::repeat;
use super::edm::{denoise, heun, plus};
use super::env::{EnvSpec, Kernel, SearchEnv};
use super::method::{Outcome, Plan, SearchMethod};
use super::params::{Params, entry, name_of, one_of};
use super::weights::first_max;
use crate::Result;
use crate::diffusion::cost::{Budget, Units};
use crate::diffusion::grid::karras_sigmas;
use crate::diffusion::meter::fits;
use crate::diffusion::noise::{NoiseKey, Purpose};

const MOST: u64 = 1 << 16;
/// The released grid's ends.
const SIGMA_MAX: f64 = 14.648;
const SIGMA_MIN: f64 = 0.002;
/// (points, candidates, intervals of a look ahead; 0: Tweedie's formula) in order of cost.
const LADDER: [(u64, u64, u64); 10] = [
    (20, 2, 0),
    (32, 4, 0),
    (32, 8, 0),
    (32, 16, 0),
    (64, 16, 0),
    (32, 16, 2),
    (64, 16, 2),
    (64, 16, 5),
    (64, 16, 10),
    (64, 16, 20),
];

/// E = sum over searched steps of K (1 + look ahead) + 2, and the deterministic end's;
/// V = Y = K for each of those steps, and the image. Without candidates it is plain sampling.
#[derive(Clone, Copy, Debug)]
pub struct Demon;

/// The stochasticity at a noise level.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum BetaRule {
    /// beta.
    Constant,
    /// beta / sigma: at 1 the classical reverse SDE.
    Inverse,
    /// beta^2 / (2 sigma^2): a diffusion of beta everywhere.
    Diffusion,
}

impl BetaRule {
    const OPTIONS: [(&'static str, Self); 3] =
        [("constant", Self::Constant), ("inverse", Self::Inverse), ("diffusion", Self::Diffusion)];

    fn name(self) -> &'static str {
        name_of(&Self::OPTIONS, &self)
    }
}

#[derive(Clone, Copy, Debug)]
struct Choice {
    candidates: Option<u64>,
    points: Option<u64>,
    look_ahead: Option<u64>,
    beta: f64,
    beta_rule: BetaRule,
    tau: Tau,
    weighting: Weighting,
    ode_after: f64,
    tail: u64,
    released: bool,
}

fn choice(params: &Map<String, Value>) -> Result<Choice> {
    let params = Params::new(params, &Demon.params())?;
    Ok(Choice {
        candidates: params.integer("candidates", 0..=MOST)?,
        points: params.integer("points", 3..=1000)?,
        look_ahead: params.integer("look_ahead", 0..=1000)?,
        beta: params.number("beta", 0.0..=1e3)?.unwrap_or(0.1),
        beta_rule: params.choice("beta_rule", &BetaRule::OPTIONS)?.unwrap_or(BetaRule::Constant),
        tau: Tau::read(&params)?,
        weighting: params.choice("weights", &Weighting::OPTIONS)?.unwrap_or(Weighting::Tanh),
        ode_after: params.number("ode_after", 0.0..=SIGMA_MAX)?.unwrap_or(0.11),
        tail: params.integer("tail", 1..=1000)?.unwrap_or(18),
        released: params.boolean("released")?.unwrap_or(false),
    })
}

/// A choice with its numbers.
#[derive(Clone, Copy, Debug)]
struct Search {
    choice: Choice,
    points: u64,
    candidates: u64,
    look_ahead: u64,
}

impl Search {
    fn sigmas(&self) -> Vec<f64> {
        karras_sigmas(SIGMA_MAX, SIGMA_MIN, self.points as usize)
    }

    /// Steps that are searched.
    fn searched(&self) -> usize {
        let sigmas = self.sigmas();
        let above = sigmas.iter().take_while(|sigma| **sigma >= self.choice.ode_after).count();
        above.min(sigmas.len() - 1)
    }

    /// Intervals of the ODE from point `at` to the end, of `whole` from the first point.
    fn intervals(&self, at: usize, whole: u64) -> u64 {
        let last = self.points - 1;
        let left = last - at as u64;
        if left == 0 { 0 } else { (whole * left).div_ceil(last) + 1 }
    }

    /// Evaluations of a look ahead from point `at`.
    fn look(&self, at: usize) -> u64 {
        match self.look_ahead {
            0 => 1,
            whole => 2 * self.intervals(at, whole),
        }
    }

    fn cost(&self, spec: &EnvSpec) -> Units {
        if self.candidates == 0 {
            return spec.cost(spec.trajectory_f(Kernel::Ode), 1);
        }
        let (k, steps) = (self.candidates, self.searched());
        let moves = if self.choice.released { 3 } else { 2 };
        let search: u64 = (0..steps).map(|i| k * (1 + self.look(i + 1)) + moves).sum();
        let tail = 2 * self.intervals(steps, self.choice.tail);
        spec.cost((search + tail) * spec.forwards_per_eval, k * steps as u64 + 1)
    }
}

impl Choice {
    fn search(&self, (points, candidates, look_ahead): (u64, u64, u64)) -> Search {
        Search {
            choice: *self,
            points: self.points.unwrap_or(points),
            candidates: self.candidates.unwrap_or(candidates),
            look_ahead: self.look_ahead.unwrap_or(look_ahead),
        }
    }

    fn within(&self, spec: &EnvSpec, budget: &Budget) -> Search {
        let whole = self.search(LADDER[LADDER.len() - 1]);
        if !budget.bounds() {
            return whole;
        }
        let affordable = |search: &Search| fits(budget, search.cost(spec)).is_ok();
        let rungs = LADDER.iter().map(|rung| self.search(*rung)).filter(affordable);
        let best = rungs.max_by_key(|search| search.cost(spec).f);
        // What was asked for and does not fit is refused with the numbers.
        let none = Search { candidates: 0, ..whole };
        best.unwrap_or(if self.candidates.is_some() { whole } else { none })
    }

    fn beta(&self, sigma: f64) -> f64 {
        match self.beta_rule {
            BetaRule::Constant => self.beta,
            BetaRule::Inverse => self.beta / sigma,
            BetaRule::Diffusion => self.beta * self.beta / (2.0 * sigma * sigma),
        }
    }
}

impl SearchMethod for Demon {
    fn name(&self) -> &'static str {
        "demon"
    }

    fn summary(&self) -> &'static str {
        "Noises of stochastic Heun steps, weighted by what they promise"
    }

    fn params(&self) -> Map<String, Value> {
        let ladder = "absent: what the budget affords, or the paper's";
        Map::from_iter([
            entry(
                "candidates",
                "integer",
                Value::Null,
                &format!("K, noises of a step ({ladder} 16); 0: plain sampling"),
            ),
            entry(
                "points",
                "integer",
                Value::Null,
                &format!("T, noise levels, one more than steps ({ladder} 64)"),
            ),
            entry(
                "look_ahead",
                "integer",
                Value::Null,
                &format!(
                    "intervals of the ODE from the highest noise to the image that is valued, \
                     fewer from lower; 0: Tweedie's formula ({ladder} 20)"
                ),
            ),
            entry("beta", "number", json!(0.1), "stochasticity; 0: none"),
            one_of(
                "beta_rule",
                &BetaRule::OPTIONS,
                "constant; inverse: beta/sigma; diffusion: beta^2/(2 sigma^2)",
            ),
            entry(
                "tau",
                "string",
                json!("adaptive"),
                "scale of values: a number, adaptive (the deviation of a step's values) or \
                 adaptive-frozen (that of the first step's, as released)",
            ),
            one_of("weights", &Weighting::OPTIONS, "tanh, boltzmann or linear"),
            entry(
                "ode_after",
                "number",
                json!(0.11),
                "noise level below which nothing is searched",
            ),
            entry("tail", "integer", json!(18), "intervals of the deterministic end"),
            entry(
                "released",
                "boolean",
                json!(false),
                "evaluate a step's beginning twice, as the released code",
            ),
        ])
    }

    fn needs_reward(&self) -> bool {
        true
    }

    fn plan(&self, params: &Map<String, Value>, spec: &EnvSpec, budget: &Budget) -> Result<Plan> {
        let choice = choice(params)?;
        spec.needs_search(self.name())?;
        let search = choice.within(spec, budget);
        let params = Map::from_iter([
            ("candidates".to_owned(), json!(search.candidates)),
            ("points".to_owned(), json!(search.points)),
            ("look_ahead".to_owned(), json!(search.look_ahead)),
            ("beta".to_owned(), json!(choice.beta)),
            ("beta_rule".to_owned(), json!(choice.beta_rule.name())),
            ("tau".to_owned(), choice.tau.value()),
            ("weights".to_owned(), json!(choice.weighting.name())),
            ("ode_after".to_owned(), json!(choice.ode_after)),
            ("tail".to_owned(), json!(choice.tail)),
            ("released".to_owned(), json!(choice.released)),
        ]);
        Plan::new(self.name(), params, search.cost(spec), budget)
    }

    fn run(&self, plan: &Plan, env: &mut SearchEnv, key: &NoiseKey) -> Result<Outcome> {
        let search = choice(&plan.params)?.search((0, 0, 0));
        let mut best = Best::default();
        let x = match search.candidates {
            0 => env.sample(key, Kernel::Ode, &[0])?,
            _ => search.run(env, key, &mut best)?,
        };
        best.finish_with(env, &x)
    }
}

/// A stochastic Heun step from one level to the next.
struct Step<'a> {
    choice: &'a Choice,
    from: f64,
    to: f64,
}

impl Step<'_> {
    fn drift(&self, sigma: f64) -> f64 {
        1.0 + self.choice.beta(sigma) * sigma
    }

    /// Factor of the noise in half a step's diffusion.
    fn diffusion(&self, sigma: f64) -> f64 {
        (2.0 * self.choice.beta(sigma)).sqrt() * sigma * (self.from - self.to).sqrt()
    }

    /// `slope`: predicted noise at `x`; one evaluation for each row of `noise`.
    fn take(&self, env: &SearchEnv, x: &Tensor, slope: &Tensor, noise: &Tensor) -> Result<Tensor> {
        let rows = noise.dim(0)?;
        let (x, slope) = (repeat(x, rows)?, repeat(slope, rows)?);
        let step = self.to - self.from;
        let (drift, drift_there) = (self.drift(self.from), self.drift(self.to));
        let (g, g_there) = (self.diffusion(self.from), self.diffusion(self.to));
        let ahead = plus(&plus(&x, step * drift, &slope)?, g, noise)?;
        let there = denoise(env, &ahead, self.to)?.noise;
        let moved = plus(&plus(&x, 0.5 * step * drift, &slope)?, 0.5 * step * drift_there, &there)?;
        plus(&moved, 0.5 * (g + g_there), noise)
    }
}

impl Search {
    fn run(&self, env: &mut SearchEnv, key: &NoiseKey, best: &mut Best) -> Result<Tensor> {
        let sigmas = self.sigmas();
        let candidates: Vec<u64> = (0..self.candidates).collect();
        let mut x = env.initial_noise(key, &[0])?.affine(sigmas[0], 0.0)?;
        let mut frozen = None;
        let steps = self.searched();
        for i in 0..steps {
            let step = Step { choice: &self.choice, from: sigmas[i], to: sigmas[i + 1] };
            let mut slope = denoise(env, &x, sigmas[i])?.noise;
            let shape = env.latent_shape;
            let device = env.denoiser.device();
            let noise =
                key.normal_rows(Purpose::SolverNoise, i as u64, &candidates, shape, device)?;
            let next = step.take(env, &x, &slope, &noise)?;
            let ends = self.ahead(env, next, i + 1)?;
            let values = env.values(&ends)?;
            let weights = weights(&values, self.choice.weighting, self.choice.tau, &mut frozen);
            let (at, value) = first_max(&values);
            best.note(env, json!({"step": i, "candidate": at, "estimate": value}));
            if self.choice.released {
                slope = denoise(env, &x, sigmas[i])?.noise;
            }
            x = step.take(env, &x, &slope, &synthesised(&noise, &weights, at)?)?;
            env.tell(None);
        }
        heun(env, x, &self.grid(steps, self.choice.tail))
    }

    /// Levels of the ODE from point `at` to the end.
    fn grid(&self, at: usize, whole: u64) -> Vec<f64> {
        let count = self.intervals(at, whole) as usize;
        let start = self.sigmas()[at];
        if count == 0 { vec![start] } else { karras_sigmas(start, SIGMA_MIN, count + 1) }
    }

    /// The images that states at point `at` lead to.
    fn ahead(&self, env: &SearchEnv, x: Tensor, at: usize) -> Result<Tensor> {
        match self.look_ahead {
            0 => Ok(denoise(env, &x, self.sigmas()[at])?.x0),
            whole => heun(env, x, &self.grid(at, whole)),
        }
    }
}
