//! What methods cost: published figures, formulas, and that the meter reads what was planned.

use crate::bed::{Bed, reward, sum};
use crate::reductions::searching;
use diffusion_sharpening::diffusion::cost::{Budget, Units};
use diffusion_sharpening::{Error, Result, search};
use proptest::prelude::*;
use serde_json::{Value, json};

fn bed(steps: usize) -> Bed {
    let mut bed = Bed::new(reward(sum));
    bed.steps = steps;
    bed
}

/// Evaluations and scored images by plan, without the image that is returned in the end where a
/// method scores it besides.
fn planned(steps: usize, method: &str, params: Value) -> Result<(u64, u64)> {
    let predicted = bed(steps).plan(method, params)?.predicted;
    assert_eq!(predicted.v, predicted.y);
    Ok((predicted.f, predicted.v))
}

#[test]
fn published_costs() -> Result<()> {
    for (steps, method, params, expected) in [
        // Demon: the image is scored besides.
        (50, "demon", json!({}), (21_272, 721)),
        (50, "demon", json!({"released": true}), (21_317, 721)),
        (50, "demon", json!({"look_ahead": 10}), (12_120, 721)),
        (50, "demon", json!({"look_ahead": 5}), (7_512, 721)),
        (50, "demon", json!({"look_ahead": 2}), (4_696, 721)),
        (50, "demon", json!({"look_ahead": 0}), (1_544, 721)),
        (50, "demon", json!({"points": 32, "look_ahead": 20}), (10_330, 353)),
        (50, "demon", json!({"points": 32, "look_ahead": 2}), (2_298, 353)),
        (50, "demon", json!({"points": 32, "candidates": 8, "look_ahead": 0}), (410, 177)),
        (50, "demon", json!({"points": 32, "candidates": 4, "look_ahead": 0}), (234, 89)),
        (50, "demon", json!({"points": 20, "candidates": 2, "look_ahead": 0}), (96, 29)),
        // Free2Guide, the paper's row of equal cost, and as released.
        (50, "free2guide", json!({"guided_steps": 5, "children": 10}), (95, 51)),
        (50, "free2guide", json!({"guided_steps": 5, "children": 5}), (70, 26)),
        (50, "free2guide", json!({"guided_steps": 10, "children": 6}), (100, 61)),
        (
            50,
            "free2guide",
            json!({"guided_steps": 5, "children": 10, "initial": 10, "cached": false}),
            (109, 61),
        ),
        // Zero-order search on SiT: 250 final steps, 50 in search, N = 2.
        (250, "zero-order", json!({"rounds": 2, "search_steps": 50}), (450, 5)),
        (250, "zero-order", json!({"rounds": 16, "search_steps": 50}), (1_850, 33)),
        (250, "zero-order", json!({"rounds": 64, "search_steps": 50}), (6_650, 129)),
        (50, "paths", json!({"paths": 2, "branches": 2}), (758, 16)),
        (50, "paths", json!({"paths": 1, "branches": 1}), (212, 4)),
        (50, "paths", json!({"paths": 2, "branches": 5}), (1_760, 40)),
        (50, "paths", json!({"paths": 4, "branches": 7}), (4_856, 112)),
        (50, "evo-search", json!({}), (5_000, 150)),
        (100, "fk-steering", json!({"particles": 4}), (400, 20)),
        (50, "step-search", json!({"policy": "uniform", "children": 20}), (981, 981)),
        (50, "step-search", json!({"policy": "eps-greedy"}), (3_921, 3_921)),
        (50, "step-search", json!({"policy": "block", "children": 4, "length": 5}), (197, 41)),
    ] {
        assert_eq!(planned(steps, method, params.clone())?, expected, "{method} {params}");
    }
    Ok(())
}

/// Costs that depend on the rewards are bounded by the plan.
fn bounded(plan: &search::Plan) -> bool {
    plan.method == "tree-search" || plan.params.get("policy") == Some(&json!("rollover"))
}

pub fn check(bed: &Bed, plan: search::Plan, seed: u64) -> Result<()> {
    let (predicted, bounds) = (plan.predicted, bounded(&plan));
    let run = bed.run_plan(plan, bed.budget, seed)?;
    if bounds {
        let within = |spent: Units| {
            spent.f <= predicted.f && spent.v <= predicted.v && spent.y <= predicted.y
        };
        assert!(within(run.spent), "{:?}: {:?} of {predicted:?}", run.plan, run.spent);
    } else {
        assert_eq!(run.spent, predicted, "{:?}", run.plan);
    }
    let unused = bed.budget.f.map(|f| f - run.spent.f);
    assert_eq!(run.outcome.unused_f, unused);
    Ok(())
}

#[test]
fn the_meter_reads_what_was_planned() -> Result<()> {
    for (method, params) in searching() {
        for scale in [1.0, 3.0] {
            let bed = if scale == 1.0 { bed(5) } else { bed(5).guided(scale) };
            check(&bed, bed.plan(method, params.clone())?, 3)?;
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    #[test]
    fn any_budget_is_kept(
        f in 4u64..400, v in proptest::option::of(1u64..60), guided in any::<bool>(),
        reward_seed in 0u64..1000, seed in 0u64..100,
    ) {
        // A reward without rhyme or reason, which sometimes fails.
        let noise = move |x: &[f32]| {
            let bits = x.iter().fold(reward_seed, |h, v| {
                (h ^ u64::from(v.to_bits())).wrapping_mul(0x100000001b3)
            });
            if bits.is_multiple_of(17) { f64::NAN } else { (bits >> 11) as f64 / (1u64 << 53) as f64 }
        };
        for listed in search::listings() {
            let mut bed = Bed::new(reward(noise));
            bed.steps = 6;
            if guided {
                bed = bed.guided(3.0);
            }
            bed.budget = Budget { f: Some(f), v, y: None };
            let trajectory = bed.plan("plain", json!({"kernel": "sde"})).map(|p| p.predicted.f);
            match bed.plan(&listed.name, json!({})) {
                Ok(plan) => {
                    prop_assert!(plan.predicted.f <= f, "{}", listed.name);
                    // Planning what was planned changes nothing.
                    let again = bed.plan(plan.method, Value::from(plan.params.clone())).unwrap();
                    prop_assert_eq!(&again, &plan);
                    check(&bed, plan, seed).unwrap();
                }
                Err(Error::Budget(_)) => {
                    let enough = trajectory.is_ok_and(|f| f <= bed.budget.f.unwrap_or(0));
                    prop_assert!(!enough, "{} refuses a trajectory's budget", listed.name);
                }
                Err(error) => prop_assert!(false, "{}: {error}", listed.name),
            }
        }
    }
}

/// The planner's table: what every method makes of a budget in evaluations, 50 steps.
#[test]
fn plans_by_budget() -> Result<()> {
    let mut table = String::new();
    for evaluations in [50, 100, 250, 500, 1_000, 2_500, 5_000, 10_000, 21_000] {
        for listed in search::listings().into_iter().filter(|l| l.name != "plain") {
            let mut bed = bed(50);
            bed.budget.f = Some(evaluations);
            let plan = bed.plan(&listed.name, json!({}))?;
            let shown = |name: &str| {
                let value = plan.params.get(name)?;
                let short = value.to_string().replace('"', "");
                (!value.is_null()).then(|| format!("{name} {short}"))
            };
            let names = [
                "candidates",
                "neighbors",
                "rounds",
                "paths",
                "branches",
                "points",
                "look_ahead",
                "guided_steps",
                "children",
                "particles",
                "evaluations",
                "initial",
                "sizes",
                "rollouts",
                "chain_steps",
            ];
            let shown: Vec<String> = names.iter().filter_map(|name| shown(name)).collect();
            let Units { f, v, .. } = plan.predicted;
            let line =
                format!("{evaluations} {}: {} | E {f} V {v}\n", listed.name, shown.join(", "));
            table.push_str(&line);
        }
    }
    let expected = include_str!("../fixtures/search_plans.txt");
    assert!(table == expected, "the table is now\n{table}");
    Ok(())
}
