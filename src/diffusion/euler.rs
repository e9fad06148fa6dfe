//! Euler steps of the probability-flow ODE in sigma coordinates (EulerDiscreteScheduler).

use candle_core::Tensor;

use super::config::PredictionType;
use super::grid::{Grid, grid};
use super::schedule::{Conversion, NoiseSchedule};
use super::solver::{Eval, History, Level, Model, Solver, SolverKind, Step, blend};
use crate::Result;

/// x = x0 + sigma n; the network sees x / sqrt(sigma^2 + 1).
#[derive(Clone, Debug)]
pub struct Euler {
    kind: PredictionType,
    grid: Grid,
}

impl Euler {
    /// # Errors
    /// `Error::Invalid` on `steps`.
    pub fn new(schedule: &NoiseSchedule, steps: usize, karras: bool) -> Result<Self> {
        let grid = grid(schedule, SolverKind::Euler, steps, karras)?;
        Ok(Self { kind: schedule.prediction_type(), grid })
    }

    pub fn sigmas(&self) -> &[f64] {
        &self.grid.sigmas
    }

    pub fn timesteps(&self) -> &[f64] {
        &self.grid.timesteps
    }
}

/// sqrt(abar) at a noise level: the scale from sigma coordinates to the network input.
pub(crate) fn input_scale(sigma: f64) -> f64 {
    1.0 / (sigma * sigma + 1.0).sqrt()
}

/// x0 from a state in sigma coordinates.
pub(crate) fn x0_at(
    kind: PredictionType,
    sigma: f64,
    x: &Tensor,
    output: &Tensor,
) -> Result<Tensor> {
    let abar = 1.0 / (sigma * sigma + 1.0);
    let to = Conversion::new(kind, abar);
    match kind {
        PredictionType::Epsilon => blend(1.0, x, -sigma, output),
        PredictionType::VPrediction => blend(to.x0_x * abar.sqrt(), x, to.x0_out, output),
        PredictionType::Sample => Ok(output.clone()),
    }
}

impl Solver for Euler {
    fn kind(&self) -> SolverKind {
        SolverKind::Euler
    }

    fn steps(&self) -> usize {
        self.grid.timesteps.len()
    }

    fn init_noise_sigma(&self) -> f64 {
        self.grid.init_noise_sigma
    }

    fn evals(&self, step: usize) -> Vec<Eval> {
        let input_scale = input_scale(self.grid.sigmas[step]);
        vec![Eval { t: self.grid.timesteps[step], input_scale }]
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
        let eval = self.evals(step)[0];
        let output = model(&x.affine(eval.input_scale, 0.0)?, &eval)?;
        let x0 = x0_at(self.kind, sigma, x, &output)?;
        // x + (next - sigma) (x - x0) / sigma without its cancellation at large sigma.
        let keep = next / sigma;
        Ok(Step { x: blend(keep, x, 1.0 - keep, &x0)?, x0 })
    }
}
