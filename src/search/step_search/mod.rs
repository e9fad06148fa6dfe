//! Search over the noise of single steps: children of a state, valued by the clean-image
//! estimate one step ahead, under one of four policies.

pub mod block;
pub mod eps_greedy;
pub mod rollover;
pub mod uniform;

use serde_json::{Map, Value, json};

use self::block::Block;
use self::eps_greedy::EpsGreedy;
use self::rollover::Rollover;
use self::uniform::Uniform;
use super::chain::Chain;
use super::env::{EnvSpec, SearchEnv};
use super::method::{Outcome, Plan, SearchMethod};
use super::params::{Params, entry, largest, name_of, one_of};
use crate::diffusion::cost::{Budget, Units};
use crate::diffusion::noise::NoiseKey;
use crate::{Error, Result};

const MOST: u64 = 1 << 20;
/// Most latents that are held at once.
const WIDEST: u64 = 1 << 12;

/// SVDD, CoDe, epsilon-greedy and rollover budget forcing.
#[derive(Clone, Copy, Debug)]
pub struct StepSearch;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Policy {
    Uniform,
    Block,
    EpsGreedy,
    Rollover,
}

impl Policy {
    const OPTIONS: [(&'static str, Self); 4] = [
        ("rollover", Self::Rollover),
        ("uniform", Self::Uniform),
        ("block", Self::Block),
        ("eps-greedy", Self::EpsGreedy),
    ];

    fn name(self) -> &'static str {
        name_of(&Self::OPTIONS, &self)
    }
}

#[derive(Clone, Copy, Debug)]
struct Choice {
    policy: Policy,
    children: Option<u64>,
    length: u64,
    rounds: Option<u64>,
    radius: f64,
    epsilon: f64,
    renormalise: bool,
    evaluations: Option<u64>,
    initial: Option<u64>,
    batch: u64,
    chain_steps: Option<u64>,
}

/// What is run, with every number decided.
enum Search {
    Uniform(Uniform),
    Block(Block),
    EpsGreedy(EpsGreedy),
    Rollover(Rollover),
}

fn choice(params: &Map<String, Value>) -> Result<Choice> {
    let params = Params::new(params, &StepSearch.params())?;
    Ok(Choice {
        policy: params.choice("policy", &Policy::OPTIONS)?.unwrap_or(Policy::Rollover),
        children: params.integer("children", 1..=WIDEST)?,
        length: params.integer("length", 1..=1000)?.unwrap_or(2),
        rounds: params.integer("rounds", 1..=MOST)?,
        radius: params.number("radius", 0.0..=1e3)?.unwrap_or(0.15),
        epsilon: params.number("epsilon", 0.0..=1.0)?.unwrap_or(0.4),
        renormalise: params.boolean("renormalise")?.unwrap_or(true),
        evaluations: params.integer("evaluations", 1..=MOST)?,
        initial: params.integer("initial", 1..=WIDEST)?,
        batch: params.integer("batch", 1..=WIDEST)?.unwrap_or(1),
        chain_steps: params.integer("chain_steps", 1..=1000)?,
    })
}

impl Choice {
    /// With every number decided, where `children` and `rounds` are.
    fn search(&self, chain: &Chain, evaluations: u64) -> Search {
        let steps = chain.steps();
        let children = self.children.unwrap_or(1);
        match self.policy {
            Policy::Uniform => Search::Uniform(Uniform {
                guided: {
                    let mut guided = vec![false; steps];
                    let open = chain.branching().into_iter().filter(|step| step + 1 < steps);
                    open.for_each(|step| guided[step] = true);
                    guided
                },
                children,
                initial: 1,
                cached: true,
                alpha: 0.0,
            }),
            Policy::Block => Search::Block(Block { children, length: self.length }),
            Policy::EpsGreedy => Search::EpsGreedy(EpsGreedy {
                children,
                rounds: self.rounds.unwrap_or(1),
                radius: self.radius,
                epsilon: self.epsilon,
                renormalise: self.renormalise,
            }),
            Policy::Rollover => {
                let initial = self.initial.unwrap_or_else(|| Rollover::initial_for(evaluations));
                Search::Rollover(Rollover { evaluations, initial, batch: self.batch })
            }
        }
    }

    fn cost(&self, spec: &EnvSpec, chain: &Chain, evaluations: u64) -> Units {
        let steps = chain.steps() as u64;
        match self.search(chain, evaluations) {
            Search::Uniform(uniform) => uniform.cost(spec),
            Search::Block(block) => block.cost(spec, steps),
            Search::EpsGreedy(greedy) => greedy.cost(spec, steps),
            Search::Rollover(rollover) => rollover.cost(spec),
        }
    }

    /// The choice with its numbers for a budget, its sampler and its evaluations.
    fn within(&self, spec: &EnvSpec, budget: &Budget) -> Result<(Self, Chain, u64)> {
        let asked = self.chain_steps.unwrap_or(spec.steps as u64);
        let chain = Chain::new(spec.schedule, asked as usize, 1.0)?;
        let bounded = budget.bounds();
        let with = |children: u64, rounds: u64| {
            let children = self.children.unwrap_or(children);
            let rounds = self.rounds.unwrap_or(rounds);
            Self { children: Some(children), rounds: Some(rounds), ..*self }
        };
        // Nothing to search with: one trajectory.
        let plain = Self { policy: Policy::Uniform, children: Some(1), ..with(1, 1) };
        if self.policy == Policy::Rollover {
            let cost = |e: u64| self.cost(spec, &chain, e);
            let affordable = largest(1..=MOST, budget, cost).or(bounded.then_some(1));
            let evaluations = self.evaluations.or(affordable).unwrap_or(10 * asked);
            // Half the steps leave more to search where there is little.
            let steps = match self.chain_steps {
                None if evaluations <= 10 * asked => asked.div_ceil(2),
                _ => asked,
            };
            let initial = self.initial.unwrap_or_else(|| Rollover::initial_for(evaluations));
            if evaluations >= initial + steps - 1 {
                let chain = Chain::new(spec.schedule, steps as usize, 1.0)?;
                return Ok((with(1, 1), chain, evaluations));
            }
            if self.evaluations.is_none() && bounded {
                return Ok((plain, chain, 0));
            }
            let message = format!(
                "{evaluations} evaluations are fewer than {initial} initial latents and {} steps \
                 take",
                steps - 1
            );
            return Err(Error::invalid("method.evaluations", message));
        }
        let (children, rounds) = match self.policy {
            Policy::EpsGreedy => (4, 20),
            Policy::Block => (25, 1),
            _ => (20, 1),
        };
        let affordable = |most: u64, of: &dyn Fn(u64) -> Self| {
            largest(1..=most, budget, |n| of(n).cost(spec, &chain, 0))
        };
        let given = self.children.is_some() || self.rounds.is_some();
        let decided = match self.policy {
            _ if !bounded => with(children, rounds),
            Policy::EpsGreedy => match affordable(MOST, &|rounds| with(4, rounds)) {
                Some(rounds) => with(4, rounds),
                None => match affordable(4, &|children| with(children, 1)) {
                    None | Some(1) if !given => plain,
                    children => with(children.unwrap_or(1), 1),
                },
            },
            _ => with(affordable(WIDEST, &|children| with(children, 1)).unwrap_or(1), 1),
        };
        Ok((decided, chain, 0))
    }
}

impl SearchMethod for StepSearch {
    fn name(&self) -> &'static str {
        "step-search"
    }

    fn summary(&self) -> &'static str {
        "At every step of DDIM, children are tried and valued one step ahead"
    }

    fn params(&self) -> Map<String, Value> {
        Map::from_iter([
            one_of(
                "policy",
                &Policy::OPTIONS,
                "rollover: the first child that improves (RBF); uniform: the best of n at every \
                 step (SVDD); block: the best of n copies after some steps (CoDe); eps-greedy: \
                 rounds near the best noise or anywhere",
            ),
            entry(
                "children",
                "integer",
                Value::Null,
                "n; absent: what the budget affords, or \
                   20, with block 25, with eps-greedy 4 a round",
            ),
            entry("length", "integer", json!(2), "steps of a block"),
            entry(
                "rounds",
                "integer",
                Value::Null,
                "of eps-greedy; absent: what the budget \
                   affords, or 20",
            ),
            entry("radius", "number", json!(0.15), "of eps-greedy, as a share of the noise"),
            entry("epsilon", "number", json!(0.4), "of eps-greedy: share of candidates anywhere"),
            entry(
                "renormalise",
                "boolean",
                json!(true),
                "of eps-greedy: keep the noise's norm; \
                   released: false",
            ),
            entry(
                "evaluations",
                "integer",
                Value::Null,
                "of rollover, in all; absent: what the \
                   budget affords, or 10 a step",
            ),
            entry(
                "initial",
                "integer",
                Value::Null,
                "of rollover: initial latents; absent: 2 to \
                   10 in 100 evaluations",
            ),
            entry("batch", "integer", json!(1), "of rollover: children tried at once"),
            entry(
                "chain_steps",
                "integer",
                Value::Null,
                "absent: the request's steps, with \
                   rollover half of them up to 10 evaluations a step",
            ),
        ])
    }

    fn needs_reward(&self) -> bool {
        true
    }

    fn plan(&self, params: &Map<String, Value>, spec: &EnvSpec, budget: &Budget) -> Result<Plan> {
        let choice = choice(params)?;
        spec.needs_search(self.name())?;
        let (choice, chain, evaluations) = choice.within(spec, budget)?;
        let cost = choice.cost(spec, &chain, evaluations);
        let mut params = Map::from_iter([
            ("policy".to_owned(), json!(choice.policy.name())),
            ("chain_steps".to_owned(), json!(chain.steps())),
        ]);
        let mut put = |name: &str, value: Value| params.insert(name.to_owned(), value);
        match choice.search(&chain, evaluations) {
            Search::Uniform(uniform) => {
                put("children", json!(uniform.children));
            }
            Search::Block(block) => {
                put("children", json!(block.children));
                put("length", json!(block.length));
            }
            Search::EpsGreedy(greedy) => {
                put("children", json!(greedy.children));
                put("rounds", json!(greedy.rounds));
                put("radius", json!(greedy.radius));
                put("epsilon", json!(greedy.epsilon));
                put("renormalise", json!(greedy.renormalise));
            }
            Search::Rollover(rollover) => {
                put("evaluations", json!(rollover.evaluations));
                put("initial", json!(rollover.initial));
                put("batch", json!(rollover.batch));
            }
        }
        Plan::new(self.name(), params, cost, budget)
    }

    fn run(&self, plan: &Plan, env: &mut SearchEnv, key: &NoiseKey) -> Result<Outcome> {
        let choice = choice(&plan.params)?;
        let steps = choice.chain_steps.unwrap_or(env.steps as u64);
        let chain = Chain::new(env.schedule, steps as usize, 1.0)?;
        match choice.search(&chain, choice.evaluations.unwrap_or(0)) {
            Search::Uniform(uniform) => uniform.run(&chain, env, key),
            Search::Block(block) => block.run(&chain, env, key),
            Search::EpsGreedy(greedy) => greedy.run(&chain, env, key),
            Search::Rollover(rollover) => rollover.run(&chain, env, key),
        }
    }
}
