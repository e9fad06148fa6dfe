//! A training run from beginning to end, or from where it was interrupted.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use candle_core::{DType, Tensor};

use super::checkpoint::{Checkpoint, Checkpoints, Progress};
use super::ema::Ema;
use super::feed::{Feed, Use};
use super::lr::factor;
use super::metrics::Recorder;
use super::optimizer::{AdamW, Gradients, Missing, Step};
use super::pass::Policy;
use super::progress::{Glance, RunProgress};
use super::resume::same;
use super::score::{Scorer, Scores};
use super::settings::{ExportFormat, ExportType, Method, Settings};
use super::setup::Setup;
use super::sharpen::{Models, Report, Sharpening};
use super::trainable::Trainable;
use super::validation::{Held, Validation, sheet};
use crate::diffusion::cost::{Budget, Cost};
use crate::diffusion::guidance::Guided;
use crate::diffusion::meter::Meter;
use crate::diffusion::sdxl_model::SdxlModel;
use crate::progress::Every;
use crate::sdxl::lora::LoraFormat;
use crate::sdxl::{ModelFolder, UNet};
use crate::util::{CancelToken, write_atomic};
use crate::{Error, Result};

/// Updates in a row without a finite gradient that end a run.
const MOST_NOT_FINITE: u64 = 10;
/// How a run ended.
#[derive(Clone, Debug)]
pub struct Outcome {
    pub step: u64,
    pub finished: bool,
    /// What all updates have cost.
    pub cost: Cost,
    /// Samples that went backward.
    pub backward: u64,
    /// What other programs can load.
    pub exported: PathBuf,
}

/// What changes.
struct State {
    trainable: Trainable,
    optimizer: AdamW,
    ema: Option<Ema>,
    /// Values of the variables that are the reference, where it is no longer the base.
    reference: Option<BTreeMap<String, Tensor>>,
    scorer: Scorer,
    feed: Feed,
    progress: Progress,
}

/// A run under way.
struct Run<'a> {
    setup: &'a Setup,
    base: Guided<SdxlModel>,
    policy: UNet,
    reference: Guided<SdxlModel>,
    gradients: Gradients,
    state: State,
    recorder: Recorder,
    /// What the next record of a step says.
    noted: BTreeMap<String, f64>,
    checkpoints: Checkpoints,
    held: Vec<Held>,
    cancel: &'a CancelToken,
}

/// Runs until `settings.steps` updates are done or `cancel` is raised; then the state is saved.
///
/// # Errors
/// Names the setting or file at fault.
pub fn run(setup: &Setup, cancel: &CancelToken, quiet: bool) -> Result<Outcome> {
    let mut run = Run::open(setup, cancel, quiet)?;
    let every = Every::Time(Duration::from_secs(10));
    let mut shown = RunProgress::new(run.state.progress.step, setup.settings.steps, every, quiet);
    if run.state.progress.step == 0 {
        run.finish_step(0)?;
    }
    let last = setup.settings.steps;
    while run.state.progress.step < last && !cancel.is_cancelled() {
        let before = run.state.scorer.state();
        match run.update(&mut shown) {
            Err(Error::Cancelled) => {
                // As it was after the last update that was finished.
                run.state.scorer.load_state(&before)?;
                run.gradients.clear();
                break;
            }
            other => other?,
        }
        let step = run.state.progress.step;
        run.finish_step(step)?;
        if step.is_multiple_of(setup.settings.save_every) && step != last {
            run.save()?;
        }
    }
    shown.finish();
    run.save()?;
    let exported = run.export(&setup.out)?;
    let Progress { step, cost, policy_passes: backward, .. } = run.state.progress;
    Ok(Outcome { step, finished: step >= last, cost, backward, exported })
}

impl<'a> Run<'a> {
    fn open(setup: &'a Setup, cancel: &'a CancelToken, quiet: bool) -> Result<Self> {
        let (settings, folder) = (&setup.settings, &setup.folder);
        let checkpoints = Checkpoints::of(&setup.out);
        let table = settings.table()?;
        let found = checkpoints.load(|before| same(before, &table, settings))?;
        let base = setup.base();
        let trainable = Trainable::new(folder, settings)?;
        let begun = settings.adapter.as_deref().filter(|_| found.is_none());
        begun.map(|path| trainable.begin_with(folder, Path::new(path))).transpose()?;
        let other_reference = begun.is_some() && setup.method == Method::Rlhf;
        let mut state = State {
            optimizer: AdamW::new(&trainable.vars, settings.optimizer())?,
            ema: (settings.ema > 0.0)
                .then(|| Ema::new(&trainable.vars, settings.ema))
                .transpose()?,
            reference: other_reference.then(|| trainable.copies()).transpose()?,
            scorer: Scorer::new(&setup.rewards, settings)?,
            feed: Feed::open(setup, &base.0, cancel, quiet)?,
            progress: Progress::default(),
            trainable,
        };
        if let Some(found) = found {
            state.restore(found, folder)?;
        }
        let held = state.feed.held(setup, cancel, quiet)?;
        let policy = state.trainable.policy(folder, settings.recompute)?;
        let reference = match &state.reference {
            None => base.clone(),
            Some(values) => {
                let unet = state.trainable.network(folder, values.clone())?;
                Guided(base.0.with_unet(unet))
            }
        };
        let gradients = Gradients::new(&state.trainable.vars, Missing::Allow)?;
        let recorder = Recorder::open(&setup.out, state.progress.step)?;
        let text =
            toml::to_string(&table).map_err(|e| Error::invalid("settings", e.to_string()))?;
        write_atomic(&setup.out.join("config.toml"), text.as_bytes())?;
        let mut run = Self {
            setup,
            base,
            policy,
            reference,
            gradients,
            state,
            recorder,
            noted: BTreeMap::new(),
            checkpoints,
            held,
            cancel,
        };
        run.recorder.text(run.state.progress.step, "settings", &text)?;
        Ok(run)
    }

    /// Validates where that is due, and records what there is of the step. To be cancelled
    /// meanwhile costs the validation alone.
    fn finish_step(&mut self, step: u64) -> Result<()> {
        let Settings { validate_every: every, steps, .. } = self.setup.settings;
        if every > 0 && (step.is_multiple_of(every) || step == steps) {
            match self.validate(step) {
                Err(Error::Cancelled) => {}
                other => other?,
            }
        }
        let noted = std::mem::take(&mut self.noted);
        if noted.is_empty() {
            return Ok(());
        }
        self.recorder.record(step, &noted)
    }

    /// The policy as it is, without gradients.
    fn actor(&self) -> Result<Guided<SdxlModel>> {
        let unet = self.state.trainable.snapshot(&self.setup.folder)?;
        Ok(Guided(self.base.0.with_unet(unet)))
    }

    fn update(&mut self, shown: &mut RunProgress) -> Result<()> {
        let settings = &self.setup.settings;
        let update = self.state.progress.step;
        let meter = Meter::new(Budget::default());
        let actor = self.actor()?;
        let state = &mut self.state;
        let using = Use { actor: &actor, meter: &meter, cancel: self.cancel };
        let (groups, scores) = state.feed.groups(update, &mut state.scorer, using)?;
        let models = Models {
            actor: &actor,
            reference: &self.reference,
            meter: &meter,
            cancel: self.cancel,
        };
        let sharpening = Sharpening {
            method: self.setup.method,
            settings,
            schedule: &self.setup.schedule,
            null: state.feed.null(),
        };
        let mut policy =
            Policy { unet: &self.policy, gradients: &mut self.gradients, meter: &meter };
        let mut report =
            sharpening.update(update, &groups, models, &mut state.scorer, &mut policy)?;
        report.means.extend(scores.iter().flat_map(Scores::means));
        self.cancel.check()?;
        let lr =
            settings.lr * factor(settings.lr_schedule, update, settings.warmup, settings.steps);
        state.optimizer.set_lr(lr)?;
        let norm = self.step_weights(&report)?;
        let progress = &mut self.state.progress;
        progress.step += 1;
        progress.policy_passes += report.policy_passes;
        for (reason, count) in &report.skipped {
            *progress.skipped.entry((*reason).to_owned()).or_default() += count;
        }
        let cost = meter.cost();
        progress.cost.units += cost.units;
        for (stage, seconds) in &cost.seconds {
            *progress.cost.seconds.entry(stage.clone()).or_default() += seconds;
        }
        self.note(&report, lr, norm, &cost.seconds);
        self.refresh_reference()?;
        if progress_failed(&self.state.progress) {
            let message = format!("no gradient was finite in {MOST_NOT_FINITE} updates in a row");
            return Err(Error::Diverged(message));
        }
        let means = |name: &str| report.means.get(name).copied();
        let (loss, reward, skipped) = (means("loss"), means("reward"), self.state.skipped());
        shown.step(self.state.progress.step, &Glance { loss, reward, skipped });
        Ok(())
    }

    /// Clips and applies the gradients; their norm, where there are any.
    fn step_weights(&mut self, report: &Report) -> Result<Option<f64>> {
        if report.used == 0 {
            self.gradients.clear();
            return Ok(None);
        }
        let norm = self.gradients.clip(self.setup.settings.clip)?;
        let state = &mut self.state;
        match state.optimizer.step(&mut self.gradients)? {
            Step::Applied { .. } => {
                state.progress.not_finite_in_a_row = 0;
                if let Some(ema) = &mut state.ema {
                    ema.update(&state.trainable.vars, state.optimizer.steps())?;
                }
            }
            Step::Skipped { .. } => {
                state.progress.not_finite += 1;
                state.progress.not_finite_in_a_row += 1;
            }
        }
        Ok(Some(norm))
    }

    fn refresh_reference(&mut self) -> Result<()> {
        let every = self.setup.settings.reference_refresh;
        if every > 0 && self.state.progress.step.is_multiple_of(every) {
            let values = self.state.trainable.copies()?;
            let unet = self.state.trainable.network(&self.setup.folder, values.clone())?;
            self.reference = Guided(self.base.0.with_unet(unet));
            self.state.reference = Some(values);
        }
        Ok(())
    }

    fn note(
        &mut self,
        report: &Report,
        lr: f64,
        norm: Option<f64>,
        seconds: &BTreeMap<String, f64>,
    ) {
        let progress = &self.state.progress;
        let noted = &mut self.noted;
        let mut put = |name: String, value: f64| noted.insert(name, value);
        report.means.iter().for_each(|(name, mean)| {
            put(format!("train/{name}"), *mean);
        });
        put("train/used_groups".into(), report.used as f64);
        put("train/lr".into(), lr);
        norm.into_iter().for_each(|norm| {
            put("train/gradient_norm".into(), norm);
        });
        put("train/not_finite".into(), progress.not_finite as f64);
        for (reason, count) in &progress.skipped {
            put(format!("train/skipped_{reason}"), *count as f64);
        }
        let units = progress.cost.units;
        put("cost/f".into(), units.f as f64);
        put("cost/v".into(), units.v as f64);
        put("cost/y".into(), units.y as f64);
        put("cost/l".into(), units.l as f64);
        put("cost/backward".into(), progress.policy_passes as f64);
        for (stage, seconds) in seconds {
            put(format!("seconds/{stage}"), *seconds);
        }
    }

    /// The average where there is one, else the weights.
    fn judged(&self) -> BTreeMap<String, Tensor> {
        self.state.ema.as_ref().map_or_else(|| self.state.trainable.values(), Ema::tensors)
    }

    fn validate(&mut self, step: u64) -> Result<()> {
        let unet = self.state.trainable.network(&self.setup.folder, self.judged())?;
        let model = Guided(self.base.0.with_unet(unet));
        let meter = Meter::new(Budget::default());
        let prompts = self.state.feed.validation_prompts().to_vec();
        let validation = Validation { setup: self.setup, prompts };
        let texts = self.state.feed.texts();
        let (mut means, images) = validation.run(&model, texts, &meter, self.cancel)?;
        if !self.held.is_empty() {
            means.extend(validation.loss(&model, &self.held, &meter, self.cancel)?);
        }
        let named = means.into_iter().map(|(name, mean)| (format!("validation/{name}"), mean));
        self.noted.extend(named);
        if let Some(sheet) = sheet(&images) {
            self.recorder.image(step, "validation", &sheet)?;
            let path = self.setup.out.join("validation").join(format!("step-{step:06}.png"));
            let mut png = Vec::new();
            sheet
                .write_to(&mut std::io::Cursor::new(&mut png), image::ImageFormat::Png)
                .map_err(|e| Error::file(&path, e))?;
            write_atomic(&path, &png)?;
        }
        Ok(())
    }

    fn save(&mut self) -> Result<()> {
        self.recorder.flush()?;
        let (state, settings) = (&mut self.state, &self.setup.settings);
        state.progress.scorer = state.scorer.state();
        let mut tensors = BTreeMap::from([
            ("weights".to_owned(), state.trainable.values()),
            ("optimizer".to_owned(), state.optimizer.state_view()?),
        ]);
        if let Some(ema) = &state.ema {
            tensors.insert("ema".into(), ema.tensors());
        }
        if let Some(reference) = &state.reference {
            tensors.insert("reference".into(), reference.clone());
        }
        state.progress.replay = state.feed.replay().map(|replay| replay.update);
        if let Some(replay) = state.feed.replay() {
            tensors.insert("replay".into(), replay.tensors()?.into_iter().collect());
        }
        let checkpoint = Checkpoint { progress: state.progress.clone(), tensors };
        self.checkpoints.save(&checkpoint, &settings.table()?, settings.keep, |folder| {
            match self.setup.settings.train {
                super::settings::Trained::Lora => self.export(folder).map(|_| ()),
                super::settings::Trained::Full => Ok(()),
            }
        })
    }

    /// Writes what other programs load: an adapter file, or the whole checkpoint in the
    /// diffusers layout.
    fn export(&self, out: &Path) -> Result<PathBuf> {
        let settings = &self.setup.settings;
        let dtype = match settings.export_dtype {
            ExportType::F16 => DType::F16,
            ExportType::Bf16 => DType::BF16,
            ExportType::F32 => DType::F32,
        };
        let Some(adapters) = self.state.trainable.adapters(self.judged())? else {
            let path = out.join("model");
            let folder = self.setup.folder.with_unet_weights(self.judged())?;
            folder.save(&path, dtype, 10_000_000_000)?;
            return Ok(path);
        };
        let path = out.join("adapter.safetensors");
        let format = match settings.export_format {
            ExportFormat::Kohya => LoraFormat::Kohya,
            ExportFormat::Diffusers => LoraFormat::Diffusers,
        };
        let names = self.setup.folder.adapter_names();
        adapters.write(&path, &names, format, dtype, &self.header())?;
        Ok(path)
    }

    /// What an adapter's file says of its training.
    fn header(&self) -> BTreeMap<String, String> {
        let settings = &self.setup.settings;
        let (width, height) = self.setup.size;
        let method = self.setup.method.name();
        let version = env!("CARGO_PKG_VERSION");
        BTreeMap::from(
            [
                ("ss_steps", self.state.progress.step.to_string()),
                ("ss_learning_rate", settings.lr.to_string()),
                ("ss_seed", settings.seed.to_string()),
                ("ss_resolution", format!("({width}, {height})")),
                (
                    "ss_training_comment",
                    format!(
                        "Diffusion-Sharpening, {method}; rewards {}",
                        settings.rewards.join(",")
                    ),
                ),
                ("modelspec.resolution", format!("{width}x{height}")),
                ("modelspec.implementation", format!("diffusion-sharpening {version}")),
            ]
            .map(|(key, value)| (key.to_owned(), value)),
        )
    }
}

fn progress_failed(progress: &Progress) -> bool {
    progress.not_finite_in_a_row >= MOST_NOT_FINITE
}

impl State {
    fn skipped(&self) -> u64 {
        self.progress.skipped.values().sum()
    }

    fn restore(&mut self, found: Checkpoint, folder: &ModelFolder) -> Result<()> {
        let Checkpoint { progress, mut tensors } = found;
        let mut part = |name: &str| {
            let found = tensors.remove(name);
            found.ok_or_else(|| Error::invalid(name, "the checkpoint lacks it"))
        };
        self.trainable.load(&part("weights")?)?;
        self.optimizer.load_state(&part("optimizer")?)?;
        if let Some(ema) = &mut self.ema {
            ema.load(&part("ema")?)?;
        }
        if let Ok(reference) = part("reference") {
            let on_device =
                |(name, t): (String, Tensor)| Ok::<_, Error>((name, t.to_device(folder.device())?));
            self.reference = Some(reference.into_iter().map(on_device).collect::<Result<_>>()?);
        }
        if let Some(update) = progress.replay {
            self.feed.restore(update, &part("replay")?)?;
        }
        self.scorer.load_state(&progress.scorer)?;
        self.progress = progress;
        Ok(())
    }
}
