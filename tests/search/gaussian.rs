//! Samplers against the closed forms of Gaussian data (spec search 12.4).

use crate::bed::{Bed, reward, sum};
use diffusion_sharpening::Result;
use diffusion_sharpening::diffusion::gmm::GaussianMixture;
use diffusion_sharpening::diffusion::noise::{NoiseKey, Purpose};
use diffusion_sharpening::diffusion::solver::{SolverKind, SolverSpec};
use serde_json::json;

const MEAN: f64 = 0.4;
const STD: f64 = 1.3;

fn bed(d: usize, steps: usize) -> Bed {
    let mut bed =
        Bed::with(vec![GaussianMixture::single(vec![MEAN; d], STD)], (1, 1, d), reward(sum));
    bed.steps = steps;
    bed
}

/// (mean, standard deviation) per coordinate of the final VP latent of DDIM(eta), from the
/// affine step in sigma coordinates: x' = D + sqrt(s'^2 - up^2) e + up z.
fn ddim_law(bed: &Bed, eta: f64) -> (f64, f64) {
    let stride = (1000 / bed.steps) as f64;
    let abar = |t: f64| bed.schedule.abar(t.max(0.0));
    let mut t = (bed.steps - 1) as f64 * stride + 1.0;
    let (mut mean, mut var) = (0.0, 1.0 / abar(t));
    while t > 0.0 {
        let sigma = |t: f64| ((1.0 - abar(t)) / abar(t)).sqrt();
        let (now, next) = (sigma(t), sigma(t - stride));
        let kappa = STD * STD / (STD * STD + now * now);
        let up = eta * next * ((now * now - next * next) / (now * now)).sqrt();
        let along = (next * next - up * up).sqrt() / now;
        // D = m + kappa (x - m); e = (x - D) / sigma
        let slope = kappa + along * (1.0 - kappa);
        mean = MEAN + slope * (mean - MEAN);
        var = slope * slope * var + up * up;
        t -= stride;
    }
    let alpha = bed.schedule.final_abar().sqrt();
    (mean * alpha, var.sqrt() * alpha)
}

#[test]
fn ddim_follows_the_law_of_its_discretised_chain() -> Result<()> {
    for kernel in ["ode", "sde"] {
        let bed = bed(4096, 20);
        let (mean, std) = ddim_law(&bed, if kernel == "sde" { 1.0 } else { 0.0 });
        let mut values = Vec::new();
        for seed in 0..12 {
            values.extend(bed.run("plain", json!({"kernel": kernel}), seed)?.latents());
        }
        let n = values.len() as f64;
        let found = values.iter().map(|v| f64::from(*v)).sum::<f64>() / n;
        let var = values.iter().map(|v| (f64::from(*v) - found).powi(2)).sum::<f64>() / n;
        let error = std / n.sqrt();
        assert!((found - mean).abs() < 4.0 * error, "{kernel}: mean {found} is not {mean}");
        assert!(
            (var.sqrt() - std).abs() < 4.0 * error,
            "{kernel}: std {} is not {std}",
            var.sqrt()
        );
    }
    Ok(())
}

#[test]
fn heun_is_second_order() -> Result<()> {
    // The last step is x0 = D(x, sigma_min) in closed form; the others solve the ODE.
    let error = |kind: SolverKind, steps: usize| -> Result<f64> {
        let mut bed = bed(64, steps);
        bed.solver = SolverSpec { kind, eta: 0.0, karras: true };
        let solver = bed.solver.build(&bed.schedule, steps)?;
        let (high, low) = (solver.level(0).sigma, solver.level(steps - 1).sigma);
        let shrink = ((STD * STD + low * low) / (STD * STD + high * high)).sqrt();
        let shrink = shrink * STD * STD / (STD * STD + low * low);
        let start =
            NoiseKey::new(2).normal(Purpose::InitialLatent, 0, 0, 64, &candle_core::Device::Cpu)?;
        let start = start.affine(solver.init_noise_sigma(), 0.0)?.to_vec1::<f32>()?;
        let found = bed.run("plain", json!({}), 2)?.latents();
        let errors = start.iter().zip(found).map(|(start, found)| {
            let exact = MEAN + (f64::from(*start) - MEAN) * shrink;
            (f64::from(found) - exact).powi(2)
        });
        Ok(errors.sum::<f64>().sqrt())
    };
    let schedule = bed(1, 2).schedule;
    assert!((schedule.sigma(999.0) - 14.61).abs() < 0.01);
    for (kind, low, high) in [(SolverKind::Heun, 3.2, 5.2), (SolverKind::Euler, 1.6, 2.5)] {
        let ratio = error(kind, 16)? / error(kind, 32)?;
        assert!(low < ratio && ratio < high, "{kind:?}: the error fell {ratio} times");
    }
    assert!(error(SolverKind::Heun, 32)? < 0.1 * error(SolverKind::Euler, 32)?);
    Ok(())
}

#[test]
fn best_of_n_reaches_the_expected_maximum() -> Result<()> {
    let (d, steps, seeds) = (16, 6, 500);
    let bed = bed(d, steps);
    let (mean, std) = ddim_law(&bed, 0.0);
    let root = (d as f64).sqrt();
    for (n, maximum) in [(2, 0.5642), (8, 1.4237)] {
        let mut total = 0.0;
        for seed in 0..seeds {
            total += bed.run("best-of-n", json!({"candidates": n}), seed)?.outcome.score;
        }
        let found = total / seeds as f64;
        let expected = d as f64 * mean + std * root * maximum;
        let tolerance = 4.0 * std * root / (seeds as f64).sqrt();
        assert!((found - expected).abs() < tolerance, "N={n}: {found} is not {expected}");
    }
    Ok(())
}
