//! Demon: the noise of every stochastic step is put together from noises that promise a better
//! image (Yeh, Lee, Chen 2025, arXiv 2410.05760).

use candle_core::{Device, Tensor};
use serde_json::{Map, Value, json};

use super::best::Best;
use super::chain::repeat;
use super::edm::{denoise, heun, plus};
use super::env::{EnvSpec, Kernel, SearchEnv};
use super::method::{Outcome, Plan, SearchMethod};
use super::params::{Params, entry, name_of, one_of};
use super::weights::{deviation, first_max, softmax};
use crate::diffusion::cost::{Budget, Units};
use crate::diffusion::grid::karras_sigmas;
use crate::diffusion::meter::fits;
use crate::diffusion::noise::{NoiseKey, Purpose};
use crate::{Error, Result};

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

/// How values become weights of noises.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Weighting {
    Tanh,
    Boltzmann,
    Linear,
}

impl Weighting {
    const OPTIONS: [(&'static str, Self); 3] =
        [("tanh", Self::Tanh), ("boltzmann", Self::Boltzmann), ("linear", Self::Linear)];

    fn name(self) -> &'static str {
        name_of(&Self::OPTIONS, &self)
    }
}

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

/// The scale of values in their weights.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Tau {
    /// The deviation of a step's values.
    Adaptive,
    /// That of the first step's, for good: as released.
    Frozen,
    Fixed(f64),
}

impl Tau {
    fn read(params: &Params) -> Result<Self> {
        let Some(value) = params.value("tau") else { return Ok(Self::Adaptive) };
        let number = value.as_f64().or_else(|| value.as_str()?.parse().ok());
        match (value.as_str(), number) {
            (Some("adaptive"), _) => Ok(Self::Adaptive),
            (Some("adaptive-frozen"), _) => Ok(Self::Frozen),
            (_, Some(tau)) if tau > 0.0 => Ok(Self::Fixed(tau)),
            _ => {
                let message =
                    format!("{value} is not 'adaptive', 'adaptive-frozen' or a number above 0");
                Err(Error::invalid("method.tau", message))
            }
        }
    }

    fn value(self) -> Value {
        match self {
            Self::Adaptive => json!("adaptive"),
            Self::Frozen => json!("adaptive-frozen"),
            Self::Fixed(tau) => json!(tau),
        }
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
        let judged = env.judge(&x)?;
        best.offer(env, &x, judged)?;
        best.finish(env)
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
            let values = env.judge(&ends)?.values;
            let weights = self.weights(&values, &mut frozen);
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

    /// Weights of the noises; 0 where scoring failed, 1 for all where nothing tells them apart.
    fn weights(&self, values: &[f64], frozen: &mut Option<f64>) -> Vec<f64> {
        let known: Vec<f64> = values.iter().copied().filter(|v| v.is_finite()).collect();
        let spread = deviation(&known);
        let scale = known.iter().fold(0.0f64, |top, value| top.max(value.abs()));
        if spread <= 1e-12 * scale || known.len() < 2 {
            let failed = known.is_empty();
            return values.iter().map(|v| f64::from(u8::from(failed || v.is_finite()))).collect();
        }
        let tau = match self.choice.tau {
            Tau::Adaptive => spread,
            Tau::Frozen => *frozen.get_or_insert(spread),
            Tau::Fixed(tau) => tau,
        };
        let mean = known.iter().sum::<f64>() / known.len() as f64;
        let (_, top) = first_max(values);
        match self.choice.weighting {
            Weighting::Boltzmann => {
                softmax(&values.iter().map(|v| (v - top) / tau).collect::<Vec<_>>())
            }
            Weighting::Tanh => each(values, |v| ((v - mean) / tau).tanh()),
            Weighting::Linear => each(values, |v| v),
        }
    }
}

/// `of` the values, 0 where scoring failed.
fn each(values: &[f64], of: impl Fn(f64) -> f64) -> Vec<f64> {
    values.iter().map(|v| if v.is_finite() { of(*v) } else { 0.0 }).collect()
}

/// The weighted sum of noises, as long as a typical one: sqrt(d). `best`: whose noise is taken
/// where the sum vanishes.
fn synthesised(noise: &Tensor, weights: &[f64], best: usize) -> Result<Tensor> {
    let dims = noise.dims().to_vec();
    let rows = noise.flatten_from(1)?.to_vec2::<f32>()?;
    let d = rows[0].len();
    let mut sum = vec![0.0f64; d];
    for (row, weight) in rows.iter().zip(weights) {
        sum.iter_mut().zip(row).for_each(|(s, v)| *s += weight * f64::from(*v));
    }
    let norm = |v: &[f64]| v.iter().map(|v| v * v).sum::<f64>().sqrt();
    let typical = (d as f64).sqrt();
    let largest = weights.iter().fold(0.0f64, |top, weight| top.max(weight.abs()));
    if norm(&sum) <= 1e-6 * typical * largest {
        sum = rows[best].iter().map(|v| f64::from(*v)).collect();
    }
    let scale = typical / norm(&sum).max(f64::MIN_POSITIVE);
    let values: Vec<f32> = sum.into_iter().map(|v| (v * scale) as f32).collect();
    let shape = [&[1], &dims[1..]].concat();
    Ok(Tensor::from_vec(values, shape, &Device::Cpu)?.to_device(noise.device())?)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Mean component of the synthesised noise along a linear reward's direction, against the
    /// values of spec search 3.4 (d far above K).
    #[test]
    fn gains_along_a_linear_reward() -> Result<()> {
        let (d, trials) = (1024, 300);
        let key = NoiseKey::new(11);
        for (weights, k, expected) in [
            ("tanh", 2, 0.83),
            ("tanh", 4, 1.53),
            ("tanh", 16, 3.75),
            ("boltzmann", 4, 0.90),
            ("boltzmann", 16, 2.33),
        ] {
            let params = Map::from_iter([("weights".to_owned(), json!(weights))]);
            let search = choice(&params)?.search((20, k, 0));
            let mut total = 0.0;
            for trial in 0..trials {
                let rows: Vec<u64> = (0..k).collect();
                let noise =
                    key.normal_rows(Purpose::Data, trial, &rows, (1, 1, d), &Device::Cpu)?;
                let along = noise.flatten_from(1)?.narrow(1, 0, 1)?.flatten_all()?;
                let values: Vec<f64> = along.to_vec1::<f32>()?.into_iter().map(f64::from).collect();
                let weights = search.weights(&values, &mut None);
                let z = synthesised(&noise, &weights, first_max(&values).0)?;
                let z = z.flatten_all()?.to_vec1::<f32>()?;
                let norm: f64 = z.iter().map(|v| f64::from(*v).powi(2)).sum();
                assert!((norm / d as f64 - 1.0).abs() < 1e-4);
                total += f64::from(z[0]) / trials as f64;
            }
            assert!((total - expected).abs() < 0.17, "{weights} {k}: {total} is not {expected}");
        }
        Ok(())
    }

    #[test]
    fn weights_without_differences_and_with_failures() -> Result<()> {
        let search = choice(&Map::new())?.search((20, 4, 0));
        let no = f64::NEG_INFINITY;
        assert_eq!(search.weights(&[0.3; 4], &mut None), [1.0; 4]);
        assert_eq!(search.weights(&[no; 4], &mut None), [1.0; 4]);
        assert_eq!(search.weights(&[no, 2.0, no], &mut None), [0.0, 1.0, 0.0]);
        let without = search.weights(&[1.0, 2.0, 4.0], &mut None);
        let with = search.weights(&[1.0, no, 2.0, 4.0], &mut None);
        assert_eq!([with[0], with[2], with[3]], without[..]);
        assert_eq!(with[1], 0.0);
        // Frozen: the first step's deviation for good.
        let frozen = Search { choice: Choice { tau: Tau::Frozen, ..search.choice }, ..search };
        let mut tau = None;
        frozen.weights(&[0.0, 2.0], &mut tau);
        assert_eq!(tau, Some(2f64.sqrt()));
        frozen.weights(&[0.0, 200.0], &mut tau);
        assert_eq!(tau, Some(2f64.sqrt()));
        Ok(())
    }
}
