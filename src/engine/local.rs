//! The in-process engine.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use candle_core::Device;
use serde_json::{Value, json};

use super::memory;
use super::model::Model;
use super::request::{CostReport, GenerateRequest, GeneratedImage, Generation, Listing, ModelInfo};
use super::resolve::{Resolution, request_of, resolve};
use super::{Backend, Planned, Progress};
use crate::data::scenes::{Caption, judge::judge};
use crate::diffusion::cost::Cost;
use crate::diffusion::denoiser::{Conditioning, Denoiser, NoiseModel, TextCond};
use crate::diffusion::guidance::Guided;
use crate::diffusion::meter::{Meter, MeteredDecoder, MeteredDenoiser};
use crate::diffusion::noise::NoiseKey;
use crate::diffusion::recording::{Digests, Recorded};
use crate::diffusion::sdxl_model::SdxlModel;
use crate::diffusion::solver::SolverSpec;
use crate::diffusion::sparing::{RowLimit, SparingDecoder, SparingDenoiser};
use crate::nn::device::Placement;
use crate::nn::device_memory::DeviceMemory;
use crate::rewards::MeteredVerifier;
use crate::sdxl::ModelFolder;
use crate::search::{self, Outcome, SearchEnv, SearchEvent};
use crate::util::CancelToken;
use crate::{Error, Result};

/// Every model of a folder, on one device.
pub struct Engine {
    models: Vec<Arc<Model>>,
    listed: Vec<ModelInfo>,
    /// Bytes, where it is not what the device has.
    memory: Option<u64>,
}

impl Engine {
    /// Opens every checkpoint in `models`, folders in the diffusers layout and single
    /// `.safetensors` files, in name order; or `models` itself when it is one.
    ///
    /// # Errors
    /// When there is no checkpoint, or one is unusable.
    pub fn open(models: &Path, placement: &Placement) -> Result<Self> {
        let mut found = Vec::new();
        if ModelFolder::is_at(models) {
            found.push(models.to_path_buf());
        } else {
            for entry in std::fs::read_dir(models).map_err(|e| Error::file(models, e))? {
                let path = entry.map_err(|e| Error::file(models, e))?.path();
                if ModelFolder::is_at(&path) {
                    found.push(path);
                }
            }
            found.sort();
        }
        if found.is_empty() {
            let message = "no checkpoint here: expected folders with a model_index.json \
                           (diffusers layout) or .safetensors files (Stability's layout)";
            return Err(Error::file(models, message));
        }
        let mut opened = Vec::new();
        for place in found {
            let path = place.canonicalize().map_err(|e| Error::file(&place, e))?;
            // The name as it was given: a file is often a link to one with another name.
            let name = if place.is_file() { place.file_stem() } else { path.file_name() };
            let id = name.map_or_else(|| "model".into(), |n| n.to_string_lossy().into_owned());
            tracing::info!(model = %id, "loading");
            if opened.iter().any(|m: &Arc<Model>| m.id == id) {
                let message = format!("there is another checkpoint called '{id}' beside it");
                return Err(Error::file(&place, message));
            }
            opened.push(Arc::new(Model::open(id, &place, placement)?));
        }
        let listed = opened.iter().map(|m| m.info()).collect();
        Ok(Self { models: opened, listed, memory: None })
    }

    /// Refuses requests that take more than `bytes` of memory, weights counted, instead of those
    /// that take more than the device has.
    #[must_use]
    pub fn with_memory(self, bytes: u64) -> Self {
        Self { memory: Some(bytes), ..self }
    }

    fn resolve(&self, model: &Model, request: &GenerateRequest) -> Result<Resolution> {
        let all = || DeviceMemory::of(model.base().folder().device()).map(|m| m.total);
        resolve(model, request, self.memory.or_else(all))
    }

    fn model(&self, id: Option<&str>) -> Result<&Arc<Model>> {
        let Some(id) = id else {
            return self.models.first().ok_or_else(|| Error::invalid("model", "none is loaded"));
        };
        let found = self.models.iter().find(|m| m.id == id);
        found.ok_or_else(|| {
            Error::unknown("model", "model", id, self.models.iter().map(|m| m.id.as_str()))
        })
    }
}

impl Backend for Engine {
    fn models(&self) -> Vec<ModelInfo> {
        self.listed.clone()
    }

    fn methods(&self) -> Vec<Listing> {
        search::listings()
    }

    fn rewards(&self) -> Vec<Listing> {
        let all = self.models.iter().flat_map(|m| m.rewards.listings());
        all.map(|l| (l.name.clone(), l)).collect::<BTreeMap<_, _>>().into_values().collect()
    }

    fn plan(&self, request: &GenerateRequest) -> Result<Planned> {
        let model = self.model(request.model.as_deref())?;
        Ok(self.resolve(model, request)?.planned)
    }

    fn generate(
        &self,
        planned: &Planned,
        cancel: &CancelToken,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Generation> {
        let model = self.model(Some(&planned.resolved.model))?;
        let resolution = self.resolve(model, &request_of(&planned.resolved))?;
        let mut run = Run::prepare(model, &resolution, cancel)?;
        for index in 0..planned.resolved.n {
            run.image(index, progress)?;
        }
        Ok(run.finish())
    }
}

/// One request under way.
struct Run<'a> {
    model: &'a Model,
    resolution: &'a Resolution,
    cancel: &'a CancelToken,
    network: Guided<SdxlModel>,
    cond: Conditioning,
    /// What memory was found to hold.
    unet_limit: RowLimit,
    vae_limit: RowLimit,
    images: Vec<GeneratedImage>,
    cost: Cost,
    trace: Vec<Value>,
}

impl<'a> Run<'a> {
    fn prepare(
        model: &'a Model,
        resolution: &'a Resolution,
        cancel: &'a CancelToken,
    ) -> Result<Self> {
        let resolved = &resolution.planned.resolved;
        let network = model.network(resolved.adapter.as_deref())?;
        let size = (resolved.width, resolved.height);
        let meter = Meter::new(crate::diffusion::cost::Budget::default());
        let cond = meter
            .time("text", || -> Result<Conditioning> {
                let encode = |text: &str| -> Result<TextCond> {
                    Ok(network.0.encode(&model.tokenizers, &[text], size)?.remove(0))
                };
                let negative = match &resolved.negative_prompt {
                    _ if resolved.guidance_scale == 1.0 => None,
                    Some(text) => Some(encode(text)?),
                    None => Some(network.0.null(&model.tokenizers, size)?),
                };
                Ok(Conditioning {
                    positive: encode(&resolved.prompt)?,
                    negative,
                    guidance_scale: resolved.guidance_scale,
                    guidance_rescale: resolved.guidance_rescale,
                })
            })
            .map_err(|error| error.during("in the text towers", "free memory of the device"))?;
        let cost = meter.cost();
        Ok(Self {
            model,
            resolution,
            cancel,
            network,
            cond,
            unet_limit: RowLimit::default(),
            vae_limit: RowLimit::default(),
            images: Vec::new(),
            cost,
            trace: Vec::new(),
        })
    }

    /// Image `index` has the seed `seed + index` and a meter of its own.
    fn image(&mut self, index: u32, progress: &mut dyn FnMut(Progress)) -> Result<()> {
        let resolved = &self.resolution.planned.resolved;
        let seed = resolved.seed.wrapping_add(index.into());
        let meter = Meter::new(resolved.budget);
        let latent_shape = self.network.0.latent_shape(resolved.width, resolved.height)?;
        let micro_batch = self.micro_batch(latent_shape.1 * latent_shape.2)?;
        let sparing = SparingDenoiser::new(&self.network, &self.unet_limit);
        let digests = Digests::default();
        let recorded = Recorded::new(&sparing, &digests);
        let denoiser: &dyn Denoiser = if resolved.digests { &recorded } else { &sparing };
        let decoder = SparingDecoder::new(&self.network.0, &self.vae_limit);
        let (planned, before) = (self.resolution.planned.cost, self.cost.units);
        let mut on_event = |event: SearchEvent| {
            progress(Progress { spent: before + event.spent, planned, event: event.event });
        };
        let mut env = SearchEnv {
            denoiser: MeteredDenoiser::new(denoiser, &meter),
            decoder: MeteredDecoder::new(&decoder, &meter),
            verifier: MeteredVerifier::new(
                &self.model.rewards,
                resolved.reward.as_deref(),
                &meter,
            )?,
            schedule: &self.model.schedule,
            solver: SolverSpec::ode(self.resolution.solver, &self.model.schedule),
            steps: resolved.steps as usize,
            cond: &self.cond,
            prompt: &resolved.prompt,
            latent_shape,
            micro_batch,
            cancel: self.cancel,
            on_event: &mut on_event,
            failed_scores: 0,
        };
        let outcome =
            self.resolution.method.run(&self.resolution.plan, &mut env, &NoiseKey { seed })?;
        if resolved.digests {
            self.trace.push(json!({"image": index, "digests": digests.take()}));
        }
        let spent = meter.cost();
        self.cost.units += spent.units;
        for (stage, seconds) in spent.seconds {
            *self.cost.seconds.entry(stage).or_default() += seconds;
        }
        self.keep(index, seed, outcome);
        Ok(())
    }

    /// Images in a model call, by what is free now.
    fn micro_batch(&self, positions: usize) -> Result<usize> {
        let resolved = &self.resolution.planned.resolved;
        let forwards = self.cond.forwards_per_eval();
        let plan = self.model.memory(resolved.width, resolved.height, forwards == 2)?;
        let device = match self.network.device() {
            Device::Cpu => memory::Device::Cpu,
            device => memory::Device::Gpu(DeviceMemory::of(device)),
        };
        Ok(memory::micro_batch(device, plan.as_deref(), positions, forwards as usize))
    }

    fn keep(&mut self, index: u32, seed: u64, outcome: Outcome) {
        let several = self.resolution.planned.resolved.n > 1;
        for mut entry in outcome.trace {
            if let (true, Some(object)) = (several, entry.as_object_mut()) {
                object.insert("image".to_owned(), json!(index));
            }
            self.trace.push(entry);
        }
        if let Ok(caption) = Caption::parse(&self.resolution.planned.resolved.prompt) {
            self.trace.push(json!({"image": index, "claims": claims(&outcome.image, &caption)}));
        }
        let scores =
            outcome.scores.into_iter().map(|(k, v)| (k, v.is_finite().then_some(v))).collect();
        self.images.push(GeneratedImage { pixels: outcome.image, seed, scores });
    }

    fn finish(self) -> Generation {
        let retries = self.unet_limit.retries() + self.vae_limit.retries();
        if retries > 0 {
            tracing::info!(retries, "finished with less memory than was planned with");
        }
        Generation {
            images: self.images,
            cost: CostReport { planned: self.resolution.planned.cost, actual: self.cost },
            resolved: self.resolution.planned.resolved.clone(),
            model: self.model.reference(),
            trace: self.trace,
        }
    }
}

/// The judge's verdict on each claim, in words. Free of charge: it reports, nothing chooses by it.
fn claims(image: &image::RgbImage, caption: &Caption) -> Vec<Value> {
    let verdicts = judge(image, caption).verdicts;
    let each = |v: crate::data::scenes::judge::Verdict| json!({"claim": v.claim.text, "holds": v.holds, "score": v.score});
    verdicts.into_iter().map(each).collect()
}
