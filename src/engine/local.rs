//! The in-process engine.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::Device;
use serde_json::{Value, json};

use super::memory;
use super::model::Model;
use super::previews::{Previewer, Watched};
use super::registry::Registry;
use super::request::{
    CostReport, GenerateRequest, GeneratedImage, Generation, Listing, ModelInfo, Preview,
};
use super::resolve::{Resolution, request_of, resolve};
use super::{Backend, Planned, Progress, TryOut};
use crate::Result;
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
use crate::search::{self, Outcome, SearchEnv, SearchEvent};
use crate::util::CancelToken;

/// The models of a folder, on one device.
pub struct Engine {
    registry: Registry,
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
        Self::open_some(models, placement, &[])
    }

    /// As [`Engine::open`], but opens only the checkpoints `ids` of the folder; the others can be
    /// loaded later. All, when `ids` is empty.
    ///
    /// # Errors
    /// As [`Engine::open`]; and when there is none of one of these ids.
    pub fn open_some(models: &Path, placement: &Placement, ids: &[String]) -> Result<Self> {
        Ok(Self { registry: Registry::open(models, placement, ids)?, memory: None })
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
}

impl Backend for Engine {
    fn models(&self) -> Vec<ModelInfo> {
        self.registry.loaded().iter().map(|model| model.info()).collect()
    }

    fn unloaded(&self) -> Vec<String> {
        self.registry.unloaded()
    }

    fn load(&self, id: &str, try_out: &mut TryOut<'_>) -> Result<ModelInfo> {
        let model = self.registry.load(id, |registry, model| {
            try_out(&Self { registry, memory: self.memory }, &model.info())
        })?;
        Ok(model.info())
    }

    fn unload(&self, id: &str) -> Result<()> {
        self.registry.unload(id)
    }

    fn load_adapter(&self, model: &str, name: &str) -> Result<()> {
        self.registry.get(Some(model))?.load_adapter(name)
    }

    fn unload_adapter(&self, model: &str, name: &str) -> Result<()> {
        self.registry.get(Some(model))?.unload_adapter(name)
    }

    fn methods(&self) -> Vec<Listing> {
        search::listings()
    }

    fn rewards(&self) -> Vec<Listing> {
        let models = self.registry.loaded();
        let all = models.iter().flat_map(|m| m.rewards.listings());
        all.map(|l| (l.name.clone(), l)).collect::<BTreeMap<_, _>>().into_values().collect()
    }

    fn memory(&self) -> Option<DeviceMemory> {
        DeviceMemory::of(self.registry.loaded().first()?.base().folder().device())
    }

    fn plan(&self, request: &GenerateRequest) -> Result<Planned> {
        let model = self.registry.get(request.model.as_deref())?;
        Ok(self.resolve(&model, request)?.planned)
    }

    fn generate(
        &self,
        planned: &Planned,
        cancel: &CancelToken,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Generation> {
        let model = self.registry.get(Some(&planned.resolved.model))?;
        let resolution = self.resolve(&model, &request_of(&planned.resolved))?;
        let mut run = Run::prepare(&model, &resolution, cancel)?;
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
    previews: Vec<Preview>,
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
            previews: Vec::new(),
        })
    }

    /// Image `index` has the seed `seed + index` and a meter of its own.
    fn image(&mut self, index: u32, progress: &mut dyn FnMut(Progress)) -> Result<()> {
        let resolved = &self.resolution.planned.resolved;
        let seed = resolved.seed.wrapping_add(index.into());
        let meter = Meter::new(resolved.budget);
        let latent_shape = self.network.0.latent_shape(resolved.width, resolved.height)?;
        let micro_batch = self.micro_batch(latent_shape.1 * latent_shape.2)?;
        let adapter = resolved.adapter.as_deref();
        let member = match resolved.alone {
            true => None,
            false => Some(self.model.member(adapter, latent_shape, micro_batch)?),
        };
        let network: &dyn Denoiser = match &member {
            Some(member) => member,
            None => &self.network,
        };
        let sparing = SparingDenoiser::new(network, &self.unet_limit);
        let digests = Digests::default();
        let recorded = Recorded::new(&sparing, &digests);
        let denoiser: &dyn Denoiser = if resolved.digests { &recorded } else { &sparing };
        let f = self.resolution.plan.predicted.f;
        let watched = Watched::new(denoiser, &self.model.schedule, f, resolved.previews);
        let denoiser: &dyn Denoiser = if resolved.previews > 0 { &watched } else { denoiser };
        let decoder = SparingDecoder::new(&self.network.0, &self.vae_limit);
        let (planned, before) = (self.resolution.planned.cost, self.cost.units);
        let previewer = Previewer {
            watched: &watched,
            decoder: MeteredDecoder::new(&decoder, &meter),
            verifier: MeteredVerifier::new(&self.model.rewards, None, &meter)?,
            prompt: &resolved.prompt,
            image: index,
            planned: f,
        };
        let (mut previews, mut failure) = (Vec::new(), None);
        let mut on_event = |event: SearchEvent| {
            let spent = before + event.spent;
            progress(Progress { spent, planned, event: event.event, preview: None });
            match previewer.take() {
                Ok(taken) => {
                    for preview in taken {
                        let event = Some(preview.clone());
                        progress(Progress { spent, planned, event: None, preview: event });
                        previews.push(preview);
                    }
                }
                Err(error) => failure = failure.take().or(Some(error)),
            }
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
        on_event(SearchEvent { spent: meter.spent(), event: None });
        if let Some(error) = failure {
            return Err(error);
        }
        self.previews.append(&mut previews);
        if resolved.digests {
            self.trace.push(json!({"image": index, "digests": digests.take()}));
        }
        if let Some(together) = member.map(|m| m.together()).filter(|t| t.joint > 0) {
            self.trace.push(json!({"image": index, "together": together}));
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
            previews: self.previews,
        }
    }
}

/// The judge's verdict on each claim, in words. Free of charge: it reports, nothing chooses by it.
fn claims(image: &image::RgbImage, caption: &Caption) -> Vec<Value> {
    let verdicts = judge(image, caption).verdicts;
    let each = |v: crate::data::scenes::judge::Verdict| json!({"claim": v.claim.text, "holds": v.holds, "score": v.score});
    verdicts.into_iter().map(each).collect()
}
