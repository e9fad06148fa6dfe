//! EvoSearch: generations of initial noise, then of states on the way, bred by the rewards of
//! their finished images (He et al. 2025, arXiv 2505.17618).

use candle_core::{Device, Tensor};
use rand::seq::index::sample;
use serde_json::{Map, Value, json};

use super::best::Best;
use super::chain::{Chain, pick};
use super::env::{EnvSpec, Kernel, SearchEnv};
use super::levels;
use super::method::{Outcome, Plan, SearchMethod};
use super::params::{Params, entry, largest, name_of, one_of};
use super::weights::ranking;
use crate::diffusion::cost::{Budget, Units};
use crate::diffusion::noise::{NoiseKey, Purpose};
use crate::rewards::ensemble::Marks;
use crate::{Error, Result};

const MOST: u64 = 1 << 12;
/// The paper's generations (SD 2.1, 50 steps): steps that they are bred at, and sizes.
const LEVELS: [u64; 4] = [0, 20, 30, 40];
const SIZES: [u64; 5] = [42, 26, 26, 26, 30];
const ELITES: u64 = 5;
/// Trajectories up to which there are two generations of initial noise alone.
const FEW: u64 = 10;

/// E = P_0 T + sum of P_g (T - s_(g-1)) for generations of P_g members that are bred at the steps
/// s; V = Y = sum of P_g.
#[derive(Clone, Copy, Debug)]
pub struct EvoSearch;

/// How the state of a child comes from its parent's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mutation {
    /// The parent's next state, noised back to this level: the law of the forward process.
    Renoise,
    /// The parent's state and a step's own noise: the paper.
    AddSigma,
}

impl Mutation {
    const OPTIONS: [(&'static str, Self); 2] =
        [("renoise", Self::Renoise), ("add-sigma", Self::AddSigma)];

    fn name(self) -> &'static str {
        name_of(&Self::OPTIONS, &self)
    }
}

#[derive(Clone, Debug)]
struct Choice {
    /// Steps, ascending from 0; one fewer than sizes.
    levels: Option<Vec<u64>>,
    sizes: Option<Vec<u64>>,
    /// Share of a child's initial noise that is new.
    beta: f64,
    elites: Option<u64>,
    /// Share of the archive that a parent is the best of.
    tournament: f64,
    mutation: Mutation,
}

fn choice(params: &Map<String, Value>) -> Result<Choice> {
    let params = Params::new(params, &EvoSearch.params())?;
    Ok(Choice {
        levels: params.integers("levels", 0..=1000)?,
        sizes: params.integers("sizes", 1..=MOST)?,
        beta: params.number("beta", 0.0..=1.0)?.unwrap_or(0.2),
        elites: params.integer("elites", 0..=MOST)?,
        tournament: params.number("tournament", 0.0..=1.0)?.unwrap_or(0.9),
        mutation: params.choice("mutation", &Mutation::OPTIONS)?.unwrap_or(Mutation::Renoise),
    })
}

/// A choice with its numbers.
#[derive(Clone, Debug)]
struct Search {
    levels: Vec<u64>,
    sizes: Vec<u64>,
    elites: u64,
    choice: Choice,
}

impl Search {
    /// The step at which a generation begins.
    fn start(&self, generation: usize) -> u64 {
        generation.checked_sub(1).map_or(0, |before| self.levels[before])
    }

    fn cost(&self, spec: &EnvSpec) -> Units {
        let steps = |generation: usize| spec.steps as u64 - self.start(generation);
        let f: u64 = self
            .sizes
            .iter()
            .enumerate()
            .map(|(g, size)| size * spec.steps_f(Kernel::Sde, steps(g) as usize))
            .sum();
        spec.cost(f, self.sizes.iter().sum())
    }
}

impl Choice {
    /// Generations of this many first members, in the paper's proportions.
    fn scaled(&self, first: u64, levels: &[u64]) -> Search {
        let scale = |size: u64| ((size * first + SIZES[0] / 2) / SIZES[0]).max(1);
        let later = |generation: usize| match levels.len() {
            1 => first,
            count if generation == count => scale(SIZES[4]),
            _ => scale(SIZES[1]),
        };
        let sizes = std::iter::once(first).chain((1..=levels.len()).map(later)).collect();
        self.with(levels.to_vec(), sizes)
    }

    fn with(&self, levels: Vec<u64>, sizes: Vec<u64>) -> Search {
        let first = sizes.first().copied().unwrap_or(1);
        let proportional = ((ELITES * first + SIZES[0] / 2) / SIZES[0]).max(1);
        let elites = self.elites.unwrap_or(proportional);
        Search { levels, sizes, elites, choice: self.clone() }
    }

    fn within(&self, spec: &EnvSpec, budget: &Budget) -> Result<Search> {
        let steps = spec.steps as u64;
        let default = levels::of_50(&LEVELS, steps);
        let given = self.levels.clone().map(|given| levels::checked(given, steps)).transpose()?;
        if let Some(sizes) = &self.sizes {
            let few = sizes.len().saturating_sub(1).min(default.len());
            let levels = given.unwrap_or_else(|| default[..few].to_vec());
            if sizes.len() != levels.len() + 1 {
                let (sizes, levels) = (sizes.len(), levels.len());
                let message = format!("{sizes} sizes for {levels} levels: expected one more");
                return Err(Error::invalid("method.sizes", message));
            }
            return Ok(self.with(levels, sizes.clone()));
        }
        if !budget.bounds() {
            return Ok(self.scaled(SIZES[0], &given.unwrap_or(default)));
        }
        let trajectory = spec.cost(spec.trajectory_f(Kernel::Sde), 1);
        let times =
            |n: u64| Units { f: n * trajectory.f, v: n * trajectory.v, y: n * trajectory.y, l: 0 };
        let trajectories = largest(1..=MOST, budget, times).unwrap_or(1);
        let levels = match given {
            Some(levels) => levels,
            None if trajectories < 2 => Vec::new(),
            None if trajectories <= FEW => vec![0],
            None => default,
        };
        let cost = |first: u64| self.scaled(first, &levels).cost(spec);
        let mut search = self.scaled(largest(1..=MOST, budget, cost).unwrap_or(1), &levels);
        // The last generation has what is left.
        let last = search.sizes.len() - 1;
        let with = |size: u64| {
            let mut search = search.clone();
            search.sizes[last] = size;
            search.cost(spec)
        };
        if let Some(size) = largest(search.sizes[last]..=MOST, budget, with) {
            search.sizes[last] = size;
        }
        Ok(search)
    }
}

impl SearchMethod for EvoSearch {
    fn name(&self) -> &'static str {
        "evo-search"
    }

    fn summary(&self) -> &'static str {
        "Generations of noises and of states on the way, bred by their finished images"
    }

    fn params(&self) -> Map<String, Value> {
        Map::from_iter([
            entry(
                "levels",
                "array",
                Value::Null,
                "steps at which generations are bred, from 0; absent: 0, 0.4, 0.6 and 0.8 of all, \
                 with few trajectories 0",
            ),
            entry(
                "sizes",
                "array",
                Value::Null,
                "members of generations, one more than levels; absent: what the budget affords \
                 in the proportions of 42, 26, 26, 26, 30",
            ),
            entry("beta", "number", json!(0.2), "new part of a child's initial noise"),
            entry(
                "elites",
                "integer",
                Value::Null,
                "members that go on as they are; absent: 5 \
                   for 42 first members, in proportion",
            ),
            entry(
                "tournament",
                "number",
                json!(0.9),
                "share of the archive that a parent is the \
                   best of",
            ),
            one_of(
                "mutation",
                &Mutation::OPTIONS,
                "of states on the way: renoise, the \
                   forward process; add-sigma, the paper's",
            ),
        ])
    }

    fn needs_reward(&self) -> bool {
        true
    }

    fn plan(&self, params: &Map<String, Value>, spec: &EnvSpec, budget: &Budget) -> Result<Plan> {
        let choice = choice(params)?;
        spec.needs_search(self.name())?;
        spec.check_steps(Kernel::Sde, spec.steps)?;
        let search = choice.within(spec, budget)?;
        let params = Map::from_iter([
            ("levels".to_owned(), json!(search.levels)),
            ("sizes".to_owned(), json!(search.sizes)),
            ("beta".to_owned(), json!(choice.beta)),
            ("elites".to_owned(), json!(search.elites)),
            ("tournament".to_owned(), json!(choice.tournament)),
            ("mutation".to_owned(), json!(choice.mutation.name())),
        ]);
        Plan::new(self.name(), params, search.cost(spec), budget)
    }

    fn run(&self, plan: &Plan, env: &mut SearchEnv, key: &NoiseKey) -> Result<Outcome> {
        let search = choice(&plan.params)?.within(&env.spec(), &Budget::default())?;
        let chain = Chain::new(env.schedule, env.steps, 1.0)?;
        let mut best = Best::default();
        let mut breeding = Breeding { search: &search, chain: &chain, key, archives: Vec::new() };
        breeding.archives.resize_with(search.levels.len(), Archive::default);
        let founders: Vec<u64> = (0..search.sizes[0]).collect();
        let mut population = env.initial_noise(key, &founders)?;
        for generation in 0..search.sizes.len() {
            breeding.roll(env, &mut best, population, generation)?;
            if generation == search.levels.len() {
                break;
            }
            population = breeding.breed(env, &mut best, generation)?;
        }
        best.finish(env)
    }
}

/// States of all members that passed a level, in the host's memory, with what the rewards say of
/// their finished images.
#[derive(Default)]
struct Archive {
    /// [1, C, h, w] before the level's step.
    before: Vec<Tensor>,
    /// After it.
    after: Vec<Tensor>,
    marks: Vec<Marks>,
}

struct Breeding<'a> {
    search: &'a Search,
    chain: &'a Chain,
    key: &'a NoiseKey,
    archives: Vec<Archive>,
}

impl Breeding<'_> {
    /// Finishes a generation's members [P, C, h, w] and archives their states.
    fn roll(
        &mut self,
        env: &mut SearchEnv,
        best: &mut Best,
        population: Tensor,
        generation: usize,
    ) -> Result<()> {
        let size = population.dim(0)?;
        // A key for each, whatever the sizes.
        let members: Vec<u64> =
            (0..size as u64).map(|member| (generation as u64) << 32 | member).collect();
        let mut x = population;
        for step in self.search.start(generation) as usize..self.chain.steps() {
            let levels = &self.search.levels;
            let archive = (generation..levels.len()).find(|g| levels[*g] == step as u64);
            let rows = |x: &Tensor| {
                let x = x.to_device(&Device::Cpu)?;
                (0..size).map(|row| pick(&x, &[row])).collect::<Result<Vec<_>>>()
            };
            if let Some(at) = archive {
                self.archives[at].before.extend(rows(&x)?);
            }
            let ahead = self.chain.look(env, &x, step)?;
            let noise = self.chain.noise(env, self.key, step, &members)?;
            x = self.chain.advance(step, &ahead.mean, &noise)?;
            if let Some(at) = archive {
                self.archives[at].after.extend(rows(&x)?);
            }
            env.tell(None);
        }
        let judged = env.judge(&x)?;
        for archive in &mut self.archives[generation..] {
            archive.marks.extend_from_slice(&judged.marks);
        }
        best.offer(env, &x, judged)
    }

    /// The next generation's members at its first step.
    fn breed(&self, env: &mut SearchEnv, best: &mut Best, generation: usize) -> Result<Tensor> {
        let archive = &self.archives[generation];
        let size = self.search.sizes[generation + 1] as usize;
        let ranks = ranking(&env.verifier.values(&archive.marks));
        let elites = (self.search.elites as usize).min(size).min(ranks.len());
        let mut members: Vec<Tensor> =
            ranks[..elites].iter().map(|i| archive.before[*i].clone()).collect();
        let subset = (self.search.choice.tournament * ranks.len() as f64).ceil() as usize;
        for child in elites..size {
            let mut rng = self.key.rng(Purpose::Resample, generation as u64, child as u64);
            let drawn = sample(&mut rng, ranks.len(), subset.clamp(1, ranks.len()));
            // The best is the one that comes first in the ranking, so that ties go to the older.
            let drawn: Vec<usize> = drawn.into_vec();
            let parent = ranks.iter().copied().find(|i| drawn.contains(i)).unwrap_or(0);
            members.push(self.child(env, archive, parent, generation, child as u64)?);
        }
        let kept: Vec<usize> = ranks[..elites].to_vec();
        let entry = json!({"generation": generation, "elites": kept, "members": size});
        best.note(env, entry);
        Ok(Tensor::cat(&members, 0)?.to_device(env.denoiser.device())?)
    }

    fn child(
        &self,
        env: &SearchEnv,
        archive: &Archive,
        parent: usize,
        generation: usize,
        member: u64,
    ) -> Result<Tensor> {
        let step = self.search.levels[generation] as usize;
        let shape = env.latent_shape;
        let purpose = Purpose::SearchProposal;
        let noise = self.key.normal_rows(purpose, step as u64, &[member], shape, &Device::Cpu)?;
        let blend = |a: f64, x: &Tensor, b: f64| -> Result<Tensor> {
            Ok((x.affine(a, 0.0)? + noise.affine(b, 0.0)?)?)
        };
        if generation == 0 {
            let beta = self.search.choice.beta;
            return blend((1.0 - beta * beta).sqrt(), &archive.before[parent], beta);
        }
        match self.search.choice.mutation {
            Mutation::AddSigma => blend(1.0, &archive.before[parent], self.chain.std(step)),
            Mutation::Renoise => {
                let ratio = self.chain.alpha(step) / self.chain.alpha(step + 1);
                blend(ratio, &archive.after[parent], (1.0 - ratio * ratio).max(0.0).sqrt())
            }
        }
    }
}
