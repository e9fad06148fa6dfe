//! From options to cells: each cell's settings, what an update of it costs, and how many updates
//! make it equal to the base.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::{Map, Value};

use super::options::{Assignment, Equal, Layer};
use crate::bench::nfe_sweep::{described, distinct};
use crate::bench::options::Seeds;
use crate::data::prompts::{self, PromptSource};
use crate::data::scenes::Split;
use crate::diffusion::config::SchedulerConfig;
use crate::diffusion::schedule::NoiseSchedule;
use crate::sdxl::ModelFolder;
use crate::train::checkpoint::Checkpoints;
use crate::train::configure::read;
use crate::train::dry_run::UpdateCost;
use crate::train::settings::{LrSchedule, Method, Settings};
use crate::{Error, Result};

/// What the ablation itself decides.
const OWN: [&str; 2] = ["seed", "out"];
/// What cells may not differ in: their numbers of updates are planned, and their images compared.
const COMMON: [&str; 3] = ["steps", "model", "resolution"];

/// How the trained models are measured.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// Where the prompts came from, for people.
    pub prompts_source: String,
    pub prompts: Vec<String>,
    pub image_seeds: Vec<u64>,
    pub steps: usize,
    pub guidance: f64,
}

/// An image of an evaluation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Wanted<'a> {
    /// Index of the prompt.
    pub index: usize,
    pub prompt: &'a str,
    pub image_seed: u64,
    /// Of its noise: image seed times the number of prompts plus the prompt's index, so that no
    /// two images share theirs.
    pub seed: u64,
}

impl Sampling {
    pub fn wanted(&self) -> Vec<Wanted<'_>> {
        let count = self.prompts.len() as u64;
        let each = |&image_seed: &u64| {
            self.prompts.iter().enumerate().map(move |(index, prompt)| {
                let seed = image_seed.wrapping_mul(count).wrapping_add(index as u64);
                Wanted { index, prompt, image_seed, seed }
            })
        };
        self.image_seeds.iter().flat_map(each).collect()
    }
}

/// A number of updates, and what it makes equal.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Length {
    pub updates: u64,
    pub equal: Vec<Equal>,
}

/// How a cell is trained.
#[derive(Clone, Debug, PartialEq)]
pub struct Training {
    /// Without a seed and a folder; `steps` are the base's.
    pub settings: Settings,
    /// Of an update, as planned.
    pub cost: UpdateCost,
    /// Ascending.
    pub lengths: Vec<Length>,
}

impl Training {
    /// Whether a short run is the beginning of a long one.
    fn is_prefixed(&self) -> bool {
        self.settings.lr_schedule == LrSchedule::Constant
    }
}

/// Settings that are compared with others.
#[derive(Clone, Debug, PartialEq)]
pub struct Cell {
    pub name: String,
    /// What its files are called by: the name of the first cell with the same settings.
    pub files: String,
    /// The settings that are not the base's.
    pub differs: Map<String, Value>,
    /// None where the method has no gradient.
    pub training: Option<Training>,
}

/// A run up to a number of updates, and its evaluation.
#[derive(Clone, Copy, Debug)]
pub struct Job<'a> {
    pub cell: &'a Cell,
    pub training: &'a Training,
    pub seed: u64,
    pub updates: u64,
}

/// An ablation, ready to run.
#[derive(Clone, Debug)]
pub struct Plan {
    pub method: Method,
    pub base: Settings,
    /// F of an update of the base.
    pub base_forwards: f64,
    pub cells: Vec<Cell>,
    pub seeds: Vec<u64>,
    pub equal: Vec<Equal>,
    pub sampling: Sampling,
    pub out: PathBuf,
}

impl Plan {
    /// Reads no weights.
    ///
    /// # Errors
    /// Names the option, the cell's setting or the file that is unusable.
    pub fn new(options: Layer, assignments: &[Assignment]) -> Result<Self> {
        let missing = |field: &str, what| Error::invalid(field, format!("missing: give {what}"));
        let method = options.method.ok_or_else(|| missing("method", "sft or rlhf"))?;
        let out = options.out.clone().ok_or_else(|| missing("out", "a folder"))?;
        let seeds = options.seeds.clone().map_or_else(|| vec![0, 1, 2], |Seeds(seeds)| seeds);
        distinct("seeds", seeds.iter().copied())?;
        let equal = options.equal.clone().unwrap_or_else(|| vec![Equal::Updates, Equal::Forwards]);
        distinct("equal", equal.iter().map(|equal| equal.name()))?;
        let sampling = sampling(&options)?;
        let mut shared = options.settings.clone();
        shared
            .extend(assignments.iter().map(|Assignment(key, value)| (key.clone(), value.clone())));
        refuse(&shared, &OWN)?;
        let settings = |set: &Map<String, Value>| -> Result<Settings> {
            let mut last = shared.clone();
            last.extend(set.clone());
            let found = read(method, options.preset.as_deref(), options.train.as_deref(), &last)?;
            // Those of a file that a run has written.
            Ok(Settings { seed: 0, out: None, cache: None, ..found })
        };
        let base = settings(&Map::new())?;
        base.check(method)?;
        let scheduler: SchedulerConfig = ModelFolder::scheduler_at(Path::new(&base.model))?;
        let schedule = NoiseSchedule::new(&scheduler)?;
        let base_forwards = UpdateCost::of(method, &base, &schedule)?.forwards();
        let table = base.table()?;
        let mut cells: Vec<Cell> = Vec::new();
        for (name, set) in named(&options)? {
            let within = |e: Error| Error::invalid(format!("cell {name}"), e.to_string());
            refuse(&set, &OWN).and_then(|()| refuse(&set, &COMMON)).map_err(within)?;
            let settings = settings(&set).map_err(within)?;
            let mut differs = settings.table()?;
            differs.retain(|key, value| table.get(key) != Some(value));
            let training = if settings.n < method.least_trajectories() {
                let enough = Settings { n: method.least_trajectories(), ..settings };
                enough.check(method).map_err(within)?;
                None
            } else {
                settings.check(method).map_err(within)?;
                let cost = UpdateCost::of(method, &settings, &schedule).map_err(within)?;
                let lengths = lengths(&equal, base.steps, base_forwards / cost.forwards());
                Some(Training { settings, cost, lengths })
            };
            let same = cells.iter().find(|other| other.differs == differs);
            let files = same.map_or_else(|| file_name(&name), |cell| cell.files.clone());
            if same.is_none() && cells.iter().any(|cell| cell.files == files) {
                let message = format!("two have names that make the file name '{files}'");
                return Err(Error::invalid("cells", message));
            }
            cells.push(Cell { name, files, differs, training });
        }
        distinct("cells", cells.iter().map(|cell| cell.name.clone()))?;
        Ok(Self { method, base, base_forwards, cells, seeds, equal, sampling, out })
    }

    /// What is to be done, each once. Seed by seed, so that a stopped ablation is a whole one
    /// over fewer seeds, and a run's lengths as they grow.
    pub fn jobs(&self) -> Vec<Job<'_>> {
        let mut seen = BTreeSet::new();
        let mut jobs = Vec::new();
        for &seed in &self.seeds {
            for cell in &self.cells {
                let Some(training) = &cell.training else { continue };
                for length in &training.lengths {
                    let updates = length.updates;
                    if seen.insert((&cell.files, seed, updates)) {
                        jobs.push(Job { cell, training, seed, updates });
                    }
                }
            }
        }
        jobs
    }

    /// F of all training as planned: what runs have in common counts once.
    pub fn forwards(&self) -> f64 {
        let mut runs: BTreeMap<(&str, u64), f64> = BTreeMap::new();
        for job in self.jobs() {
            let f = job.training.cost.forwards() * job.updates as f64;
            let run = runs.entry((&job.cell.files, job.seed)).or_default();
            *run = if job.training.is_prefixed() { run.max(f) } else { *run + f };
        }
        runs.values().sum()
    }

    /// Where the base's scores are.
    pub fn base_scores(&self) -> PathBuf {
        self.out.join("scores/base.jsonl")
    }

    /// Where a job's scores are.
    pub fn scores(&self, job: &Job) -> PathBuf {
        let name = format!("{}-s{}-u{}.jsonl", job.cell.files, job.seed, job.updates);
        self.out.join("scores").join(name)
    }

    /// The folder of a job's run. At a constant learning rate a short run is the beginning of a
    /// long one and has the same folder, unless that has gone on without it.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub fn run_folder(&self, job: &Job) -> Result<PathBuf> {
        let name = format!("{}-s{}", job.cell.files, job.seed);
        let runs = self.out.join("runs");
        let shared = runs.join(&name);
        let past = Checkpoints::of(&shared).steps()?.last().is_some_and(|&step| step > job.updates);
        if past || !job.training.is_prefixed() {
            return Ok(runs.join(format!("{name}-u{}", job.updates)));
        }
        Ok(shared)
    }

    /// A job's settings as the trainer takes them.
    pub fn settings(&self, job: &Job, folder: &Path) -> Settings {
        Settings {
            seed: job.seed,
            steps: job.updates,
            out: Some(folder.display().to_string()),
            cache: Some(self.out.join("latents").display().to_string()),
            ..job.training.settings.clone()
        }
    }
}

/// Cells by name, those of axes first.
fn named(options: &Layer) -> Result<Vec<(String, Map<String, Value>)>> {
    let mut cells = Vec::new();
    for axis in &options.axis {
        if axis.set.contains_key(&axis.name) {
            let message = format!("set has '{}', which the axis varies", axis.name);
            return Err(Error::invalid("axis", message));
        }
        for value in &axis.values {
            let mut set = Map::from_iter([(axis.name.clone(), value.clone())]);
            set.extend(axis.set.clone());
            cells.push((describe(&set), set));
        }
    }
    cells.extend(options.cells.iter().map(|cell| (cell.name.clone(), cell.set.clone())));
    if cells.is_empty() {
        return Err(Error::invalid("cells", "give [[axis]] with values, or [[cells]]"));
    }
    Ok(cells)
}

/// Settings as people write them: `n=3 m=1`.
pub fn describe(settings: &Map<String, Value>) -> String {
    let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let shown = |value: &Value| match value {
        Value::Array(items) => items.iter().map(text).collect::<Vec<_>>().join("+"),
        other => text(other),
    };
    let each = settings.iter().map(|(key, value)| format!("{key}={}", shown(value)));
    each.collect::<Vec<_>>().join(" ")
}

fn file_name(name: &str) -> String {
    let kept = |c: char| if c.is_ascii_alphanumeric() || "._".contains(c) { c } else { '-' };
    name.chars().map(kept).collect()
}

/// `ratio`: F of an update of the base by that of the cell.
fn lengths(equal: &[Equal], steps: u64, ratio: f64) -> Vec<Length> {
    let mut lengths: Vec<Length> = Vec::new();
    for &equal in equal {
        let updates = match equal {
            Equal::Updates => steps,
            Equal::Forwards => ((steps as f64 * ratio).round() as u64).max(1),
        };
        match lengths.iter_mut().find(|length| length.updates == updates) {
            Some(length) => length.equal.push(equal),
            None => lengths.push(Length { updates, equal: vec![equal] }),
        }
    }
    lengths.sort_by_key(|length| length.updates);
    lengths
}

fn sampling(options: &Layer) -> Result<Sampling> {
    let default = PromptSource::Scenes { split: Split::Test, count: 128 };
    let source = options.prompts.clone().unwrap_or(default);
    let list = prompts::load(&source)?;
    let prompts_source = described(&source, &list);
    let image_seeds = options.image_seeds.clone().map_or_else(|| vec![0], |Seeds(seeds)| seeds);
    distinct("image_seeds", image_seeds.iter().copied())?;
    let (steps, guidance) = (options.steps.unwrap_or(50), options.guidance.unwrap_or(5.0));
    if steps == 0 {
        return Err(Error::invalid("steps", "expected at least 1"));
    }
    if !guidance.is_finite() {
        return Err(Error::invalid("guidance", format!("expected a number, got {guidance}")));
    }
    Ok(Sampling { prompts_source, prompts: list.prompts, image_seeds, steps, guidance })
}

fn refuse(set: &Map<String, Value>, keys: &[&str]) -> Result<()> {
    match keys.iter().find(|key| set.contains_key(**key)) {
        None => Ok(()),
        Some(key) if OWN.contains(key) => {
            Err(Error::invalid(*key, "is the ablation's own: see its seeds and out"))
        }
        Some(key) => Err(Error::invalid(*key, "cells cannot differ in it: give it in settings")),
    }
}
