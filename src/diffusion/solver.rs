//! What a solver of the reverse process is: a plan of model evaluations per step and an
//! update. The latents between steps are diffusers' own for the scheduler of that name.

use std::str::FromStr;
use std::sync::Arc;

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use super::ddim::Ddim;
use super::dpm::DpmPp2m;
use super::euler::Euler;
use super::heun::Heun;
use super::schedule::NoiseSchedule;
use crate::{Error, Result};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SolverKind {
    /// diffusers' DDIMScheduler (Song et al. 2021, eq. 12).
    #[serde(rename = "ddim")]
    Ddim,
    /// EulerDiscreteScheduler (Karras et al. 2022, alg. 1 without correction).
    #[serde(rename = "euler")]
    Euler,
    /// HeunDiscreteScheduler (Karras et al. 2022, alg. 1).
    #[serde(rename = "heun")]
    Heun,
    /// DPMSolverMultistepScheduler: DPM-Solver++(2M), midpoint (Lu et al. 2022, alg. 2).
    #[serde(rename = "dpmpp-2m")]
    DpmPp2m,
}

impl SolverKind {
    pub const ALL: [Self; 4] = [Self::Ddim, Self::Euler, Self::Heun, Self::DpmPp2m];

    pub fn name(self) -> &'static str {
        match self {
            Self::Ddim => "ddim",
            Self::Euler => "euler",
            Self::Heun => "heun",
            Self::DpmPp2m => "dpmpp-2m",
        }
    }

    /// Model evaluations of one sample over a whole trajectory (guidance not counted).
    pub fn evaluations(self, steps: usize) -> usize {
        match self {
            Self::Heun => (2 * steps).saturating_sub(1),
            _ => steps,
        }
    }
}

impl FromStr for SolverKind {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let found = Self::ALL.into_iter().find(|kind| kind.name() == name);
        let known = Self::ALL.iter().map(|kind| kind.name());
        found.ok_or_else(|| Error::unknown("solver", "solver", name, known))
    }
}

/// A choice of solver, ready to be built for a number of steps.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SolverSpec {
    pub kind: SolverKind,
    /// DDIM's stochasticity in [0, 1]; must be 0 for the others.
    pub eta: f64,
    /// Karras noise levels (Euler, Heun, DPM++).
    pub karras: bool,
}

impl SolverSpec {
    /// The deterministic solver of that kind, with the configuration's Karras switch.
    pub fn ode(kind: SolverKind, schedule: &NoiseSchedule) -> Self {
        Self { kind, eta: 0.0, karras: schedule.config().use_karras_sigmas }
    }

    /// DDIM with eta 1: ancestral sampling.
    pub fn sde() -> Self {
        Self { kind: SolverKind::Ddim, eta: 1.0, karras: false }
    }

    /// # Errors
    /// `Error::Invalid` on `steps` or `eta`.
    pub fn build(&self, schedule: &NoiseSchedule, steps: usize) -> Result<Arc<dyn Solver>> {
        let range = if self.kind == SolverKind::Ddim { 0.0..=1.0 } else { 0.0..=0.0 };
        if !range.contains(&self.eta) {
            let message =
                format!("{} is not possible with solver '{}'", self.eta, self.kind.name());
            return Err(Error::invalid("eta", message));
        }
        Ok(match self.kind {
            SolverKind::Ddim => Arc::new(Ddim::new(schedule, steps, self.eta)?),
            SolverKind::Euler => Arc::new(Euler::new(schedule, steps, self.karras)?),
            SolverKind::Heun => Arc::new(Heun::new(schedule, steps, self.karras)?),
            SolverKind::DpmPp2m => Arc::new(DpmPp2m::new(schedule, steps, self.karras)?),
        })
    }
}

/// One model evaluation: the network sees `input_scale * x` at timestep `t`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Eval {
    pub t: f64,
    pub input_scale: f64,
}

/// Where a latent stands: x = scale * (x0 + sigma * unit noise).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Level {
    pub sigma: f64,
    pub scale: f64,
}

impl Level {
    pub(super) fn vp(abar: f64) -> Self {
        Self { sigma: ((1.0 - abar) / abar).sqrt(), scale: abar.sqrt() }
    }
}

/// What a multistep solver remembers between steps.
#[derive(Clone, Debug, Default)]
pub struct History {
    pub(super) previous_x0: Option<Tensor>,
}

/// The state after a step and the clean-image estimate made at its beginning.
#[derive(Clone, Debug)]
pub struct Step {
    pub x: Tensor,
    pub x0: Tensor,
}

/// Answers one evaluation: given the scaled network input [B, ...], the raw (guided)
/// network output of the same shape.
pub type Model<'a> = dyn FnMut(&Tensor, &Eval) -> Result<Tensor> + 'a;

/// A solver laid out for a number of steps. Moves a batch in lock-step; rows never mix.
pub trait Solver: Send + Sync {
    fn kind(&self) -> SolverKind;
    fn steps(&self) -> usize;
    /// The initial state is this times unit noise.
    fn init_noise_sigma(&self) -> f64;
    /// The evaluations of a step, in order.
    fn evals(&self, step: usize) -> Vec<Eval>;
    /// The level of the state before `step`; `steps()` asks for the final one.
    fn level(&self, step: usize) -> Level;
    /// Standard deviation of the noise that a step adds to the state; 0: it needs none.
    fn noise_std(&self, _step: usize) -> f64 {
        0.0
    }
    /// Takes `step` from state `x` [B, ...]. `noise`: unit noise of the same shape, needed
    /// where `noise_std` is positive.
    ///
    /// # Errors
    /// The model's, or a missing noise.
    fn advance(
        &self,
        step: usize,
        x: &Tensor,
        history: &mut History,
        model: &mut Model,
        noise: Option<&Tensor>,
    ) -> Result<Step>;
}

/// Evaluations of one sample in steps `from..to`.
pub fn evaluations(solver: &dyn Solver, from: usize, to: usize) -> usize {
    (from..to).map(|step| solver.evals(step).len()).sum()
}

/// a x + b y for scalars.
pub(super) fn blend(a: f64, x: &Tensor, b: f64, y: &Tensor) -> Result<Tensor> {
    Ok((x.affine(a, 0.0)? + y.affine(b, 0.0)?)?)
}
