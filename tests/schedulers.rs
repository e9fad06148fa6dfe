//! The solvers against diffusers, step by step (tools/scheduler_fixtures.py).

use candle_core::{Device, Tensor};
use diffusion_sharpening::Result;
use diffusion_sharpening::diffusion::config::{SchedulerConfig, TimestepSpacing};
use diffusion_sharpening::diffusion::grid::grid;
use diffusion_sharpening::diffusion::schedule::NoiseSchedule;
use diffusion_sharpening::diffusion::solver::{Eval, History, SolverKind, SolverSpec};
use serde::Deserialize;

#[derive(Deserialize)]
struct Fixture {
    shape: [usize; 4],
    cases: Vec<Case>,
    grids: Vec<GridCase>,
}

#[derive(Deserialize)]
struct Case {
    name: String,
    config: SchedulerConfig,
    steps: usize,
    eta: f64,
    timesteps: Vec<f64>,
    sigmas: Vec<f64>,
    init_noise_sigma: f64,
    initial: Vec<f32>,
    noise: Vec<Vec<f32>>,
    latents: Vec<Vec<f32>>,
    x0: Vec<Vec<f32>>,
}

#[derive(Deserialize)]
struct GridCase {
    class: String,
    spacing: TimestepSpacing,
    steps: usize,
    timesteps: Vec<f64>,
}

fn fixture() -> Fixture {
    serde_json::from_str(include_str!("fixtures/schedulers.json")).unwrap()
}

/// Largest difference relative to the largest value.
fn distance(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    let scale = expected.iter().fold(0f32, |m, v| m.max(v.abs()));
    found.iter().zip(expected).fold(0f32, |m, (a, b)| m.max((a - b).abs())) / scale
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

fn check(case: &Case, shape: [usize; 4]) -> Result<()> {
    let name = &case.name;
    let schedule = NoiseSchedule::new(&case.config)?;
    let kind = case.config.default_solver();
    let spec = SolverSpec { eta: case.eta, ..SolverSpec::ode(kind, &schedule) };
    let solver = spec.build(&schedule, case.steps)?;

    // diffusers lists Heun's inner levels twice.
    let grid = grid(&schedule, kind, case.steps, spec.karras)?;
    let mut sigmas = case.sigmas.clone();
    sigmas.dedup();
    for (found, expected) in grid.sigmas.iter().zip(&sigmas) {
        assert!((found - expected).abs() <= 1e-5 * expected, "{name}: sigma {found} vs {expected}");
    }
    assert_eq!(grid.sigmas.len(), sigmas.len(), "{name}");
    let found: Vec<f64> =
        (0..case.steps).flat_map(|i| solver.evals(i)).map(|eval| eval.t).collect();
    assert_eq!(found.len(), case.timesteps.len(), "{name}");
    assert_eq!(found.len(), kind.evaluations(case.steps), "{name}");
    for (found, expected) in found.iter().zip(&case.timesteps) {
        assert!((found - expected).abs() < 2e-3, "{name}: timestep {found} vs {expected}");
    }
    let scale = solver.init_noise_sigma() / case.init_noise_sigma;
    assert!((scale - 1.0).abs() < 1e-5, "{name}");

    let tensor = |data: &[f32]| Tensor::from_slice(data, &shape, &Device::Cpu);
    let mut x = tensor(&case.initial)?.affine(solver.init_noise_sigma(), 0.0)?;
    let mut history = History::default();
    let mut model = |x: &Tensor, eval: &Eval| Ok(x.affine(0.1, 0.01 * eval.t / 1000.0)?);
    // diffusers reports latents per evaluation, Heun's intermediate points included.
    let mut row = 0;
    // From sigma 4096 to 3.5, diffusers subtracts nearly equal f32 numbers.
    let bound = if sigmas.first().is_some_and(|s| *s > 1e3) { 5e-4 } else { 1e-5 };
    for step in 0..case.steps {
        let noise = case.noise.get(step).map(|z| tensor(z)).transpose()?;
        let next = solver.advance(step, &x, &mut history, &mut model, noise.as_ref())?;
        if let Some(expected) = case.x0.get(row) {
            let error = distance(&values(&next.x0), expected);
            assert!(error < bound, "{name}: x0 of step {step} is off by {error}");
        }
        row += solver.evals(step).len();
        let error = distance(&values(&next.x), &case.latents[row - 1]);
        assert!(error < bound, "{name}: step {step} is off by {error}");
        x = next.x;
    }
    Ok(())
}

#[test]
fn trajectories_equal_diffusers() -> Result<()> {
    let fixture = fixture();
    for case in &fixture.cases {
        check(case, fixture.shape)?;
    }
    Ok(())
}

#[test]
fn timestep_grids_equal_diffusers() -> Result<()> {
    for case in &fixture().grids {
        let config = SchedulerConfig {
            class_name: Some(case.class.clone()),
            timestep_spacing: Some(case.spacing),
            ..SchedulerConfig::sdxl()
        };
        let schedule = NoiseSchedule::new(&config)?;
        let found = grid(&schedule, config.default_solver(), case.steps, false)?.timesteps;
        assert_eq!(found.len(), case.timesteps.len());
        for (found, expected) in found.iter().zip(&case.timesteps) {
            let what = format!("{} {:?} {}", case.class, case.spacing, case.steps);
            assert!((found - expected).abs() < 1e-4, "{what}: {found} vs {expected}");
        }
    }
    Ok(())
}

#[test]
fn the_published_grids() -> Result<()> {
    let schedule = NoiseSchedule::sdxl()?;
    for (steps, first, stride) in [(50, 981.0, 20.0), (25, 961.0, 40.0), (20, 951.0, 50.0)] {
        let found = grid(&schedule, SolverKind::Ddim, steps, false)?.timesteps;
        let expected: Vec<f64> = (0..steps).map(|i| first - stride * i as f64).collect();
        assert_eq!(found, expected);
    }
    for (kind, most) in [(SolverKind::Ddim, 1000), (SolverKind::DpmPp2m, 999)] {
        assert!(grid(&schedule, kind, most, false).is_ok());
        let message = grid(&schedule, kind, most + 1, false).unwrap_err().to_string();
        assert!(message.starts_with("steps: "), "{message}");
        assert!(grid(&schedule, kind, 0, false).is_err());
    }
    let stochastic = SolverSpec { eta: 0.5, ..SolverSpec::ode(SolverKind::Heun, &schedule) };
    assert!(stochastic.build(&schedule, 5).is_err());
    Ok(())
}
