//! Everything a method may touch while it runs, all of it metered.

use candle_core::Tensor;
use serde_json::Value;

use crate::Result;
use crate::diffusion::cost::Units;
use crate::diffusion::denoiser::Conditioning;
use crate::diffusion::meter::{Meter, MeteredDecoder, MeteredDenoiser};
use crate::diffusion::noise::NoiseKey;
use crate::diffusion::schedule::NoiseSchedule;
use crate::diffusion::solver::{SolverKind, SolverSpec};
use crate::diffusion::trajectory::{Row, State, Trajectory};
use crate::rewards::MeteredVerifier;
use crate::util::CancelToken;

/// What planning needs to know of an environment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EnvSpec {
    /// Solver steps of a trajectory.
    pub steps: usize,
    /// The solver of deterministic trajectories.
    pub solver: SolverKind,
    /// U-Net forwards of one guided evaluation: 2 with guidance, else 1.
    pub forwards_per_eval: u64,
    /// Whether there is a reward to search for.
    pub searches: bool,
    /// Whether the returned image is scored (any reward is registered).
    pub reports: bool,
    /// L of scoring one image with the searched reward.
    pub search_calls: u64,
    /// L of scoring the returned image with all other rewards.
    pub report_calls: u64,
}

/// How a trajectory is sampled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kernel {
    /// The request's solver, deterministic.
    Ode,
    /// DDIM with eta 1.
    Sde,
}

impl Kernel {
    pub const OPTIONS: [(&'static str, Self); 2] = [("ode", Self::Ode), ("sde", Self::Sde)];

    pub fn name(self) -> &'static str {
        match self {
            Self::Ode => "ode",
            Self::Sde => "sde",
        }
    }
}

impl EnvSpec {
    /// F of one trajectory.
    pub fn trajectory_f(&self, kernel: Kernel) -> u64 {
        let solver = match kernel {
            Kernel::Ode => self.solver,
            Kernel::Sde => SolverKind::Ddim,
        };
        solver.evaluations(self.steps) as u64 * self.forwards_per_eval
    }

    /// Cost of sampling, decoding and searching `images` with `f` forwards in all, and of
    /// reporting on one of them.
    pub fn cost(&self, f: u64, images: u64) -> Units {
        let v = if self.searches { images } else { u64::from(self.reports) };
        Units { f, v, y: images, l: images * self.search_calls + self.report_calls }
    }
}

/// What a running method tells its caller: after every step of the batch, and (with
/// `event`) when it has just decided something.
#[derive(Clone, Debug)]
pub struct SearchEvent {
    pub spent: Units,
    pub event: Option<Value>,
}

/// One image's environment.
pub struct SearchEnv<'a> {
    pub denoiser: MeteredDenoiser<'a>,
    pub decoder: MeteredDecoder<'a>,
    pub verifier: MeteredVerifier<'a>,
    pub schedule: &'a NoiseSchedule,
    /// The request's solver, used for deterministic trajectories.
    pub solver: SolverSpec,
    pub steps: usize,
    pub cond: &'a Conditioning,
    pub prompt: &'a str,
    /// (C, h, w).
    pub latent_shape: (usize, usize, usize),
    /// Most candidates per model evaluation, decode and scoring call; at least 1.
    pub micro_batch: usize,
    pub cancel: &'a CancelToken,
    pub on_event: &'a mut dyn FnMut(SearchEvent),
}

impl<'a> SearchEnv<'a> {
    pub fn spec(&self) -> EnvSpec {
        EnvSpec {
            steps: self.steps,
            solver: self.solver.kind,
            forwards_per_eval: self.cond.forwards_per_eval(),
            searches: self.verifier.searched().is_some(),
            reports: self.verifier.reports(),
            search_calls: self.verifier.search_calls(),
            report_calls: self.verifier.report_calls(),
        }
    }

    pub fn meter(&self) -> &'a Meter {
        self.denoiser.meter()
    }

    pub fn solver_of(&self, kernel: Kernel) -> SolverSpec {
        match kernel {
            Kernel::Ode => self.solver,
            Kernel::Sde => SolverSpec::sde(),
        }
    }

    pub fn tell(&mut self, event: Option<Value>) {
        let spent = self.meter().spent();
        (self.on_event)(SearchEvent { spent, event });
    }

    /// Candidates in pieces of the micro-batch.
    pub fn chunks(&self, candidates: std::ops::Range<u64>) -> Vec<Vec<u64>> {
        let candidates: Vec<u64> = candidates.collect();
        candidates.chunks(self.micro_batch.max(1)).map(<[u64]>::to_vec).collect()
    }

    /// Whole trajectories from the candidates' own initial noise: final latents
    /// [candidates, C, h, w].
    ///
    /// # Errors
    /// `Error::Budget` before running, `Error::Cancelled`, the model's.
    pub fn sample(&mut self, key: &NoiseKey, kernel: Kernel, candidates: &[u64]) -> Result<Tensor> {
        let solver = self.solver_of(kernel).build(self.schedule, self.steps)?;
        let cond = self.cond;
        let rows: Vec<Row> =
            candidates.iter().map(|c| Row { key: *key, candidate: *c, cond }).collect();
        let trajectory = Trajectory {
            solver: solver.as_ref(),
            denoiser: self.denoiser.clone(),
            micro_batch: self.micro_batch,
            cancel: self.cancel,
        };
        let noise = trajectory.initial_noise(&rows, self.latent_shape)?;
        let state = State::start(solver.as_ref(), &noise)?;
        let end = trajectory.run(state, solver.steps(), &rows, &mut |report| {
            (self.on_event)(SearchEvent { spent: report.spent, event: None });
            Ok(())
        })?;
        Ok(end.x)
    }
}
