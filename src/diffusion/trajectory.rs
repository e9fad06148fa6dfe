//! Running a batch of latents through a solver: lock-step, micro-batched, cancellable.

use candle_core::Tensor;

use super::cost::Units;
use super::denoiser::Conditioning;
use super::meter::MeteredDenoiser;
use super::noise::{NoiseKey, Purpose};
use super::solver::{Eval, History, Solver, evaluations};
use crate::util::CancelToken;
use crate::{Error, Result};

/// Whose noise and conditioning a row of the batch has.
#[derive(Clone, Copy, Debug)]
pub struct Row<'a> {
    pub key: NoiseKey,
    pub candidate: u64,
    pub cond: &'a Conditioning,
}

/// A batch on its way: the state before `step`.
#[derive(Clone, Debug)]
pub struct State {
    /// [B, C, h, w] in the solver's coordinates.
    pub x: Tensor,
    pub step: usize,
    pub history: History,
}

impl State {
    /// At the beginning of `solver`, from unit noise [B, C, h, w].
    ///
    /// # Errors
    /// When the device is out of memory.
    pub fn start(solver: &dyn Solver, unit_noise: &Tensor) -> Result<Self> {
        let x = unit_noise.affine(solver.init_noise_sigma(), 0.0)?;
        Ok(Self { x, step: 0, history: History::default() })
    }
}

/// Tells of a finished step.
#[derive(Debug)]
pub struct StepReport<'a> {
    /// Index of the finished step.
    pub step: usize,
    pub steps: usize,
    pub spent: Units,
    /// The state after the step.
    pub x: &'a Tensor,
    /// The clean-image estimate made at the step's beginning, [B, C, h, w].
    pub x0: &'a Tensor,
}

/// How to run: which solver and model, in what pieces.
#[derive(Clone)]
pub struct Trajectory<'a> {
    pub solver: &'a dyn Solver,
    pub denoiser: MeteredDenoiser<'a>,
    /// Most rows per model evaluation (guidance doubles them inside); at least 1.
    pub micro_batch: usize,
    pub cancel: &'a CancelToken,
}

impl Trajectory<'_> {
    /// F of taking `rows` from step `from` to step `to`.
    pub fn cost(&self, from: usize, to: usize, rows: &[Row]) -> u64 {
        let forwards: u64 = rows.iter().map(|row| row.cond.forwards_per_eval()).sum();
        evaluations(self.solver, from, to) as u64 * forwards
    }

    /// Unit noise of the rows' initial latents, [B, C, h, w].
    ///
    /// # Errors
    /// When the device is out of memory.
    pub fn initial_noise(&self, rows: &[Row], shape: (usize, usize, usize)) -> Result<Tensor> {
        noise_rows(rows, Purpose::InitialLatent, 0, shape, self.denoiser.device())
    }

    /// Takes the batch from its step to step `until` and calls `on_step` after each step.
    /// Each step is finished for all rows before the next begins. Results do not depend on
    /// the micro-batch where the model's rows do not.
    ///
    /// # Errors
    /// `Error::Budget` before anything is run when the whole stretch does not fit,
    /// `Error::Cancelled` between evaluations, the model's and `on_step`'s errors.
    pub fn run(
        &self,
        state: State,
        until: usize,
        rows: &[Row],
        on_step: &mut dyn FnMut(&StepReport) -> Result<()>,
    ) -> Result<State> {
        let State { mut x, step: from, mut history } = state;
        let (batch, channels, height, width) = x.dims4()?;
        if rows.len() != batch {
            let message = format!("{} rows for a batch of {batch}", rows.len());
            return Err(Error::invalid("rows", message));
        }
        let meter = self.denoiser.meter();
        meter.ensure(Units { f: self.cost(from, until, rows), ..Units::default() })?;
        for step in from..until {
            let noise = match self.solver.noise_std(step) > 0.0 {
                true => {
                    let shape = (channels, height, width);
                    Some(noise_rows(rows, Purpose::SolverNoise, step as u64, shape, x.device())?)
                }
                false => None,
            };
            let mut model = |x: &Tensor, eval: &Eval| self.evaluate(x, eval.t, rows);
            let next = self.solver.advance(step, &x, &mut history, &mut model, noise.as_ref())?;
            x = next.x;
            let (steps, spent) = (self.solver.steps(), meter.spent());
            on_step(&StepReport { step, steps, spent, x: &x, x0: &next.x0 })?;
        }
        Ok(State { x, step: until.max(from), history })
    }

    /// Guided prediction at one timestep for every row, in micro-batches. `x`: scaled
    /// network input [B, C, h, w].
    ///
    /// # Errors
    /// `Error::Budget`, `Error::Cancelled`, the model's.
    pub fn evaluate(&self, x: &Tensor, t: f64, rows: &[Row]) -> Result<Tensor> {
        let cond: Vec<_> = rows.iter().map(|row| row.cond).collect();
        evaluate(&self.denoiser, x, t, &cond, self.micro_batch, self.cancel)
    }
}

/// Guided prediction at one timestep for every row of `x`, scaled network input [B, C, h, w],
/// in micro-batches.
///
/// # Errors
/// `Error::Budget`, `Error::Cancelled`, the model's.
pub fn evaluate(
    denoiser: &MeteredDenoiser,
    x: &Tensor,
    t: f64,
    cond: &[&Conditioning],
    micro_batch: usize,
    cancel: &CancelToken,
) -> Result<Tensor> {
    let size = micro_batch.max(1);
    let mut parts = Vec::with_capacity(cond.len().div_ceil(size));
    for (i, cond) in cond.chunks(size).enumerate() {
        cancel.check()?;
        let t = Tensor::full(t as f32, cond.len(), x.device())?;
        let part = x.narrow(0, i * size, cond.len())?.contiguous()?;
        parts.push(denoiser.predict(&part, &t, cond)?);
    }
    match parts.len() {
        1 => Ok(parts.remove(0)),
        _ => Ok(Tensor::cat(&parts, 0)?),
    }
}

/// Unit noise of one purpose and step for each row, [B, ...shape].
///
/// # Errors
/// When the device is out of memory.
pub fn noise_rows(
    rows: &[Row],
    purpose: Purpose,
    step: u64,
    shape: (usize, usize, usize),
    device: &candle_core::Device,
) -> Result<Tensor> {
    let noise =
        |row: &Row| row.key.normal(purpose, step, row.candidate, shape, &candle_core::Device::Cpu);
    let rows = rows.iter().map(noise).collect::<Result<Vec<_>>>()?;
    Ok(Tensor::stack(&rows, 0)?.to_device(device)?)
}
