//! Searches against the closed forms of Gaussian data and a linear reward (spec search 12.4).

use crate::bed::{Bed, reward, sum};
use diffusion_sharpening::Result;
use diffusion_sharpening::diffusion::gmm::GaussianMixture;
use diffusion_sharpening::diffusion::noise::{NoiseKey, Purpose};
use serde_json::{Value, json};

const MEAN: f64 = 0.4;
const STD: f64 = 1.3;

fn bed(d: usize, steps: usize) -> Bed {
    let gaussian = GaussianMixture::single(vec![MEAN; d], STD);
    let mut bed = Bed::with(vec![gaussian], (1, 1, d), reward(sum));
    bed.steps = steps;
    bed
}

/// DDIM on this Gaussian is affine in VP coordinates: every step multiplies the distance from
/// its mean by a slope and adds noise.
struct Chain {
    slopes: Vec<f64>,
    stds: Vec<f64>,
    /// The first state's, and the last's.
    mean: f64,
    std: f64,
}

fn chain(bed: &Bed, eta: f64) -> Chain {
    let stride = (1000 / bed.steps) as f64;
    let abar = |t: f64| bed.schedule.abar_or_final(t);
    let mut t = (bed.steps - 1) as f64 * stride + 1.0;
    let (mut mean, mut var) = (0.0, 1.0);
    let (mut slopes, mut stds) = (Vec::new(), Vec::new());
    while t > 0.0 {
        let (a, p) = (abar(t), abar(t - stride));
        let up = eta * ((1.0 - p) / (1.0 - a)).sqrt() * (1.0 - a / p).sqrt();
        let along = (1.0 - p - up * up).sqrt();
        // x0 = MEAN + kappa (x/sqrt(a) - MEAN), eps = (x - sqrt(a) x0) / sqrt(1 - a).
        let kappa = STD * STD / (STD * STD + (1.0 - a) / a);
        let slope = p.sqrt() * kappa / a.sqrt() + along * (1.0 - kappa) / (1.0 - a).sqrt();
        mean = p.sqrt() * MEAN + slope * (mean - a.sqrt() * MEAN);
        var = slope * slope * var + up * up;
        slopes.push(slope);
        stds.push(up);
        t -= stride;
    }
    Chain { slopes, stds, mean, std: var.sqrt() }
}

/// Mean and standard error of a number of runs of a method.
fn mean_of(
    bed: &Bed,
    method: &str,
    params: &Value,
    runs: u64,
    of: impl Fn(&crate::bed::Run) -> f64,
) -> Result<(f64, f64)> {
    let mut values = Vec::new();
    for seed in 0..runs {
        values.push(of(&bed.run(method, params.clone(), seed)?));
    }
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let var = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (n - 1.0);
    Ok((mean, (var / n).sqrt()))
}

fn near(found: (f64, f64), expected: f64, what: &str) {
    let (mean, error) = found;
    assert!((mean - expected).abs() < 4.0 * error, "{what}: {mean} ± {error} is not {expected}");
}

#[test]
fn guided_steps_gain_the_expected_maximum_each() -> Result<()> {
    let (d, steps) = (9, 6);
    let bed = bed(d, steps);
    let law = chain(&bed, 1.0);
    let root = (d as f64).sqrt();
    for (n, maximum) in [(2, 0.5642), (4, 1.0294)] {
        for guided in [2, steps - 1, steps] {
            // What a step's noise gains along the reward is what is left of it in the end.
            let left = |step: usize| law.slopes[step + 1..].iter().product::<f64>();
            let gain: f64 = (0..guided).map(|s| law.stds[s] * left(s) * maximum).sum();
            let expected = d as f64 * law.mean + root * gain;
            let params = json!({"children": n, "guided_steps": guided});
            let found = mean_of(&bed, "free2guide", &params, 400, |run| run.outcome.score)?;
            near(found, expected, &format!("{n} children at {guided} steps"));
        }
    }
    Ok(())
}

#[test]
fn a_zero_order_pivot_climbs_as_far_as_its_neighbours_let_it() -> Result<()> {
    let (d, cosine) = (256, 0.8f64);
    let bed = bed(d, 3);
    let law = chain(&bed, 0.0);
    let scale = law.std * (d as f64).sqrt();
    for (n, maximum) in [(2, 0.5642), (4, 1.0294)] {
        let saturated = maximum * ((1.0 + cosine) / (1.0 - cosine)).sqrt();
        for rounds in [1, 4, 20] {
            let expected = saturated * (1.0 - cosine.powi(rounds));
            let params = json!({"neighbors": n, "cosine": cosine, "rounds": rounds});
            let found = mean_of(&bed, "zero-order", &params, 150, |run| {
                let last = run.outcome.trace.iter().rev().find_map(|e| e["value"].as_f64());
                (last.unwrap() - d as f64 * law.mean) / scale
            })?;
            let tolerance = 4.0 * found.1 + 0.02;
            assert!((found.0 - expected).abs() < tolerance, "{n} {rounds}: {found:?} {expected}");
        }
    }
    Ok(())
}

/// With elitism the best never gets worse, and more rounds find better.
#[test]
fn a_pivot_that_is_kept_never_falls() -> Result<()> {
    let bed = bed(64, 3);
    let mut before = f64::NEG_INFINITY;
    for rounds in [0, 1, 2, 5, 10] {
        let params = json!({"elitism": "keep-pivot", "rounds": rounds});
        let score = bed.run("zero-order", params, 3)?.outcome.score;
        assert!(score >= before);
        before = score;
    }
    Ok(())
}

/// E[Z] = E[exp(lambda r)] over the chain's own law, whatever was resampled.
#[test]
fn particles_estimate_the_tilt_without_bias() -> Result<()> {
    let (steps, lambda) = (8, 0.4);
    let bed = bed(1, steps);
    let law = chain(&bed, 1.0);
    let expected = (lambda * law.mean + 0.5 * (lambda * law.std).powi(2)).exp();
    for (potential, ess, resampler) in [
        ("diff", 1.0, "systematic"),
        ("diff", 0.5, "multinomial"),
        ("max", 0.9, "systematic"),
        ("sum", 0.9, "systematic"),
    ] {
        let params = json!({
            "particles": 16, "lambda": lambda, "potential": potential, "ess": ess,
            "resampler": resampler, "stops": 3,
        });
        let found = mean_of(&bed, "fk-steering", &params, 500, |run| {
            run.outcome.trace.iter().find_map(|e| e["log_z"].as_f64()).unwrap().exp()
        })?;
        near(found, expected, potential);
    }
    Ok(())
}

/// Without noise between its legs a path is the probability-flow ODE on one grid.
#[test]
fn a_path_that_never_goes_back_follows_the_ode() -> Result<()> {
    let d = 32;
    let error = |steps: usize| -> Result<f64> {
        let bed = bed(d, steps);
        let params = json!({"paths": 1, "branches": 1, "forward": 0.0, "backward": 0.03});
        let found = bed.run("paths", params, 5)?.latents();
        let top = bed.schedule.sigma(999.0);
        let start =
            NoiseKey::new(5).normal(Purpose::InitialLatent, 0, 0, d, &candle_core::Device::Cpu)?;
        let start = start.affine((top * top + 1.0).sqrt(), 0.0)?.to_vec1::<f32>()?;
        let exact = |x: f32| MEAN + (f64::from(x) - MEAN) * STD / (STD * STD + top * top).sqrt();
        let errors = start.iter().zip(found).map(|(x, f)| (f64::from(f) - exact(*x)).powi(2));
        Ok((errors.sum::<f64>() / d as f64).sqrt())
    };
    let (coarse, fine) = (error(25)?, error(100)?);
    assert!(fine < 0.03 && fine < 0.4 * coarse, "{coarse} {fine}");
    Ok(())
}

/// Demon's noise moves along the reward: the more candidates, the further.
#[test]
fn demon_gains_with_candidates() -> Result<()> {
    let bed = bed(64, 5);
    let scores = [1, 4, 16].map(|k| {
        let params = json!({"candidates": k, "points": 16, "look_ahead": 0, "beta": 0.3});
        mean_of(&bed, "demon", &params, 12, |run| run.outcome.score)
    });
    let [one, four, sixteen] = scores;
    let ((one, e), (four, _), (sixteen, _)) = (one?, four?, sixteen?);
    assert!(four > one + 2.0 * e && sixteen > four + 2.0 * e, "{one} {four} {sixteen}");
    Ok(())
}

/// At equal cost a search whose reward is linear beats best-of-N of the same kernel.
#[test]
fn evolution_and_trees_beat_independent_samples_on_a_linear_reward() -> Result<()> {
    let mut bed = bed(64, 10);
    bed.budget.f = Some(400);
    let found = ["best-of-n", "evo-search", "tree-search"].map(|method| {
        let params = match method {
            "best-of-n" => json!({"kernel": "sde"}),
            _ => json!({}),
        };
        mean_of(&bed, method, &params, 150, |run| run.outcome.score)
    });
    let [best, evolved, tree] = found;
    let (best, evolved, tree) = (best?, evolved?, tree?);
    assert!(evolved.0 > best.0 + 2.0 * best.1, "{evolved:?} {best:?}");
    assert!(tree.0 > best.0 + 2.0 * best.1, "{tree:?} {best:?}");
    Ok(())
}
