//! Whatever a request may say: no method panics, and what is planned is what is spent.

use std::sync::Arc;

use crate::bed::{Bed, FnReward, reward, sum};
use crate::costs::check;
use crate::reductions::searching;
use diffusion_sharpening::diffusion::cost::Budget;
use diffusion_sharpening::rewards::RewardSet;
use diffusion_sharpening::{Error, Result, search};
use proptest::prelude::*;
use serde_json::{Map, Value, json};

/// A value for a listed parameter, small enough to be run.
fn value(entry: &Value, pick: u64) -> Value {
    if let Some(options) = entry["enum"].as_array() {
        return options[pick as usize % options.len()].clone();
    }
    match entry["type"].as_str() {
        Some("integer") => json!(pick % 7),
        Some("number") => json!([0.0, 0.1, 0.5, 0.9, 1.0, 3.0, 1e-310][pick as usize % 7]),
        Some("boolean") => json!(pick.is_multiple_of(2)),
        Some("array") => json!((0..pick % 8).map(|i| i * (1 + pick / 8 % 3)).collect::<Vec<_>>()),
        _ => json!(["adaptive", "0.5", "inf", "adaptive-frozen"][pick as usize % 4]),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn any_request_is_answered(
        method in 0usize..10, picks in proptest::collection::vec(0u64..1000, 12),
        steps in 1usize..7, f in proptest::option::of(0u64..120),
        v in proptest::option::of(0u64..40), bits in any::<u64>(), offset in any::<bool>(),
    ) {
        let listings = search::listings();
        let listed = &listings[method % listings.len()];
        let mut params = Map::new();
        for (i, (name, entry)) in listed.params.iter().enumerate() {
            // A part of the parameters, each time another.
            if bits >> i & 1 == 1 {
                params.insert(name.clone(), value(entry, picks[i % picks.len()]));
            }
        }
        let mut bed = Bed::new(reward(|x| if sum(x) > 6.0 { f64::NAN } else { sum(x) }));
        bed.steps = steps;
        bed.budget = Budget { f, v, y: None };
        if offset {
            let config = bed.schedule.config().clone();
            let config = diffusion_sharpening::diffusion::config::SchedulerConfig {
                set_alpha_to_one: true, steps_offset: 0, ..config
            };
            bed.schedule =
                diffusion_sharpening::diffusion::schedule::NoiseSchedule::new(&config).unwrap();
        }
        match bed.plan(&listed.name, Value::from(params)) {
            Ok(plan) => {
                let again = bed.plan(plan.method, Value::from(plan.params.clone())).unwrap();
                prop_assert_eq!(&again, &plan);
                if plan.predicted.f <= 400 {
                    check(&bed, plan, 1).unwrap();
                }
            }
            Err(Error::Invalid { .. } | Error::Budget(_)) => {}
            Err(error) => prop_assert!(false, "{error}"),
        }
    }
}

/// A bed with a second reward, which both are searched by.
fn two(ensemble: &'static str, micro_batch: usize) -> Bed {
    let mut bed = Bed::new(reward(sum));
    let other = FnReward {
        name: "other",
        higher_is_better: true,
        calls: 0,
        f: Box::new(|x| -(sum(x) - 1.0).abs()),
    };
    let rewards = bed.rewards.iter().cloned().chain([Arc::new(other) as _]).collect();
    bed.rewards = RewardSet::new(rewards).unwrap();
    bed.searched = Some(ensemble);
    bed.micro_batch = micro_batch;
    bed
}

#[test]
fn every_method_takes_a_sum_of_rewards() -> Result<()> {
    for (method, params) in searching() {
        let run = two("searched:0.5+other:2", 4).run(method, params.clone(), 4)?;
        let scores = &run.outcome.scores;
        let sum = 0.5 * scores["searched"] + 2.0 * scores["other"];
        assert!((run.outcome.score - sum).abs() < 1e-9, "{method} {params}");
        assert_eq!(scores["searched:0.5+other:2"], run.outcome.score);
    }
    Ok(())
}

#[test]
fn ranks_decide_the_same_in_any_micro_batch_or_are_refused() -> Result<()> {
    for ensemble in ["rank(searched+other)", "normalised(searched+other)"] {
        for (method, params) in searching() {
            let run = |micro_batch| two(ensemble, micro_batch).run(method, params.clone(), 4);
            if matches!(method, "fk-steering" | "tree-search") {
                let error = run(1).unwrap_err().to_string();
                assert!(error.starts_with("reward") && error.contains(method), "{error}");
                continue;
            }
            let (one, eight) = (run(1)?, run(8)?);
            assert_eq!(one.latents(), eight.latents(), "{method} {params}");
        }
        // A search by ranks is a search, if candidates come one by one, too.
        for method in ["best-of-n", "zero-order"] {
            let mut moved = 0;
            for seed in 0..8 {
                let plain = two(ensemble, 4).run("plain", json!({}), seed)?;
                let found = two(ensemble, 1).run(method, json!({}), seed)?;
                moved += u32::from(found.latents() != plain.latents());
            }
            assert!(moved >= 2, "{method}: {moved} of 8");
        }
    }
    Ok(())
}
