//! What every method is with one candidate, without a reward that tells candidates apart, or with
//! its search switched off: another method, to the bit.

use crate::bed::{Bed, Run, reward, sum};
use diffusion_sharpening::Result;
use serde_json::{Value, json};

fn same(bed: &Bed, a: (&str, Value), b: (&str, Value)) -> Result<()> {
    for seed in [3, 4] {
        let first = bed.run(a.0, a.1.clone(), seed)?;
        let second = bed.run(b.0, b.1.clone(), seed)?;
        assert_eq!(first.latents(), second.latents(), "{} {} and {} {}", a.0, a.1, b.0, b.1);
        assert_eq!(first.outcome.score, second.outcome.score);
    }
    Ok(())
}

fn sde() -> (&'static str, Value) {
    ("plain", json!({"kernel": "sde"}))
}

fn ode() -> (&'static str, Value) {
    ("plain", json!({}))
}

fn best_of(n: u64) -> (&'static str, Value) {
    ("best-of-n", json!({"kernel": "sde", "candidates": n}))
}

#[test]
fn one_candidate_is_plain_sampling() -> Result<()> {
    let bed = Bed::new(reward(sum)).guided(3.0);
    let steps = bed.steps;
    for (method, params) in [
        ("free2guide", json!({"children": 1})),
        ("free2guide", json!({"guided_steps": 0, "children": 7})),
        ("free2guide", json!({"eta": 1.0, "children": 1, "guided": "random"})),
        ("step-search", json!({"policy": "uniform", "children": 1})),
        ("step-search", json!({"policy": "block", "children": 1, "length": 2})),
        (
            "step-search",
            json!({"policy": "eps-greedy", "children": 1, "rounds": 1, "epsilon": 1.0}),
        ),
        (
            "step-search",
            json!({"policy": "rollover", "evaluations": steps, "initial": 1,
                               "chain_steps": steps}),
        ),
        ("fk-steering", json!({"particles": 1})),
        ("evo-search", json!({"levels": [], "sizes": [1]})),
        ("tree-search", json!({"rollouts": 1})),
    ] {
        same(&bed, (method, params), sde())?;
    }
    for (method, params) in [
        ("zero-order", json!({"rounds": 0})),
        ("zero-order", json!({"rounds": 3, "cosine": 1.0})),
        ("paths", json!({"branches": 0})),
        ("demon", json!({"candidates": 0})),
    ] {
        same(&bed, (method, params), ode())?;
    }
    Ok(())
}

#[test]
fn without_selection_particles_and_populations_are_best_of_n() -> Result<()> {
    let bed = Bed::new(reward(sum));
    for (method, params) in [
        ("fk-steering", json!({"particles": 6, "lambda": 0.0})),
        ("fk-steering", json!({"particles": 6, "lambda": 0.0, "ess": 1.0})),
        ("evo-search", json!({"levels": [], "sizes": [6]})),
        ("tree-search", json!({"levels": [0], "widening": 1e6, "rollouts": 6})),
        ("tree-search", json!({"levels": [0], "widening": 1e6, "rollouts": 6, "batch": 4})),
    ] {
        same(&bed, (method, params), best_of(6))?;
    }
    Ok(())
}

#[test]
fn svdd_is_free2guide_at_every_step_and_code_with_blocks_of_one() -> Result<()> {
    let bed = Bed::new(reward(sum)).guided(2.0);
    let last = bed.steps - 1;
    let svdd = ("step-search", json!({"policy": "uniform", "children": 5}));
    same(&bed, ("free2guide", json!({"children": 5, "guided_steps": last})), svdd.clone())?;
    same(&bed, ("step-search", json!({"policy": "block", "children": 5, "length": 1})), svdd)
}

#[test]
fn an_evaluation_that_is_made_anew_changes_nothing() -> Result<()> {
    let bed = Bed::new(reward(sum));
    let params = |cached: bool| json!({"children": 4, "guided_steps": 3, "cached": cached});
    same(&bed, ("free2guide", params(true)), ("free2guide", params(false)))?;
    let params = |released: bool| json!({"candidates": 3, "points": 8, "look_ahead": 2, "released": released});
    same(&bed, ("demon", params(true)), ("demon", params(false)))
}

#[test]
fn demon_without_noise_is_heun_whatever_the_candidates() -> Result<()> {
    let bed = Bed::new(reward(sum));
    let params = |candidates: u64| json!({"candidates": candidates, "points": 10, "look_ahead": 0, "beta": 0.0});
    same(&bed, ("demon", params(1)), ("demon", params(5)))
}

/// Every method with parameters under which it searches, in few steps.
pub fn searching() -> Vec<(&'static str, Value)> {
    vec![
        ("best-of-n", json!({"candidates": 5})),
        ("zero-order", json!({"neighbors": 3, "rounds": 3})),
        ("zero-order", json!({"neighbors": 2, "rounds": 3, "elitism": "keep-pivot"})),
        ("zero-order", json!({"neighbors": 2, "rounds": 3, "elitism": "restart"})),
        ("zero-order", json!({"rounds": 2, "search_steps": 3})),
        ("paths", json!({"paths": 2, "branches": 3})),
        ("demon", json!({"candidates": 4, "points": 8, "look_ahead": 0})),
        ("demon", json!({"candidates": 3, "points": 8, "look_ahead": 3, "weights": "boltzmann"})),
        ("demon", json!({"candidates": 3, "points": 8, "look_ahead": 1, "tau": 0.5})),
        ("free2guide", json!({"children": 4, "guided_steps": 3})),
        ("free2guide", json!({"children": 4, "guided_steps": 5})),
        ("free2guide", json!({"children": 4, "guided_steps": 2, "guided": "random"})),
        ("free2guide", json!({"children": 3, "guided_steps": 3, "alpha": 0.5})),
        ("free2guide", json!({"children": 3, "guided_steps": 3, "initial": 4, "cached": false})),
        ("fk-steering", json!({"particles": 5, "stops": 2})),
        ("fk-steering", json!({"particles": 5, "stops": 3, "potential": "diff", "ess": 1.0})),
        (
            "fk-steering",
            json!({"particles": 5, "stops": 3, "potential": "sum",
                               "resampler": "multinomial"}),
        ),
        ("step-search", json!({"policy": "uniform", "children": 3})),
        ("step-search", json!({"policy": "block", "children": 3, "length": 2})),
        ("step-search", json!({"policy": "eps-greedy", "children": 2, "rounds": 3})),
        ("step-search", json!({"policy": "rollover", "evaluations": 30, "initial": 4})),
        ("step-search", json!({"policy": "rollover", "evaluations": 30, "initial": 4, "batch": 3})),
        ("evo-search", json!({"levels": [0, 2, 3], "sizes": [6, 4, 4, 5], "elites": 1})),
        ("evo-search", json!({"levels": [0, 3], "sizes": [4, 4, 4], "mutation": "add-sigma"})),
        ("tree-search", json!({"evaluations": 40, "levels": [0, 2, 3]})),
        (
            "tree-search",
            json!({"evaluations": 40, "levels": [0, 2], "selection": "sample",
                               "batch": 3}),
        ),
    ]
}

#[test]
fn the_micro_batch_decides_nothing() -> Result<()> {
    for (method, params) in searching() {
        let run = |micro_batch: usize| -> Result<Run> {
            let mut bed = Bed::new(reward(sum)).guided(4.0);
            bed.micro_batch = micro_batch;
            bed.run(method, params.clone(), 8)
        };
        let (one, eight) = (run(1)?, run(8)?);
        assert_eq!(one.latents(), eight.latents(), "{method} {params}");
        let decisions = |run: &Run| {
            let mut trace = run.outcome.trace.clone();
            // What was spent when an image was told of is by the micro-batch.
            let entries = trace.iter_mut().filter_map(Value::as_object_mut);
            entries.for_each(|entry| {
                entry.remove("spent");
            });
            trace
        };
        assert_eq!((one.spent, decisions(&one)), (eight.spent, decisions(&eight)));
    }
    Ok(())
}

/// A strictly increasing function of the reward chooses the same, where only ranks matter.
#[test]
fn ranks_are_enough_where_they_should_be() -> Result<()> {
    let by_rank = |method: &str, params: &Value| {
        !matches!(method, "demon" | "fk-steering" | "tree-search") && params["alpha"].is_null()
    };
    for (method, params) in searching().into_iter().filter(|(m, p)| by_rank(m, p)) {
        let base = Bed::new(reward(sum)).run(method, params.clone(), 6)?;
        let bent = Bed::new(reward(|x| (0.3 * sum(x)).exp())).run(method, params.clone(), 6)?;
        assert_eq!(base.latents(), bent.latents(), "{method} {params}");
    }
    Ok(())
}

/// Scale and offset of the reward decide nothing where it is measured by its own deviation.
#[test]
fn scales_are_enough_for_adaptive_methods() -> Result<()> {
    for (method, params) in [
        ("demon", json!({"candidates": 4, "points": 8, "look_ahead": 0})),
        ("fk-steering", json!({"particles": 5, "stops": 3, "potential": "diff"})),
        ("tree-search", json!({"evaluations": 40, "levels": [0, 2, 3]})),
    ] {
        let base = Bed::new(reward(sum)).run(method, params.clone(), 6)?;
        for (scale, offset) in [(1e4, 0.0), (1.0 / 1024.0, 0.0), (2.0, 64.0)] {
            let bed = Bed::new(reward(move |x| scale * sum(x) + offset));
            let run = bed.run(method, params.clone(), 6)?;
            let near = |(a, b): (&f32, &f32)| (a - b).abs() < 1e-3;
            let (found, expected) = (run.latents(), base.latents());
            assert!(found.iter().zip(&expected).all(near), "{method} {scale} {offset}");
        }
    }
    Ok(())
}

#[test]
fn a_constant_or_broken_reward_is_survived() -> Result<()> {
    for (method, params) in searching() {
        let constant = Bed::new(reward(|_| 0.7)).run(method, params.clone(), 5)?;
        assert!(constant.latents().iter().all(|v| v.is_finite()), "{method} {params}");
        assert_eq!(constant.outcome.score, 0.7);
        let broken = Bed::new(reward(|_| f64::NAN)).run(method, params.clone(), 5)?;
        assert_eq!(broken.latents(), constant.latents(), "{method} {params}");
        assert_eq!(broken.outcome.failed_scores, broken.spent.v);
        // A part that fails, at both ends of what there is.
        for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            let bed = Bed::new(reward(move |x| if sum(x) > 4.0 { bad } else { sum(x) }));
            let run = bed.run(method, params.clone(), 5)?;
            assert!(run.latents().iter().all(|v| v.is_finite()), "{method} {params}");
            assert!(run.outcome.curve.windows(2).all(|w| w[0].best < w[1].best));
        }
    }
    Ok(())
}
