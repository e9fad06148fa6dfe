//! Feynman-Kac steering: particles that are resampled on the way by what their clean-image
//! estimates are worth (Singhal et al. 2025, arXiv 2501.06848), in log domain.

use serde_json::{Map, Value, json};

use super::best::Best;
use super::chain::Chain;
use super::env::{EnvSpec, Kernel, SearchEnv};
use super::method::{Outcome, Plan, SearchMethod};
use super::params::{Params, entry, largest, name_of, one_of};
use super::weights::{
    deviation, effective_size, log_mean_exp, multinomial, scaled, softmax, systematic,
};
use crate::Result;
use crate::diffusion::cost::{Budget, Units};
use crate::diffusion::noise::{NoiseKey, Purpose};

const MOST: u64 = 1 << 12;
const DEFAULT_PARTICLES: u64 = 4;
/// The paper's lambda, for a reward with a standard deviation of about 1 (ImageReward).
const LAMBDA: f64 = 10.0;
/// Fewest steps that a small budget is stretched to two particles with.
const LEAST_STEPS: u64 = 25;

/// E = kT, V = Y = k (|R| + 1) for k particles that are resampled after the steps R.
#[derive(Clone, Copy, Debug)]
pub struct FkSteering;

/// What a particle's weight grows by when it is valued.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Potential {
    /// Its best value so far.
    Max,
    /// The gain since its last value.
    Diff,
    /// The sum of its values.
    Sum,
}

impl Potential {
    const OPTIONS: [(&'static str, Self); 3] =
        [("max", Self::Max), ("diff", Self::Diff), ("sum", Self::Sum)];

    fn name(self) -> &'static str {
        name_of(&Self::OPTIONS, &self)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Resampler {
    Systematic,
    Multinomial,
}

impl Resampler {
    const OPTIONS: [(&'static str, Self); 2] =
        [("systematic", Self::Systematic), ("multinomial", Self::Multinomial)];

    fn name(self) -> &'static str {
        name_of(&Self::OPTIONS, &self)
    }
}

#[derive(Clone, Copy, Debug)]
struct Choice {
    particles: Option<u64>,
    /// None: [`LAMBDA`] over the deviation of the first values.
    lambda: Option<f64>,
    potential: Potential,
    /// Times that particles are valued before the end, evenly spaced.
    stops: u64,
    /// Share of the particles that the effective number falls below before a resampling.
    ess: f64,
    resampler: Resampler,
    chain_steps: Option<u64>,
}

fn choice(params: &Map<String, Value>) -> Result<Choice> {
    let params = Params::new(params, &FkSteering.params())?;
    Ok(Choice {
        particles: params.integer("particles", 1..=MOST)?,
        lambda: params.number("lambda", 0.0..=1e9)?,
        potential: params.choice("potential", &Potential::OPTIONS)?.unwrap_or(Potential::Max),
        stops: params.integer("stops", 0..=1000)?.unwrap_or(4),
        ess: params.number("ess", 0.0..=1.0)?.unwrap_or(0.5),
        resampler: params
            .choice("resampler", &Resampler::OPTIONS)?
            .unwrap_or(Resampler::Systematic),
        chain_steps: params.integer("chain_steps", 1..=1000)?,
    })
}

/// Steps after which particles are valued: every (steps / (stops + 1))-th, never the last.
fn stops(count: u64, steps: usize) -> Vec<usize> {
    let every = (steps as u64 / (count + 1)).max(1) as usize;
    (1..=count as usize).map(|i| i * every).filter(|step| *step + 1 < steps).collect()
}

impl Choice {
    fn cost(&self, spec: &EnvSpec, steps: u64, particles: u64) -> Units {
        let valued = if particles > 1 { stops(self.stops, steps as usize).len() as u64 } else { 0 };
        let f = particles * spec.steps_f(Kernel::Sde, steps as usize);
        spec.cost(f, particles * (valued + 1))
    }

    /// (steps, particles) for a budget.
    fn within(&self, spec: &EnvSpec, budget: &Budget) -> (u64, u64) {
        let steps = self.chain_steps.unwrap_or(spec.steps as u64);
        let default = (!budget.bounds()).then_some(DEFAULT_PARTICLES);
        if let Some(particles) = self.particles.or(default) {
            return (steps, particles);
        }
        let affordable =
            |steps: u64| largest(1..=MOST, budget, |k| self.cost(spec, steps, k)).unwrap_or(1);
        let particles = affordable(steps);
        if particles == 1 && self.chain_steps.is_none() {
            let mut shorter = (LEAST_STEPS.min(steps)..steps).rev();
            if let Some(fewer) = shorter.find(|steps| affordable(*steps) == 2) {
                return (fewer, 2);
            }
        }
        (steps, particles)
    }
}

impl SearchMethod for FkSteering {
    fn name(&self) -> &'static str {
        "fk-steering"
    }

    fn summary(&self) -> &'static str {
        "Particles of DDIM with eta 1, resampled by what they promise"
    }

    fn params(&self) -> Map<String, Value> {
        Map::from_iter([
            entry("particles", "integer", Value::Null, "absent: what the budget affords, or 4"),
            entry(
                "lambda",
                "number",
                Value::Null,
                "factor of rewards in log weights; absent: 10 over the standard deviation of \
                 the first values",
            ),
            one_of(
                "potential",
                &Potential::OPTIONS,
                "max: by the best value so far; diff: by its gain; sum: by all values",
            ),
            entry("stops", "integer", json!(4), "how often particles are valued on the way"),
            entry(
                "ess",
                "number",
                json!(0.5),
                "they are resampled when fewer than this share are effective; 1: always",
            ),
            one_of("resampler", &Resampler::OPTIONS, "systematic or multinomial"),
            entry(
                "chain_steps",
                "integer",
                Value::Null,
                "absent: the request's steps, or down to 25 for a second particle",
            ),
        ])
    }

    fn needs_reward(&self) -> bool {
        true
    }

    fn plan(&self, params: &Map<String, Value>, spec: &EnvSpec, budget: &Budget) -> Result<Plan> {
        let choice = choice(params)?;
        spec.needs_search(self.name())?;
        spec.needs_absolute(self.name())?;
        let (steps, particles) = choice.within(spec, budget);
        spec.check_steps(Kernel::Sde, steps as usize)?;
        let predicted = choice.cost(spec, steps, particles);
        let params = Map::from_iter([
            ("particles".to_owned(), json!(particles)),
            ("lambda".to_owned(), json!(choice.lambda)),
            ("potential".to_owned(), json!(choice.potential.name())),
            ("stops".to_owned(), json!(choice.stops)),
            ("ess".to_owned(), json!(choice.ess)),
            ("resampler".to_owned(), json!(choice.resampler.name())),
            ("chain_steps".to_owned(), json!(steps)),
        ]);
        Plan::new(self.name(), params, predicted, budget)
    }

    fn run(&self, plan: &Plan, env: &mut SearchEnv, key: &NoiseKey) -> Result<Outcome> {
        let choice = choice(&plan.params)?;
        let steps = choice.chain_steps.map_or(env.steps, |steps| steps as usize);
        let chain = Chain::new(env.schedule, steps, 1.0)?;
        let candidates: Vec<u64> = (0..choice.particles.unwrap_or(1)).collect();
        let stops = if candidates.len() > 1 { stops(choice.stops, steps) } else { Vec::new() };
        let mut best = Best::default();
        let mut particles = Particles::new(choice, candidates.len());
        let mut x = env.initial_noise(key, &candidates)?;
        for step in 0..steps {
            let mut ahead = chain.look(env, &x, step)?;
            if stops.contains(&step) {
                // The estimate from before the step costs no evaluation.
                let values = env.values(&ahead.x0)?;
                let mut rng = key.rng(Purpose::Resample, step as u64, 0);
                let kept = particles.stop(&values, &mut rng);
                best.note(env, json!({"step": step, "kept": kept, "values": finite(&values)}));
                ahead = ahead.rows(&kept)?;
            }
            let noise = chain.noise(env, key, step, &candidates)?;
            x = chain.advance(step, &ahead.mean, &noise)?;
            env.tell(None);
        }
        let judged = env.judge(&x)?;
        let log_z = particles.end(&judged.values);
        if candidates.len() > 1 {
            best.note(env, json!({"log_z": log_z.is_finite().then_some(log_z)}));
        }
        best.offer(env, &x, judged)?;
        best.finish(env)
    }
}

/// Values as JSON has them: null where scoring failed.
fn finite(values: &[f64]) -> Vec<Option<f64>> {
    values.iter().map(|value| value.is_finite().then_some(*value)).collect()
}

/// The particles' weights.
struct Particles {
    choice: Choice,
    lambda: Option<f64>,
    /// Log of the product of a lineage's potentials.
    log_p: Vec<f64>,
    /// Log weights since the last resampling.
    log_w: Vec<f64>,
    top: Vec<f64>,
    sum: Vec<f64>,
    /// Log of the estimate of E[exp(lambda r)].
    log_z: f64,
}

impl Particles {
    fn new(choice: Choice, count: usize) -> Self {
        let zeros = || vec![0.0; count];
        Self {
            choice,
            lambda: choice.lambda,
            log_p: zeros(),
            log_w: zeros(),
            top: vec![f64::NEG_INFINITY; count],
            sum: zeros(),
            log_z: 0.0,
        }
    }

    /// Decided by the first values that differ; 0 until then.
    fn lambda(&mut self, values: &[f64]) -> f64 {
        let spread = deviation(values);
        if self.lambda.is_none() && spread > 0.0 {
            self.lambda = Some(LAMBDA / spread).filter(|lambda| lambda.is_finite());
        }
        self.lambda.unwrap_or(0.0)
    }

    /// Values the particles and chooses which go on, a place for each.
    fn stop(&mut self, values: &[f64], rng: &mut impl rand::Rng) -> Vec<usize> {
        let (lambda, count) = (self.lambda(values), values.len());
        if values.iter().all(|value| *value == f64::NEG_INFINITY) {
            return (0..count).collect();
        }
        for (i, value) in values.iter().enumerate() {
            let own = scaled(lambda, *value);
            let increment = match self.choice.potential {
                Potential::Diff => difference(own, self.log_p[i]),
                Potential::Max => {
                    self.top[i] = self.top[i].max(*value);
                    scaled(lambda, self.top[i])
                }
                Potential::Sum => {
                    self.sum[i] += own;
                    self.sum[i]
                }
            };
            self.log_p[i] += increment;
            self.log_w[i] += increment;
        }
        if self.log_w.iter().all(|w| *w == f64::NEG_INFINITY) {
            // Each failed once: from here on they are as good as each other.
            self.log_z = f64::NEG_INFINITY;
            self.log_w.fill(0.0);
            self.log_p.fill(0.0);
            return (0..count).collect();
        }
        let weights = softmax(&self.log_w);
        let enough = effective_size(&weights) >= self.choice.ess * count as f64;
        let uniform = weights.iter().all(|weight| *weight == weights[0]);
        if uniform || (enough && self.choice.ess < 1.0) {
            return (0..count).collect();
        }
        self.log_z += log_mean_exp(&self.log_w);
        let kept = match self.choice.resampler {
            Resampler::Systematic => systematic(&weights, rng),
            Resampler::Multinomial => multinomial(&weights, rng),
        };
        let take = |of: &[f64]| kept.iter().map(|i| of[*i]).collect();
        (self.log_p, self.top, self.sum) = (take(&self.log_p), take(&self.top), take(&self.sum));
        self.log_w.fill(0.0);
        kept
    }

    /// Makes every lineage's product exp(lambda r) of its finished image; the estimate's log.
    fn end(&mut self, values: &[f64]) -> f64 {
        let lambda = self.lambda(values);
        for (i, value) in values.iter().enumerate() {
            self.log_w[i] += difference(scaled(lambda, *value), self.log_p[i]);
        }
        self.log_z += log_mean_exp(&self.log_w);
        self.log_z
    }
}

/// a - b; -inf where a is, whatever b.
fn difference(a: f64, b: f64) -> f64 {
    if a == f64::NEG_INFINITY || b == f64::NEG_INFINITY { a } else { a - b }
}
