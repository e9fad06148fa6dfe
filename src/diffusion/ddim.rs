//! DDIM (Song et al. 2021, eq. 12) at any eta, in VP coordinates, with a timestep per sample.

use candle_core::Tensor;

use super::config::PredictionType;
use super::grid::grid;
use super::schedule::{NoiseSchedule, column, x0_eps_at};
use super::solver::{Eval, History, Level, Model, Solver, SolverKind, Step};
use crate::{Error, Result};

/// The transition from noise level abar_t to abar_p for each sample of a batch:
/// mean = sqrt(abar_p) x0 + sqrt(1 - abar_p - std^2) eps,
/// std = eta sqrt((1-abar_p)/(1-abar_t)) sqrt(1 - abar_t/abar_p).
/// At eta 1 it is the DDPM posterior. Differentiable in the network output.
#[derive(Clone, Debug)]
pub struct Transition {
    kind: PredictionType,
    abar: Vec<f64>,
    abar_prev: Vec<f64>,
    std: Vec<f64>,
}

impl Transition {
    /// `prev` below 0 stands for the end of the trajectory (`NoiseSchedule::final_abar`).
    ///
    /// # Errors
    /// `Error::Invalid` when `t` and `prev` differ in length.
    pub fn new(schedule: &NoiseSchedule, t: &[f64], prev: &[f64], eta: f64) -> Result<Self> {
        if t.len() != prev.len() {
            return Err(Error::invalid("timesteps", "as many previous ones as current ones"));
        }
        let abar: Vec<f64> = t.iter().map(|t| schedule.abar(*t)).collect();
        let abar_prev: Vec<f64> = prev.iter().map(|p| schedule.abar_or_final(*p)).collect();
        let std = abar.iter().zip(&abar_prev).map(|(a, p)| ddim_std(*a, *p, eta)).collect();
        Ok(Self { kind: schedule.prediction_type(), abar, abar_prev, std })
    }

    /// (x0, eps) from state `x` [B, ...] and network output [B, ...].
    ///
    /// # Errors
    /// When shapes disagree.
    pub fn x0_eps(&self, x: &Tensor, output: &Tensor) -> Result<(Tensor, Tensor)> {
        x0_eps_at(self.kind, x, output, &self.abar)
    }

    /// Mean of the next state, [B, ...].
    ///
    /// # Errors
    /// When shapes disagree.
    pub fn mean(&self, x0: &Tensor, eps: &Tensor) -> Result<Tensor> {
        let alpha: Vec<f64> = self.abar_prev.iter().map(|p| p.sqrt()).collect();
        let direction = self.abar_prev.iter().zip(&self.std);
        let direction: Vec<f64> =
            direction.map(|(p, s)| (1.0 - p - s * s).max(0.0).sqrt()).collect();
        Ok((x0.broadcast_mul(&column(&alpha, x0)?)?
            + eps.broadcast_mul(&column(&direction, eps)?)?)?)
    }

    /// Standard deviation of the next state per sample.
    pub fn std(&self) -> &[f64] {
        &self.std
    }

    /// mean + std * noise, [B, ...].
    ///
    /// # Errors
    /// When shapes disagree.
    pub fn add_noise(&self, mean: &Tensor, noise: &Tensor) -> Result<Tensor> {
        Ok((mean + noise.broadcast_mul(&column(&self.std, noise)?)?)?)
    }
}

fn ddim_std(abar: f64, abar_prev: f64, eta: f64) -> f64 {
    let variance = (1.0 - abar_prev) / (1.0 - abar) * (1.0 - abar / abar_prev);
    eta * variance.max(0.0).sqrt()
}

/// diffusers' DDIMScheduler: from t to t - num_train_timesteps / steps.
#[derive(Clone, Debug)]
pub struct Ddim {
    schedule: NoiseSchedule,
    timesteps: Vec<f64>,
    stride: f64,
    eta: f64,
}

impl Ddim {
    /// # Errors
    /// `Error::Invalid` on `steps`.
    pub fn new(schedule: &NoiseSchedule, steps: usize, eta: f64) -> Result<Self> {
        let timesteps = grid(schedule, SolverKind::Ddim, steps, false)?.timesteps;
        let stride = (schedule.num_train_timesteps() / steps) as f64;
        Ok(Self { schedule: schedule.clone(), timesteps, stride, eta })
    }

    /// Timesteps of the steps, descending.
    pub fn timesteps(&self) -> &[f64] {
        &self.timesteps
    }

    /// The transition of `step` for a batch of `rows`.
    ///
    /// # Errors
    /// None for a step below `steps()`.
    pub fn transition(&self, step: usize, rows: usize) -> Result<Transition> {
        let t = self.timesteps[step];
        Transition::new(&self.schedule, &vec![t; rows], &vec![t - self.stride; rows], self.eta)
    }
}

impl Solver for Ddim {
    fn kind(&self) -> SolverKind {
        SolverKind::Ddim
    }

    fn steps(&self) -> usize {
        self.timesteps.len()
    }

    fn init_noise_sigma(&self) -> f64 {
        1.0
    }

    fn evals(&self, step: usize) -> Vec<Eval> {
        vec![Eval { t: self.timesteps[step], input_scale: 1.0 }]
    }

    fn level(&self, step: usize) -> Level {
        Level::vp(match step.checked_sub(1) {
            None => self.schedule.abar(self.timesteps[0]),
            Some(before) => self.schedule.abar_or_final(self.timesteps[before] - self.stride),
        })
    }

    fn noise_std(&self, step: usize) -> f64 {
        let t = self.timesteps[step];
        let abar_prev = self.schedule.abar_or_final(t - self.stride);
        ddim_std(self.schedule.abar(t), abar_prev, self.eta)
    }

    fn advance(
        &self,
        step: usize,
        x: &Tensor,
        _history: &mut History,
        model: &mut Model,
        noise: Option<&Tensor>,
    ) -> Result<Step> {
        let transition = self.transition(step, x.dim(0)?)?;
        let output = model(x, &self.evals(step)[0])?;
        let (x0, eps) = transition.x0_eps(x, &output)?;
        let mean = transition.mean(&x0, &eps)?;
        let x = match noise {
            _ if self.noise_std(step) == 0.0 => mean,
            Some(noise) => transition.add_noise(&mean, noise)?,
            None => return Err(Error::invalid("noise", "a stochastic step needs noise")),
        };
        Ok(Step { x, x0 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_published_steps() -> Result<()> {
        let schedule = NoiseSchedule::sdxl()?;
        let x = Tensor::new(&[[1.0f32], [1.0], [1.0], [1.0]], &candle_core::Device::Cpu)?;
        let out = Tensor::new(&[[0.0f32], [1.0], [0.0], [1.0]], &candle_core::Device::Cpu)?;
        let t = [600.0, 600.0, 39.0, 39.0];
        let transition = Transition::new(&schedule, &t, &[560.0, 560.0, -1.0, -1.0], 0.0)?;
        let (x0, eps) = transition.x0_eps(&x, &out)?;
        let next = transition.mean(&x0, &eps)?.flatten_all()?.to_vec1::<f32>()?;
        let expected = [1.12239901, 1.12239901 - 0.13521616, 1.01865205, 1.01865205 - 0.16706452];
        for (found, expected) in next.iter().zip(expected) {
            assert!((f64::from(*found) - expected).abs() < 2e-6, "{found} is not {expected}");
        }
        Ok(())
    }

    #[test]
    fn the_published_policy_deviations() -> Result<()> {
        let schedule = NoiseSchedule::sdxl()?;
        for (steps, step, expected) in [
            (50, 0, 0.45446),
            (50, 25, 0.28769),
            (50, 49, 0.02065),
            (20, 0, 0.64439),
            (20, 10, 0.40155),
        ] {
            let std = Ddim::new(&schedule, steps, 1.0)?.noise_std(step);
            assert!((std - expected).abs() < 1e-5, "{steps}/{step}: {std} is not {expected}");
        }
        Ok(())
    }

    #[test]
    fn eta_one_is_the_ddpm_posterior() -> Result<()> {
        let schedule = NoiseSchedule::sdxl()?;
        let x = Tensor::new(&[[0.7f32], [-1.3]], &candle_core::Device::Cpu)?;
        let x0 = Tensor::new(&[[0.2f32], [0.9]], &candle_core::Device::Cpu)?;
        let (t, p) = ([700.0, 281.0], [660.0, 261.0]);
        let transition = Transition::new(&schedule, &t, &p, 1.0)?;
        for row in 0..2 {
            let (a, b) = (schedule.abar(t[row]), schedule.abar(p[row]));
            let value = |tensor: &Tensor| -> Result<f64> {
                Ok(f64::from(tensor.get(row)?.to_vec1::<f32>()?[0]))
            };
            let (x, x0) = (value(&x)?, value(&x0)?);
            let posterior = b.sqrt() * (1.0 - a / b) / (1.0 - a) * x0
                + (a / b).sqrt() * (1.0 - b) / (1.0 - a) * x;
            let eps = (x - a.sqrt() * x0) / (1.0 - a).sqrt();
            let one = |v: f64| Tensor::full(v as f32, (2, 1), &candle_core::Device::Cpu);
            let mean = value(&transition.mean(&one(x0)?, &one(eps)?)?)?;
            assert!((mean - posterior).abs() < 1e-6, "{mean} is not {posterior}");
            let variance = (1.0 - b) / (1.0 - a) * (1.0 - a / b);
            assert!((transition.std()[row].powi(2) - variance).abs() < 1e-12);
        }
        Ok(())
    }
}
