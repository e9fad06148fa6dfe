//! What a sweep's cells say: one row per method and budget, with means,
//! intervals over prompts and paired differences against plain sampling.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::arm::PLAIN;
use super::cell::Cell;
use super::manifest::Manifest;
use super::stats::{Bootstrap, Estimate, mean};
use crate::rewards::ensemble;

/// By how much of its budget of time an image may take longer before it is late.
pub const LATE: f64 = 0.05;

/// One reward in one row.
#[derive(Clone, Debug, PartialEq)]
pub struct Score {
    pub estimate: Option<Estimate>,
    /// Cells that ran and have no score.
    pub missing: usize,
    /// Mean of the differences from the reference cell of the same prompt and seed.
    pub difference: Option<Estimate>,
}

/// All cells of a method at a budget.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    pub method: String,
    /// The method asked for, where plain sampling stood in for it.
    pub requested_method: Option<String>,
    pub budget: u64,
    /// Steps, where all cells agree.
    pub steps: Option<u32>,
    /// Cells that ran.
    pub n: usize,
    /// Distinct prompts among them.
    pub prompts: usize,
    /// Cells in which nothing could run.
    pub infeasible: usize,
    /// Why, of the first.
    pub reason: Option<String>,
    /// Means per image.
    pub f: f64,
    pub v: f64,
    pub y: f64,
    pub seconds: f64,
    /// Share of them outside the networks and the rewards: noise, solver, choices.
    pub overhead: f64,
    /// Images that took longer than their budget by more than [`LATE`], were it milliseconds.
    pub late: usize,
    /// In the order of [`Summary::rewards`].
    pub scores: Vec<Score>,
    /// Whether the differences are taken against this row.
    pub is_reference: bool,
}

impl Row {
    /// Whether the row belongs to its method's line: it ran, as itself.
    #[must_use]
    pub fn on_curve(&self) -> bool {
        self.requested_method.is_none() && self.n > 0
    }
}

/// The rows of a sweep.
#[derive(Clone, Debug, PartialEq)]
pub struct Summary {
    /// Searched reward first, then the held-out one, then the others by name.
    pub rewards: Vec<String>,
    /// How many of them are searched: several where an ensemble has no score of its own.
    pub searched: usize,
    pub rows: Vec<Row>,
    /// Budget of the plain row that differences are taken against.
    pub reference_budget: Option<u64>,
}

type Pair = (usize, u64);

impl Summary {
    /// Summarises the cells of `manifest`'s grid.
    #[must_use]
    pub fn build(manifest: &Manifest, cells: &[Cell]) -> Self {
        let (rewards, searched) = rewards(manifest, cells);
        let prompts: Vec<usize> =
            cells.iter().map(|c| c.prompt_index).collect::<BTreeSet<_>>().into_iter().collect();
        let slot: HashMap<usize, usize> =
            prompts.iter().enumerate().map(|(i, &p)| (p, i)).collect();
        let bootstrap = Bootstrap::new(prompts.len());

        let groups = groups(manifest, cells);
        let reference_budget = reference(manifest, groups.values());
        let reference = plain_at(groups.values().flatten().copied(), reference_budget);

        let rows = groups
            .values()
            .map(|group| {
                let ran: Vec<&Cell> =
                    group.iter().copied().filter(|c| c.infeasible.is_none()).collect();
                let is_reference =
                    reference_budget == Some(group[0].budget) && ran.iter().any(|c| is_plain(c));
                let scores = rewards
                    .iter()
                    .map(|reward| {
                        let values = by_pair(&ran, reward);
                        let plain = by_pair(&reference, reward);
                        let clusters = |of: &dyn Fn(&Pair, f64) -> Option<f64>| {
                            let mut clusters = vec![Vec::new(); prompts.len()];
                            for (pair, &value) in &values {
                                clusters[slot[&pair.0]].extend(of(pair, value));
                            }
                            bootstrap.estimate(&clusters)
                        };
                        Score {
                            estimate: clusters(&|_, value| Some(value)),
                            missing: ran.len() - values.len(),
                            difference: (!is_reference)
                                .then(|| clusters(&|pair, value| Some(value - plain.get(pair)?)))
                                .flatten(),
                        }
                    })
                    .collect();
                row(group, &ran, scores, is_reference)
            })
            .collect();
        Self { rewards, searched, rows, reference_budget }
    }
}

/// Cells by method asked for, budget, and whether plain sampling stood in.
type Groups<'a> = BTreeMap<(Option<usize>, u64, bool), Vec<&'a Cell>>;

fn groups<'a>(manifest: &Manifest, cells: &'a [Cell]) -> Groups<'a> {
    let mut groups = Groups::new();
    for cell in cells {
        let method = manifest.config.methods.iter().position(|m| m == cell.requested());
        let stood_in = cell.infeasible.is_none() && cell.requested_method.is_some();
        groups.entry((method, cell.budget, stood_in)).or_default().push(cell);
    }
    groups
}

/// The cells of plain sampling that differences are taken against.
pub(super) fn reference_cells<'a>(manifest: &Manifest, cells: &'a [Cell]) -> Vec<&'a Cell> {
    plain_at(cells.iter(), reference(manifest, groups(manifest, cells).values()))
}

/// The cells of plain sampling at a budget.
fn plain_at<'a>(cells: impl Iterator<Item = &'a Cell>, budget: Option<u64>) -> Vec<&'a Cell> {
    cells.filter(|c| is_plain(c) && Some(c.budget) == budget).collect()
}

fn row(group: &[&Cell], ran: &[&Cell], scores: Vec<Score>, is_reference: bool) -> Row {
    let first = group[0];
    let average = |of: &dyn Fn(&Cell) -> f64| {
        mean(&ran.iter().map(|c| of(c)).collect::<Vec<_>>()).unwrap_or(f64::NAN)
    };
    let steps: BTreeSet<u32> = ran.iter().map(|c| c.steps).collect();
    Row {
        method: first.method.clone(),
        requested_method: first.requested_method.clone(),
        budget: first.budget,
        steps: steps.first().copied().filter(|_| steps.len() == 1),
        n: ran.len(),
        prompts: ran.iter().map(|c| c.prompt_index).collect::<BTreeSet<_>>().len(),
        infeasible: group.len() - ran.len(),
        reason: group.iter().find_map(|c| c.infeasible.clone()),
        f: average(&|c| c.f as f64),
        v: average(&|c| c.v as f64),
        y: average(&|c| c.y as f64),
        seconds: average(&|c| c.seconds),
        overhead: average(&|c| 1.0 - c.stages.values().sum::<f64>() / c.seconds),
        late: ran.iter().filter(|c| 1e3 * c.seconds > (1.0 + LATE) * c.budget as f64).count(),
        scores,
        is_reference,
    }
}

/// A cell of the plain row proper: no adapter, not standing in for a search.
fn is_plain(cell: &Cell) -> bool {
    cell.method == PLAIN && cell.requested_method.is_none() && cell.infeasible.is_none()
}

fn by_pair(cells: &[&Cell], reward: &str) -> BTreeMap<Pair, f64> {
    cells
        .iter()
        .filter_map(|c| {
            let score = c.scores.get(reward).copied().flatten().filter(|s| s.is_finite())?;
            Some(((c.prompt_index, c.seed), score))
        })
        .collect()
}

fn rewards(manifest: &Manifest, cells: &[Cell]) -> (Vec<String>, usize) {
    let seen: BTreeSet<&String> = cells.iter().flat_map(|c| c.scores.keys()).collect();
    let searched = &manifest.config.reward;
    // Ranks among candidates say nothing between images: then the members themselves.
    let mut rewards: Vec<String> = match ensemble::names(searched) {
        Ok(members) if !seen.contains(searched) => members.into_iter().map(str::to_owned).collect(),
        _ => vec![searched.clone()],
    };
    let count = rewards.len();
    rewards.extend(manifest.config.held_out.clone());
    for reward in seen {
        if !rewards.contains(reward) {
            rewards.push(reward.clone());
        }
    }
    (rewards, count)
}

/// The budget of the reference row: the one asked for, otherwise that of plain
/// sampling at the steps that searches take, otherwise plain's smallest.
fn reference<'a>(
    manifest: &Manifest,
    groups: impl Iterator<Item = &'a Vec<&'a Cell>>,
) -> Option<u64> {
    let plain: Vec<(u64, u32)> = groups
        .filter_map(|group| group.iter().find(|c| is_plain(c)))
        .map(|c| (c.budget, c.steps))
        .collect();
    if let Some(asked) = manifest.reference_budget {
        return plain.iter().map(|p| p.0).find(|&budget| budget == asked);
    }
    let same_steps = plain.iter().find(|p| p.1 == manifest.config.steps);
    same_steps.or_else(|| plain.iter().min()).map(|p| p.0)
}
