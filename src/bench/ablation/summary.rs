//! What the files of an ablation say: a row for each cell and number of updates.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;
use serde_json::{Map, Value};

use super::options::Equal;
use super::plan::{Cell, Job, Length, Plan, Training};
use super::scores::{Line, Scores};
use crate::Result;
use crate::bench::stats::{Bootstrap, Estimate, mean};

/// A reward in a row.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Score {
    /// Over prompts, images and training seeds.
    pub mean: Option<Estimate>,
    /// From the base model's image of the same prompt and noise.
    pub difference: Option<Estimate>,
    /// From the cell that differs in nothing, at the same images and training seeds.
    pub from_base: Option<Estimate>,
    /// The mean difference of each training seed.
    pub by_seed: BTreeMap<u64, Option<f64>>,
    /// Deviation of these (n − 1), from two seeds on.
    pub seed_deviation: Option<f64>,
    /// Images without a score.
    pub missing: usize,
}

/// What the runs of a row took: means over training seeds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Spent {
    /// Of the whole run, as planned.
    pub f_planned: f64,
    /// Metered.
    pub f: f64,
    /// Images scored.
    pub v: f64,
    /// Calls to a grader outside.
    pub l: f64,
    /// Samples that went backward.
    pub backward: f64,
}

/// A cell at one number of updates.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Row {
    pub cell: String,
    /// The settings that are not the base's.
    pub differs: Map<String, Value>,
    /// Without equals: the method has no gradient there, and nothing ran.
    pub equal: Vec<Equal>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub updates: Option<u64>,
    /// Training seeds that are done.
    pub seeds: Vec<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub spent: Option<Spent>,
    /// By reward.
    pub scores: BTreeMap<String, Score>,
}

impl Row {
    pub fn has_gradient(&self) -> bool {
        !self.equal.is_empty()
    }
}

/// All rows.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Summary {
    pub method: &'static str,
    /// What the base is trained on.
    pub rewards: Vec<String>,
    /// How it was measured.
    pub sampling: Map<String, Value>,
    pub prompts: usize,
    /// Settings that the cells start from.
    pub settings: Map<String, Value>,
    /// Means of the base model.
    pub base: BTreeMap<String, Option<Estimate>>,
    pub rows: Vec<Row>,
}

/// Scores of one reward: by prompt and image seed.
type ByImage = BTreeMap<(usize, u64), f64>;

/// A training seed with its scores.
type BySeed = (u64, Scores);

fn by_image(lines: &[Line], reward: &str) -> ByImage {
    let score = |line: &Line| {
        let score = line.scores.get(reward).copied().flatten()?;
        Some(((line.prompt_index, line.image_seed), score))
    };
    lines.iter().filter_map(score).collect()
}

/// Estimates over the prompts of a plan.
struct Prompts {
    count: usize,
    bootstrap: Bootstrap,
}

impl Prompts {
    fn estimate(&self, values: impl Iterator<Item = (usize, f64)>) -> Option<Estimate> {
        let mut clusters = vec![Vec::new(); self.count];
        values.for_each(|(prompt, value)| clusters[prompt].push(value));
        self.bootstrap.estimate(&clusters)
    }

    /// `before`: of the model without training; `seeds`: of the runs; `others`: of the runs of the
    /// cell that they are compared with.
    fn score(&self, reward: &str, before: &[Line], seeds: &[BySeed], others: &[BySeed]) -> Score {
        let of_runs = |runs: &[BySeed]| -> BTreeMap<u64, ByImage> {
            runs.iter().map(|(seed, scores)| (*seed, by_image(&scores.lines, reward))).collect()
        };
        let (before, all, others) = (by_image(before, reward), of_runs(seeds), of_runs(others));
        let to_others = |(seed, scores): (&u64, &ByImage)| {
            others.get(seed).map_or_else(Vec::new, |others| less(scores, others))
        };
        let to_before = |scores: &ByImage| less(scores, &before);
        let of_seed = |(seed, scores): (&u64, &ByImage)| {
            let differences = to_before(scores).into_iter().map(|(_, difference)| difference);
            (*seed, mean(&differences.collect::<Vec<_>>()))
        };
        let by_seed: BTreeMap<u64, Option<f64>> = all.iter().map(of_seed).collect();
        let images: usize = seeds.iter().map(|(_, scores)| scores.lines.len()).sum();
        let own = all.values().flatten().map(|(image, score)| (image.0, *score));
        Score {
            mean: self.estimate(own),
            difference: self.estimate(all.values().flat_map(to_before)),
            from_base: self.estimate(all.iter().flat_map(to_others)),
            seed_deviation: deviation(by_seed.values().copied()),
            by_seed,
            missing: images - all.values().map(BTreeMap::len).sum::<usize>(),
        }
    }
}

/// The differences of images that both have, with their prompts.
fn less(scores: &ByImage, others: &ByImage) -> Vec<(usize, f64)> {
    let paired =
        |(image, score): (&(usize, u64), &f64)| Some((image.0, score - others.get(image)?));
    scores.iter().filter_map(paired).collect()
}

fn deviation(values: impl Iterator<Item = Option<f64>>) -> Option<f64> {
    let values: Vec<f64> = values.flatten().collect();
    let (mean, n) = (mean(&values)?, values.len() as f64);
    let squares: f64 = values.iter().map(|v| (v - mean).powi(2)).sum();
    (values.len() > 1).then(|| (squares / (n - 1.0)).sqrt())
}

impl Summary {
    /// Reads the files that are there; none before the base is measured.
    ///
    /// # Errors
    /// When a file cannot be read, or was made with other settings.
    pub fn read(plan: &Plan) -> Result<Option<Self>> {
        let Some(base) = Scores::of(plan, None)? else { return Ok(None) };
        let base = base.lines;
        let rewards: BTreeSet<&String> = base.iter().flat_map(|line| line.scores.keys()).collect();
        let count = plan.sampling.prompts.len();
        let prompts = Prompts { count, bootstrap: Bootstrap::new(count) };
        let own = |reward: &&String| {
            let values = by_image(&base, reward).into_iter().map(|(image, score)| (image.0, score));
            ((*reward).clone(), prompts.estimate(values))
        };
        let like_base = plan.cells.iter().find(|cell| cell.differs.is_empty());
        let others = match like_base.and_then(|cell| Some((cell, cell.training.as_ref()?))) {
            Some((cell, training)) => done(plan, cell, training, plan.base.steps)?,
            None => Vec::new(),
        };
        let mut rows = Vec::new();
        for cell in &plan.cells {
            let Some(training) = &cell.training else {
                rows.push(Row {
                    cell: cell.name.clone(),
                    differs: cell.differs.clone(),
                    equal: Vec::new(),
                    updates: None,
                    seeds: Vec::new(),
                    spent: None,
                    scores: BTreeMap::new(),
                });
                continue;
            };
            for length in &training.lengths {
                let done = done(plan, cell, training, length.updates)?;
                let others: &[BySeed] = if cell.differs.is_empty() { &[] } else { &others };
                let score = |reward: &&String| {
                    ((*reward).clone(), prompts.score(reward, &base, &done, others))
                };
                rows.push(Row {
                    cell: cell.name.clone(),
                    differs: cell.differs.clone(),
                    equal: length.equal.clone(),
                    updates: Some(length.updates),
                    seeds: done.iter().map(|(seed, _)| *seed).collect(),
                    spent: spent(training, length, &done),
                    scores: rewards.iter().map(score).collect(),
                });
            }
        }
        Ok(Some(Self {
            method: plan.method.name(),
            rewards: plan.base.rewards.clone(),
            sampling: super::scores::sampling(plan),
            prompts: count,
            settings: plan.base.table()?,
            base: rewards.iter().map(own).collect(),
            rows,
        }))
    }
}

/// The seeds of a cell that are done.
fn done(plan: &Plan, cell: &Cell, training: &Training, updates: u64) -> Result<Vec<BySeed>> {
    let mut done = Vec::new();
    for &seed in &plan.seeds {
        let found = Scores::of(plan, Some(&Job { cell, training, seed, updates }))?;
        done.extend(found.map(|scores| (seed, scores)));
    }
    Ok(done)
}

fn spent(training: &Training, length: &Length, done: &[BySeed]) -> Option<Spent> {
    let runs: Vec<_> = done.iter().filter_map(|(_, scores)| scores.head.run.as_ref()).collect();
    let of = |number: &dyn Fn(&super::scores::Trained) -> u64| {
        mean(&runs.iter().map(|run| number(run) as f64).collect::<Vec<_>>())
    };
    Some(Spent {
        f_planned: training.cost.forwards() * length.updates as f64,
        f: of(&|run| run.cost.units.f)?,
        v: of(&|run| run.cost.units.v)?,
        l: of(&|run| run.cost.units.l)?,
        backward: of(&|run| run.backward)?,
    })
}
