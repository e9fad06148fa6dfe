//! Diffusion tree search (Jain et al. 2025, arXiv 2506.20701): a tree of states whose values are
//! backed up from finished images, grown where it promises most.

use candle_core::{Device, Tensor};
use rand::Rng;
use serde_json::{Map, Value, json};

use super::best::Best;
use super::chain::Chain;
use super::env::{EnvSpec, Kernel, SearchEnv};
use super::levels;
use super::method::{Outcome, Plan, SearchMethod};
use super::params::{Params, entry, largest, name_of, one_of};
use super::weights::{deviation, first_max, log_mean_exp, scaled, softmax};
use crate::diffusion::cost::{Budget, Units};
use crate::diffusion::noise::{NoiseKey, Purpose};
use crate::{Error, Result};

const MOST: u64 = 1 << 20;
/// Steps at which the tree branches, of 50.
const LEVELS: [u64; 5] = [0, 5, 10, 20, 30];
/// Trajectories' worth of evaluations without a budget.
const DEFAULT_TRAJECTORIES: u64 = 10;

/// At most `evaluations` and `rollouts`: a rollout from a node at step s takes T - s evaluations
/// and V = Y = 1.
#[derive(Clone, Copy, Debug)]
pub struct TreeSearch;

/// How a child is chosen on the way down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Selection {
    /// The upper confidence bound: DTS*.
    Ucb,
    /// By lot, in proportion to exp(lambda value): DTS.
    Sample,
}

impl Selection {
    const OPTIONS: [(&'static str, Self); 2] = [("ucb", Self::Ucb), ("sample", Self::Sample)];

    fn name(self) -> &'static str {
        name_of(&Self::OPTIONS, &self)
    }
}

#[derive(Clone, Debug)]
struct Choice {
    evaluations: Option<u64>,
    rollouts: Option<u64>,
    levels: Option<Vec<u64>>,
    selection: Selection,
    /// None: one over the deviation of the rewards so far.
    lambda: Option<f64>,
    /// Children of a node after N visits: ceil(widening N^power).
    widening: f64,
    power: f64,
    /// Of the confidence bound, in deviations of the rewards.
    exploration: f64,
    /// Rollouts at once.
    batch: u64,
}

fn choice(params: &Map<String, Value>) -> Result<Choice> {
    let params = Params::new(params, &TreeSearch.params())?;
    Ok(Choice {
        evaluations: params.integer("evaluations", 1..=MOST)?,
        rollouts: params.integer("rollouts", 1..=MOST)?,
        levels: params.integers("levels", 0..=1000)?,
        selection: params.choice("selection", &Selection::OPTIONS)?.unwrap_or(Selection::Ucb),
        lambda: params.number("lambda", 0.0..=1e9)?,
        widening: params.number("widening", 0.0..=1e6)?.unwrap_or(1.0),
        power: params.number("power", 0.0..=1.0)?.unwrap_or(0.5),
        exploration: params.number("exploration", 0.0..=1e6)?.unwrap_or(1.0),
        batch: params.integer("batch", 1..=1 << 16)?.unwrap_or(1),
    })
}

impl Choice {
    fn levels(&self, steps: u64) -> Result<Vec<u64>> {
        let levels = self.levels.clone().unwrap_or_else(|| levels::of_50(&LEVELS, steps));
        levels::some_checked(levels, steps)
    }
}

/// Most rollouts of this many evaluations: the first is a whole trajectory.
fn most_rollouts(evaluations: u64, steps: u64, levels: &[u64]) -> u64 {
    let shortest = steps - levels.last().copied().unwrap_or(0);
    1 + evaluations.saturating_sub(steps) / shortest
}

impl SearchMethod for TreeSearch {
    fn name(&self) -> &'static str {
        "tree-search"
    }

    fn summary(&self) -> &'static str {
        "A tree of states on the way, grown where finished images promise most (DTS*)"
    }

    fn params(&self) -> Map<String, Value> {
        Map::from_iter([
            entry(
                "evaluations",
                "integer",
                Value::Null,
                "most in all; absent: the budget, or 10 \
                   trajectories",
            ),
            entry("rollouts", "integer", Value::Null, "most in all; absent: as many as fit"),
            entry(
                "levels",
                "array",
                Value::Null,
                "steps before which the tree branches, from 0; \
                   absent: 0, 0.1, 0.2, 0.4 and 0.6 of all",
            ),
            one_of(
                "selection",
                &Selection::OPTIONS,
                "ucb: upper confidence bound (DTS*); \
                   sample: by lot (DTS)",
            ),
            entry(
                "lambda",
                "number",
                Value::Null,
                "of values, log(mean(exp(lambda v)))/lambda; \
                   absent: one over the deviation of the rewards so far",
            ),
            entry("widening", "number", json!(1.0), "a node has up to widening N^power children"),
            entry("power", "number", json!(0.5), "after N visits"),
            entry("exploration", "number", json!(1.0), "weight of the bound, in deviations"),
            entry("batch", "integer", json!(1), "rollouts at once"),
        ])
    }

    fn needs_reward(&self) -> bool {
        true
    }

    fn plan(&self, params: &Map<String, Value>, spec: &EnvSpec, budget: &Budget) -> Result<Plan> {
        let choice = choice(params)?;
        spec.needs_search(self.name())?;
        spec.needs_absolute(self.name())?;
        spec.check_steps(Kernel::Sde, spec.steps)?;
        let steps = spec.steps as u64;
        let levels = choice.levels(steps)?;
        let bounded = budget.bounds();
        let f_only = Budget { v: None, y: None, ..*budget };
        let units = |f: u64, images: u64| Units { l: 0, ..spec.cost(f, images) };
        let affordable = largest(1..=MOST, &f_only, |e| units(e * spec.forwards_per_eval, 0));
        let affordable = affordable.or((bounded && budget.f.is_some()).then_some(1));
        let evaluations = choice.evaluations.or(affordable).unwrap_or(DEFAULT_TRAJECTORIES * steps);
        let images = Budget { f: None, ..*budget };
        let possible = most_rollouts(evaluations, steps, &levels);
        let most = largest(1..=possible, &images, |n| units(0, n));
        let most = most.unwrap_or(if images.bounds() { 1 } else { possible });
        // Between one and two trajectories there is one.
        let few = choice.evaluations.is_none() && evaluations < 2 * steps;
        let rollouts = choice.rollouts.unwrap_or(if few { 1 } else { possible }).min(most);
        if evaluations < steps {
            let message = format!("{evaluations} evaluations, a trajectory takes {steps}");
            return Err(match choice.evaluations {
                Some(_) => Error::invalid("method.evaluations", message),
                None => Error::Budget(message),
            });
        }
        let params = Map::from_iter([
            ("evaluations".to_owned(), json!(evaluations)),
            ("rollouts".to_owned(), json!(rollouts)),
            ("levels".to_owned(), json!(levels)),
            ("selection".to_owned(), json!(choice.selection.name())),
            ("lambda".to_owned(), json!(choice.lambda)),
            ("widening".to_owned(), json!(choice.widening)),
            ("power".to_owned(), json!(choice.power)),
            ("exploration".to_owned(), json!(choice.exploration)),
            ("batch".to_owned(), json!(choice.batch)),
        ]);
        let f = evaluations.min(rollouts * steps) * spec.forwards_per_eval;
        Plan::new(self.name(), params, spec.cost(f, rollouts), budget)
    }

    fn run(&self, plan: &Plan, env: &mut SearchEnv, key: &NoiseKey) -> Result<Outcome> {
        let choice = choice(&plan.params)?;
        let levels = choice.levels(env.steps as u64)?;
        let chain = Chain::new(env.schedule, env.steps, 1.0)?;
        let mut best = Best::default();
        let mut tree = Tree::new(choice, levels);
        tree.grow(&chain, env, key, &mut best)?;
        best.finish(env)
    }
}

/// A state before the step of a level, or the root, whose children begin from noise.
struct Node {
    parent: Option<usize>,
    /// Which level its children branch at: the root's is none.
    level: Option<usize>,
    /// [1, C, h, w] in the host's memory; none of the root.
    state: Option<Tensor>,
    children: Vec<usize>,
    visits: f64,
    /// Values of finished images that hang directly below.
    leaves: Vec<f64>,
    value: f64,
}

struct Tree {
    choice: Choice,
    levels: Vec<u64>,
    nodes: Vec<Node>,
    rewards: Vec<f64>,
}

/// A way down the tree to be continued.
struct Descent {
    node: usize,
    /// The rollout, whose noise is its own.
    candidate: u64,
    x: Tensor,
    from: usize,
}

impl Tree {
    fn new(choice: Choice, levels: Vec<u64>) -> Self {
        let root = Node::below(None, None, None);
        Self { choice, levels, nodes: vec![root], rewards: Vec::new() }
    }

    fn grow(
        &mut self,
        chain: &Chain,
        env: &mut SearchEnv,
        key: &NoiseKey,
        best: &mut Best,
    ) -> Result<()> {
        let steps = chain.steps() as u64;
        let mut left = self.choice.evaluations.unwrap_or(steps);
        let rollouts = self.choice.rollouts.unwrap_or(1);
        let mut done = 0;
        while done < rollouts {
            let mut descents = Vec::new();
            while (descents.len() as u64) < self.choice.batch.min(rollouts - done) {
                let candidate = done + descents.len() as u64;
                let node = self.select(key, candidate);
                let from = self.nodes[node].level.map_or(0, |level| self.levels[level]);
                if steps - from > left {
                    break;
                }
                left -= steps - from;
                // Other rollouts of the batch see it as visited.
                self.visit(node);
                let x = match &self.nodes[node].state {
                    Some(state) => state.to_device(env.denoiser.device())?,
                    None => env.initial_noise(key, &[candidate])?,
                };
                descents.push(Descent { node, candidate, x, from: from as usize });
            }
            if descents.is_empty() {
                break;
            }
            done += descents.len() as u64;
            self.roll_out(chain, env, key, best, descents)?;
        }
        Ok(())
    }

    /// The node that gets a child.
    fn select(&self, key: &NoiseKey, candidate: u64) -> usize {
        let mut rng = key.rng(Purpose::SearchSchedule, 0, candidate);
        let mut at = 0;
        loop {
            let node = &self.nodes[at];
            let room = (self.choice.widening * node.visits.powf(self.choice.power)).ceil();
            // Below the last level are finished images alone.
            let last = node.level == Some(self.levels.len() - 1);
            if last || (node.children.len() as f64) < room.max(1.0) || node.children.is_empty() {
                return at;
            }
            let values: Vec<f64> = node.children.iter().map(|c| self.nodes[*c].value).collect();
            let chosen = match self.choice.selection {
                Selection::Sample => {
                    let lambda = self.lambda();
                    let scaled: Vec<f64> = values.iter().map(|v| scaled(lambda, *v)).collect();
                    let mut target: f64 = rng.random();
                    let inside = |weight: &f64| {
                        target -= weight;
                        target < 0.0
                    };
                    softmax(&scaled).iter().position(inside).unwrap_or(0)
                }
                Selection::Ucb => {
                    let spread = deviation(&self.rewards) * self.choice.exploration;
                    let bound = |(child, value): (&usize, &f64)| {
                        let visits = self.nodes[*child].visits.max(1.0);
                        value + spread * (node.visits.max(1.0).ln() / visits).sqrt()
                    };
                    let bounds: Vec<f64> = node.children.iter().zip(&values).map(bound).collect();
                    first_max(&bounds).0
                }
            };
            at = node.children[chosen];
        }
    }

    /// 1/deviation of the rewards so far, unless it is given; 0 without any difference.
    fn lambda(&self) -> f64 {
        self.choice.lambda.unwrap_or_else(|| match deviation(&self.rewards) {
            spread if spread > 0.0 => 1.0 / spread,
            _ => 0.0,
        })
    }

    fn visit(&mut self, node: usize) {
        let mut at = Some(node);
        while let Some(node) = at {
            self.nodes[node].visits += 1.0;
            at = self.nodes[node].parent;
        }
    }

    /// Finishes descents, each from its own step, and adds their states as nodes.
    fn roll_out(
        &mut self,
        chain: &Chain,
        env: &mut SearchEnv,
        key: &NoiseKey,
        best: &mut Best,
        mut descents: Vec<Descent>,
    ) -> Result<()> {
        let first = descents.iter().map(|d| d.from).min().unwrap_or(0);
        let begun: Vec<usize> = descents.iter().map(|d| d.node).collect();
        for step in first..chain.steps() {
            let level = self.levels.iter().position(|level| *level == step as u64);
            let mut active: Vec<&mut Descent> =
                descents.iter_mut().filter(|d| d.from <= step).collect();
            // A state at a level below the one where the descent began is a new node.
            if let Some(level) = level {
                for descent in &mut active {
                    if self.nodes[descent.node].level.is_none_or(|above| above < level) {
                        let state = Some(descent.x.to_device(&Device::Cpu)?);
                        self.nodes.push(Node::below(Some(descent.node), Some(level), state));
                        let new = self.nodes.len() - 1;
                        self.nodes[descent.node].children.push(new);
                        self.nodes[new].visits = 1.0;
                        descent.node = new;
                    }
                }
            }
            let x: Vec<&Tensor> = active.iter().map(|d| &d.x).collect();
            let ahead = chain.look(env, &Tensor::cat(&x, 0)?, step)?;
            let candidates: Vec<u64> = active.iter().map(|d| d.candidate).collect();
            let noise = chain.noise(env, key, step, &candidates)?;
            let next = chain.advance(step, &ahead.mean, &noise)?;
            for (row, descent) in active.into_iter().enumerate() {
                descent.x = next.narrow(0, row, 1)?;
            }
            env.tell(None);
        }
        let x: Vec<&Tensor> = descents.iter().map(|d| &d.x).collect();
        let x = Tensor::cat(&x, 0)?;
        let judged = env.judge(&x)?;
        for ((descent, begun), value) in descents.iter().zip(begun).zip(&judged.values) {
            self.rewards.push(*value);
            self.nodes[descent.node].leaves.push(*value);
            let level = self.nodes[begun].level.map(|level| self.levels[level]);
            let rollout = json!({
                "rollout": descent.candidate, "from": level, "node": begun,
                "value": value.is_finite().then_some(*value),
            });
            best.note(env, rollout);
        }
        best.offer(env, &x, judged)?;
        for descent in &descents {
            self.back_up(descent.node);
        }
        Ok(())
    }

    /// Values from a node up: log(mean(exp(lambda v))) / lambda of what hangs below.
    fn back_up(&mut self, node: usize) {
        let lambda = self.lambda();
        let mut at = Some(node);
        while let Some(node) = at {
            let children = self.nodes[node].children.iter().map(|c| self.nodes[*c].value);
            let below: Vec<f64> = children.chain(self.nodes[node].leaves.iter().copied()).collect();
            self.nodes[node].value = if lambda > 0.0 {
                let scaled: Vec<f64> = below.iter().map(|v| v * lambda).collect();
                log_mean_exp(&scaled) / lambda
            } else {
                let finite: Vec<f64> = below.iter().copied().filter(|v| v.is_finite()).collect();
                match finite.len() {
                    0 => f64::NEG_INFINITY,
                    n => finite.iter().sum::<f64>() / n as f64,
                }
            };
            at = self.nodes[node].parent;
        }
    }
}

impl Node {
    fn below(parent: Option<usize>, level: Option<usize>, state: Option<Tensor>) -> Self {
        Self {
            parent,
            level,
            state,
            children: Vec::new(),
            visits: 0.0,
            leaves: Vec::new(),
            value: f64::NEG_INFINITY,
        }
    }
}
