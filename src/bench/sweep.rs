//! Runs the grid of a sweep, cell by cell, into a folder that can be resumed.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::time::Instant;

use super::arm::{Arm, MethodSpec, Planner};
use super::cell::{Cell, CellStore};
use super::contract::Contract;
use super::manifest::{Manifest, SweepConfig};
use super::progress::Ticker;
use super::{replay, report, thumbnail};
use crate::engine::request::{GenerateRequest, Generation};
use crate::engine::{Backend, CancelToken};
use crate::rewards::OBSERVED;
use crate::{Error, Result};

/// File name of the cells in a sweep's folder.
pub const CELLS: &str = "cells.jsonl";

/// Part `index` of `of` parts of the prompts, both counted from one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shard {
    pub index: usize,
    pub of: usize,
}

impl Shard {
    /// Whether a prompt belongs to this part.
    #[must_use]
    pub fn holds(&self, prompt_index: usize) -> bool {
        prompt_index % self.of == self.index - 1
    }
}

impl std::str::FromStr for Shard {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let parsed = text.split_once('/').and_then(|(i, n)| {
            Some(Self { index: i.trim().parse().ok()?, of: n.trim().parse().ok()? })
        });
        match parsed {
            Some(shard) if (1..=shard.of).contains(&shard.index) => Ok(shard),
            _ => Err(format!("'{text}' is not i/n with 1 <= i <= n")),
        }
    }
}

impl std::fmt::Display for Shard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.index, self.of)
    }
}

/// A sweep, ready to run.
#[derive(Clone, Debug)]
pub struct Sweep {
    pub manifest: Manifest,
    pub methods: Vec<MethodSpec>,
    pub shard: Option<Shard>,
    pub out: PathBuf,
    /// Most cells to compute in this call.
    pub limit: Option<usize>,
    /// Allow the folder to hold another grid of the same settings.
    pub extend: bool,
    /// No progress.
    pub quiet: bool,
}

/// What a call of [`Sweep::run`] did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Cells computed now.
    pub ran: usize,
    /// Of those, cells in which nothing could run.
    pub infeasible: usize,
    /// Cells that the folder already held.
    pub kept: usize,
    /// Cells still to do.
    pub remaining: usize,
    /// Whether it stopped because it was cancelled.
    pub interrupted: bool,
}

/// A cell to compute: indices into methods and budgets, then prompt and seed.
#[derive(Clone, Copy, Debug)]
struct Todo {
    method: usize,
    budget: u64,
    prompt: usize,
    seed: u64,
}

impl Sweep {
    fn config(&self) -> &SweepConfig {
        &self.manifest.config
    }

    /// The arms of the grid, in the order of its methods, then budgets.
    ///
    /// # Errors
    /// When a request is refused for another reason than its cost.
    pub fn arms(&self, backend: &dyn Backend) -> Result<Vec<(String, u64, Arm)>> {
        let planner = self.planner(backend);
        let mut arms: Vec<(String, u64, Arm)> = Vec::new();
        for method in &self.methods {
            let mut budgets = self.config().budgets.clone();
            budgets.sort_unstable();
            for budget in budgets {
                let mut arm = planner.arm(method, budget)?;
                if let Some(cheaper) = arms.iter().find(|(label, _, other)| {
                    // Plain sampling at the most steps that the schedule has.
                    *label == method.label && method.is_plain() && *other == arm
                }) {
                    arm = match &arm {
                        Arm::Run { f, .. } => Arm::Infeasible(format!(
                            "plain sampling cannot spend more than {f} forwards here: \
                             the same as at budget {}",
                            self.config().contract.show(cheaper.1)
                        )),
                        other => other.clone(),
                    };
                }
                arms.push((method.label.clone(), budget, arm));
            }
        }
        Ok(arms)
    }

    fn planner<'a>(&'a self, backend: &'a dyn Backend) -> Planner<'a> {
        let (config, rates) = (self.config(), &self.manifest.rates);
        Planner { backend, config, contract: config.contract, rates }
    }

    /// Whether a cell is computed: not where its budget leaves out the prompt, and not where its
    /// scores are derived from the candidates of a larger budget of the prompt.
    pub(super) fn computes(
        &self,
        method: &MethodSpec,
        budget: u64,
        prompt: usize,
        runs: impl Fn(u64) -> bool,
    ) -> bool {
        let config = self.config();
        let holds = |budget: &u64| config.fewer_prompts.holds(*budget, prompt);
        let replayed = config.replay
            && method.name == replay::METHOD
            && !method.params.contains_key("candidates")
            && runs(budget);
        let larger = |other: &u64| *other > budget && holds(other) && runs(*other);
        holds(&budget) && !(replayed && config.budgets.iter().any(larger))
    }

    /// Computes every cell that the folder lacks, then writes the reports of
    /// all cells there. Raising `cancel` stops it between or within cells.
    ///
    /// # Errors
    /// When the folder holds another sweep, cannot be written, or the backend fails.
    pub fn run(&self, backend: &dyn Backend, cancel: &CancelToken) -> Result<Tally> {
        let mut arms: HashMap<(usize, u64), Arm> = HashMap::new();
        for (label, budget, arm) in self.arms(backend)? {
            let index = self.methods.iter().position(|m| m.label == label).unwrap_or_default();
            arms.insert((index, budget), arm);
        }
        std::fs::create_dir_all(&self.out).map_err(|e| Error::file(&self.out, e))?;
        self.manifest.claim(&self.out, self.extend)?;
        let (mut store, cells) = CellStore::open(&self.out.join(CELLS))?;

        let (mut todo, mut tally) = self.missing(&cells, &arms);
        let all = todo.len();
        todo.truncate(self.limit.unwrap_or(all));
        let forwards = todo.iter().map(|t| arms[&(t.method, t.budget)].f()).sum();
        let mut ticker = Ticker::new(todo.len(), forwards, self.quiet);
        for cell in &todo {
            let key = (cell.method, cell.budget);
            let predicted = arms[&key].f();
            match self.cell(backend, cancel, *cell, &mut arms, &mut ticker) {
                Ok(done) => {
                    tally.infeasible += usize::from(done.infeasible.is_some());
                    store.append(&done)?;
                }
                Err(Error::Cancelled) => {
                    tally.interrupted = true;
                    break;
                }
                Err(e) => {
                    ticker.finish();
                    return Err(e);
                }
            }
            tally.ran += 1;
            ticker.cell_done(predicted);
        }
        ticker.finish();
        tally.remaining = all - tally.ran;
        drop(store);
        report::write(&self.out)?;
        Ok(tally)
    }

    /// The cells of the grid that `cells` lacks: prompt by prompt, so that a
    /// stopped sweep is a complete comparison over fewer prompts.
    fn missing(&self, cells: &[Cell], arms: &HashMap<(usize, u64), Arm>) -> (Vec<Todo>, Tally) {
        let config = self.config();
        let fingerprint = config.fingerprint();
        let done: HashSet<_> = cells
            .iter()
            .filter(|c| config.owns(c, &fingerprint))
            .map(|c| (c.requested(), c.budget, c.prompt_index, c.seed))
            .collect();
        let (mut todo, mut tally) = (Vec::new(), Tally::default());
        for prompt in (0..config.prompts.len()).filter(|&p| self.shard.is_none_or(|s| s.holds(p))) {
            for &seed in &config.seeds {
                for &budget in &config.budgets {
                    for (method, spec) in self.methods.iter().enumerate() {
                        let runs = |budget| arms.get(&(method, budget)).is_some_and(Arm::runs);
                        if !self.computes(spec, budget, prompt, runs) {
                            continue;
                        }
                        if done.contains(&(spec.label.as_str(), budget, prompt, seed)) {
                            tally.kept += 1;
                        } else {
                            todo.push(Todo { method, budget, prompt, seed });
                        }
                    }
                }
            }
        }
        (todo, tally)
    }

    /// Computes one cell; a refusal of its cost turns its arm into a cheaper one.
    fn cell(
        &self,
        backend: &dyn Backend,
        cancel: &CancelToken,
        todo: Todo,
        arms: &mut HashMap<(usize, u64), Arm>,
        ticker: &mut Ticker,
    ) -> Result<Cell> {
        let planner = self.planner(backend);
        let asked = &self.methods[todo.method];
        let key = (todo.method, todo.budget);
        loop {
            cancel.check()?;
            let arm = arms[&key].clone();
            let mut cell = Cell {
                method: asked.label.clone(),
                budget: todo.budget,
                prompt: self.config().prompts[todo.prompt].clone(),
                prompt_index: todo.prompt,
                seed: todo.seed,
                config: self.config().fingerprint(),
                ..Cell::default()
            };
            let (method, requested, request) = match &arm {
                Arm::Infeasible(reason) => {
                    cell.infeasible = Some(reason.clone());
                    return Ok(cell);
                }
                Arm::Run { method, requested, request, .. } => (method, requested, request),
            };
            let request = GenerateRequest {
                prompt: cell.prompt.clone(),
                seed: Some(todo.seed),
                ..(**request).clone()
            };
            let start = Instant::now();
            let outcome = backend.plan(&request).and_then(|planned| {
                backend.generate(&planned, cancel, &mut |p| ticker.within(p.spent.f))
            });
            let plain = method.is_plain();
            let cheaper = match outcome {
                Ok(generation) => {
                    cell.seconds = start.elapsed().as_secs_f64();
                    cell.method.clone_from(&method.label);
                    cell.requested_method.clone_from(requested);
                    fill(&mut cell, generation, self.config().contract)?;
                    return Ok(cell);
                }
                Err(Error::Budget(_)) if !plain => planner.fallback(asked, todo.budget)?,
                Err(Error::Budget(reason)) => Arm::Infeasible(reason),
                Err(Error::Invalid { field, message }) if plain && field == "steps" => {
                    Arm::Infeasible(format!("steps: {message}"))
                }
                Err(e) => return Err(e),
            };
            arms.insert(key, cheaper);
        }
    }
}

/// Copies what a generation cost and scored into its cell.
fn fill(cell: &mut Cell, generation: Generation, contract: Contract) -> Result<()> {
    let image = generation
        .images
        .into_iter()
        .next()
        .ok_or_else(|| Error::invalid("images", "the backend returned no image"))?;
    let units = generation.cost.actual.units;
    (cell.f, cell.v, cell.y) = (units.f, units.v, units.y);
    if contract == Contract::EqualF && cell.f > cell.budget {
        tracing::warn!(
            "{} spent {} forwards of a budget of {} (prompt {}, seed {})",
            cell.method,
            cell.f,
            cell.budget,
            cell.prompt_index,
            cell.seed
        );
    }
    cell.candidates = replay::candidates(&generation.trace);
    cell.stages = generation.cost.actual.seconds;
    // Scoring candidates for the record is no part of a search.
    cell.seconds -= cell.stages.remove(OBSERVED).unwrap_or(0.0);
    cell.steps = generation.resolved.steps;
    cell.params = generation.resolved.method;
    cell.thumbnail = Some(thumbnail::of(&image.pixels));
    cell.scores = image
        .scores
        .into_iter()
        .map(|(reward, score)| (reward, score.filter(|s| s.is_finite())))
        .collect();
    Ok(())
}
