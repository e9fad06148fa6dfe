//! Heun's method for the probability-flow ODE (HeunDiscreteScheduler, without churn).

use candle_core::Tensor;

use super::config::PredictionType;
use super::euler::{input_scale, x0_at};
use super::grid::{Grid, grid};
use super::schedule::NoiseSchedule;
use super::solver::{Eval, History, Level, Model, Solver, SolverKind, Step, blend};
use crate::Result;

/// x = x0 + sigma n. Two evaluations a step, one in the last (an Euler step to sigma 0).
#[derive(Clone, Debug)]
pub struct Heun {
    kind: PredictionType,
    grid: Grid,
}

impl Heun {
    /// # Errors
    /// `Error::Invalid` on `steps`.
    pub fn new(schedule: &NoiseSchedule, steps: usize, karras: bool) -> Result<Self> {
        let grid = grid(schedule, SolverKind::Heun, steps, karras)?;
        Ok(Self { kind: schedule.prediction_type(), grid })
    }

    pub fn sigmas(&self) -> &[f64] {
        &self.grid.sigmas
    }
}

impl Solver for Heun {
    fn kind(&self) -> SolverKind {
        SolverKind::Heun
    }

    fn steps(&self) -> usize {
        self.grid.timesteps.len()
    }

    fn init_noise_sigma(&self) -> f64 {
        self.grid.init_noise_sigma
    }

    fn evals(&self, step: usize) -> Vec<Eval> {
        let at = |i: usize| Eval {
            t: self.grid.timesteps[i],
            input_scale: input_scale(self.grid.sigmas[i]),
        };
        let second = (step + 1 < self.steps()).then(|| at(step + 1));
        std::iter::once(at(step)).chain(second).collect()
    }

    fn level(&self, step: usize) -> Level {
        Level { sigma: self.grid.sigmas[step], scale: 1.0 }
    }

    fn advance(
        &self,
        step: usize,
        x: &Tensor,
        _history: &mut History,
        model: &mut Model,
        _noise: Option<&Tensor>,
    ) -> Result<Step> {
        let (sigma, next) = (self.grid.sigmas[step], self.grid.sigmas[step + 1]);
        let evals = self.evals(step);
        let output = model(&x.affine(evals[0].input_scale, 0.0)?, &evals[0])?;
        let x0 = x0_at(self.kind, sigma, x, &output)?;
        let slope = ((x - &x0)? / sigma)?;
        let ahead = blend(1.0, x, next - sigma, &slope)?;
        let Some(eval) = evals.get(1) else {
            return Ok(Step { x: ahead, x0 });
        };
        let output = model(&ahead.affine(eval.input_scale, 0.0)?, eval)?;
        let slope_ahead = ((&ahead - x0_at(self.kind, next, &ahead, &output)?)? / next)?;
        let slope = blend(0.5, &slope, 0.5, &slope_ahead)?;
        Ok(Step { x: blend(1.0, x, next - sigma, &slope)?, x0 })
    }
}
