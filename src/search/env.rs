//! Everything a method may touch while it runs, all of it metered.

use candle_core::Tensor;
use image::RgbImage;
use serde_json::Value;

use super::params::name_of;
use crate::diffusion::cost::Units;
use crate::diffusion::denoiser::Conditioning;
use crate::diffusion::meter::{Meter, MeteredDecoder, MeteredDenoiser};
use crate::diffusion::noise::{NoiseKey, Purpose};
use crate::diffusion::schedule::NoiseSchedule;
use crate::diffusion::solver::{SolverKind, SolverSpec};
use crate::diffusion::trajectory::{Row, State, Trajectory, evaluate};
use crate::rewards::MeteredVerifier;
use crate::rewards::ensemble::Marks;
use crate::util::CancelToken;
use crate::{Error, Result};

/// What planning needs to know of an environment.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct EnvSpec<'a> {
    pub schedule: &'a NoiseSchedule,
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
    /// Whether values of the searched rewards are relative to the other candidates of a decision.
    pub relative: bool,
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
        name_of(&Self::OPTIONS, &self)
    }

    /// Its solver, where deterministic trajectories have this one.
    fn solver(self, ode: SolverSpec) -> SolverSpec {
        match self {
            Self::Ode => ode,
            Self::Sde => SolverSpec::sde(),
        }
    }
}

impl EnvSpec<'_> {
    /// F of one trajectory.
    pub fn trajectory_f(&self, kernel: Kernel) -> u64 {
        self.steps_f(kernel, self.steps)
    }

    /// F of a trajectory of `steps` steps.
    pub fn steps_f(&self, kernel: Kernel, steps: usize) -> u64 {
        let ode = SolverSpec::ode(self.solver, self.schedule);
        kernel.solver(ode).kind.evaluations(steps) as u64 * self.forwards_per_eval
    }

    /// Checks that a trajectory can have these steps.
    ///
    /// # Errors
    /// `Error::Invalid` on "steps".
    pub fn check_steps(&self, kernel: Kernel, steps: usize) -> Result<()> {
        let ode = SolverSpec::ode(self.solver, self.schedule);
        kernel.solver(ode).build(self.schedule, steps).map(|_| ())
    }

    /// # Errors
    /// `Error::Invalid` on "reward" when its values cannot be compared between decisions.
    pub fn needs_absolute(&self, method: &str) -> Result<()> {
        if !self.relative {
            return Ok(());
        }
        let message = format!(
            "{method} compares values of different decisions, and those of rank(…) and \
             normalised(…) mean something within one alone: take a sum"
        );
        Err(Error::invalid("reward", message))
    }

    /// # Errors
    /// `Error::Invalid` on "reward" when there is none to search for.
    pub fn needs_search(&self, method: &str) -> Result<()> {
        if self.searches {
            return Ok(());
        }
        Err(Error::invalid("reward", format!("{method} needs a reward to search for")))
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
    /// Scores so far that are no numbers.
    pub failed_scores: u64,
}

/// Latents as images, and what the searched rewards say of them.
#[derive(Clone, Debug)]
pub struct Judged {
    pub images: Vec<RgbImage>,
    pub marks: Vec<Marks>,
    /// To decide by: higher is better, -inf where scoring failed.
    pub values: Vec<f64>,
}

impl<'a> SearchEnv<'a> {
    pub fn spec(&self) -> EnvSpec<'a> {
        EnvSpec {
            schedule: self.schedule,
            steps: self.steps,
            solver: self.solver.kind,
            forwards_per_eval: self.cond.forwards_per_eval(),
            searches: self.verifier.searched().is_some(),
            reports: self.verifier.reports(),
            relative: self.verifier.is_relative(),
            search_calls: self.verifier.search_calls(),
            report_calls: self.verifier.report_calls(),
        }
    }

    pub fn meter(&self) -> &'a Meter {
        self.denoiser.meter()
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

    /// Decodes and scores latents [B, C, h, w], in pieces of the micro-batch. They are the
    /// candidates of one decision: values may be relative to each other.
    ///
    /// # Errors
    /// `Error::Budget` before running, `Error::Cancelled`, the decoder's and the reward's.
    pub fn judge(&mut self, latents: &Tensor) -> Result<Judged> {
        let mut images = Vec::new();
        let marks = self.score(latents, &mut |part| images.extend(part))?;
        let values = self.verifier.values(&marks);
        Ok(Judged { images, marks, values })
    }

    /// As [`SearchEnv::judge`], for latents whose images are not returned: their marks.
    ///
    /// # Errors
    /// As [`SearchEnv::judge`].
    pub fn marks(&mut self, latents: &Tensor) -> Result<Vec<Marks>> {
        self.score(latents, &mut |_| {})
    }

    /// As [`SearchEnv::marks`]: their values, to decide by.
    ///
    /// # Errors
    /// As [`SearchEnv::judge`].
    pub fn values(&mut self, latents: &Tensor) -> Result<Vec<f64>> {
        let marks = self.marks(latents)?;
        Ok(self.verifier.values(&marks))
    }

    fn score(
        &mut self,
        latents: &Tensor,
        each: &mut dyn FnMut(Vec<RgbImage>),
    ) -> Result<Vec<Marks>> {
        let rows = latents.dim(0)?;
        let mut marks = Vec::with_capacity(rows);
        for from in (0..rows).step_by(self.micro_batch.max(1)) {
            self.cancel.check()?;
            let count = self.micro_batch.max(1).min(rows - from);
            let part = self.decoder.decode(&latents.narrow(0, from, count)?)?;
            marks.extend(self.verifier.score(&part, self.prompt)?);
            each(part);
        }
        if self.verifier.searched().is_some() {
            let failed = marks.iter().filter(|marks| !marks.iter().all(|mark| mark.is_finite()));
            self.failed_scores += failed.count() as u64;
        }
        Ok(marks)
    }

    /// Guided prediction for every row of `x`, scaled network input [B, C, h, w], at one
    /// timestep, in pieces of the micro-batch.
    ///
    /// # Errors
    /// `Error::Budget` before running, `Error::Cancelled`, the model's.
    pub fn evaluate(&self, x: &Tensor, t: f64) -> Result<Tensor> {
        let cond = vec![self.cond; x.dim(0)?];
        evaluate(&self.denoiser, x, t, &cond, self.micro_batch, self.cancel)
    }

    /// Unit noise of the candidates' initial latents, [candidates, C, h, w].
    ///
    /// # Errors
    /// When the device is out of memory.
    pub fn initial_noise(&self, key: &NoiseKey, candidates: &[u64]) -> Result<Tensor> {
        let device = self.denoiser.device();
        key.normal_rows(Purpose::InitialLatent, 0, candidates, self.latent_shape, device)
    }

    /// Whole trajectories from the candidates' own initial noise: final latents
    /// [candidates, C, h, w].
    ///
    /// # Errors
    /// `Error::Budget` before running, `Error::Cancelled`, the model's.
    pub fn sample(&mut self, key: &NoiseKey, kernel: Kernel, candidates: &[u64]) -> Result<Tensor> {
        let noise = self.initial_noise(key, candidates)?;
        self.sample_from(&noise, key, kernel, candidates, self.steps)
    }

    /// Whole trajectories of `steps` steps from this unit noise [candidates, C, h, w]; a
    /// stochastic kernel's own noise is the candidates'.
    ///
    /// # Errors
    /// `Error::Budget` before running, `Error::Cancelled`, the model's.
    pub fn sample_from(
        &mut self,
        noise: &Tensor,
        key: &NoiseKey,
        kernel: Kernel,
        candidates: &[u64],
        steps: usize,
    ) -> Result<Tensor> {
        let solver = kernel.solver(self.solver).build(self.schedule, steps)?;
        let cond = self.cond;
        let rows: Vec<Row> =
            candidates.iter().map(|c| Row { key: *key, candidate: *c, cond }).collect();
        let trajectory = Trajectory {
            solver: solver.as_ref(),
            denoiser: self.denoiser.clone(),
            micro_batch: self.micro_batch,
            cancel: self.cancel,
        };
        let state = State::start(solver.as_ref(), noise)?;
        let end = trajectory.run(state, solver.steps(), &rows, &mut |report| {
            (self.on_event)(SearchEvent { spent: report.spent, event: None });
            Ok(())
        })?;
        Ok(end.x)
    }
}
