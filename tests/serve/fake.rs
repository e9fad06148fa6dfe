//! A backend without a model: deterministic pictures, exact costs, and prompts
//! that make it wait, fail, panic, run out of memory or end the process.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex};
use std::time::Duration;

use diffusion_sharpening::diffusion::cost::{Budget, Cost, Units};
use diffusion_sharpening::engine::request::{
    BudgetRequest, CostReport, GenerateRequest, GeneratedImage, Generation, Listing, MethodRequest,
    ModelInfo, ModelRef, Preview, Resolved,
};
use diffusion_sharpening::engine::{Backend, CancelToken, Planned, Progress, TryOut};
use diffusion_sharpening::{Error, Result};
use image::{Rgb, RgbImage};
use serde_json::{Map, Value, json};

/// Prompts with "wait" stop here at each step, those with "decode" after the last, until the gate
/// opens.
#[derive(Default)]
pub struct Gate {
    open: Mutex<bool>,
    changed: Condvar,
}

impl Gate {
    pub fn open(&self) {
        *self.open.lock().unwrap() = true;
        self.changed.notify_all();
    }

    fn pass(&self, cancel: &CancelToken) -> Result<()> {
        let mut open = self.open.lock().unwrap();
        while !*open {
            cancel.check()?;
            open = self.changed.wait_timeout(open, Duration::from_millis(5)).unwrap().0;
        }
        Ok(())
    }
}

#[derive(Default)]
pub struct Fake {
    pub gate: Gate,
    pub step: Duration,
    /// Prompts in the order in which they were finished or cancelled.
    pub finished: Mutex<Vec<String>>,
    pub cancelled: Mutex<Vec<String>>,
    /// Models and adapters that were unloaded.
    pub unloaded: Mutex<Vec<String>>,
    /// Models that are loaded now cannot make an image.
    pub unfit: AtomicBool,
}

const MODELS: [&str; 2] = ["tiny", "second"];
const METHODS: [&str; 2] = ["plain", "best-of-n"];
const REWARDS: [&str; 2] = ["judge", "clip"];

fn known(field: &str, what: &'static str, name: &str, all: &[&str]) -> Result<()> {
    if all.contains(&name) {
        return Ok(());
    }
    Err(Error::unknown(field, what, name, all.iter().copied()))
}

fn object(value: Value) -> Map<String, Value> {
    value.as_object().unwrap().clone()
}

impl Fake {
    fn has(&self, name: &str) -> bool {
        self.unloaded.lock().unwrap().iter().all(|other| other != name)
    }
}

impl Backend for Fake {
    fn models(&self) -> Vec<ModelInfo> {
        let model = |id: &&str| ModelInfo {
            id: (*id).to_owned(),
            sha256: "5eed".repeat(16),
            default_width: 64,
            default_height: 64,
            default_steps: 20,
            default_guidance_scale: 5.0,
            adapters: ["sharpened"]
                .iter()
                .filter(|a| self.has(a))
                .map(|a| (*a).to_owned())
                .collect(),
            unet_parameters: 3_456_789,
            dtype: "f32".to_owned(),
            example_prompts: vec![
                "a red circle left of a striped blue square".to_owned(),
                "three green triangles".to_owned(),
                "a small yellow star above a large purple ring".to_owned(),
            ],
        };
        MODELS.iter().filter(|id| self.has(id)).map(model).collect()
    }

    fn unloaded(&self) -> Vec<String> {
        MODELS.iter().filter(|id| !self.has(id)).map(|id| (*id).to_owned()).collect()
    }

    fn load(&self, id: &str, try_out: &mut TryOut<'_>) -> Result<ModelInfo> {
        if id == "broken" {
            return Err(Error::file("models/broken", "no weights"));
        }
        known("model", "model", id, &MODELS)?;
        let alone = Self::default();
        let info = alone.models().into_iter().find(|model| model.id == id).unwrap();
        try_out(&alone, &info)?;
        if self.unfit.load(Ordering::Relaxed) {
            return Err(Error::Weights("a tensor is not finite".to_owned()));
        }
        self.finished.lock().unwrap().append(&mut alone.finished.lock().unwrap());
        self.unloaded.lock().unwrap().retain(|other| other != id);
        Ok(info)
    }

    fn unload(&self, id: &str) -> Result<()> {
        known("model", "model", id, &MODELS)?;
        self.unloaded.lock().unwrap().push(id.to_owned());
        Ok(())
    }

    fn load_adapter(&self, model: &str, name: &str) -> Result<()> {
        known("model", "model", model, &MODELS)?;
        known("adapter", "adapter", name, &["sharpened"])?;
        self.unloaded.lock().unwrap().retain(|other| other != name);
        Ok(())
    }

    fn unload_adapter(&self, model: &str, name: &str) -> Result<()> {
        known("model", "model", model, &MODELS)?;
        known("adapter", "adapter", name, &["sharpened"])?;
        self.unloaded.lock().unwrap().push(name.to_owned());
        Ok(())
    }

    fn methods(&self) -> Vec<Listing> {
        let listing = |name: &str, summary: &str, params: Value| Listing {
            name: name.to_owned(),
            summary: summary.to_owned(),
            params: object(params),
        };
        vec![
            listing("plain", "One trajectory, no search.", json!({})),
            listing(
                "best-of-n",
                "Independent trajectories; the best by the reward is returned.",
                json!({
                    "candidates": {"type": "integer", "default": 4,
                        "description": "Trajectories per image."},
                    "kernel": {"type": "string", "enum": ["ode", "sde"], "default": "ode",
                        "description": "How each trajectory is sampled."},
                }),
            ),
        ]
    }

    fn rewards(&self) -> Vec<Listing> {
        REWARDS
            .iter()
            .map(|name| Listing {
                name: (*name).to_owned(),
                summary: format!("The {name} of the test."),
                params: Map::new(),
            })
            .collect()
    }

    fn plan(&self, request: &GenerateRequest) -> Result<Planned> {
        let model = request.model.clone().unwrap_or_else(|| "tiny".to_owned());
        let there = |all: &[&'static str]| -> Vec<&str> {
            all.iter().copied().filter(|name| self.has(name)).collect()
        };
        known("model", "model", &model, &there(&MODELS))?;
        if let Some(adapter) = &request.adapter {
            known("adapter", "adapter", adapter, &there(&["sharpened"]))?;
        }
        let (name, params) = match request.method.clone() {
            None => ("plain".to_owned(), Map::new()),
            Some(MethodRequest::Name(name)) => (name, Map::new()),
            Some(MethodRequest::Full { name, params }) => (name, params),
        };
        known("method", "method", &name, &METHODS)?;
        if let Some(reward) = &request.reward {
            known("reward", "reward", reward, &REWARDS)?;
        }
        for (field, value, most) in [
            ("guidance_scale", request.guidance_scale, 100.0),
            ("guidance_rescale", request.guidance_rescale, 1.0),
            ("previews", request.previews.map(f64::from), 16.0),
        ] {
            if value.is_some_and(|value| !(0.0..=most).contains(&value)) {
                return Err(Error::invalid(field, format!("expected 0 to {most}")));
            }
        }
        if request.prompt.contains("huge") {
            let message = "2048 x 2048 px take at least 12.345 GiB, there is 8.000 GiB";
            return Err(Error::InsufficientMemory(message.to_owned()));
        }
        let steps = request.steps.unwrap_or(20);
        let each = 2 * u64::from(steps);
        let budget = match request.budget {
            None => Budget::default(),
            Some(BudgetRequest::Forwards(f)) => Budget { f: Some(f), ..Budget::default() },
            Some(BudgetRequest::Full(budget)) => budget,
        };
        let wanted = match (name.as_str(), params.get("candidates")) {
            ("plain", _) => 1,
            (_, Some(Value::Number(n))) => n.as_u64().unwrap_or(4),
            _ => 4,
        };
        let candidates = match budget.f {
            Some(f) if f < each => {
                return Err(Error::Budget(format!("one trajectory needs {each} F, not {f}")));
            }
            Some(f) if name != "plain" => f / each,
            _ => wanted,
        };
        let n = request.n.unwrap_or(1);
        let of = |per_image: u64| per_image * u64::from(n);
        let method = object(json!({"name": name, "candidates": candidates}));
        Ok(Planned {
            cost: Units { f: of(candidates * each), v: of(candidates), y: of(candidates), l: 0 },
            resolved: Resolved {
                prompt: request.prompt.clone(),
                negative_prompt: request.negative_prompt.clone(),
                model,
                adapter: request.adapter.clone(),
                method,
                seed: request.seed.unwrap_or(7),
                width: request.width.unwrap_or(64),
                height: request.height.unwrap_or(64),
                steps,
                guidance_scale: request.guidance_scale.unwrap_or(5.0),
                guidance_rescale: request.guidance_rescale.unwrap_or(0.0),
                solver: request.solver.clone().unwrap_or_else(|| "ddim".to_owned()),
                n,
                reward: request.reward.clone(),
                budget,
                output_format: request.output_format.unwrap_or_default(),
                digests: request.digests.unwrap_or_default(),
                previews: request.previews.unwrap_or_default(),
                alone: request.alone.unwrap_or_default(),
            },
        })
    }

    fn generate(
        &self,
        planned: &Planned,
        cancel: &CancelToken,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Generation> {
        let resolved = planned.resolved.clone();
        let result = self.run(planned, cancel, progress);
        let list = if result.is_ok() { &self.finished } else { &self.cancelled };
        list.lock().unwrap().push(resolved.prompt);
        result
    }
}

impl Fake {
    fn run(
        &self,
        planned: &Planned,
        cancel: &CancelToken,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Generation> {
        let resolved = planned.resolved.clone();
        let prompt = resolved.prompt.as_str();
        assert!(!prompt.contains("panic"), "a backend that panics");
        if prompt.contains("broken") {
            return Err(Error::Weights("/a/path: a tensor is missing".to_owned()));
        }
        if prompt.contains("crowded") {
            let cause = "DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")";
            let error = Error::from(candle_core::Error::Msg(cause.to_owned()));
            return Err(error.during("in the U-Net", "make smaller images"));
        }
        let start = std::time::Instant::now();
        let (mut spent, mut previews) = (Units::default(), Vec::new());
        while spent.f < planned.cost.f {
            cancel.check()?;
            std::thread::sleep(self.step);
            spent.f += 2;
            let event = (spent.f == 2).then(|| json!({"event": "chosen", "candidate": 0}));
            let due = u64::from(resolved.previews) * spent.f / planned.cost.f;
            let preview = (previews.len() < due as usize).then(|| Preview {
                image: 0,
                f: spent.f,
                of: planned.cost.f,
                t: 500.0,
                scores: BTreeMap::from([("judge".to_owned(), Some(0.25))]),
                pixels: picture(&resolved, spent.f),
            });
            previews.extend(preview.clone());
            progress(Progress { spent, planned: planned.cost, event, preview });
            if prompt.contains("deadly") {
                std::process::abort();
            }
            if prompt.contains("wait") {
                self.gate.pass(cancel)?;
            }
        }
        if prompt.contains("decode") {
            self.gate.pass(cancel)?;
        }
        spent = planned.cost;
        let images = (0..u64::from(resolved.n)).map(|i| picture(&resolved, resolved.seed + i));
        let score = |k: u64| (resolved.seed * 37 + k * 11) as f64 % 100.0 / 100.0;
        let mut trace = vec![json!({"event": "chosen", "candidate": 0, "score": score(1)})];
        trace.push(json!({"event": "judge", "image": 0, "claims": [
            {"claim": "there is a red circle", "holds": true, "score": 0.97},
            {"claim": "it is left of the square", "holds": false, "score": 0.31},
        ]}));
        if resolved.digests {
            trace.push(json!({"image": 0, "digests": ["0000000a", "0000000b"]}));
        }
        let seconds = BTreeMap::from([
            ("text".to_owned(), 0.001),
            ("unet".to_owned(), start.elapsed().as_secs_f64()),
            ("vae_decode".to_owned(), 0.002),
        ]);
        Ok(Generation {
            previews,
            images: images
                .enumerate()
                .map(|(i, pixels)| GeneratedImage {
                    pixels,
                    seed: resolved.seed + i as u64,
                    scores: BTreeMap::from([
                        ("judge".to_owned(), Some(score(1))),
                        ("clip".to_owned(), (!prompt.contains("nan")).then(|| score(2) * 30.0)),
                        (
                            "aesthetic".to_owned(),
                            Some(if prompt.contains("nan") { f64::NAN } else { 5.25 }),
                        ),
                    ]),
                })
                .collect(),
            cost: CostReport { planned: planned.cost, actual: Cost { units: spent, seconds } },
            model: ModelRef { id: resolved.model.clone(), sha256: "5eed".repeat(16) },
            resolved,
            trace,
        })
    }
}

/// A disc on a ground, both coloured by the seed and the method.
fn picture(resolved: &Resolved, seed: u64) -> RgbImage {
    let salt = resolved.method.get("candidates").and_then(Value::as_u64).unwrap_or(1);
    let hue = |k: u64| (40 + (seed * 53 + k * 71 + salt * 29) % 190) as u8;
    let (w, h) = (resolved.width, resolved.height);
    let (cx, cy, r) = (w as f64 * 0.5, h as f64 * 0.45, w.min(h) as f64 * 0.3);
    RgbImage::from_fn(w, h, |x, y| {
        let (dx, dy) = (f64::from(x) - cx, f64::from(y) - cy);
        if dx.hypot(dy) < r {
            Rgb([hue(1), hue(2) / 3, hue(3) / 2])
        } else {
            Rgb([200 + (hue(4) / 8), 210, 190 + hue(5) / 8])
        }
    })
}
