//! Free2Guide: the best child of some stochastic steps by its clean-image estimate (Kim, Kim, Ye
//! 2025, arXiv 2411.17041, path-integral control with alpha to 0).

use rand::seq::index::sample;
use serde_json::{Map, Value, json};

use super::chain::Chain;
use super::env::{EnvSpec, SearchEnv};
use super::method::{Outcome, Plan, SearchMethod};
use super::params::{Params, entry, largest, name_of, one_of};
use super::step_search::uniform::Uniform;
use crate::Result;
use crate::diffusion::cost::Budget;
use crate::diffusion::meter::fits;
use crate::diffusion::noise::{NoiseKey, Purpose};

const MOST: u64 = 1 << 16;
/// Guided steps and children of the paper (LaVie), and the most children that its ablation
/// still gains from.
const STEPS: u64 = 5;
const CHILDREN: u64 = 5;
const MANY: u64 = 11;
/// Where more children are no use, and more steps are guided instead.
const MOST_CHILDREN: u64 = 20;

/// Cost in evaluations: T + m(n-1) for m guided steps of T; V = Y = m n and the image.
#[derive(Clone, Copy, Debug)]
pub struct Free2Guide;

/// Which steps are guided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Guided {
    /// The first ones: the paper.
    First,
    /// By lot: Diffusion-Sharpening's port to SDXL.
    Random,
}

impl Guided {
    const OPTIONS: [(&'static str, Self); 2] = [("first", Self::First), ("random", Self::Random)];

    fn name(self) -> &'static str {
        name_of(&Self::OPTIONS, &self)
    }

    fn steps(self, count: u64, of: usize, key: &NoiseKey) -> Vec<bool> {
        let count = (count as usize).min(of);
        let mut guided = vec![false; of];
        match self {
            Self::First => guided[..count].fill(true),
            Self::Random => {
                let mut rng = key.rng(Purpose::SearchSchedule, 0, 0);
                sample(&mut rng, of, count).into_iter().for_each(|step| guided[step] = true);
            }
        }
        guided
    }
}

#[derive(Clone, Copy, Debug)]
struct Choice {
    children: Option<u64>,
    guided_steps: Option<u64>,
    guided: Guided,
    eta: f64,
    alpha: f64,
    initial: u64,
    cached: bool,
    chain_steps: Option<u64>,
}

fn choice(params: &Map<String, Value>) -> Result<Choice> {
    let params = Params::new(params, &Free2Guide.params())?;
    Ok(Choice {
        children: params.integer("children", 1..=MOST)?,
        guided_steps: params.integer("guided_steps", 0..=1000)?,
        guided: params.choice("guided", &Guided::OPTIONS)?.unwrap_or(Guided::First),
        eta: params.number("eta", 0.0..=1.0)?.unwrap_or(1.0),
        alpha: params.number("alpha", 0.0..=f64::MAX)?.unwrap_or(0.0),
        initial: params.integer("initial", 1..=MOST)?.unwrap_or(1),
        cached: params.boolean("cached")?.unwrap_or(true),
        chain_steps: params.integer("chain_steps", 1..=1000)?,
    })
}

impl Choice {
    /// As it is run with these numbers. Random steps never include the last, as a plan must not
    /// depend on the lot.
    fn search(&self, (steps, guided, children): (u64, u64, u64), key: &NoiseKey) -> Uniform {
        let steps = steps as usize;
        let mut marks = match self.guided {
            Guided::Random if guided < steps as u64 => {
                let mut marks = self.guided.steps(guided, steps - 1, key);
                marks.push(false);
                marks
            }
            _ => self.guided.steps(guided, steps, key),
        };
        if self.eta == 0.0 {
            marks.fill(false);
        }
        let (initial, cached, alpha) = (self.initial, self.cached, self.alpha);
        Uniform { guided: marks, children, initial, cached, alpha }
    }

    /// (steps, guided steps, children) for a budget.
    fn within(&self, spec: &EnvSpec, budget: &Budget) -> (u64, u64, u64) {
        let full = self.chain_steps.unwrap_or(spec.steps as u64);
        let key = NoiseKey::new(0);
        let cost = |numbers| self.search(numbers, &key).cost(spec);
        let given = (self.guided_steps, self.children);
        if !budget.bounds() {
            return (full, given.0.unwrap_or(STEPS), given.1.unwrap_or(CHILDREN));
        }
        let affords = |steps: u64, guided: u64| {
            largest(1..=MOST, budget, |children| cost((steps, guided, children)))
        };
        match given {
            (Some(guided), Some(children)) => (full, guided, children),
            (None, Some(children)) => {
                let most = largest(0..=full, budget, |guided| cost((full, guided, children)));
                (full, most.unwrap_or(0), children)
            }
            (Some(guided), None) => (full, guided, affords(full, guided).unwrap_or(1)),
            (None, None) => {
                // More children up to where they help, then more steps.
                for (guided, most) in [(STEPS, MANY), (2 * STEPS, 21), (4 * STEPS, 23)] {
                    let guided = guided.min(full);
                    let children = affords(full, guided).unwrap_or(1);
                    if children <= most {
                        return self.cheaper(spec, budget, (full, guided, children));
                    }
                }
                let children = affords(full, full - 1).unwrap_or(1).min(MOST_CHILDREN);
                (full, full - 1, children)
            }
        }
    }

    /// Fewer steps where a trajectory leaves too little for the paper's search.
    fn cheaper(
        &self,
        spec: &EnvSpec,
        budget: &Budget,
        numbers: (u64, u64, u64),
    ) -> (u64, u64, u64) {
        let (full, _, children) = numbers;
        if children >= CHILDREN || self.chain_steps.is_some() {
            return numbers;
        }
        let key = NoiseKey::new(0);
        let fewer = (full / 2..=full).rev().map(|steps| (steps, STEPS.min(steps), CHILDREN));
        let mut fitting = fewer.filter(|n| fits(budget, self.search(*n, &key).cost(spec)).is_ok());
        match fitting.next() {
            Some(cheaper) if full >= 2 * STEPS => cheaper,
            _ => numbers,
        }
    }
}

impl SearchMethod for Free2Guide {
    fn name(&self) -> &'static str {
        "free2guide"
    }

    fn summary(&self) -> &'static str {
        "At some steps of DDIM, of several children the one with the best look ahead"
    }

    fn params(&self) -> Map<String, Value> {
        let budget = "absent: what the budget affords, or 5";
        Map::from_iter([
            entry("children", "integer", Value::Null, budget),
            entry("guided_steps", "integer", Value::Null, budget),
            one_of("guided", &Guided::OPTIONS, "first: the first steps; random: any but the last"),
            entry("eta", "number", json!(1.0), "stochasticity of DDIM; 0: no search"),
            entry("alpha", "number", json!(0.0), "temperature; above 0 noises are averaged"),
            entry(
                "initial",
                "integer",
                json!(1),
                "initial latents to choose from; the released code: n",
            ),
            entry(
                "cached",
                "boolean",
                json!(true),
                "a look ahead serves the next step; the released code: false",
            ),
            entry(
                "chain_steps",
                "integer",
                Value::Null,
                "absent: the request's steps, or what fits",
            ),
        ])
    }

    fn needs_reward(&self) -> bool {
        true
    }

    fn plan(&self, params: &Map<String, Value>, spec: &EnvSpec, budget: &Budget) -> Result<Plan> {
        let choice = choice(params)?;
        spec.needs_search(self.name())?;
        let (steps, guided, children) = choice.within(spec, budget);
        let predicted = choice.search((steps, guided, children), &NoiseKey::new(0)).cost(spec);
        let params = Map::from_iter([
            ("children".to_owned(), json!(children)),
            ("guided_steps".to_owned(), json!(guided)),
            ("guided".to_owned(), json!(choice.guided.name())),
            ("eta".to_owned(), json!(choice.eta)),
            ("alpha".to_owned(), json!(choice.alpha)),
            ("initial".to_owned(), json!(choice.initial)),
            ("cached".to_owned(), json!(choice.cached)),
            ("chain_steps".to_owned(), json!(steps)),
        ]);
        Plan::new(self.name(), params, predicted, budget)
    }

    fn run(&self, plan: &Plan, env: &mut SearchEnv, key: &NoiseKey) -> Result<Outcome> {
        let choice = choice(&plan.params)?;
        let steps = choice.chain_steps.unwrap_or(env.steps as u64);
        let numbers = (steps, choice.guided_steps.unwrap_or(0), choice.children.unwrap_or(1));
        let chain = Chain::new(env.schedule, steps as usize, choice.eta)?;
        choice.search(numbers, key).run(&chain, env, key)
    }
}
