//! Trajectories as searches use them: interrupted, resumed and mixed.

use candle_core::Tensor;
use diffusion_sharpening::diffusion::cost::{Budget, Units};
use diffusion_sharpening::diffusion::denoiser::Conditioning;
use diffusion_sharpening::diffusion::meter::{Meter, MeteredDenoiser};
use diffusion_sharpening::diffusion::noise::NoiseKey;
use diffusion_sharpening::diffusion::solver::{SolverKind, SolverSpec};
use diffusion_sharpening::diffusion::trajectory::{Row, State, Trajectory};
use diffusion_sharpening::{Error, Result};

use crate::bed::{Bed, reward, sum};

const STEPS: usize = 6;

fn values(x: &Tensor) -> Vec<f32> {
    x.flatten_all().unwrap().to_vec1().unwrap()
}

fn specs(bed: &Bed) -> Vec<SolverSpec> {
    let odes = SolverKind::ALL.map(|kind| SolverSpec::ode(kind, &bed.schedule));
    odes.into_iter().chain([SolverSpec::sde()]).collect()
}

/// Runs `rows`, stopping and resuming after each of `stops`; the final latents and the
/// clean-image estimate of every step.
fn run(bed: &Bed, spec: SolverSpec, rows: &[Row], stops: &[usize]) -> Result<Vec<Vec<f32>>> {
    let meter = Meter::new(Budget::default());
    let solver = spec.build(&bed.schedule, STEPS)?;
    let trajectory = Trajectory {
        solver: solver.as_ref(),
        denoiser: MeteredDenoiser::new(&bed.model, &meter),
        micro_batch: 2,
        cancel: &bed.cancel,
    };
    let noise = trajectory.initial_noise(rows, bed.shape)?;
    let mut state = State::start(solver.as_ref(), &noise)?;
    let mut seen = Vec::new();
    for stop in stops.iter().copied().chain([STEPS]) {
        state = trajectory.run(state, stop, rows, &mut |report| {
            seen.push(values(report.x0));
            Ok(())
        })?;
    }
    assert_eq!(meter.spent().f, trajectory.cost(0, STEPS, rows));
    assert_eq!(seen.len(), STEPS);
    seen.push(values(&state.x));
    Ok(seen)
}

#[test]
fn a_resumed_run_is_the_whole_run() -> Result<()> {
    let bed = Bed::new(reward(sum)).guided(2.0);
    let row = |candidate| Row { key: NoiseKey::new(1), candidate, cond: &bed.cond };
    let rows = [row(0), row(1), row(2)];
    for spec in specs(&bed) {
        let whole = run(&bed, spec, &rows, &[])?;
        assert_eq!(whole, run(&bed, spec, &rows, &[1, 4])?, "{spec:?}");
    }
    Ok(())
}

#[test]
fn rows_of_different_requests_do_not_mix() -> Result<()> {
    let bed = Bed::new(reward(sum)).guided(2.0);
    let conds = [
        bed.cond.clone(),
        Conditioning { guidance_scale: 7.0, guidance_rescale: 0.7, ..bed.cond.clone() },
        Conditioning::plain(bed.cond.positive.clone()),
    ];
    for spec in specs(&bed) {
        let row = |i: usize| {
            let (key, candidate) = (NoiseKey::new(10 + i as u64), i as u64 % 2);
            Row { key, candidate, cond: &conds[i] }
        };
        let together = run(&bed, spec, &[row(0), row(1), row(2)], &[])?;
        let size = bed.shape.0 * bed.shape.1 * bed.shape.2;
        for i in 0..3 {
            for (all, one) in together.iter().zip(run(&bed, spec, &[row(i)], &[])?) {
                assert_eq!(all[i * size..(i + 1) * size], one, "{spec:?} row {i}");
            }
        }
    }
    Ok(())
}

#[test]
fn a_stretch_that_does_not_fit_is_refused_whole() -> Result<()> {
    let bed = Bed::new(reward(sum));
    let meter = Meter::new(Budget { f: Some(5), ..Budget::default() });
    let solver = bed.solver.build(&bed.schedule, STEPS)?;
    let trajectory = Trajectory {
        solver: solver.as_ref(),
        denoiser: MeteredDenoiser::new(&bed.model, &meter),
        micro_batch: 1,
        cancel: &bed.cancel,
    };
    let rows = [Row { key: NoiseKey::new(0), candidate: 0, cond: &bed.cond }];
    let state = State::start(solver.as_ref(), &trajectory.initial_noise(&rows, bed.shape)?)?;
    let refused = trajectory.run(state.clone(), STEPS, &rows, &mut |_| Ok(()));
    assert!(matches!(refused, Err(Error::Budget(_))));
    assert_eq!((bed.rows_run(), meter.spent()), (0, Units::default()));
    let part = trajectory.run(state, 5, &rows, &mut |_| Ok(()))?;
    assert_eq!((part.step, meter.spent().f), (5, 5));
    Ok(())
}
