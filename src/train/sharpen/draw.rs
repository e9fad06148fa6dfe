//! Where the chains of an update start: every number a function of the run's seed, the update
//! and the group.

use rand::Rng;

use crate::diffusion::ddim::Ddim;
use crate::diffusion::noise::{NoiseKey, Purpose};
use crate::diffusion::schedule::NoiseSchedule;
use crate::train::settings::{Settings, TimestepMode};
use crate::{Error, Result};

/// A group's own randomness and timestep.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Start {
    /// Of the group's noise.
    pub key: NoiseKey,
    /// The timestep at which its chains start.
    pub t: f64,
    /// States of its chains: min(m, 1 + t / stride).
    pub states: usize,
}

/// The key of `group` in `update` of the run with this seed.
pub fn key(seed: u64, update: u64, group: u64) -> NoiseKey {
    NoiseKey::new(NoiseKey::new(seed).rng(Purpose::Training, update, group).random())
}

/// The starts of an update's groups.
///
/// # Errors
/// Names `t_min` where no timestep of the band is left.
pub fn starts(
    schedule: &NoiseSchedule,
    settings: &Settings,
    update: u64,
    groups: usize,
) -> Result<Vec<Start>> {
    let stride = stride(schedule, settings);
    let band = settings.t_min..=settings.t_max;
    let grid: Vec<f64> = match settings.timesteps {
        TimestepMode::Uniform => Vec::new(),
        TimestepMode::Grid => {
            let all = Ddim::new(schedule, settings.chain_steps, 0.0)?;
            all.timesteps().iter().copied().filter(|t| band.contains(&(*t as u32))).collect()
        }
    };
    if settings.timesteps == TimestepMode::Grid && grid.is_empty() {
        let message = format!("no timestep of {} steps lies in the band", settings.chain_steps);
        return Err(Error::invalid("t_min", message));
    }
    Ok((0..groups as u64)
        .map(|group| {
            let key = key(settings.seed, update, group);
            let mut rng = key.rng(Purpose::Training, 0, 0);
            let t = match settings.timesteps {
                TimestepMode::Uniform => f64::from(rng.random_range(band.clone())),
                TimestepMode::Grid => grid[rng.random_range(0..grid.len())],
            };
            Start { key, t, states: states(t, stride, settings.m) }
        })
        .collect())
}

/// Timesteps of a chain's step.
pub fn stride(schedule: &NoiseSchedule, settings: &Settings) -> f64 {
    (schedule.num_train_timesteps() / settings.chain_steps.max(1)) as f64
}

fn states(t: f64, stride: f64, m: usize) -> usize {
    m.min(1 + (t / stride) as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chains_end_where_the_schedule_does() {
        let at = [0.0, 39.0, 40.0, 79.0, 80.0, 961.0].map(|t| states(t, 40.0, 3));
        assert_eq!(at, [1, 1, 2, 2, 3, 3]);
    }
}
