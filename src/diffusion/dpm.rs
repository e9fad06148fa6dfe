//! DPM-Solver++(2M), midpoint (Lu et al. 2022, alg. 2; DPMSolverMultistepScheduler).

use candle_core::Tensor;

use super::grid::{Grid, grid};
use super::schedule::{NoiseSchedule, x0_eps_at};
use super::solver::{Eval, History, Level, Model, Solver, SolverKind, Step, blend};
use crate::{Result, diffusion::config::PredictionType};

/// VP coordinates. First order in the first step and in the last, which goes to sigma 0.
#[derive(Clone, Debug)]
pub struct DpmPp2m {
    kind: PredictionType,
    grid: Grid,
}

impl DpmPp2m {
    /// # Errors
    /// `Error::Invalid` on `steps`.
    pub fn new(schedule: &NoiseSchedule, steps: usize, karras: bool) -> Result<Self> {
        let grid = grid(schedule, SolverKind::DpmPp2m, steps, karras)?;
        Ok(Self { kind: schedule.prediction_type(), grid })
    }

    pub fn sigmas(&self) -> &[f64] {
        &self.grid.sigmas
    }

    fn abar(&self, step: usize) -> f64 {
        1.0 / (1.0 + self.grid.sigmas[step].powi(2))
    }
}

impl Solver for DpmPp2m {
    fn kind(&self) -> SolverKind {
        SolverKind::DpmPp2m
    }

    fn steps(&self) -> usize {
        self.grid.timesteps.len()
    }

    fn init_noise_sigma(&self) -> f64 {
        self.grid.init_noise_sigma
    }

    fn evals(&self, step: usize) -> Vec<Eval> {
        vec![Eval { t: self.grid.timesteps[step], input_scale: 1.0 }]
    }

    fn level(&self, step: usize) -> Level {
        Level::vp(self.abar(step))
    }

    fn advance(
        &self,
        step: usize,
        x: &Tensor,
        history: &mut History,
        model: &mut Model,
        _noise: Option<&Tensor>,
    ) -> Result<Step> {
        let (sigma, next) = (self.grid.sigmas[step], self.grid.sigmas[step + 1]);
        let output = model(x, &self.evals(step)[0])?;
        let rows = vec![self.abar(step); x.dim(0)?];
        let (x0, _) = x0_eps_at(self.kind, x, &output, &rows)?;
        let previous = history.previous_x0.replace(x0.clone());
        // lambda = -ln sigma; exp(-h) = next / sigma, and alpha' is 1 at sigma' = 0.
        let data = match (previous, step.checked_sub(1)) {
            (Some(previous), Some(before)) if next > 0.0 => {
                let h = (sigma / next).ln();
                let h_before = (self.grid.sigmas[before] / sigma).ln();
                let half_over_r = 0.5 * h / h_before;
                blend(1.0 + half_over_r, &x0, -half_over_r, &previous)?
            }
            _ => x0.clone(),
        };
        let (alpha, alpha_next) = (self.abar(step).sqrt(), self.abar(step + 1).sqrt());
        let keep = (alpha_next * next) / (alpha * sigma);
        Ok(Step { x: blend(keep, x, alpha_next * (1.0 - next / sigma), &data)?, x0 })
    }
}
