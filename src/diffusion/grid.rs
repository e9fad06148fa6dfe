//! Which timesteps and noise levels a run of N steps visits, by diffusers' rules.

use super::config::TimestepSpacing;
use super::schedule::NoiseSchedule;
use super::solver::SolverKind;
use crate::{Error, Result};

/// Timesteps of the model evaluations, descending, and the noise levels of a run.
#[derive(Clone, Debug)]
pub struct Grid {
    /// One per step.
    pub timesteps: Vec<f64>,
    /// One per step and the final 0; empty for DDIM, which reads levels off the schedule.
    pub sigmas: Vec<f64>,
    /// Euler's and Heun's scale of the initial unit noise; 1 in VP coordinates.
    pub init_noise_sigma: f64,
}

/// The grid of `steps` steps for a solver. `karras`: Karras et al. 2022, eq. 5 with
/// rho 7 between the largest and smallest noise level (of the plain grid for Euler and
/// Heun, of the whole schedule for DPM++, as diffusers has it); ignored by DDIM.
///
/// # Errors
/// `Error::Invalid` on `steps` when the schedule cannot hold that many.
pub fn grid(
    schedule: &NoiseSchedule,
    kind: SolverKind,
    steps: usize,
    karras: bool,
) -> Result<Grid> {
    let timesteps = timesteps(schedule, kind, steps)?;
    if kind == SolverKind::Ddim {
        return Ok(Grid { timesteps, sigmas: Vec::new(), init_noise_sigma: 1.0 });
    }
    let last = (schedule.num_train_timesteps() - 1) as f64;
    let plain: Vec<f64> = timesteps.iter().map(|t| schedule.sigma_linear(*t)).collect();
    let (mut timesteps, mut sigmas) = (timesteps, plain);
    if karras {
        let (high, low) = match kind {
            SolverKind::DpmPp2m => (schedule.sigma(last), schedule.sigma(0.0)),
            _ => (sigmas[0], sigmas[steps - 1]),
        };
        let config = schedule.config();
        let high = config.sigma_max.unwrap_or(high);
        let low = config.sigma_min.unwrap_or(low);
        sigmas = karras_sigmas(high, low, steps);
        timesteps = sigmas.iter().map(|s| schedule.t_of_sigma(*s)).collect();
        if kind == SolverKind::DpmPp2m {
            timesteps.iter_mut().for_each(|t| *t = t.round_ties_even());
        }
    }
    let max = sigmas.iter().copied().fold(0.0, f64::max);
    let init_noise_sigma = match (kind, spacing(schedule, kind)) {
        (SolverKind::DpmPp2m, _) => 1.0,
        (_, TimestepSpacing::Leading) => (max * max + 1.0).sqrt(),
        _ => max,
    };
    sigmas.push(0.0);
    Ok(Grid { timesteps, sigmas, init_noise_sigma })
}

/// sigma_i = (smax^(1/7) + i/(n-1) (smin^(1/7) - smax^(1/7)))^7, i = 0..n.
pub fn karras_sigmas(sigma_max: f64, sigma_min: f64, n: usize) -> Vec<f64> {
    let (high, low) = (sigma_max.powf(1.0 / 7.0), sigma_min.powf(1.0 / 7.0));
    let ramp = |i: usize| if n > 1 { i as f64 / (n - 1) as f64 } else { 0.0 };
    (0..n).map(|i| (high + ramp(i) * (low - high)).powi(7)).collect()
}

fn spacing(schedule: &NoiseSchedule, kind: SolverKind) -> TimestepSpacing {
    let default = match kind {
        SolverKind::Ddim => TimestepSpacing::Leading,
        _ => TimestepSpacing::Linspace,
    };
    schedule.config().timestep_spacing.unwrap_or(default)
}

fn timesteps(schedule: &NoiseSchedule, kind: SolverKind, steps: usize) -> Result<Vec<f64>> {
    let train = schedule.num_train_timesteps();
    let spacing = spacing(schedule, kind);
    // DPM++ lays out one step more and drops the last for linspace and leading.
    let points = match kind {
        SolverKind::DpmPp2m if spacing != TimestepSpacing::Trailing => steps + 1,
        _ => steps,
    };
    if steps == 0 || points > train {
        let message = format!("{steps} does not lie in 1..={}", train - (points - steps));
        return Err(Error::invalid("steps", message));
    }
    let integers = matches!(kind, SolverKind::Ddim | SolverKind::DpmPp2m);
    let ascending = |value: &dyn Fn(usize) -> f64| -> Vec<f64> {
        (0..points).rev().take(steps).map(value).collect()
    };
    Ok(match spacing {
        TimestepSpacing::Leading => {
            let ratio = train / points;
            let offset = schedule.config().steps_offset;
            ascending(&|i| (i * ratio + offset) as f64)
        }
        TimestepSpacing::Linspace => {
            let gap = (train - 1) as f64 / (points - 1).max(1) as f64;
            ascending(&|i| {
                let t = i as f64 * gap;
                if integers { t.round_ties_even() } else { t }
            })
        }
        TimestepSpacing::Trailing => {
            // numpy's arange adds (start + step) - start, which decides the ties.
            let start = train as f64;
            let step = (start - start / steps as f64) - start;
            (0..steps).map(|i| (start + i as f64 * step).round_ties_even() - 1.0).collect()
        }
    })
}
