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
use crate::diffusion::cost::{Budget, Units};
use crate::diffusion::meter::fits;
use crate::diffusion::noise::{NoiseKey, Purpose};

const MOST: u64 = 1 << 12;
/// Steps, guided steps, children.
type Numbers = (u64, u64, u64);
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

    /// Which of the steps that are `open` to it. By lot the last step is never taken, as what it
    /// costs is another thing and no plan must depend on the lot.
    fn steps(self, count: u64, open: &[usize], of: usize, key: &NoiseKey) -> Vec<bool> {
        let mut guided = vec![false; of];
        match self {
            Self::First => {
                open.iter().take(count as usize).for_each(|step| guided[*step] = true);
            }
            Self::Random => {
                let open: Vec<usize> = open.iter().copied().filter(|s| s + 1 < of).collect();
                let mut rng = key.rng(Purpose::SearchSchedule, 0, 0);
                let drawn = sample(&mut rng, open.len(), open.len().min(count as usize));
                drawn.into_iter().for_each(|at| guided[open[at]] = true);
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
    /// As it is run with these numbers.
    fn search(&self, chain: &Chain, guided: u64, children: u64, key: &NoiseKey) -> Uniform {
        let mut open = chain.branching();
        // The released code chooses an initial latent in the place of its first child.
        open.retain(|step| self.initial < 2 || *step > 0);
        let guided = self.guided.steps(guided, &open, chain.steps(), key);
        let (initial, cached, alpha) = (self.initial, self.cached, self.alpha);
        Uniform { guided, children, initial, cached, alpha }
    }

    /// What these numbers cost: with as many guided steps as there are, whatever the lot.
    fn cost(&self, spec: &EnvSpec, (steps, guided, children): Numbers) -> Result<Units> {
        let chain = Chain::new(spec.schedule, steps as usize, self.eta)?;
        Ok(self.search(&chain, guided, children, &NoiseKey::new(0)).cost(spec))
    }

    fn within(&self, spec: &EnvSpec, budget: &Budget) -> Result<Numbers> {
        let full = self.chain_steps.unwrap_or(spec.steps as u64);
        let chain = Chain::new(spec.schedule, full as usize, self.eta)?;
        let key = NoiseKey::new(0);
        let cost =
            |guided: u64, children: u64| self.search(&chain, guided, children, &key).cost(spec);
        let given = (self.guided_steps, self.children);
        if !budget.bounds() {
            return Ok((full, given.0.unwrap_or(STEPS), given.1.unwrap_or(CHILDREN)));
        }
        let affords =
            |guided: u64| largest(1..=MOST, budget, |children| cost(guided, children)).unwrap_or(1);
        Ok(match given {
            (Some(guided), Some(children)) => (full, guided, children),
            (None, Some(children)) => {
                let most = largest(0..=full, budget, |guided| cost(guided, children));
                (full, most.unwrap_or(0), children)
            }
            (Some(guided), None) => (full, guided, affords(guided)),
            (None, None) => {
                // More children up to where they help, then more steps.
                let tried = [(STEPS, MANY), (2 * STEPS, 21), (4 * STEPS, 23)];
                for (guided, most) in tried.map(|(guided, most)| (guided.min(full), most)) {
                    let children = affords(guided);
                    if children <= most {
                        return self.cheaper(spec, budget, (full, guided, children));
                    }
                }
                (full, full - 1, affords(full - 1).min(MOST_CHILDREN))
            }
        })
    }

    /// Fewer steps where a trajectory leaves too little for the paper's search.
    fn cheaper(&self, spec: &EnvSpec, budget: &Budget, numbers: Numbers) -> Result<Numbers> {
        let (full, _, children) = numbers;
        if children >= CHILDREN || self.chain_steps.is_some() || full < 2 * STEPS {
            return Ok(numbers);
        }
        for steps in (full / 2..=full).rev() {
            let fewer = (steps, STEPS.min(steps), CHILDREN);
            if fits(budget, self.cost(spec, fewer)?).is_ok() {
                return Ok(fewer);
            }
        }
        Ok(numbers)
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
        let (steps, guided, children) = choice.within(spec, budget)?;
        let predicted = choice.cost(spec, (steps, guided, children))?;
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
        let (guided, children) = (choice.guided_steps.unwrap_or(0), choice.children.unwrap_or(1));
        let chain = Chain::new(env.schedule, steps as usize, choice.eta)?;
        choice.search(&chain, guided, children, key).run(&chain, env, key)
    }
}
