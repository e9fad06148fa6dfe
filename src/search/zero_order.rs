//! Zero-order search: a pivot of initial noise and its neighbours on the sphere, round by round
//! (Ma et al. 2025, arXiv 2501.09732, sec. 3; neighbours as the authors gave them to
//! tt-scale-flux).

use candle_core::Tensor;
use serde_json::{Map, Value, json};

use super::best::Best;
use super::chain::pick;
use super::env::{EnvSpec, Kernel, SearchEnv};
use super::method::{Outcome, Plan, SearchMethod};
use super::params::{Params, entry, largest, name_of, one_of};
use super::weights::first_max;
use crate::Result;
use crate::diffusion::cost::{Budget, Units};
use crate::diffusion::noise::{NoiseKey, Purpose};
use crate::rewards::ensemble::Marks;

const MOST: u64 = 1 << 20;
/// Most latents that are held at once.
const WIDEST: u64 = 1 << 12;
/// Rounds without a parameter and without a budget.
const DEFAULT_ROUNDS: u64 = 8;
/// Neighbours of the paper, and rounds from which it has twice as many.
const FEW: u64 = 2;
const MANY_ROUNDS: u64 = 50;

/// Cost: rounds × neighbours trajectories, and one for every round's pivot or the first
/// (`elitism`). Without a round it is plain sampling.
#[derive(Clone, Copy, Debug)]
pub struct ZeroOrder;

/// What a pivot without a better neighbour does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Elitism {
    /// It is replaced all the same: the paper.
    None,
    /// It stays.
    KeepPivot,
    /// A new one is drawn: tt-scale-flux.
    Restart,
}

impl Elitism {
    const OPTIONS: [(&'static str, Self); 3] =
        [("none", Self::None), ("keep-pivot", Self::KeepPivot), ("restart", Self::Restart)];

    fn name(self) -> &'static str {
        name_of(&Self::OPTIONS, &self)
    }
}

struct Choice {
    neighbors: Option<u64>,
    cosine: f64,
    elitism: Elitism,
    rounds: Option<u64>,
    search_steps: Option<u64>,
}

fn choice(params: &Map<String, Value>) -> Result<Choice> {
    let params = Params::new(params, &ZeroOrder.params())?;
    Ok(Choice {
        neighbors: params.integer("neighbors", 1..=WIDEST)?,
        cosine: params.number("cosine", 0.0..=1.0)?.unwrap_or(0.95),
        elitism: params.choice("elitism", &Elitism::OPTIONS)?.unwrap_or(Elitism::None),
        rounds: params.integer("rounds", 0..=MOST)?,
        search_steps: params.integer("search_steps", 1..=1000)?,
    })
}

impl Choice {
    fn cost(&self, spec: &EnvSpec, rounds: u64) -> Units {
        let search = self.search_steps.map_or(spec.steps, |steps| steps as usize);
        let (search_f, final_f) =
            (spec.steps_f(Kernel::Ode, search), spec.trajectory_f(Kernel::Ode));
        let neighbors = self.neighbors.unwrap_or(FEW);
        let images = match self.elitism {
            _ if rounds == 0 => 0,
            Elitism::None => rounds * neighbors,
            Elitism::KeepPivot => 1 + rounds * neighbors,
            Elitism::Restart => rounds * (neighbors + 1),
        };
        let again = u64::from(images == 0 || search != spec.steps);
        spec.cost(images * search_f + again * final_f, images + again)
    }
}

impl SearchMethod for ZeroOrder {
    fn name(&self) -> &'static str {
        "zero-order"
    }

    fn summary(&self) -> &'static str {
        "Moves the initial noise to the best of its neighbours, round by round"
    }

    fn params(&self) -> Map<String, Value> {
        Map::from_iter([
            entry(
                "neighbors",
                "integer",
                Value::Null,
                "of a round; absent: 2, and 4 where the budget affords over 50 rounds",
            ),
            entry("cosine", "number", json!(0.95), "of a neighbour with the pivot"),
            one_of(
                "elitism",
                &Elitism::OPTIONS,
                "none: the best neighbour is the next pivot; keep-pivot: only if it is better; \
                 restart: else a new pivot is drawn",
            ),
            entry("rounds", "integer", Value::Null, "absent: what the budget affords, or 8"),
            entry(
                "search_steps",
                "integer",
                Value::Null,
                "steps of trajectories that are compared; absent: the request's",
            ),
        ])
    }

    fn needs_reward(&self) -> bool {
        true
    }

    fn plan(&self, params: &Map<String, Value>, spec: &EnvSpec, budget: &Budget) -> Result<Plan> {
        let choice = choice(params)?;
        spec.needs_search(self.name())?;
        let steps = choice.search_steps.map_or(spec.steps, |steps| steps as usize);
        spec.check_steps(Kernel::Ode, spec.steps)?;
        spec.check_steps(Kernel::Ode, steps)?;
        // Round by round from one on the cost rises; none at all may cost more than one.
        let affordable = |choice: &Choice| largest(1..=MOST, budget, |n| choice.cost(spec, n));
        let mut choice = Choice { neighbors: choice.neighbors.or(Some(FEW)), ..choice };
        let asked = choice.rounds.or(affordable(&choice));
        if params.get("neighbors").is_none_or(Value::is_null)
            && choice.rounds.is_none()
            && asked.is_some_and(|rounds| rounds > MANY_ROUNDS)
        {
            choice.neighbors = Some(2 * FEW);
        }
        let affordable = affordable(&choice).or(budget.bounds().then_some(0));
        let rounds = choice.rounds.or(affordable).unwrap_or(DEFAULT_ROUNDS);
        let cost = choice.cost(spec, rounds);
        let params = Map::from_iter([
            ("neighbors".to_owned(), json!(choice.neighbors)),
            ("cosine".to_owned(), json!(choice.cosine)),
            ("elitism".to_owned(), json!(choice.elitism.name())),
            ("rounds".to_owned(), json!(rounds)),
            ("search_steps".to_owned(), json!(steps)),
        ]);
        Plan::new(self.name(), params, cost, budget)
    }

    fn run(&self, plan: &Plan, env: &mut SearchEnv, key: &NoiseKey) -> Result<Outcome> {
        let choice = choice(&plan.params)?;
        let steps = choice.search_steps.map_or(env.steps, |steps| steps as usize);
        let rounds = choice.rounds.unwrap_or(0);
        let mut search = Search { env, key, steps, best: Best::default(), seen: Vec::new() };
        let mut pivot = search.env.initial_noise(key, &[0])?;
        let mut pivots = 1;
        // What is known of the pivot, where it is worth something.
        let mut known: Vec<Marks> = Vec::new();
        if rounds > 0 && choice.elitism == Elitism::KeepPivot {
            known = search.marks(&pivot)?;
        }
        for round in 0..rounds {
            if choice.elitism == Elitism::Restart {
                known = search.marks(&pivot)?;
            }
            let neighbors = search.neighbors(&pivot, round, &choice)?;
            let mut marks = known.clone();
            marks.extend(search.marks(&neighbors)?);
            // The pivot and its neighbours are the candidates of one decision.
            let values = search.env.verifier.values(&marks);
            let (at, top) = first_max(&values);
            let moved = at >= known.len();
            let neighbor = at.saturating_sub(known.len());
            if moved {
                pivot = pick(&neighbors, &[neighbor])?;
                if choice.elitism == Elitism::KeepPivot {
                    known = vec![marks.swap_remove(at)];
                }
            } else if choice.elitism == Elitism::Restart {
                pivot = search.env.initial_noise(key, &[pivots])?;
                pivots += 1;
            }
            let value = top.is_finite().then_some(top);
            let entry =
                json!({"round": round, "moved": moved, "neighbor": neighbor, "value": value});
            search.best.note(search.env, entry);
        }
        search.finish(pivot)
    }
}

struct Search<'s, 'e> {
    env: &'s mut SearchEnv<'e>,
    key: &'s NoiseKey,
    steps: usize,
    best: Best,
    /// All noises so far, where the best one's image has to be made again with more steps.
    seen: Vec<(Marks, Tensor)>,
}

impl Search<'_, '_> {
    /// What the rewards say of these noises' images.
    fn marks(&mut self, noise: &Tensor) -> Result<Vec<Marks>> {
        let rows: Vec<u64> = (0..noise.dim(0)? as u64).collect();
        let mut all = Vec::with_capacity(rows.len());
        for rows in rows.chunks(self.env.micro_batch.max(1)) {
            let part = noise.narrow(0, rows[0] as usize, rows.len())?;
            let latents = self.env.sample_from(&part, self.key, Kernel::Ode, rows, self.steps)?;
            let judged = self.env.judge(&latents)?;
            all.extend(judged.marks.iter().cloned());
            if self.steps == self.env.steps {
                self.best.offer(self.env, &latents, judged)?;
                continue;
            }
            for (i, marks) in judged.marks.into_iter().enumerate() {
                self.seen.push((marks, part.narrow(0, i, 1)?));
            }
        }
        Ok(all)
    }

    /// |n| (cos u + sin t): u the pivot's direction, t a random one orthogonal to it.
    fn neighbors(&self, pivot: &Tensor, round: u64, choice: &Choice) -> Result<Tensor> {
        let shape = self.env.latent_shape;
        let to_vec = |t: &Tensor| -> Result<Vec<f32>> { Ok(t.flatten_all()?.to_vec1()?) };
        let n = to_vec(pivot)?;
        let norm = |v: &[f64]| v.iter().map(|v| v * v).sum::<f64>().sqrt();
        let n: Vec<f64> = n.into_iter().map(f64::from).collect();
        let length = norm(&n);
        let sine = (1.0 - choice.cosine * choice.cosine).sqrt();
        let mut rows = Vec::new();
        for neighbor in 0..choice.neighbors.unwrap_or(FEW) {
            let cpu = candle_core::Device::Cpu;
            let v = self.key.normal(Purpose::SearchProposal, round, neighbor, shape, &cpu)?;
            let mut v: Vec<f64> = to_vec(&v)?.into_iter().map(f64::from).collect();
            let along = v.iter().zip(&n).map(|(v, n)| v * n).sum::<f64>() / (length * length);
            v.iter_mut().zip(&n).for_each(|(v, n)| *v -= along * n);
            let across = norm(&v);
            let mixed = n.iter().zip(&v).map(|(n, v)| {
                (choice.cosine * n + sine * length / across.max(f64::MIN_POSITIVE) * v) as f32
            });
            rows.push(Tensor::from_iter(mixed, &cpu)?.reshape(shape)?);
        }
        Ok(Tensor::stack(&rows, 0)?.to_device(pivot.device())?)
    }

    fn finish(self, pivot: Tensor) -> Result<Outcome> {
        if !self.best.is_empty() {
            return self.best.finish(self.env);
        }
        let marks: Vec<Marks> = self.seen.iter().map(|(marks, _)| marks.clone()).collect();
        let (at, _) = first_max(&self.env.verifier.values(&marks));
        let noise = self.seen.get(at).map_or(pivot, |(_, noise)| noise.clone());
        let (key, steps) = (self.key, self.env.steps);
        let latents = self.env.sample_from(&noise, key, Kernel::Ode, &[0], steps)?;
        self.best.finish_with(self.env, &latents)
    }
}
