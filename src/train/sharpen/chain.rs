//! A stretch of the sampler's steps, without gradients.

use candle_core::Tensor;

use super::draw::Start;
use crate::Result;
use crate::diffusion::cost::Units;
use crate::diffusion::ddim::Transition;
use crate::diffusion::denoiser::Conditioning;
use crate::diffusion::meter::MeteredDenoiser;
use crate::diffusion::noise::Purpose;
use crate::diffusion::schedule::NoiseSchedule;
use crate::util::CancelToken;

/// How chains are rolled out.
pub struct Chain<'a> {
    pub denoiser: MeteredDenoiser<'a>,
    pub schedule: &'a NoiseSchedule,
    /// Timesteps of a step.
    pub stride: f64,
    /// Stochasticity (Song et al. 2021, eq. 16).
    pub eta: f64,
    /// Probability-flow steps from a state to its clean-image estimate (eq. 6); 1 is the
    /// one-step estimate (Tweedie's formula).
    pub estimate_steps: usize,
    /// Most rows of a U-Net pass.
    pub micro_batch: usize,
    pub cancel: &'a CancelToken,
}

/// A trajectory: its group's start, which of the group it is, and what it is conditioned on.
#[derive(Clone, Copy, Debug)]
pub struct Row<'a> {
    pub start: Start,
    pub candidate: u64,
    pub cond: &'a Conditioning,
}

/// All chains that have a state number k.
#[derive(Clone, Debug)]
pub struct Level {
    /// Their rows, ascending.
    pub rows: Vec<usize>,
    pub t: Vec<f64>,
    /// The states, [rows, C, h, w].
    pub x: Tensor,
    /// Their clean-image estimates, where asked for.
    pub x0: Option<Tensor>,
}

impl Chain<'_> {
    /// F of rolling out these rows: for each state an evaluation, which the step and the
    /// estimate share, and those further down that the estimate needs. Without estimates a
    /// chain's last state needs none.
    pub fn cost(&self, rows: &[Row], estimates: bool) -> u64 {
        let evaluations = |row: &Row| {
            let states = 0..row.start.states;
            let of_state = |k: usize| self.flow(row.start.t - k as f64 * self.stride).len();
            let all = if estimates { states.map(of_state).sum() } else { states.len() - 1 };
            all as u64 * row.cond.forwards_per_eval()
        };
        rows.iter().map(evaluations).sum()
    }

    /// Timesteps of the probability flow from `t` to the end, `t` first.
    fn flow(&self, t: f64) -> Vec<f64> {
        let steps = self.estimate_steps.max(1);
        let at = |i: usize| (t * (1.0 - i as f64 / steps as f64)).round();
        let mut all: Vec<f64> = std::iter::once(t).chain((1..steps).map(at)).collect();
        all.dedup();
        all
    }

    /// Rolls out from `x` [rows, C, h, w], the states at the rows' starts, with clean-image
    /// estimates or without.
    ///
    /// # Errors
    /// `Error::Budget` before anything is run, `Error::Cancelled`, the model's.
    pub fn roll(&self, x: &Tensor, rows: &[Row], estimates: bool) -> Result<Vec<Level>> {
        let f = self.cost(rows, estimates);
        self.denoiser.meter().ensure(Units { f, ..Units::default() })?;
        let longest = rows.iter().map(|row| row.start.states).max().unwrap_or(0);
        let mut x = x.clone();
        let mut active: Vec<usize> = (0..rows.len()).collect();
        let mut levels = Vec::with_capacity(longest);
        for k in 0..longest {
            let stays: Vec<usize> =
                (0..active.len()).filter(|i| rows[active[*i]].start.states > k).collect();
            x = pick(&x, &stays)?;
            active = stays.into_iter().map(|i| active[i]).collect();
            let here: Vec<Row> = active.iter().map(|i| rows[*i]).collect();
            let t: Vec<f64> = here.iter().map(|row| row.start.t - k as f64 * self.stride).collect();
            if estimates {
                let output = self.predict(&x, &t, &here)?;
                let (next, tweedie) = self.step(&x, &output, &t, &here, k)?;
                let x0 = Some(self.estimate(&x, tweedie, &output, &t, &here)?);
                levels.push(Level { rows: active.clone(), t, x, x0 });
                x = next;
                continue;
            }
            // Only those that go on are evaluated.
            let on: Vec<usize> =
                (0..here.len()).filter(|i| here[*i].start.states > k + 1).collect();
            levels.push(Level { rows: active.clone(), t: t.clone(), x: x.clone(), x0: None });
            if on.is_empty() {
                break;
            }
            let from = pick(&x, &on)?;
            active = on.iter().map(|i| active[*i]).collect();
            let here: Vec<Row> = on.iter().map(|i| here[*i]).collect();
            let t: Vec<f64> = on.iter().map(|i| t[*i]).collect();
            let output = self.predict(&from, &t, &here)?;
            x = self.step(&from, &output, &t, &here, k)?.0;
        }
        Ok(levels)
    }

    /// The state a stride further down, and the one-step estimate of the clean latent.
    fn step(
        &self,
        x: &Tensor,
        output: &Tensor,
        t: &[f64],
        rows: &[Row],
        k: usize,
    ) -> Result<(Tensor, Tensor)> {
        let prev: Vec<f64> = t.iter().map(|t| t - self.stride).collect();
        let transition = Transition::new(self.schedule, t, &prev, self.eta)?;
        let (x0, eps) = transition.x0_eps(x, output)?;
        let mean = transition.mean(&x0, &eps)?;
        if self.eta == 0.0 {
            return Ok((mean, x0));
        }
        Ok((transition.add_noise(&mean, &chain_noise(rows, k, x)?)?, x0))
    }

    /// The clean-image estimate of eq. 6: probability-flow steps from `t` to the end, the first
    /// of which is known.
    fn estimate(
        &self,
        x: &Tensor,
        tweedie: Tensor,
        output: &Tensor,
        t: &[f64],
        rows: &[Row],
    ) -> Result<Tensor> {
        if self.estimate_steps <= 1 {
            return Ok(tweedie);
        }
        let flows: Vec<Vec<f64>> = t.iter().map(|t| self.flow(*t)).collect();
        let (mut x, mut output, mut x0) = (x.clone(), output.clone(), tweedie);
        let longest = flows.iter().map(Vec::len).max().unwrap_or(0);
        for i in 1..longest {
            let moving: Vec<usize> = (0..rows.len()).filter(|r| flows[*r].len() > i).collect();
            let at = |step: usize| moving.iter().map(|r| flows[*r][step]).collect::<Vec<_>>();
            let (from, to) = (at(i - 1), at(i));
            let flow = Transition::new(self.schedule, &from, &to, 0.0)?;
            let (clean, eps) = flow.x0_eps(&pick(&x, &moving)?, &pick(&output, &moving)?)?;
            let moved = flow.mean(&clean, &eps)?;
            let here: Vec<Row> = moving.iter().map(|r| rows[*r]).collect();
            let predicted = self.predict(&moved, &to, &here)?;
            let (clean, _) = self.schedule.x0_eps(&moved, &predicted, &to)?;
            x = replace(&x, &moving, &moved)?;
            output = replace(&output, &moving, &predicted)?;
            x0 = replace(&x0, &moving, &clean)?;
        }
        Ok(x0)
    }

    /// Guided predictions with a timestep a row.
    fn predict(&self, x: &Tensor, t: &[f64], rows: &[Row]) -> Result<Tensor> {
        let size = self.micro_batch.max(1);
        let mut parts = Vec::with_capacity(rows.len().div_ceil(size));
        for (i, rows) in rows.chunks(size).enumerate() {
            self.cancel.check()?;
            let cond: Vec<_> = rows.iter().map(|row| row.cond).collect();
            let t: Vec<f32> = t[i * size..][..rows.len()].iter().map(|t| *t as f32).collect();
            let t = Tensor::new(t, x.device())?;
            let part = x.narrow(0, i * size, rows.len())?.contiguous()?;
            parts.push(self.denoiser.predict(&part, &t, &cond)?);
        }
        Ok(Tensor::cat(&parts, 0)?)
    }
}

/// Unit noise of the rows' steps from state k.
pub(super) fn chain_noise(rows: &[Row], k: usize, like: &Tensor) -> Result<Tensor> {
    let shape = &like.dims()[1..];
    let noise = |row: &Row| {
        let device = &candle_core::Device::Cpu;
        row.start.key.normal(Purpose::SolverNoise, k as u64, row.candidate, shape, device)
    };
    let rows = rows.iter().map(noise).collect::<Result<Vec<_>>>()?;
    Ok(Tensor::stack(&rows, 0)?.to_device(like.device())?)
}

/// These rows of `x`.
pub(super) fn pick(x: &Tensor, rows: &[usize]) -> Result<Tensor> {
    if rows.len() == x.dim(0)? {
        return Ok(x.clone());
    }
    let index: Vec<u32> = rows.iter().map(|row| *row as u32).collect();
    Ok(x.index_select(&Tensor::new(index, x.device())?, 0)?)
}

/// `x` with these rows replaced by those of `by`.
fn replace(x: &Tensor, rows: &[usize], by: &Tensor) -> Result<Tensor> {
    let count = x.dim(0)?;
    if rows.len() == count {
        return Ok(by.clone());
    }
    let mut order: Vec<u32> = (0..count as u32).collect();
    rows.iter().enumerate().for_each(|(i, row)| order[*row] = (count + i) as u32);
    let both = Tensor::cat(&[x, by], 0)?;
    Ok(both.index_select(&Tensor::new(order, x.device())?, 0)?)
}
