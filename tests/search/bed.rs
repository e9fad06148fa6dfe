//! A sampling environment whose model has a closed form.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use candle_core::{Device, Tensor};
use diffusion_sharpening::diffusion::cost::{Budget, Units};
use diffusion_sharpening::diffusion::denoiser::{Conditioning, NoiseModel, TextCond};
use diffusion_sharpening::diffusion::gmm::{GaussianMixture, GmmModel};
use diffusion_sharpening::diffusion::guidance::Guided;
use diffusion_sharpening::diffusion::meter::{Meter, MeteredDecoder, MeteredDenoiser};
use diffusion_sharpening::diffusion::noise::NoiseKey;
use diffusion_sharpening::diffusion::packed::{PackedDecoder, unpack};
use diffusion_sharpening::diffusion::schedule::NoiseSchedule;
use diffusion_sharpening::diffusion::solver::{SolverKind, SolverSpec};
use diffusion_sharpening::diffusion::sparing::{RowLimit, SparingDenoiser};
use diffusion_sharpening::rewards::{MeteredVerifier, Reward, RewardSet};
use diffusion_sharpening::search::{self, EnvSpec, Outcome, Plan, SearchEnv, SearchEvent};
use diffusion_sharpening::util::CancelToken;
use diffusion_sharpening::{Error, Result};
use image::RgbImage;
use serde_json::{Map, Value};

/// Counts the rows it is asked for, and has memory for some of them at a time.
pub struct Counting {
    pub model: GmmModel,
    pub rows: AtomicU64,
    pub most: AtomicUsize,
    /// Of every call, refused ones too.
    pub calls: Mutex<Vec<usize>>,
}

/// As candle reports that a GPU is full.
#[derive(Debug)]
struct Full;

impl std::fmt::Display for Full {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")")
    }
}

impl std::error::Error for Full {}

pub fn full() -> Error {
    candle_core::Error::Cuda(Box::new(Full)).bt().into()
}

impl NoiseModel for Counting {
    fn device(&self) -> &Device {
        self.model.device()
    }

    fn latent_shape(&self, width: u32, height: u32) -> Result<(usize, usize, usize)> {
        self.model.latent_shape(width, height)
    }

    fn forward(&self, x: &Tensor, t: &Tensor, text: &[&TextCond]) -> Result<Tensor> {
        self.calls.lock().unwrap().push(text.len());
        if text.len() > self.most.load(Ordering::Relaxed) {
            return Err(full());
        }
        self.rows.fetch_add(text.len() as u64, Ordering::Relaxed);
        self.model.forward(x, t, text)
    }
}

type Score = Box<dyn Fn(&[f32]) -> f64 + Send + Sync>;

/// A function of the exact latent.
pub struct FnReward {
    pub name: &'static str,
    pub higher_is_better: bool,
    pub calls: u64,
    pub f: Score,
}

impl Reward for FnReward {
    fn name(&self) -> &str {
        self.name
    }

    fn summary(&self) -> &str {
        "a function of the latent"
    }

    fn range(&self) -> Option<(f64, f64)> {
        None
    }

    fn higher_is_better(&self) -> bool {
        self.higher_is_better
    }

    fn external_calls(&self) -> u64 {
        self.calls
    }

    fn score(&self, images: &[RgbImage], _prompts: &[&str]) -> Result<Vec<f64>> {
        Ok(images.iter().map(|image| (self.f)(&unpack(image))).collect())
    }
}

pub fn reward(f: impl Fn(&[f32]) -> f64 + Send + Sync + 'static) -> Arc<dyn Reward> {
    Arc::new(FnReward { name: "searched", higher_is_better: true, calls: 0, f: Box::new(f) })
}

/// Sum of the latent: linear, with gradient a = (1, ..., 1).
pub fn sum(x: &[f32]) -> f64 {
    x.iter().map(|v| f64::from(*v)).sum()
}

pub struct Bed {
    pub schedule: NoiseSchedule,
    pub model: Guided<Arc<Counting>>,
    pub counter: Arc<Counting>,
    pub shape: (usize, usize, usize),
    pub rewards: RewardSet,
    pub searched: Option<&'static str>,
    pub cond: Conditioning,
    pub solver: SolverSpec,
    pub steps: usize,
    pub micro_batch: usize,
    pub budget: Budget,
    pub cancel: CancelToken,
    /// Raises the cancel token after this many progress reports.
    pub cancel_after: Option<u64>,
}

#[derive(Debug)]
pub struct Run {
    pub plan: Plan,
    pub outcome: Outcome,
    pub spent: Units,
    pub events: Vec<SearchEvent>,
    /// How often there was too little memory.
    pub retries: usize,
}

impl Run {
    pub fn latents(&self) -> Vec<f32> {
        self.outcome.latents.flatten_all().unwrap().to_vec1().unwrap()
    }
}

impl Bed {
    /// Two mixtures in 2x2x3 dimensions, no guidance, 5 DDIM steps.
    pub fn new(reward: Arc<dyn Reward>) -> Self {
        let shape = (2, 2, 3);
        let mixture = |offset: f64| GaussianMixture {
            weights: vec![1.0, 2.0],
            means: vec![vec![offset - 1.0; 12], vec![offset + 0.5; 12]],
            stds: vec![0.5, 1.5],
        };
        Self::with(vec![mixture(0.0), mixture(0.3)], shape, reward)
    }

    pub fn with(
        mixtures: Vec<GaussianMixture>,
        shape: (usize, usize, usize),
        reward: Arc<dyn Reward>,
    ) -> Self {
        let schedule = NoiseSchedule::sdxl().unwrap();
        let model = GmmModel::new(mixtures, shape, &schedule).unwrap();
        let counter = Arc::new(Counting {
            model,
            rows: AtomicU64::new(0),
            most: AtomicUsize::new(usize::MAX),
            calls: Mutex::default(),
        });
        Self {
            solver: SolverSpec::ode(SolverKind::Ddim, &schedule),
            schedule,
            model: Guided(counter.clone()),
            counter,
            shape,
            rewards: RewardSet::new(vec![reward]).unwrap(),
            searched: Some("searched"),
            cond: Conditioning::plain(GmmModel::text(0).unwrap()),
            steps: 5,
            micro_batch: 4,
            budget: Budget::default(),
            cancel: CancelToken::default(),
            cancel_after: None,
        }
    }

    pub fn guided(mut self, scale: f64) -> Self {
        self.cond = Conditioning {
            negative: Some(GmmModel::text(1).unwrap()),
            guidance_scale: scale,
            ..self.cond
        };
        self
    }

    pub fn spec(&self) -> EnvSpec<'_> {
        let names: Vec<&str> =
            self.searched.iter().flat_map(|t| t.split(|c: char| "()+:".contains(c))).collect();
        let calls = |searched: bool| {
            let rewards = self.rewards.iter().filter(|r| names.contains(&r.name()) == searched);
            rewards.map(|reward| reward.external_calls()).sum()
        };
        EnvSpec {
            schedule: &self.schedule,
            relative: self.searched.is_some_and(|text| text.contains('(')),
            steps: self.steps,
            solver: self.solver.kind,
            forwards_per_eval: self.cond.forwards_per_eval(),
            searches: self.searched.is_some(),
            reports: !self.rewards.is_empty(),
            search_calls: calls(true),
            report_calls: calls(false),
        }
    }

    pub fn plan(&self, method: &str, params: Value) -> Result<Plan> {
        let params: Map<String, Value> = serde_json::from_value(params).unwrap();
        search::method(method)?.plan(&params, &self.spec(), &self.budget)
    }

    pub fn run(&self, method: &str, params: Value, seed: u64) -> Result<Run> {
        let plan = self.plan(method, params)?;
        self.run_plan(plan, self.budget, seed)
    }

    /// Runs a plan under a budget that it may not have been made for.
    pub fn run_plan(&self, plan: Plan, budget: Budget, seed: u64) -> Result<Run> {
        let meter = Meter::new(budget);
        let mut events = Vec::new();
        let mut on_event = |event| {
            events.push(event);
            if self.cancel_after.is_some_and(|n| events.len() as u64 >= n) {
                self.cancel.cancel();
            }
        };
        let limit = RowLimit::default();
        let denoiser = SparingDenoiser::new(&self.model, &limit);
        let mut env = SearchEnv {
            denoiser: MeteredDenoiser::new(&denoiser, &meter),
            decoder: MeteredDecoder::new(&PackedDecoder, &meter),
            verifier: MeteredVerifier::new(&self.rewards, self.searched, &meter)?,
            schedule: &self.schedule,
            solver: self.solver,
            steps: self.steps,
            cond: &self.cond,
            prompt: "a prompt",
            latent_shape: self.shape,
            micro_batch: self.micro_batch,
            cancel: &self.cancel,
            on_event: &mut on_event,
            failed_scores: 0,
        };
        assert_eq!(env.spec(), self.spec());
        let outcome = search::method(plan.method)?.run(&plan, &mut env, &NoiseKey::new(seed))?;
        Ok(Run { plan, outcome, spent: meter.spent(), events, retries: limit.retries() })
    }

    pub fn rows_run(&self) -> u64 {
        self.counter.rows.load(Ordering::Relaxed)
    }
}
