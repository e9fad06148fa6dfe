//! What an update learns from: generated images of prompts, or images with captions. All of it
//! follows from the settings' seed and the number of the update.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use candle_core::Tensor;
use rand::Rng;

use super::latents::{Batches, CacheKey, Crop, LatentCache, LatentExample, Transform};
use super::rollout::{Replay, Rollout};
use super::score::{Scorer, Scores};
use super::settings::{Method, Settings};
use super::setup::Setup;
use super::sharpen::{Group, group_key};
use super::source::Order;
use super::texts::Texts;
use super::validation::Held;
use crate::data::images::{self, ImageSource};
use crate::data::prompts;
use crate::diffusion::denoiser::{NoiseModel, TextCond};
use crate::diffusion::guidance::Guided;
use crate::diffusion::meter::Meter;
use crate::diffusion::noise::Purpose;
use crate::diffusion::sdxl_model::SdxlModel;
use crate::progress::{Every, Progress};
use crate::util::CancelToken;
use crate::{Error, Result};

/// What generating needs.
#[derive(Clone, Copy)]
pub struct Use<'a> {
    pub actor: &'a Guided<SdxlModel>,
    pub meter: &'a Meter,
    pub cancel: &'a CancelToken,
}

/// Prompts or image-text pairs, with the texts' encodings.
pub struct Feed {
    settings: Settings,
    texts: Texts,
    kind: Kind,
    validation_prompts: Vec<String>,
}

enum Kind {
    Prompts { all: Vec<String>, order: Order, rollout: Box<Rollout>, replay: Option<Replay> },
    Pairs { cache: LatentCache, batches: Batches },
}

impl Feed {
    /// Reads prompts, or encodes what is not cached yet of the images.
    ///
    /// # Errors
    /// Names the source that is unusable.
    pub fn open(
        setup: &Setup,
        base: &SdxlModel,
        cancel: &CancelToken,
        quiet: bool,
    ) -> Result<Self> {
        let settings = &setup.settings;
        let listed = |source| -> Result<Vec<String>> {
            let list = prompts::load(source)?;
            if !list.skipped.is_empty() {
                tracing::warn!(skipped = list.skipped.len(), first = ?list.skipped[0], "prompts");
            }
            Ok(list.prompts)
        };
        let kind = match (setup.method, &settings.data, &settings.prompts) {
            (Method::Rlhf, _, Some(source)) => {
                let all = listed(source)?;
                let order = Order::new(all.len(), settings.seed);
                let shape = base.latent_shape(setup.size.0, setup.size.1)?;
                let rollout = Box::new(Rollout::new(settings, &setup.schedule, shape)?);
                Kind::Prompts { all, order, rollout, replay: None }
            }
            (Method::Sft, Some(source), _) => {
                let transform = transform(setup, settings.crop, settings.flip, settings.buckets);
                let cache = cached(setup, source, transform, settings.variants, cancel, quiet)?;
                let batches = Batches::new(cache.buckets(), settings.batch, settings.seed)?;
                Kind::Pairs { cache, batches }
            }
            (Method::Rlhf, ..) => return Err(Error::invalid("prompts", "missing: give prompts")),
            (Method::Sft, ..) => {
                return Err(Error::invalid("data", "missing: give images with captions"));
            }
        };
        Ok(Self {
            settings: settings.clone(),
            texts: Texts::new(base.clone(), setup.size)?,
            kind,
            validation_prompts: match settings.validate_every {
                0 => Vec::new(),
                _ => listed(&settings.validation_prompts)?,
            },
        })
    }

    /// The groups of an update, and the scores of images that were generated and scored for it.
    ///
    /// # Errors
    /// The models', `Error::Cancelled`; then nothing has changed.
    pub fn groups(
        &mut self,
        update: u64,
        scorer: &mut Scorer,
        using: Use,
    ) -> Result<(Vec<Group>, Option<Scores>)> {
        let settings = &self.settings;
        match &mut self.kind {
            Kind::Prompts { all, order, rollout, replay } => {
                let generated = update - update % settings.rollout_reuse;
                if let Some(known) = replay.as_ref().filter(|known| known.update == generated) {
                    return Ok((known.groups.clone(), None));
                }
                let batch = order.batch(generated / settings.rollout_reuse, settings.batch);
                let prompts: Vec<&str> = batch.iter().map(|i| all[*i].as_str()).collect();
                let context = (using.meter, using.cancel);
                let (groups, scores) = rollout.groups(
                    generated,
                    &prompts,
                    &mut self.texts,
                    using.actor,
                    scorer,
                    context,
                )?;
                if settings.rollout_reuse > 1 {
                    *replay = Some(Replay { update: generated, groups: groups.clone() });
                }
                Ok((groups, scores))
            }
            Kind::Pairs { cache, batches } => {
                let examples: Vec<LatentExample> =
                    batches.at(update).into_iter().map(|i| cache.get(i)).collect::<Result<_>>()?;
                let captions: Vec<&str> = examples.iter().map(|e| e.caption.as_str()).collect();
                let texts = self.texts.encode(&captions)?;
                let null = self.texts.null();
                let device = using.actor.0.device();
                let group = |(i, (example, text)): (usize, (&LatentExample, TextCond))| {
                    let key = group_key(settings.seed, update, i as u64);
                    let dropped = settings.prompt_dropout > 0.0
                        && key.rng(Purpose::Training, 2, 0).random_bool(settings.prompt_dropout);
                    let text = if dropped { null.clone() } else { text };
                    let noise = key.normal(
                        Purpose::Training,
                        1,
                        0,
                        example.mean.shape(),
                        &candle_core::Device::Cpu,
                    )?;
                    let clean = (&example.mean + (noise * &example.std)?)?.to_device(device)?;
                    Ok(Group {
                        prompt: example.caption.clone(),
                        text: TextCond { time_ids: example.time_ids, ..text },
                        clean: clean.unsqueeze(0)?,
                        noise: None,
                        scores: None,
                    })
                };
                let groups = examples.iter().zip(texts).enumerate().map(group);
                Ok((groups.collect::<Result<_>>()?, None))
            }
        }
    }

    /// Images whose loss is followed: the middle of each, whole, at the mean of its latents.
    ///
    /// # Errors
    /// Names the source that is unusable.
    pub fn held(&mut self, setup: &Setup, cancel: &CancelToken, quiet: bool) -> Result<Vec<Held>> {
        let Some(source) = &self.settings.validation_data else { return Ok(Vec::new()) };
        if self.settings.validate_every == 0 {
            return Ok(Vec::new());
        }
        let cache =
            cached(setup, source, transform(setup, Crop::Center, false, false), 1, cancel, quiet)?;
        let mut held = Vec::with_capacity(cache.len());
        for i in 0..cache.len() {
            let example = cache.get(i)?;
            let text = self.texts.encode(&[&example.caption])?.remove(0);
            let text = TextCond { time_ids: example.time_ids, ..text };
            held.push(Held { clean: example.mean.to_device(setup.folder.device())?, text });
        }
        Ok(held)
    }

    /// The null conditioning of sampling.
    pub fn null(&self) -> TextCond {
        self.texts.null().clone()
    }

    pub fn texts(&mut self) -> &mut Texts {
        &mut self.texts
    }

    pub fn validation_prompts(&self) -> &[String] {
        &self.validation_prompts
    }

    /// What a checkpoint must keep of generated images.
    pub fn replay(&self) -> Option<&Replay> {
        match &self.kind {
            Kind::Prompts { replay, .. } => replay.as_ref(),
            Kind::Pairs { .. } => None,
        }
    }

    /// Goes on with images that were generated for `update`.
    ///
    /// # Errors
    /// When they do not fit the run.
    pub fn restore(&mut self, update: u64, tensors: &BTreeMap<String, Tensor>) -> Result<()> {
        let Kind::Prompts { all, order, replay, .. } = &mut self.kind else {
            return Err(Error::invalid("replay", "images from data are not generated"));
        };
        let batch = order.batch(update / self.settings.rollout_reuse, self.settings.batch);
        let prompts: Vec<&str> = batch.iter().map(|i| all[*i].as_str()).collect();
        let device = self.texts.null().context.device().clone();
        *replay = Some(Replay::restore(update, tensors, &prompts, &mut self.texts, &device)?);
        Ok(())
    }
}

fn transform(setup: &Setup, crop: Crop, flip: bool, buckets: bool) -> Transform {
    let factor = setup.folder.vae.config().factor() as u32;
    // Buckets in steps of 64 pixels for SDXL.
    Transform { resolution: setup.size.0, crop, flip, buckets, step: 8 * factor }
}

/// The latents of a set, encoded now where they are not cached yet.
fn cached(
    setup: &Setup,
    source: &ImageSource,
    transform: Transform,
    variants: u32,
    cancel: &CancelToken,
    quiet: bool,
) -> Result<LatentCache> {
    let set = images::open(source, transform.resolution)?;
    let settings = &setup.settings;
    let own = || setup.out.join("latents");
    let dir = settings.cache.as_ref().map_or_else(own, PathBuf::from);
    let key = CacheKey { transform, variants, seed: settings.seed };
    let every = Every::Time(Duration::from_secs(10));
    let mut shown = Progress::new("image", 0, set.len() as u64, every, quiet);
    let cache =
        LatentCache::open(set.as_ref(), &setup.folder, &key, &dir, cancel, &mut |done, all| {
            shown.show(done as u64, &format!("encoding {done} of {all} images"));
        })?;
    shown.finish();
    if !cache.skipped().is_empty() {
        tracing::warn!(skipped = cache.skipped().len(), first = ?cache.skipped()[0], "images");
    }
    Ok(cache)
}
