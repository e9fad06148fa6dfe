//! The steps of Diffusion-Sharpening whose speed is measured: `tools/bench_torch_sharpen.py` does
//! the same under the same names, from what [`super::sharpen_step`] writes.

use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Tensor};

use super::adapter::TARGETS;
use super::workload;
use crate::data::scenes::export::example;
use crate::data::scenes::{Split, render::render};
use crate::diffusion::denoiser::Denoiser;
use crate::diffusion::guidance::Guided;
use crate::diffusion::meter::Meter;
use crate::diffusion::noise::{NoiseKey, Purpose};
use crate::diffusion::schedule::NoiseSchedule;
use crate::diffusion::sdxl_model::SdxlModel;
use crate::nn::device::Placement;
use crate::rewards::registry;
use crate::sdxl::{ModelFolder, UNet};
use crate::train::dry_run::UpdateCost;
use crate::train::latents::pixels;
use crate::train::optimizer::{AdamW, Gradients, Missing, Step};
use crate::train::pass::Policy;
use crate::train::rollout::Rollout;
use crate::train::score::Scorer;
use crate::train::settings::{Method, Renoise, RewardScale, Score, Settings, Target, Trained};
use crate::train::sharpen::{Group, Models, Report, Sharpening};
use crate::train::texts::Texts;
use crate::train::trainable::Trainable;
use crate::util::CancelToken;
use crate::{Error, Result};

/// Steps of a sampler through all timesteps of the schedule.
const STEPS: usize = 25;
const TIMESTEPS: usize = 1000;
/// The deviation of the adapter's up matrices: one that changes nothing has a gradient in half of
/// its matrices only.
const UP: f64 = 0.01;
/// The number of the step: the same one each time, so that every run does the same.
pub(super) const UPDATE: u64 = 0;

/// What of a step is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Everything: images generated (RLHF), trajectories, scores, gradients, optimizer.
    Whole,
    /// The images alone.
    Rollouts,
    /// All but the images, which are there already.
    Replay,
}

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    pub method: Method,
    pub trained: Trained,
    pub part: Part,
}

impl Piece {
    /// Every piece with the name it is reported under.
    pub const ALL: [(&'static str, Self); 6] = [
        ("sharpen_sft_lora", Self::new(Method::Sft, Trained::Lora, Part::Whole)),
        ("sharpen_rlhf_lora", Self::new(Method::Rlhf, Trained::Lora, Part::Whole)),
        ("sharpen_rlhf_rollouts", Self::new(Method::Rlhf, Trained::Lora, Part::Rollouts)),
        ("sharpen_rlhf_lora_replay", Self::new(Method::Rlhf, Trained::Lora, Part::Replay)),
        ("sharpen_rlhf_full", Self::new(Method::Rlhf, Trained::Full, Part::Whole)),
        ("sharpen_rlhf_full_replay", Self::new(Method::Rlhf, Trained::Full, Part::Replay)),
    ];

    const fn new(method: Method, trained: Trained, part: Part) -> Self {
        Self { method, trained, part }
    }
}

/// Trajectories and states as in the paper; steps, groups and the missing guidance as in the
/// released scripts; the reference at every state, as `ds-train` has it. Chains start where all
/// of their states exist, so that every step costs the same. Where every weight is trained, the
/// graph of one group at a time is what fits beside them.
pub fn settings(method: Method, trained: Trained) -> Settings {
    let (batch, n, m) = (4, 3, 3);
    Settings {
        train: trained,
        batch,
        micro: if trained == Trained::Full { 1 } else { batch },
        n,
        m,
        chain_steps: STEPS,
        chain_guidance: 1.0,
        targets: TARGETS.map(String::from).to_vec(),
        score: Score::Chain,
        t_min: ((m - 1) * (TIMESTEPS / STEPS)) as u32,
        t_max: TIMESTEPS as u32 - 1,
        beta: 500.0,
        reward_scale: RewardScale::None,
        renoise: Renoise::FreshIndep,
        target: Target::EpsInit,
        rollout_steps: STEPS,
        rollout_solver: "ddim".into(),
        rollout_guidance: 1.0,
        rollout_reuse: 1,
        rollout_batch: batch * n,
        decode_batch: batch * n,
        lr: 1e-6,
        ..Settings::from(method)
    }
}

/// A checkpoint with an adapter, or all of its U-Net, in training.
pub struct Steps {
    pub(super) method: Method,
    pub(super) settings: Settings,
    pub(super) schedule: NoiseSchedule,
    pub(super) prompts: Vec<String>,
    pub(super) trainable: Trainable,
    pub(super) gradients: Gradients,
    folder: Arc<ModelFolder>,
    base: Guided<SdxlModel>,
    scorer: Scorer,
    texts: Texts,
    rollout: Rollout,
    policy: UNet,
    optimizer: AdamW,
    /// What a part that generates nothing learns from.
    given: Vec<Group>,
}

impl Steps {
    /// Opens the checkpoint; `latent` is (height, width) of the latents where it should not be
    /// the model's own.
    ///
    /// # Errors
    /// Names the file that is missing or unusable, or `rewards` without a scene CLIP.
    pub fn open(
        path: &Path,
        (method, trained): (Method, Trained),
        latent: Option<(usize, usize)>,
        placement: &Placement,
    ) -> Result<Self> {
        let mut settings = settings(method, trained);
        if placement.device.is_cuda() {
            // What a graph of SDXL at 512 px takes is to fit into 80 GB beside the rest.
            settings.micro = settings.micro.min(2);
        }
        let scorer = Scorer::new(&registry::for_model(path)?, &settings)?;
        let folder = Arc::new(ModelFolder::open(path, placement)?);
        let schedule = NoiseSchedule::new(&folder.scheduler()?)?;
        if schedule.num_train_timesteps() != TIMESTEPS {
            let message = format!("expected a schedule of {TIMESTEPS} timesteps");
            return Err(Error::file(path, message));
        }
        let size = workload::pixels(&folder, latent);
        let base = Guided(SdxlModel::new(folder.clone()));
        let shape = base.latent_shape(size.0, size.1)?;
        let trainable = Trainable::new(&folder, &settings)?;
        let key = NoiseKey::new(settings.seed);
        for (index, (name, var)) in trainable.vars.iter().enumerate() {
            if trained == Trained::Lora && name.ends_with(".up") {
                let index = index as u64;
                let unit =
                    key.normal(Purpose::Training, UPDATE, index, var.dims(), var.device())?;
                var.set(&(unit * UP)?)?;
            }
        }
        let mut steps = Self {
            rollout: Rollout::new(&settings, &schedule, shape)?,
            texts: Texts::new(base.0.clone(), size)?,
            policy: trainable.policy(&folder, settings.recompute)?,
            gradients: Gradients::new(&trainable.vars, Missing::Refuse)?,
            optimizer: AdamW::new(&trainable.vars, settings.optimizer())?,
            prompts: Vec::new(),
            given: Vec::new(),
            method,
            settings,
            schedule,
            trainable,
            folder,
            base,
            scorer,
        };
        match method {
            Method::Sft => steps.read_scenes(size)?,
            Method::Rlhf => {
                let prompts = Split::Train.prompts(steps.settings.batch);
                steps.prompts = prompts.iter().map(ToString::to_string).collect();
            }
        }
        Ok(steps)
    }

    /// The data of SFT: scenes of (width, height) pixels with their captions.
    fn read_scenes(&mut self, (width, height): (u32, u32)) -> Result<()> {
        for index in 0..self.settings.batch as u64 {
            let (caption, scene) = example(Split::Train, self.settings.seed, index);
            let prompt = caption.to_string();
            let image = pixels(&[&render(&scene, width, height)])?;
            let vae = &self.folder.vae;
            let posterior = vae.encode(&image.to_device(self.folder.device())?)?;
            let text = self.texts.encode(&[&prompt])?.remove(0);
            // Latents are f32 whatever the VAE computes in.
            let clean = vae.scale(&posterior.mean)?.to_dtype(DType::F32)?;
            self.given.push(Group {
                prompt: prompt.clone(),
                text,
                clean,
                noise: None,
                scores: None,
            });
            self.prompts.push(prompt);
        }
        Ok(())
    }

    /// Makes what `part` does not make itself.
    ///
    /// # Errors
    /// The networks'.
    pub fn prepare(&mut self, part: Part) -> Result<()> {
        if self.method == Method::Rlhf && part == Part::Replay {
            let actor = self.actor()?;
            self.given = self.generate(&actor, &Meter::default())?;
        }
        Ok(())
    }

    /// What `part` costs.
    ///
    /// # Errors
    /// None in practice.
    pub fn planned(&self, part: Part) -> Result<UpdateCost> {
        let whole = UpdateCost::of(self.method, &self.settings, &self.schedule)?;
        Ok(match part {
            Part::Whole => whole,
            Part::Rollouts => UpdateCost { rollout: whole.rollout, ..UpdateCost::default() },
            Part::Replay => UpdateCost { rollout: 0.0, ..whole },
        })
    }

    /// Does `part` once and gives the loss, or the images' latents.
    ///
    /// # Errors
    /// The networks'; a gradient that is not finite.
    pub fn run(&mut self, part: Part, meter: &Meter) -> Result<Tensor> {
        let (report, groups) = self.learn(part, meter)?;
        let Some(report) = report else {
            let clean: Vec<&Tensor> = groups.iter().map(|group| &group.clean).collect();
            return Ok(Tensor::stack(&clean, 0)?);
        };
        self.gradients.clip(self.settings.clip)?;
        if let Step::Skipped { norm } = self.optimizer.step(&mut self.gradients)? {
            return Err(Error::invalid("gradients", format!("their norm is {norm}")));
        }
        let loss = report.means.get("loss").copied();
        let loss = loss.ok_or_else(|| Error::invalid("scores", "no group has a preference"))?;
        // Where the weights are: a measurement waits for that device.
        Ok(Tensor::new(loss, self.folder.device())?)
    }

    /// `part` up to the gradients, with what it learnt from.
    pub(super) fn learn(
        &mut self,
        part: Part,
        meter: &Meter,
    ) -> Result<(Option<Report>, Vec<Group>)> {
        let actor = self.actor()?;
        let groups = match (self.method, part) {
            (Method::Sft, _) | (_, Part::Replay) => self.given.clone(),
            (Method::Rlhf, _) => self.generate(&actor, meter)?,
        };
        if part == Part::Rollouts {
            return Ok((None, groups));
        }
        let cancel = CancelToken::default();
        let models = Models { actor: &actor, reference: &self.base, meter, cancel: &cancel };
        let sharpening = sharpening(self.method, &self.settings, &self.schedule, &self.texts);
        let mut policy = Policy { unet: &self.policy, gradients: &mut self.gradients, meter };
        let report = sharpening.update(UPDATE, &groups, models, &mut self.scorer, &mut policy)?;
        Ok((Some(report), groups))
    }

    /// The method.
    pub(super) fn sharpening(&self) -> Sharpening<'_> {
        sharpening(self.method, &self.settings, &self.schedule, &self.texts)
    }

    /// The policy as it is, without gradients.
    fn actor(&self) -> Result<Guided<SdxlModel>> {
        Ok(Guided(self.base.0.with_unet(self.trainable.snapshot(&self.folder)?)))
    }

    fn generate(&mut self, actor: &Guided<SdxlModel>, meter: &Meter) -> Result<Vec<Group>> {
        let prompts: Vec<&str> = self.prompts.iter().map(String::as_str).collect();
        let (texts, scorer) = (&mut self.texts, &mut self.scorer);
        let cancel = CancelToken::default();
        let (groups, _) =
            self.rollout.groups(UPDATE, &prompts, texts, actor, scorer, (meter, &cancel))?;
        Ok(groups)
    }
}

fn sharpening<'a>(
    method: Method,
    settings: &'a Settings,
    schedule: &'a NoiseSchedule,
    texts: &Texts,
) -> Sharpening<'a> {
    Sharpening { method, settings, schedule, null: texts.null().clone() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diffusion::cost::Budget;

    #[test]
    fn every_part_costs_what_is_said() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny");
        let placement = Placement::cpu(candle_core::DType::F32);
        // Small latents: what is counted does not depend on them.
        for (name, Piece { method, trained, part }) in Piece::ALL {
            settings(method, trained).check(method).unwrap();
            let mut steps =
                Steps::open(&path, (method, trained), Some((8, 8)), &placement).unwrap();
            steps.prepare(part).unwrap();
            let meter = Meter::new(Budget::default());
            let made = steps.run(part, &meter).unwrap();
            let finite = made.to_dtype(candle_core::DType::F64).unwrap().sum_all().unwrap();
            assert!(finite.to_scalar::<f64>().unwrap().is_finite(), "{name}");
            let (planned, spent) = (steps.planned(part).unwrap(), meter.spent());
            assert_eq!(spent.f as f64, planned.forwards(), "{name}");
            assert_eq!(
                (spent.y as f64, spent.v as f64),
                (planned.images, planned.images),
                "{name}"
            );
            assert!(steps.gradients.is_empty(), "{name}");
        }
    }

    #[test]
    fn a_checkpoint_without_a_reward_is_refused() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/parity/ddim_tiny");
        let placement = Placement::cpu(candle_core::DType::F32);
        let lora = (Method::Sft, Trained::Lora);
        let error = Steps::open(&path, lora, None, &placement).err().unwrap().to_string();
        assert!(error.starts_with("rewards:") && error.contains("scene-clip"), "{error}");
    }
}
