//! A deterministic backend, and a small HTTP server that speaks for it.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use base64::Engine as _;
use diffusion_sharpening::diffusion::cost::{Budget, Cost, Units};
use diffusion_sharpening::engine::request::{
    BudgetRequest, CostReport, GenerateRequest, GeneratedImage, Generation, Listing, MethodRequest,
    ModelInfo, ModelRef, Resolved,
};
use diffusion_sharpening::engine::{Backend, CancelToken, Planned, Progress};
use diffusion_sharpening::{Error, Result};
use serde_json::{Map, Value, json};

/// Plain costs `steps` forwards (twice with guidance); best-of-n as many
/// trajectories as fit. Scores depend on prompt and seed; candidates add luck.
#[derive(Default)]
pub struct Fake {
    /// Every image whose seed is a multiple of this has no judge score.
    pub judge_fails_at: Option<u64>,
    /// Cancels itself within this call of `generate`, counted from one.
    pub cancel_at: Option<usize>,
    pub calls: AtomicUsize,
    pub log: Mutex<Vec<GenerateRequest>>,
}

pub const MAX_STEPS: u32 = 1000;

fn listing(name: &str) -> Listing {
    Listing { name: name.into(), summary: String::new(), params: Map::new() }
}

fn luck(key: &str) -> f64 {
    let hash = key
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
    ((hash ^ (hash >> 31)).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 11) as f64 / (1u64 << 53) as f64
}

impl Backend for Fake {
    fn models(&self) -> Vec<ModelInfo> {
        vec![ModelInfo {
            id: "fake".into(),
            sha256: "0123456789abcdef".into(),
            default_width: 8,
            default_height: 8,
            default_steps: 50,
            default_guidance_scale: 5.0,
            adapters: vec!["sharp".into()],
            unet_parameters: 1,
            dtype: "f32".into(),
            example_prompts: vec![],
        }]
    }

    fn methods(&self) -> Vec<Listing> {
        vec![listing("plain"), listing("best-of-n")]
    }

    fn rewards(&self) -> Vec<Listing> {
        vec![listing("clip"), listing("judge")]
    }

    fn plan(&self, request: &GenerateRequest) -> Result<Planned> {
        let (name, mut method) = match request.method.clone() {
            None => ("plain".to_owned(), Map::new()),
            Some(MethodRequest::Name(name)) => (name, Map::new()),
            Some(MethodRequest::Full { name, params }) => (name, params),
        };
        let steps = request.steps.unwrap_or(50);
        if !(1..=MAX_STEPS).contains(&steps) {
            return Err(Error::invalid("steps", format!("must be 1 to {MAX_STEPS}")));
        }
        let guidance_scale = request.guidance_scale.unwrap_or(5.0);
        let trajectory = u64::from(steps) * if guidance_scale == 1.0 { 1 } else { 2 };
        let budget = match request.budget {
            Some(BudgetRequest::Forwards(f)) => Budget { f: Some(f), ..Budget::default() },
            Some(BudgetRequest::Full(budget)) => budget,
            None => Budget::default(),
        };
        let n = match (name.as_str(), budget.f) {
            ("plain", _) | (_, None) => 1,
            (_, Some(f)) => f / trajectory,
        };
        if n == 0 {
            return Err(Error::Budget(format!("one trajectory costs {trajectory} forwards")));
        }
        method.insert("name".into(), name.into());
        method.insert("n".into(), n.into());
        let resolved = Resolved {
            prompt: request.prompt.clone(),
            negative_prompt: None,
            model: "fake".into(),
            adapter: request.adapter.clone(),
            method,
            seed: request.seed.unwrap_or(0),
            width: 8,
            height: 8,
            steps,
            guidance_scale,
            guidance_rescale: 0.0,
            solver: "ddim".into(),
            n: 1,
            reward: request.reward.clone(),
            budget,
            output_format: request.output_format.unwrap_or_default(),
            digests: request.digests.unwrap_or_default(),
            previews: request.previews.unwrap_or_default(),
            alone: request.alone.unwrap_or_default(),
        };
        self.log.lock().unwrap().push(request.clone());
        Ok(Planned { resolved, cost: Units { f: n * trajectory, v: n, y: n, l: 0 } })
    }

    fn generate(
        &self,
        planned: &Planned,
        cancel: &CancelToken,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Generation> {
        let call = self.calls.fetch_add(1, Ordering::SeqCst) + 1;
        if self.cancel_at == Some(call) {
            cancel.cancel();
        }
        cancel.check()?;
        progress(Progress {
            spent: planned.cost,
            planned: planned.cost,
            event: None,
            preview: None,
        });
        let r = &planned.resolved;
        let base = luck(&format!("{}|{}", r.prompt, r.seed));
        let best = (0..planned.cost.v)
            .map(|k| luck(&format!("{}|{}|{k}", r.prompt, r.seed)))
            .fold(0.0, f64::max);
        let clip = 0.3 * base + 0.2 * best - 0.5 / f64::from(r.steps);
        let fails = self.judge_fails_at.is_some_and(|every| r.seed.is_multiple_of(every));
        // A failed score may arrive as no number at all or as one that is not finite.
        let failed = if r.seed == 0 { None } else { Some(f64::NAN) };
        let judge = if fails { failed } else { Some(0.5 * base + 0.1 * best) };
        let lot = |k: u64| luck(&format!("{}|{}|{k}", r.prompt, r.seed));
        let all = |of: &dyn Fn(f64) -> f64| (0..planned.cost.v).map(|k| of(lot(k))).collect();
        let (clips, judges): (Vec<f64>, Vec<f64>) = (all(&|l| l), all(&|l| 1.0 - l));
        let observed = r.method.get("observe") == Some(&json!(true));
        let candidates = json!({"candidates": {"clip": clips, "judge": judges}});
        let seconds = BTreeMap::from([("unet".to_owned(), planned.cost.f as f64 * 1e-3)]);
        Ok(Generation {
            images: vec![GeneratedImage {
                pixels: image::RgbImage::from_pixel(8, 8, image::Rgb([9, 8, 7])),
                seed: r.seed,
                scores: BTreeMap::from([("clip".into(), Some(clip)), ("judge".into(), judge)]),
            }],
            cost: CostReport {
                planned: planned.cost,
                actual: Cost { units: planned.cost, seconds },
            },
            resolved: r.clone(),
            model: ModelRef { id: "fake".into(), sha256: "0123456789abcdef".into() },
            previews: vec![],
            trace: if observed { vec![candidates] } else { vec![] },
        })
    }
}

/// Serves a [`Fake`] on a free port until the test process ends; the first
/// `busy` generations are answered 429. Returns the URL.
pub fn serve(busy: usize) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        let (fake, busy) = (Fake::default(), AtomicUsize::new(busy));
        for stream in listener.incoming().flatten() {
            answer(stream, &fake, &busy);
        }
    });
    url
}

fn answer(mut stream: TcpStream, fake: &Fake, busy: &AtomicUsize) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let (mut first, mut length) = (String::new(), 0);
    reader.read_line(&mut first).unwrap();
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).unwrap() == 0 || line.trim().is_empty() {
            break;
        }
        if let Some(value) = line.to_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().unwrap();
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).unwrap();
    let path = first.split(' ').nth(1).unwrap_or_default();
    let (status, extra, value) = match path {
        // Bare lists and lists under their name are both understood.
        "/models" => (200, "", json!({"models": fake.models()})),
        "/methods" => (200, "", json!({"methods": fake.methods()})),
        "/rewards" => (200, "", json!(fake.rewards())),
        _ if busy.load(Ordering::SeqCst) > 0 => {
            busy.fetch_sub(1, Ordering::SeqCst);
            (429, "Retry-After: 1\r\n", json!({"title": "The queue is full"}))
        }
        _ => generate(fake, &body),
    };
    let text = value.to_string();
    let _ = write!(
        stream,
        "HTTP/1.1 {status} X\r\nContent-Type: application/json\r\n{extra}Connection: close\r\n\
         Content-Length: {}\r\n\r\n{text}",
        text.len()
    );
}

fn generate(fake: &Fake, body: &[u8]) -> (u16, &'static str, Value) {
    let request: GenerateRequest = serde_json::from_slice(body).unwrap();
    let outcome = fake
        .plan(&request)
        .and_then(|planned| fake.generate(&planned, &CancelToken::default(), &mut |_| {}));
    let generation = match outcome {
        Ok(generation) => generation,
        Err(e) => {
            let (kind, field) = match &e {
                Error::Budget(_) => ("budget", "budget"),
                Error::Invalid { field, .. } => ("invalid-value", field.as_str()),
                _ => ("other", ""),
            };
            let kind = format!("urn:problem-type:test:{kind}");
            let problem = json!({"type": kind, "detail": e.to_string(), "field": field});
            return (422, "", problem);
        }
    };
    let image = &generation.images[0];
    let mut png = std::io::Cursor::new(Vec::new());
    image.pixels.write_to(&mut png, image::ImageFormat::Png).unwrap();
    let data = base64::engine::general_purpose::STANDARD.encode(png.get_ref());
    let image = json!({"data": data, "format": "png", "seed": image.seed, "scores": image.scores});
    let answer = json!({
        "id": "1", "images": [image], "cost": generation.cost, "resolved": generation.resolved,
        "model": generation.model, "trace": [],
    });
    (200, "", answer)
}
