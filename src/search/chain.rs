//! DDIM one step at a time, so that a search can choose between ways to go on.

use candle_core::Tensor;

use super::env::SearchEnv;
use crate::Result;
use crate::diffusion::ddim::Ddim;
use crate::diffusion::noise::{NoiseKey, Purpose};
use crate::diffusion::schedule::NoiseSchedule;
use crate::diffusion::solver::Solver;

/// A DDIM sampler. Its states are latents [B, C, h, w] in VP coordinates; the state before step 0
/// is unit noise, that after the last is finished.
#[derive(Clone, Debug)]
pub struct Chain {
    ddim: Ddim,
    stds: Vec<f64>,
}

/// What one evaluation at a state tells.
#[derive(Clone, Debug)]
pub struct Ahead {
    /// Clean-image estimate (Tweedie), [B, C, h, w].
    pub x0: Tensor,
    /// Mean of the next state, [B, C, h, w].
    pub mean: Tensor,
}

impl Ahead {
    /// One row of the batch, kept as a batch of one.
    ///
    /// # Errors
    /// When there is no such row.
    pub fn row(&self, row: usize) -> Result<Self> {
        Ok(Self { x0: self.x0.narrow(0, row, 1)?, mean: self.mean.narrow(0, row, 1)? })
    }

    /// These rows, in this order.
    ///
    /// # Errors
    /// When there is no such row.
    pub fn rows(&self, rows: &[usize]) -> Result<Self> {
        Ok(Self { x0: pick(&self.x0, rows)?, mean: pick(&self.mean, rows)? })
    }
}

/// Rows of a batch, in this order.
///
/// # Errors
/// When there is no such row.
pub fn pick(x: &Tensor, rows: &[usize]) -> Result<Tensor> {
    let rows = rows.iter().map(|row| x.narrow(0, *row, 1)).collect::<candle_core::Result<Vec<_>>>();
    Ok(Tensor::cat(&rows?, 0)?)
}

/// A batch of one, `count` times.
///
/// # Errors
/// When memory runs out.
pub fn repeat(x: &Tensor, count: usize) -> Result<Tensor> {
    pick(x, &vec![0; count])
}

impl Chain {
    /// # Errors
    /// `Error::Invalid` on `steps`.
    pub fn new(schedule: &NoiseSchedule, steps: usize, eta: f64) -> Result<Self> {
        let ddim = Ddim::new(schedule, steps, eta)?;
        let stds = (0..steps).map(|step| ddim.noise_std(step)).collect();
        Ok(Self { ddim, stds })
    }

    pub fn steps(&self) -> usize {
        self.stds.len()
    }

    /// The steps at which children of a state differ.
    pub fn branching(&self) -> Vec<usize> {
        (0..self.steps()).filter(|step| self.branches(*step)).collect()
    }

    /// Whether the children of a state before `step` differ.
    fn branches(&self, step: usize) -> bool {
        self.stds[step] > 0.0
    }

    /// Standard deviation of the noise that `step` adds.
    pub fn std(&self, step: usize) -> f64 {
        self.stds[step]
    }

    /// sqrt(abar) of the state before `step`; `steps()` asks for the end.
    pub fn alpha(&self, step: usize) -> f64 {
        self.ddim.level(step).scale
    }

    /// Evaluates states `x` before `step`: one evaluation a row.
    ///
    /// # Errors
    /// `Error::Budget` before running, `Error::Cancelled`, the model's.
    pub fn look(&self, env: &SearchEnv, x: &Tensor, step: usize) -> Result<Ahead> {
        let output = env.evaluate(x, self.ddim.timesteps()[step])?;
        let transition = self.ddim.transition(step, x.dim(0)?)?;
        let (x0, eps) = transition.x0_eps(x, &output)?;
        let mean = transition.mean(&x0, &eps)?;
        Ok(Ahead { x0, mean })
    }

    /// The states after `step`: the means with unit noise of their shape.
    ///
    /// # Errors
    /// When shapes disagree.
    pub fn advance(&self, step: usize, mean: &Tensor, noise: &Tensor) -> Result<Tensor> {
        if !self.branches(step) {
            return Ok(mean.clone());
        }
        self.ddim.transition(step, mean.dim(0)?)?.add_noise(mean, noise)
    }

    /// The solver's own noise of `step` for the candidates, [candidates, C, h, w].
    ///
    /// # Errors
    /// When memory runs out.
    pub fn noise(
        &self,
        env: &SearchEnv,
        key: &NoiseKey,
        step: usize,
        candidates: &[u64],
    ) -> Result<Tensor> {
        let device = env.denoiser.device();
        key.normal_rows(Purpose::SolverNoise, step as u64, candidates, env.latent_shape, device)
    }
}
