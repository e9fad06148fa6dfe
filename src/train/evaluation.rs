//! Images of prompts and seeds, and what every reward makes of each.

use std::collections::BTreeMap;

use image::RgbImage;

use super::setup::Setup;
use super::texts::Texts;
use crate::Result;
use crate::diffusion::cost::Units;
use crate::diffusion::denoiser::{Conditioning, NoiseModel};
use crate::diffusion::guidance::Guided;
use crate::diffusion::meter::{Meter, MeteredDecoder, MeteredDenoiser};
use crate::diffusion::noise::NoiseKey;
use crate::diffusion::sdxl_model::SdxlModel;
use crate::diffusion::solver::SolverSpec;
use crate::diffusion::trajectory::{Row, State, Trajectory};
use crate::util::CancelToken;

/// Plain sampling with the checkpoint's own solver, as a request for that seed to the server.
#[derive(Clone, Copy)]
pub struct Evaluation<'a> {
    pub setup: &'a Setup,
    pub steps: usize,
    /// Guidance scale; 1 is none.
    pub guidance: f64,
}

/// An image with its scores by reward; NaN where scoring failed.
#[derive(Clone, Debug)]
pub struct Scored {
    pub image: RgbImage,
    pub scores: BTreeMap<String, f64>,
}

impl Evaluation<'_> {
    /// Gives `each` the image of every prompt and seed, in their order.
    ///
    /// # Errors
    /// The models', `Error::Cancelled`.
    pub fn run(
        &self,
        model: &Guided<SdxlModel>,
        texts: &mut Texts,
        wanted: &[(&str, u64)],
        meter: &Meter,
        cancel: &CancelToken,
        each: &mut dyn FnMut(Scored),
    ) -> Result<()> {
        let Setup { settings, schedule, scheduler, rewards, size, .. } = self.setup;
        let shape = model.0.latent_shape(size.0, size.1)?;
        let solver =
            SolverSpec::ode(scheduler.default_solver(), schedule).build(schedule, self.steps)?;
        let trajectory = Trajectory {
            solver: solver.as_ref(),
            denoiser: MeteredDenoiser::new(model, meter),
            micro_batch: settings.rollout_batch,
            cancel,
        };
        let decoder = MeteredDecoder::new(&model.0, meter);
        let calls: u64 = rewards.iter().map(|reward| reward.external_calls()).sum();
        for part in wanted.chunks(settings.decode_batch) {
            cancel.check()?;
            let prompts: Vec<&str> = part.iter().map(|(prompt, _)| *prompt).collect();
            let encoded = texts.encode(&prompts)?;
            let conds: Vec<Conditioning> =
                encoded.into_iter().map(|text| texts.conditioning(text, self.guidance)).collect();
            let keys = part.iter().map(|(_, seed)| NoiseKey::new(*seed));
            let rows: Vec<Row> =
                keys.zip(&conds).map(|(key, cond)| Row { key, candidate: 0, cond }).collect();
            let noise = trajectory.initial_noise(&rows, shape)?;
            let state = State::start(solver.as_ref(), &noise)?;
            let end = trajectory.run(state, solver.steps(), &rows, &mut |_| Ok(()))?;
            let images = decoder.decode(&end.x)?;
            let v = images.len() as u64;
            meter.reserve(Units { v, l: v * calls, ..Units::default() })?;
            let scores = meter.time("reward", || rewards.score(&images, &prompts))?;
            for (i, image) in images.into_iter().enumerate() {
                let scores = scores.iter().map(|(name, all)| (name.clone(), all[i])).collect();
                each(Scored { image, scores });
            }
        }
        Ok(())
    }
}
