//! A server as a backend: the sweep's requests over HTTP.

use std::collections::BTreeMap;
use std::env::VarError;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use base64::Engine as _;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use ureq::http::header::{AUTHORIZATION, HeaderValue};
use ureq::http::{Request, Response};
use ureq::middleware::{Middleware, MiddlewareNext};
use ureq::{Body, SendBody};

use super::arm::PLAIN;
use crate::diffusion::cost::{Budget, Units};
use crate::engine::request::{
    BudgetRequest, CostReport, GenerateRequest, GeneratedImage, Generation, Listing, MethodRequest,
    ModelInfo, ModelRef, Resolved,
};
use crate::engine::{Backend, CancelToken, Planned, Progress};
use crate::{Error, Result};

/// The variable that has the key for a server with API keys.
pub const KEY: &str = "DS_API_KEY";
const CONNECT: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(100);
/// Largest answer accepted, in bytes.
const MAX_ANSWER: u64 = 1 << 30;
/// Attempts at a server that cannot be reached.
const ATTEMPTS: u32 = 5;
/// Longest wait that a busy server can ask for between attempts.
const MAX_WAIT: u64 = 60;

/// A `ds-serve` at a URL.
#[derive(Clone, Debug)]
pub struct RemoteBackend {
    agent: ureq::Agent,
    base: String,
    models: Vec<ModelInfo>,
    methods: Vec<Listing>,
    rewards: Vec<Listing>,
}

/// The answer to `POST /generate`.
#[derive(Deserialize)]
struct Answer {
    images: Vec<AnswerImage>,
    cost: CostReport,
    resolved: Resolved,
    model: ModelRef,
    #[serde(default)]
    trace: Vec<Value>,
}

#[derive(Deserialize)]
struct AnswerImage {
    data: String,
    seed: u64,
    #[serde(default)]
    scores: BTreeMap<String, Option<f64>>,
}

/// RFC 9457 problem details, with the field at fault.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Problem {
    r#type: String,
    title: String,
    detail: String,
    field: Option<String>,
}

/// What one attempt at `POST /generate` came to.
enum Attempt {
    Done(Box<Generation>),
    /// The server is busy: try again after so many seconds.
    Busy(u64),
    /// It could not be reached.
    Unreachable(String),
}

/// Adds the key to every request.
struct Key(HeaderValue);

impl Middleware for Key {
    fn handle(
        &self,
        mut request: Request<SendBody<'_>>,
        next: MiddlewareNext<'_>,
    ) -> std::result::Result<Response<Body>, ureq::Error> {
        request.headers_mut().insert(AUTHORIZATION, self.0.clone());
        next.handle(request)
    }
}

impl RemoteBackend {
    /// Connects with the key that the environment has, if any: flags and files would show it
    /// to others.
    ///
    /// # Errors
    /// See [`RemoteBackend::connect`].
    pub fn from_env(url: &str) -> Result<Self> {
        match std::env::var(KEY) {
            Ok(key) => Self::connect(url, Some(&key)),
            Err(VarError::NotPresent) => Self::connect(url, None),
            Err(VarError::NotUnicode(_)) => Err(Error::invalid(KEY, "is not UTF-8")),
        }
    }

    /// Asks the server at `url` what it has. Every request has the `key`.
    ///
    /// # Errors
    /// When it does not answer as expected, or a header cannot have the key.
    pub fn connect(url: &str, key: Option<&str>) -> Result<Self> {
        let base = url.trim_end_matches('/').to_owned();
        let mut config = ureq::Agent::config_builder()
            .timeout_connect(Some(CONNECT))
            .http_status_as_error(false);
        if let Some(key) = key {
            let mut value = HeaderValue::try_from(format!("Bearer {key}"))
                .map_err(|_| Error::invalid(KEY, "has characters that no key has"))?;
            value.set_sensitive(true);
            config = config.middleware(Key(value));
        }
        let agent = config.build().new_agent();
        let list = |what: &str| get(&agent, &base, what);
        let (models, methods, rewards) = (list("models")?, list("methods")?, list("rewards")?);
        Ok(Self {
            models: parse(&base, "models", models)?,
            methods: parse(&base, "methods", methods)?,
            rewards: parse(&base, "rewards", rewards)?,
            agent,
            base,
        })
    }

    fn attempt(&self, body: &Value) -> Result<Attempt> {
        let fail = |message: String| Error::invalid("url", format!("{}: {message}", self.base));
        let url = format!("{}/generate", self.base);
        let mut response = match self.agent.post(&url).send_json(body) {
            Ok(response) => response,
            Err(e) => return Ok(Attempt::Unreachable(e.to_string())),
        };
        let status = response.status().as_u16();
        let wait = response
            .headers()
            .get("retry-after")
            .and_then(|v| v.to_str().ok()?.trim().parse().ok())
            .unwrap_or(1);
        let text = match response.body_mut().with_config().limit(MAX_ANSWER).read_to_vec() {
            Ok(text) => text,
            Err(e) => return Ok(Attempt::Unreachable(e.to_string())),
        };
        match status {
            200 => {
                let answer: Answer = serde_json::from_slice(&text)
                    .map_err(|e| fail(format!("unexpected answer to POST /generate: {e}")))?;
                Ok(Attempt::Done(Box::new(answer.into_generation()?)))
            }
            429 | 503 => Ok(Attempt::Busy(wait)),
            400..500 => Err(refusal(status, &text)),
            _ => {
                let text = String::from_utf8_lossy(&text);
                Err(fail(format!(
                    "status {status}: {}",
                    text.chars().take(300).collect::<String>()
                )))
            }
        }
    }

    /// Attempts until the server has an answer or cannot be reached any more.
    fn persist(&self, body: &Value, cancel: &CancelToken) -> Result<Generation> {
        let mut unreachable = 0;
        loop {
            cancel.check()?;
            let seconds = match self.attempt(body)? {
                Attempt::Done(generation) => return Ok(*generation),
                Attempt::Busy(seconds) => seconds.clamp(1, MAX_WAIT),
                Attempt::Unreachable(message) => {
                    unreachable += 1;
                    if unreachable == ATTEMPTS {
                        return Err(Error::invalid("url", format!("{}: {message}", self.base)));
                    }
                    1 << unreachable
                }
            };
            for _ in 0..seconds * 10 {
                cancel.check()?;
                std::thread::sleep(POLL);
            }
        }
    }
}

impl Backend for RemoteBackend {
    fn models(&self) -> Vec<ModelInfo> {
        self.models.clone()
    }

    fn methods(&self) -> Vec<Listing> {
        self.methods.clone()
    }

    fn rewards(&self) -> Vec<Listing> {
        self.rewards.clone()
    }

    /// Fills in the model's defaults. The cost is an estimate: the server plans
    /// for itself, and refuses in [`Backend::generate`].
    fn plan(&self, request: &GenerateRequest) -> Result<Planned> {
        let model = match &request.model {
            Some(id) => self.models.iter().find(|m| m.id == *id),
            None => self.models.first(),
        }
        .ok_or_else(|| {
            let known = self.models.iter().map(|m| m.id.as_str());
            Error::unknown("model", "model", request.model.clone().unwrap_or_default(), known)
        })?;
        let method = match &request.method {
            None => MethodRequest::Name(PLAIN.into()),
            Some(method) => method.clone(),
        };
        let (name, mut params) = match method {
            MethodRequest::Name(name) => (name, serde_json::Map::new()),
            MethodRequest::Full { name, params } => (name, params),
        };
        params.insert("name".into(), name.clone().into());
        let budget = match request.budget {
            None => Budget::default(),
            Some(BudgetRequest::Forwards(f)) => Budget { f: Some(f), ..Budget::default() },
            Some(BudgetRequest::Full(budget)) => budget,
        };
        let resolved = Resolved {
            prompt: request.prompt.clone(),
            negative_prompt: request.negative_prompt.clone(),
            model: model.id.clone(),
            adapter: request.adapter.clone(),
            method: params,
            seed: request.seed.unwrap_or(0),
            width: request.width.unwrap_or(model.default_width),
            height: request.height.unwrap_or(model.default_height),
            steps: request.steps.unwrap_or(model.default_steps),
            guidance_scale: request.guidance_scale.unwrap_or(model.default_guidance_scale),
            guidance_rescale: request.guidance_rescale.unwrap_or(0.0),
            solver: request.solver.clone().unwrap_or_default(),
            n: request.n.unwrap_or(1),
            reward: request.reward.clone(),
            budget,
            output_format: request.output_format.unwrap_or_default(),
            digests: request.digests.unwrap_or_default(),
            previews: request.previews.unwrap_or_default(),
            alone: request.alone.unwrap_or_default(),
        };
        // Exact comparison: 1 is the value that turns guidance off.
        #[allow(clippy::float_cmp)]
        let per_step = if resolved.guidance_scale == 1.0 { 1 } else { 2 };
        let trajectory = u64::from(resolved.steps) * per_step;
        let f = if name == PLAIN { trajectory } else { budget.f.unwrap_or(trajectory) };
        let cost = Units { f: f * u64::from(resolved.n), ..Units::default() };
        Ok(Planned { resolved, cost })
    }

    fn generate(
        &self,
        planned: &Planned,
        cancel: &CancelToken,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Generation> {
        let body = body(&planned.resolved)?;
        let (this, token) = (self.clone(), cancel.clone());
        let (send, receive) = mpsc::channel();
        // The request cannot be broken off, but waiting for it can.
        std::thread::spawn(move || {
            // Nobody listens any more once the wait was broken off.
            let _ = send.send(this.persist(&body, &token));
        });
        loop {
            match receive.recv_timeout(POLL) {
                Ok(outcome) => {
                    if let Ok(generation) = &outcome {
                        progress(Progress {
                            spent: generation.cost.actual.units,
                            planned: generation.cost.planned,
                            event: None,
                            preview: None,
                        });
                    }
                    return outcome;
                }
                Err(RecvTimeoutError::Timeout) => cancel.check()?,
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(Error::invalid("url", "the request's thread ended"));
                }
            }
        }
    }
}

fn get(agent: &ureq::Agent, base: &str, what: &str) -> Result<Value> {
    let fail = |message: String| Error::invalid("url", format!("{base}/{what}: {message}"));
    let mut response =
        agent.get(format!("{base}/{what}")).call().map_err(|e| fail(e.to_string()))?;
    match response.status().as_u16() {
        200 => {}
        401 => return Err(fail(format!("the server wants a key: set {KEY} to one of its keys"))),
        status => return Err(fail(format!("status {status}"))),
    }
    response.body_mut().read_json().map_err(|e| fail(e.to_string()))
}

/// A list, bare or under its own name.
fn parse<T: DeserializeOwned>(base: &str, what: &str, mut answer: Value) -> Result<Vec<T>> {
    let list = match answer.get_mut(what) {
        Some(list) => list.take(),
        None => answer,
    };
    serde_json::from_value(list)
        .map_err(|e| Error::invalid("url", format!("{base}/{what}: unexpected answer: {e}")))
}

/// The error that a 4xx answer stands for.
fn refusal(status: u16, text: &[u8]) -> Error {
    let problem: Problem = serde_json::from_slice(text).unwrap_or_default();
    let message = match (problem.detail.is_empty(), problem.title.is_empty()) {
        (false, _) => problem.detail,
        (true, false) => problem.title,
        (true, true) => format!("the server answered {status}"),
    };
    let field = problem.field.unwrap_or_default();
    if field == "budget" || problem.r#type.rsplit(['/', ':', '#']).next() == Some("budget") {
        return Error::Budget(message.strip_prefix("budget: ").unwrap_or(&message).to_owned());
    }
    let field = if field.is_empty() { "request".to_owned() } else { field };
    let message = message.strip_prefix(&format!("{field}: ")).unwrap_or(&message).to_owned();
    Error::Invalid { field, message }
}

/// The request's body: what [`Backend::plan`] resolved, without what the server knows better.
fn body(resolved: &Resolved) -> Result<Value> {
    let mut params = resolved.method.clone();
    let name = match params.remove("name") {
        Some(Value::String(name)) => name,
        _ => PLAIN.to_owned(),
    };
    let request = GenerateRequest {
        prompt: resolved.prompt.clone(),
        negative_prompt: resolved.negative_prompt.clone(),
        model: Some(resolved.model.clone()),
        adapter: resolved.adapter.clone(),
        method: Some(if params.is_empty() {
            MethodRequest::Name(name)
        } else {
            MethodRequest::Full { name, params }
        }),
        seed: Some(resolved.seed),
        width: Some(resolved.width),
        height: Some(resolved.height),
        steps: Some(resolved.steps),
        guidance_scale: Some(resolved.guidance_scale),
        guidance_rescale: (resolved.guidance_rescale > 0.0).then_some(resolved.guidance_rescale),
        solver: (!resolved.solver.is_empty()).then(|| resolved.solver.clone()),
        n: Some(resolved.n),
        reward: resolved.reward.clone(),
        budget: (resolved.budget != Budget::default())
            .then_some(BudgetRequest::Full(resolved.budget)),
        output_format: Some(resolved.output_format),
        digests: resolved.digests.then_some(true),
        previews: Some(resolved.previews).filter(|n| *n > 0),
        alone: resolved.alone.then_some(true),
        deadline_ms: None,
    };
    let mut body =
        serde_json::to_value(request).map_err(|e| Error::invalid("request", e.to_string()))?;
    if let Some(body) = body.as_object_mut() {
        body.retain(|_, value| !value.is_null());
    }
    Ok(body)
}

impl Answer {
    fn into_generation(self) -> Result<Generation> {
        let images = self
            .images
            .into_iter()
            .map(|image| {
                let bytes = base64::engine::general_purpose::STANDARD
                    .decode(&image.data)
                    .map_err(|e| Error::invalid("images", format!("bad base64: {e}")))?;
                let pixels = image::load_from_memory(&bytes)
                    .map_err(|e| Error::invalid("images", e.to_string()))?
                    .to_rgb8();
                Ok(GeneratedImage { pixels, seed: image.seed, scores: image.scores })
            })
            .collect::<Result<_>>()?;
        Ok(Generation {
            images,
            cost: self.cost,
            resolved: self.resolved,
            model: self.model,
            // Their pictures stay on the server; the trace has what else there is.
            previews: Vec::new(),
            trace: self.trace,
        })
    }
}
