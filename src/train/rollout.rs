//! The images that RLHF learns from: whole trajectories of the policy.

use std::sync::Arc;

use candle_core::Tensor;

use super::score::{Scorer, Scores};
use super::settings::{Score, Settings};
use super::sharpen::{Group, group_key};
use super::texts::Texts;
use crate::diffusion::denoiser::Conditioning;
use crate::diffusion::guidance::Guided;
use crate::diffusion::meter::{Meter, MeteredDecoder, MeteredDenoiser};
use crate::diffusion::schedule::NoiseSchedule;
use crate::diffusion::sdxl_model::SdxlModel;
use crate::diffusion::solver::{Solver, SolverSpec};
use crate::diffusion::trajectory::{Row, State, Trajectory};
use crate::util::CancelToken;
use crate::{Error, Result};

/// How images are generated.
pub struct Rollout {
    settings: Settings,
    solver: Arc<dyn Solver>,
    /// (C, h, w).
    shape: (usize, usize, usize),
}

impl Rollout {
    /// # Errors
    /// Names `rollout_solver` or `rollout_steps`.
    pub fn new(
        settings: &Settings,
        schedule: &NoiseSchedule,
        shape: (usize, usize, usize),
    ) -> Result<Self> {
        let kind = settings.rollout_solver.parse();
        let kind = kind.map_err(|e: Error| Error::invalid("rollout_solver", e.to_string()))?;
        let solver = SolverSpec::ode(kind, schedule)
            .build(schedule, settings.rollout_steps)
            .map_err(|e| Error::invalid("rollout_steps", e.to_string()))?;
        Ok(Self { settings: settings.clone(), solver, shape })
    }

    /// Images of one prompt.
    pub fn per_prompt(&self) -> usize {
        if self.settings.rollout_shared { 1 } else { self.settings.n }
    }

    /// F of one image.
    pub fn evaluations(&self) -> u64 {
        self.solver.kind().evaluations(self.solver.steps()) as u64
            * if self.settings.rollout_guidance == 1.0 { 1 } else { 2 }
    }

    /// A group for each prompt, generated as `update` draws them; with the images' scores
    /// where those count.
    ///
    /// # Errors
    /// The models', `Error::Cancelled`.
    pub fn groups(
        &self,
        update: u64,
        prompts: &[&str],
        texts: &mut Texts,
        actor: &Guided<SdxlModel>,
        scorer: &mut Scorer,
        (meter, cancel): (&Meter, &CancelToken),
    ) -> Result<(Vec<Group>, Option<Scores>)> {
        let count = self.per_prompt();
        let encoded = texts.encode(prompts)?;
        let conds: Vec<Conditioning> = encoded
            .iter()
            .map(|text| texts.conditioning(text.clone(), self.settings.rollout_guidance))
            .collect();
        let rows: Vec<Row> = (0..prompts.len() * count)
            .map(|row| Row {
                key: group_key(self.settings.seed, update, (row / count) as u64),
                candidate: (row % count) as u64,
                cond: &conds[row / count],
            })
            .collect();
        let trajectory = Trajectory {
            solver: self.solver.as_ref(),
            denoiser: MeteredDenoiser::new(actor, meter),
            micro_batch: self.settings.rollout_batch,
            cancel,
        };
        let noise = trajectory.initial_noise(&rows, self.shape)?;
        let state = State::start(self.solver.as_ref(), &noise)?;
        let clean = trajectory.run(state, self.solver.steps(), &rows, &mut |_| Ok(()))?.x;
        let scores = match self.settings.score {
            Score::Chain => None,
            Score::Sample => {
                let of_row = |row: usize| prompts[row / count];
                let of_row: Vec<&str> = (0..rows.len()).map(of_row).collect();
                let sets: Vec<usize> = (0..rows.len()).map(|row| row / count).collect();
                let decoder = MeteredDecoder::new(&actor.0, meter);
                Some(scorer.score(&decoder, &clean, &of_row, &sets)?)
            }
        };
        let group = |i: usize| {
            let range = i * count..(i + 1) * count;
            Ok(Group {
                prompt: prompts[i].to_owned(),
                text: encoded[i].clone(),
                clean: clean.narrow(0, range.start, count)?,
                noise: Some(noise.narrow(0, range.start, count)?),
                scores: scores.as_ref().map(|scores| scores.total[range.clone()].to_vec()),
            })
        };
        Ok(((0..prompts.len()).map(group).collect::<Result<_>>()?, scores))
    }
}

/// What is kept of generated groups from one update to the next.
#[derive(Clone, Debug)]
pub struct Replay {
    /// The update that generated them.
    pub update: u64,
    pub groups: Vec<Group>,
}

impl Replay {
    /// Clean latents and noise [groups, images, C, h, w], and scores, for a checkpoint; prompts
    /// follow from the update.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn tensors(&self) -> Result<Vec<(String, Tensor)>> {
        let stack = |of: &dyn Fn(&Group) -> Tensor| {
            Tensor::stack(&self.groups.iter().map(of).collect::<Vec<_>>(), 0)
        };
        let mut all = vec![("clean".to_owned(), stack(&|g| g.clean.clone())?)];
        let noise: Option<Vec<Tensor>> = self.groups.iter().map(|g| g.noise.clone()).collect();
        if let Some(noise) = noise {
            all.push(("noise".to_owned(), Tensor::stack(&noise, 0)?));
        }
        let scores: Option<Vec<Vec<f64>>> = self.groups.iter().map(|g| g.scores.clone()).collect();
        if let Some(scores) = scores {
            let device = &candle_core::Device::Cpu;
            let rows = (scores.len(), scores.first().map_or(0, Vec::len));
            all.push(("scores".to_owned(), Tensor::from_vec(scores.concat(), rows, device)?));
        }
        Ok(all)
    }

    /// # Errors
    /// Names the tensor that is missing or has another shape.
    pub fn restore(
        update: u64,
        tensors: &std::collections::BTreeMap<String, Tensor>,
        prompts: &[&str],
        texts: &mut Texts,
        device: &candle_core::Device,
    ) -> Result<Self> {
        let find = |name: &str| {
            let found = tensors.get(name).map(|t| t.to_device(device)).transpose()?;
            match found {
                Some(t) if t.dim(0)? != prompts.len() => {
                    let message = format!("expected {} groups, got {:?}", prompts.len(), t.dims());
                    Err(Error::invalid(name, message))
                }
                found => Ok::<_, Error>(found),
            }
        };
        let clean = find("clean")?.ok_or_else(|| Error::invalid("clean", "is missing"))?;
        let (noise, scores) = (find("noise")?, find("scores")?);
        let scores = scores.map(|t| t.to_vec2::<f64>()).transpose()?;
        let encoded = texts.encode(prompts)?;
        let group = |i: usize| {
            Ok(Group {
                prompt: prompts[i].to_owned(),
                text: encoded[i].clone(),
                clean: clean.get(i)?,
                noise: noise.as_ref().map(|t| t.get(i)).transpose()?,
                scores: scores.as_ref().map(|scores| scores[i].clone()),
            })
        };
        Ok(Self { update, groups: (0..prompts.len()).map(group).collect::<Result<_>>()? })
    }
}
