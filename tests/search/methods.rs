//! Reductions, cost and edge cases.

use std::sync::Arc;

use crate::bed::{Bed, FnReward, Run, reward, sum};
use diffusion_sharpening::diffusion::cost::{Budget, Units};
use diffusion_sharpening::diffusion::solver::{SolverKind, SolverSpec};
use diffusion_sharpening::rewards::{Reward, RewardSet};
use diffusion_sharpening::{Error, Result, search};
use proptest::prelude::*;
use serde_json::json;

const N8: fn() -> serde_json::Value = || json!({"candidates": 8});

fn budget_f(f: u64) -> Budget {
    Budget { f: Some(f), ..Budget::default() }
}

#[test]
fn best_of_one_is_plain() -> Result<()> {
    for kind in SolverKind::ALL {
        for kernel in ["ode", "sde"] {
            let mut bed = Bed::new(reward(sum)).guided(3.0);
            bed.solver = SolverSpec::ode(kind, &bed.schedule);
            let plain = bed.run("plain", json!({"kernel": kernel}), 9)?;
            let one = bed.run("best-of-n", json!({"kernel": kernel, "candidates": 1}), 9)?;
            assert_eq!(plain.latents(), one.latents(), "{kind:?} {kernel}");
            assert_eq!(plain.outcome.score, one.outcome.score);
            assert_eq!(plain.spent, one.spent);
        }
    }
    Ok(())
}

#[test]
fn candidate_zero_is_the_plain_image() -> Result<()> {
    let bed = Bed::new(reward(|_| 1.0));
    for seed in 0..3 {
        let many = bed.run("best-of-n", N8(), seed)?;
        assert_eq!(many.latents(), bed.run("plain", json!({}), seed)?.latents());
        assert_eq!(many.outcome.curve.len(), 1, "ties improve nothing");
    }
    Ok(())
}

#[test]
fn the_micro_batch_changes_nothing() -> Result<()> {
    for kernel in ["ode", "sde"] {
        let runs = [1, 3, 8].map(|micro_batch| -> Result<Run> {
            let mut bed = Bed::new(reward(sum)).guided(5.0);
            bed.micro_batch = micro_batch;
            bed.run("best-of-n", json!({"kernel": kernel, "candidates": 8}), 4)
        });
        let [a, b, c] = runs;
        let (a, b, c) = (a?, b?, c?);
        assert_eq!(a.latents(), b.latents());
        assert_eq!(a.latents(), c.latents());
        assert_eq!((a.spent, b.spent), (c.spent, c.spent));
    }
    Ok(())
}

#[test]
fn more_candidates_are_never_worse() -> Result<()> {
    let bed = Bed::new(reward(sum));
    let mut before = f64::NEG_INFINITY;
    for n in 1..10 {
        let run = bed.run("best-of-n", json!({"candidates": n}), 5)?;
        assert!(run.outcome.score >= before);
        before = run.outcome.score;
        assert!(run.outcome.curve.windows(2).all(|w| w[0].best < w[1].best));
        assert_eq!(run.outcome.curve.last().map(|p| p.best), Some(before));
        assert_eq!(run.outcome.trace.len(), run.outcome.curve.len());
        let told = run.events.iter().filter(|event| event.event.is_some()).count();
        assert_eq!(told, run.outcome.trace.len());
    }
    Ok(())
}

#[test]
fn monotone_transforms_and_scales_choose_the_same() -> Result<()> {
    let base = Bed::new(reward(sum)).run("best-of-n", N8(), 6)?;
    let transforms: [fn(f64) -> f64; 4] =
        [|r| (0.3 * r).exp(), |r| 1e4 * r + 7.0, |r| 1e-9 * r, |r| r.powi(3)];
    for transform in transforms {
        let run = Bed::new(reward(move |x| transform(sum(x)))).run("best-of-n", N8(), 6)?;
        assert_eq!(run.latents(), base.latents());
    }
    let negated =
        FnReward { name: "searched", higher_is_better: false, calls: 0, f: Box::new(|x| -sum(x)) };
    let run = Bed::new(Arc::new(negated)).run("best-of-n", N8(), 6)?;
    assert_eq!(run.latents(), base.latents());
    assert_eq!(run.outcome.score, -base.outcome.score);
    Ok(())
}

#[test]
fn failed_scores_never_win() -> Result<()> {
    let plain = Bed::new(reward(sum)).run("plain", json!({}), 7)?;
    let all = Bed::new(reward(|_| f64::NAN)).run("best-of-n", N8(), 7)?;
    assert_eq!(all.latents(), plain.latents(), "index 0 when all fail");
    assert_eq!((all.outcome.failed_scores, all.outcome.curve.len()), (8, 0));
    assert!(all.outcome.score.is_nan() && all.outcome.scores["searched"].is_nan());

    let best = Bed::new(reward(sum)).run("best-of-n", N8(), 7)?;
    for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        let worst_first = plain.outcome.score;
        let bed = Bed::new(reward(move |x| if sum(x) == worst_first { bad } else { sum(x) }));
        let run = bed.run("best-of-n", N8(), 7)?;
        assert_eq!(run.outcome.failed_scores, 1);
        assert_ne!(run.latents(), plain.latents());
        if best.latents() != plain.latents() {
            assert_eq!(run.latents(), best.latents());
        }
    }
    Ok(())
}

#[test]
fn the_other_rewards_report_on_the_winner_only() -> Result<()> {
    let mut bed = Bed::new(reward(sum));
    let first: Arc<dyn Reward> = Arc::new(FnReward {
        name: "first",
        higher_is_better: true,
        calls: 2,
        f: Box::new(|x| x[0].into()),
    });
    bed.rewards.add(first.clone())?;
    assert!(bed.rewards.add(first).is_err(), "names are unique");
    let run = bed.run("best-of-n", N8(), 8)?;
    assert_eq!(run.spent, Units { f: 40, v: 8, y: 8, l: 2 });
    assert_eq!(run.spent, run.plan.predicted);
    assert_eq!(run.outcome.scores["first"], f64::from(run.latents()[0]));
    assert_eq!(run.outcome.scores["searched"], run.outcome.score);

    bed.searched = None;
    let plain = bed.run("plain", json!({}), 8)?;
    assert_eq!((plain.spent.v, plain.outcome.scores.len()), (1, 2));
    assert_eq!(plain.outcome.failed_scores, 0);
    assert!(plain.outcome.score.is_nan());
    let message = bed.plan("best-of-n", json!({})).unwrap_err().to_string();
    assert!(message.starts_with("reward: "), "{message}");
    bed.rewards = RewardSet::default();
    assert_eq!(bed.run("plain", json!({}), 8)?.spent, Units { f: 5, v: 0, y: 1, l: 0 });
    Ok(())
}

#[test]
fn budgets_around_one_trajectory() -> Result<()> {
    // One trajectory is 5 steps with guidance: F = 10.
    let mut bed = Bed::new(reward(sum)).guided(4.0);
    for method in ["plain", "best-of-n"] {
        bed.budget = budget_f(9);
        let message = bed.plan(method, json!({})).unwrap_err().to_string();
        assert_eq!(message, "budget: f: 10 needed, 9 allowed");
        bed.budget = Budget { y: Some(0), ..budget_f(10) };
        assert!(matches!(bed.plan(method, json!({})), Err(Error::Budget(_))));
    }
    bed.budget = budget_f(19);
    let plain = bed.run("plain", json!({}), 1)?;
    let search = bed.run("best-of-n", json!({}), 1)?;
    assert_eq!(plain.latents(), search.latents());
    assert_eq!((search.outcome.unused_f, search.plan.unused_f), (Some(9), Some(9)));

    bed.budget = Budget { f: Some(100), v: Some(6), y: None };
    assert_eq!(bed.plan("best-of-n", json!({}))?.params["candidates"], 6);
    let explicit = bed.plan("best-of-n", json!({"candidates": 11})).unwrap_err();
    assert!(explicit.to_string().contains("f: 110 needed, 100 allowed"), "{explicit}");
    bed.budget = Budget::default();
    assert_eq!(bed.plan("best-of-n", json!({}))?.params["candidates"], 4);
    Ok(())
}

#[test]
fn a_refused_run_runs_nothing() -> Result<()> {
    let bed = Bed::new(reward(sum));
    let plan = bed.plan("best-of-n", json!({"candidates": 4}))?;
    assert_eq!(bed.rows_run(), 0, "planning runs nothing");
    for budget in [budget_f(19), Budget { f: Some(0), ..Budget::default() }] {
        let refused = bed.run_plan(plan.clone(), budget, 0);
        assert!(matches!(refused, Err(Error::Budget(_))));
        assert_eq!(bed.rows_run(), 0);
    }
    assert_eq!(bed.run_plan(plan, budget_f(20), 0)?.spent.f, 20);
    assert_eq!(bed.rows_run(), 20);
    Ok(())
}

#[test]
fn cancellation_stops_between_evaluations() {
    let mut bed = Bed::new(reward(sum));
    bed.cancel_after = Some(2);
    assert!(matches!(bed.run("best-of-n", N8(), 0), Err(Error::Cancelled)));
    assert_eq!(bed.rows_run(), 2 * 4, "two steps of the first micro-batch");
}

#[test]
fn parameters_are_checked_by_name() {
    let bed = Bed::new(reward(sum));
    for (method, params, field) in [
        ("plain", json!({"candidates": 2}), "method.candidates: unknown parameter; known: kernel"),
        ("best-of-n", json!({"n": 2}), "method.n: unknown parameter"),
        ("best-of-n", json!({"candidates": 0}), "method.candidates: 0 is not an integer"),
        ("best-of-n", json!({"candidates": 1.5}), "method.candidates: 1.5 is not"),
        ("best-of-n", json!({"kernel": "heun"}), "method.kernel: \"heun\" is not one of: ode, sde"),
    ] {
        let message = bed.plan(method, params).unwrap_err().to_string();
        assert!(message.starts_with(field), "{message}");
    }
    assert!(bed.plan("plain", json!({"name": "plain", "kernel": null})).is_ok());
    let message = bed.plan("beam", json!({})).unwrap_err().to_string();
    let known: Vec<String> = search::listings().into_iter().map(|l| l.name).collect();
    assert_eq!(message, format!("method: unknown method 'beam'; known: {}", known.join(", ")));
}

#[test]
fn every_method_stops_when_it_is_cancelled() -> Result<()> {
    for (method, params) in crate::reductions::searching() {
        let mut bed = Bed::new(reward(sum));
        bed.cancel_after = Some(2);
        let error = bed.run(method, params.clone(), 3).unwrap_err();
        assert!(matches!(error, Error::Cancelled), "{method} {params}: {error}");
    }
    Ok(())
}

#[test]
fn every_method_describes_its_parameters() {
    let listings = search::listings();
    for (i, listing) in listings.iter().enumerate() {
        assert!(listings[..i].iter().all(|other| other.name != listing.name));
        for (name, entry) in &listing.params {
            for key in ["type", "default", "description"] {
                assert!(entry.get(key).is_some(), "{}.{name} lacks {key}", listing.name);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// The plan's prediction is what the meter reads, within the budget, and a plan's
    /// parameters plan to themselves.
    #[test]
    fn planned_is_metered(
        steps in 1usize..7,
        kind in prop::sample::select(SolverKind::ALL.to_vec()),
        guidance in prop::option::of(1.5f64..8.0),
        f in prop::option::of(1u64..200),
        v in prop::option::of(0u64..9),
        candidates in prop::option::of(1u64..9),
        kernel in prop::sample::select(vec!["ode", "sde"]),
        method in prop::sample::select(vec!["plain", "best-of-n"]),
        micro_batch in 1usize..5,
    ) {
        let mut bed = Bed::new(reward(sum));
        if let Some(scale) = guidance {
            bed = bed.guided(scale);
        }
        bed.solver = SolverSpec::ode(kind, &bed.schedule);
        (bed.steps, bed.micro_batch) = (steps, micro_batch);
        bed.budget = Budget { f, v, y: None };
        let mut params = json!({"kernel": kernel});
        if method == "best-of-n" {
            params["candidates"] = json!(candidates);
        }
        match bed.plan(method, params) {
            Err(Error::Budget(_)) => prop_assert!(f.is_some() || v.is_some()),
            Err(other) => prop_assert!(false, "{other}"),
            Ok(plan) => {
                let again = bed.plan(method, plan.params.clone().into()).unwrap();
                prop_assert_eq!(&again, &plan);
                let run = bed.run_plan(plan, bed.budget, 3).unwrap();
                prop_assert_eq!(run.spent, run.plan.predicted);
                prop_assert_eq!(run.outcome.unused_f, run.plan.unused_f);
                prop_assert_eq!(bed.rows_run(), run.spent.f);
                prop_assert!(f.is_none_or(|f| run.spent.f <= f));
            }
        }
    }
}
