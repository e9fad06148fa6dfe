//! Best-of-k from the scores of best-of-N's candidates: what k of them, drawn without
//! replacement, would have given on the mean. One run at the largest budget is the whole curve.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::cell::Cell;
use super::manifest::SweepConfig;

/// The method whose cells can be replayed.
pub const METHOD: &str = "best-of-n";

/// Scores of all candidates by reward, in their order.
pub type Candidates = BTreeMap<String, Vec<Option<f64>>>;

/// What a generation's trace says of all its candidates.
pub fn candidates(trace: &[Value]) -> Option<Candidates> {
    let entry = trace.iter().find_map(|entry| entry.get("candidates"))?;
    serde_json::from_value(entry.clone()).ok()
}

/// Cells for the budgets of `config` below those of `cells` that hold their candidates.
pub fn derive(config: &SweepConfig, cells: &[Cell]) -> Vec<Cell> {
    if !config.replay {
        return Vec::new();
    }
    let replayed = cells.iter().flat_map(|cell| {
        let below = config.budgets.iter().filter(move |budget| **budget < cell.budget);
        below.filter_map(|budget| at(cell, *budget, &config.reward))
    });
    replayed.collect()
}

/// The mean cell of `budget`; none without candidates, or where it pays for none.
fn at(cell: &Cell, budget: u64, searched: &str) -> Option<Cell> {
    let candidates = cell.candidates.as_ref()?;
    let scores = candidates.get(searched)?;
    let n = scores.len();
    let one = cell.f.checked_div(n as u64).filter(|one| *one > 0)?;
    let k = usize::try_from(budget / one).ok()?.min(n);
    if k == 0 {
        return None;
    }
    let wins = winning(scores, k);
    // Of those that have a score.
    let mean = |scores: &Vec<Option<f64>>| -> Option<f64> {
        let known = scores.iter().zip(&wins).filter_map(|(score, p)| Some(((*score)?, *p)));
        let (sum, weight) = known.fold((0.0, 0.0), |(s, w), (score, p)| (s + p * score, w + p));
        (weight > 0.0).then(|| sum / weight)
    };
    let share = k as f64 / n as f64;
    Some(Cell {
        budget,
        f: k as u64 * one,
        v: k as u64,
        y: k as u64,
        seconds: cell.seconds * share,
        stages: cell.stages.iter().map(|(name, s)| (name.clone(), s * share)).collect(),
        scores: candidates.iter().map(|(name, scores)| (name.clone(), mean(scores))).collect(),
        params: {
            let mut params = cell.params.clone();
            params.insert("candidates".to_owned(), json!(k));
            params.insert("replayed_from".to_owned(), json!(n));
            params
        },
        candidates: None,
        thumbnail: None,
        ..cell.clone()
    })
}

/// Probability that each candidate is the best of k drawn ones: C(worse, k-1) / C(n, k). Ties
/// are won by the earlier one, failed scores lose to all others.
fn winning(scores: &[Option<f64>], k: usize) -> Vec<f64> {
    let n = scores.len();
    let value = |i: usize| scores[i].unwrap_or(f64::NEG_INFINITY);
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|a, b| value(*b).total_cmp(&value(*a)));
    let mut wins = vec![0.0; n];
    // C(n-1, k-1) / C(n, k) for the best, then a factor for every rank.
    let mut probability = k as f64 / n as f64;
    for (rank, i) in order.into_iter().enumerate() {
        wins[i] = probability;
        let worse = n - 1 - rank;
        if worse == 0 || worse < k {
            break;
        }
        probability *= (worse + 1 - k) as f64 / worse as f64;
    }
    wins
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chances_by_hand() {
        let some = |values: &[f64]| values.iter().map(|v| Some(*v)).collect::<Vec<_>>();
        assert_eq!(winning(&some(&[1.0, 3.0, 2.0]), 1), [1.0 / 3.0; 3]);
        let two = winning(&some(&[1.0, 3.0, 2.0]), 2);
        assert!((two[1] - 2.0 / 3.0).abs() < 1e-12 && (two[2] - 1.0 / 3.0).abs() < 1e-12);
        assert_eq!(two[0], 0.0);
        assert_eq!(winning(&some(&[1.0, 3.0, 2.0]), 3), [0.0, 1.0, 0.0]);
        assert_eq!(winning(&[None, Some(0.0)], 2), [0.0, 1.0]);
        for n in 1..30 {
            for k in 1..=n {
                let values: Vec<Option<f64>> =
                    (0..n).map(|i| Some(f64::from(i * 7 % 30))).collect();
                let sum: f64 = winning(&values, k as usize).iter().sum();
                assert!((sum - 1.0).abs() < 1e-9, "{n} {k}: {sum}");
            }
        }
    }

    /// Against all subsets.
    #[test]
    fn the_mean_over_all_subsets() {
        let searched = [0.3, 0.9, 0.1, 0.5, 0.7];
        let held = [1.0, 2.0, 4.0, 8.0, 16.0];
        let all = |values: &[f64]| values.iter().map(|v| Some(*v)).collect::<Vec<_>>();
        let cell = Cell {
            method: METHOD.into(),
            budget: 500,
            f: 500,
            seconds: 10.0,
            candidates: Some(BTreeMap::from([
                ("clip".to_owned(), all(&searched)),
                ("judge".to_owned(), all(&held)),
            ])),
            ..Cell::default()
        };
        for k in 1..=5u32 {
            let (mut sums, mut count) = ([0.0; 2], 0.0);
            for subset in 0u32..32 {
                if subset.count_ones() != k {
                    continue;
                }
                let inside = (0..5).filter(|i| subset & (1 << i) != 0);
                let best = inside.max_by(|a, b| searched[*a].total_cmp(&searched[*b])).unwrap();
                (sums[0], sums[1], count) =
                    (sums[0] + searched[best], sums[1] + held[best], count + 1.0);
            }
            let found = at(&cell, u64::from(k) * 100 + 50, "clip").unwrap();
            assert_eq!((found.f, found.v, found.y), (u64::from(k) * 100, k.into(), k.into()));
            assert!((found.scores["clip"].unwrap() - sums[0] / count).abs() < 1e-12);
            assert!((found.scores["judge"].unwrap() - sums[1] / count).abs() < 1e-12);
            assert!((found.seconds - 2.0 * f64::from(k)).abs() < 1e-12);
        }
        assert!(at(&cell, 99, "clip").is_none());
    }
}
