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
    /// The mean difference of each training seed.
    pub by_seed: Vec<Option<f64>>,
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
    /// What is trained on.
    pub rewards_trained: Vec<String>,
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

    /// `base` and `seeds`: of the base model, and of the runs.
    fn score(&self, reward: &str, base: &[Line], seeds: &[&Scores]) -> Score {
        let base = by_image(base, reward);
        let all: Vec<ByImage> = seeds.iter().map(|s| by_image(&s.lines, reward)).collect();
        let values = |scores: &ByImage| -> Vec<(usize, f64)> {
            scores.iter().map(|(image, score)| (image.0, *score)).collect()
        };
        let differences = |scores: &ByImage| -> Vec<(usize, f64)> {
            let paired =
                |(image, score): (&(usize, u64), &f64)| Some((image.0, score - base.get(image)?));
            scores.iter().filter_map(paired).collect()
        };
        let of_seed =
            |scores| mean(&differences(scores).into_iter().map(|(_, d)| d).collect::<Vec<_>>());
        let by_seed: Vec<Option<f64>> = all.iter().map(of_seed).collect();
        let images: usize = seeds.iter().map(|s| s.lines.len()).sum();
        Score {
            mean: self.estimate(all.iter().flat_map(values)),
            difference: self.estimate(all.iter().flat_map(differences)),
            seed_deviation: deviation(&by_seed),
            by_seed,
            missing: images - all.iter().map(BTreeMap::len).sum::<usize>(),
        }
    }
}

fn deviation(values: &[Option<f64>]) -> Option<f64> {
    let values: Vec<f64> = values.iter().copied().flatten().collect();
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
                let found: Vec<&Scores> = done.iter().map(|(_, scores)| scores).collect();
                let score =
                    |reward: &&String| ((*reward).clone(), prompts.score(reward, &base, &found));
                rows.push(Row {
                    cell: cell.name.clone(),
                    differs: cell.differs.clone(),
                    equal: length.equal.clone(),
                    updates: Some(length.updates),
                    seeds: done.iter().map(|(seed, _)| *seed).collect(),
                    spent: spent(training, length, &found),
                    scores: rewards.iter().map(score).collect(),
                });
            }
        }
        Ok(Some(Self {
            method: plan.method.name(),
            rewards_trained: plan.base.rewards.clone(),
            sampling: super::scores::sampling(plan),
            prompts: count,
            settings: plan.base.table()?,
            base: rewards.iter().map(own).collect(),
            rows,
        }))
    }
}

/// The seeds of a cell that are done.
fn done(plan: &Plan, cell: &Cell, training: &Training, updates: u64) -> Result<Vec<(u64, Scores)>> {
    let mut done = Vec::new();
    for &seed in &plan.seeds {
        let found = Scores::of(plan, Some(&Job { cell, training, seed, updates }))?;
        done.extend(found.map(|scores| (seed, scores)));
    }
    Ok(done)
}

fn spent(training: &Training, length: &Length, found: &[&Scores]) -> Option<Spent> {
    let runs: Vec<_> = found.iter().filter_map(|scores| scores.head.run.as_ref()).collect();
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
