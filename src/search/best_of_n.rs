//! Best-of-N: random search over initial noise (Ma et al. 2025, arXiv 2501.09732, sec. 3).

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::best::Best;
use super::env::{EnvSpec, Kernel, SearchEnv};
use super::method::{Outcome, Plan, SearchMethod};
use super::params::{Params, entry, largest, one_of};
use crate::Result;
use crate::diffusion::cost::Budget;
use crate::diffusion::noise::NoiseKey;

/// Candidates without a parameter and without a budget.
const DEFAULT_CANDIDATES: u64 = 4;
const MOST_CANDIDATES: u64 = 1 << 20;

/// Cost: N trajectories, V = Y = N. Candidate 0 is the plain image of the seed.
#[derive(Clone, Copy, Debug)]
pub struct BestOfN;

struct Choice {
    kernel: Kernel,
    candidates: Option<u64>,
    observe: bool,
}

fn choice(params: &Map<String, Value>) -> Result<Choice> {
    let params = Params::new(params, &BestOfN.params())?;
    Ok(Choice {
        kernel: params.choice("kernel", &Kernel::OPTIONS)?.unwrap_or(Kernel::Ode),
        candidates: params.integer("candidates", 1..=MOST_CANDIDATES)?,
        observe: params.boolean("observe")?.unwrap_or(false),
    })
}

impl SearchMethod for BestOfN {
    fn name(&self) -> &'static str {
        "best-of-n"
    }

    fn summary(&self) -> &'static str {
        "N independent trajectories, the one with the best reward is returned"
    }

    fn params(&self) -> Map<String, Value> {
        let candidates = "N; absent: what the budget affords, or 4 without a budget";
        let kernel = "ode: the request's solver; sde: DDIM with eta 1";
        Map::from_iter([
            entry("candidates", "integer", Value::Null, candidates),
            one_of("kernel", &Kernel::OPTIONS, kernel),
            entry(
                "observe",
                "boolean",
                json!(false),
                "score every candidate by every reward that needs no call outside, for the trace; \
                 nothing is chosen by it",
            ),
        ])
    }

    fn needs_reward(&self) -> bool {
        true
    }

    fn plan(&self, params: &Map<String, Value>, spec: &EnvSpec, budget: &Budget) -> Result<Plan> {
        let Choice { kernel, candidates, observe } = choice(params)?;
        spec.needs_search(self.name())?;
        spec.check_steps(kernel, spec.steps)?;
        let cost = |n: u64| spec.cost(n * spec.trajectory_f(kernel), n);
        // One that does not fit is refused with the numbers.
        let affordable =
            largest(1..=MOST_CANDIDATES, budget, cost).or(budget.bounds().then_some(1));
        let n = candidates.or(affordable).unwrap_or(DEFAULT_CANDIDATES);
        let params = Map::from_iter([
            ("candidates".to_owned(), json!(n)),
            ("kernel".to_owned(), json!(kernel.name())),
            ("observe".to_owned(), json!(observe)),
        ]);
        Plan::new(self.name(), params, cost(n), budget)
    }

    fn run(&self, plan: &Plan, env: &mut SearchEnv, key: &NoiseKey) -> Result<Outcome> {
        let Choice { kernel, candidates, observe } = choice(&plan.params)?;
        let mut best = Best::default();
        let mut seen: BTreeMap<String, Vec<f64>> = BTreeMap::new();
        for candidates in env.chunks(0..candidates.unwrap_or(1)) {
            let latents = env.sample(key, kernel, &candidates)?;
            let judged = env.judge(&latents)?;
            if observe {
                let scores = env.verifier.observe(&judged.images, env.prompt, &judged.marks)?;
                for (name, scores) in scores {
                    seen.entry(name).or_default().extend(scores);
                }
            }
            best.offer(env, &latents, judged)?;
        }
        if observe {
            best.note(env, json!({"candidates": seen}));
        }
        best.finish(env)
    }
}
