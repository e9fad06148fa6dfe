//! One prompt and one noise, several arms, at a cost that is equal or said.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use utoipa::ToSchema;

use super::body;
use super::deadline;
use super::limits;
use super::problem::{Kind, Problem};
use super::server::Shared;
use crate::Error;
use crate::diffusion::cost::Units;
use crate::engine::latency::Rates;
use crate::engine::request::{BudgetRequest, GenerateRequest, MethodRequest};
use crate::engine::{Backend, Planned};

/// Arms of a comparison, at most.
const MOST_ARMS: usize = 16;
/// What arms share, so that their images differ by method alone.
const SHARED: [&str; 7] =
    ["prompt", "negative_prompt", "seed", "n", "width", "height", "output_format"];

/// `POST /compare`.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CompareRequest {
    /// Fields of a generation request; those of an arm win.
    #[schema(value_type = GenerateRequest)]
    pub base: Map<String, Value>,
    /// What each arm has besides, and its `label`.
    #[schema(value_type = Vec<ArmBody>, min_items = 1, max_items = 16)]
    pub arms: Vec<Map<String, Value>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub contract: Option<Contract>,
}

/// What an arm may have: a generation request's fields but those that arms share.
#[derive(ToSchema)]
#[allow(dead_code, reason = "describes bodies")]
#[serde(deny_unknown_fields)]
pub struct ArmBody {
    #[schema(min_length = 1, max_length = 64, pattern = r"\S")]
    label: Option<String>,
    model: Option<String>,
    adapter: Option<String>,
    method: Option<MethodRequest>,
    #[schema(minimum = 1)]
    steps: Option<u32>,
    #[schema(minimum = 0, maximum = 100)]
    guidance_scale: Option<f64>,
    #[schema(minimum = 0, maximum = 1)]
    guidance_rescale: Option<f64>,
    solver: Option<String>,
    reward: Option<String>,
    budget: Option<BudgetRequest>,
    digests: Option<bool>,
    #[schema(minimum = 1)]
    deadline_ms: Option<u64>,
    #[schema(maximum = 16)]
    previews: Option<u32>,
    alone: Option<bool>,
}

/// What every arm may spend on an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Contract {
    /// U-Net forwards.
    EqualF(u64),
    /// Milliseconds, as planned from the measured seconds of F, V and Y.
    EqualLatencyMs(u64),
}

/// An arm as it is planned.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Arm {
    pub label: String,
    /// Of its generation; none where it cannot meet the contract.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// Why it cannot.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unmet: Option<String>,
    /// Over all images.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub planned: Option<Units>,
    /// Seconds that the plan takes, by what was measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub planned_seconds: Option<f64>,
}

/// An arm that runs, with its request.
pub struct Runnable {
    pub request: GenerateRequest,
    pub planned: Planned,
}

/// Plans every arm of a client's comparison; blocks. An arm that cannot meet the contract has no
/// [`Runnable`], and says why.
///
/// # Errors
/// The request is wrong; the problem's field names the arm.
pub fn plan(
    shared: &Shared,
    backend: &dyn Backend,
    client: &str,
    id: &str,
    asked: &CompareRequest,
) -> Result<Vec<(Arm, Option<Runnable>)>, Problem> {
    if !(1..=MOST_ARMS).contains(&asked.arms.len()) {
        let message = format!("{} arms; 1 to {MOST_ARMS} can be compared", asked.arms.len());
        return Err(Problem::field(Kind::InvalidValue, "arms", message));
    }
    let (mut seed, mut before) = (None, 0.0);
    let mut arms = Vec::with_capacity(asked.arms.len());
    for (index, arm) in asked.arms.iter().enumerate() {
        let within = |problem: Problem| locate(problem, asked, index);
        let (label, mut request) = merge(asked, index, arm)?;
        limits::check_request(&request, &shared.settings).map_err(within)?;
        request.seed = request.seed.or(seed);
        // Others' rows would be in its seconds.
        request.alone = request.alone.or(Some(true));
        let contract = Planner { shared, backend, contract: asked.contract };
        let planned = contract.plan(&mut request);
        let (mut arm, runnable) = match planned {
            Ok((planned, rates)) => {
                limits::check_plan(&planned, &shared.settings).map_err(within)?;
                before +=
                    deadline::check(shared, client, &request, &planned, before).map_err(within)?;
                seed = Some(planned.resolved.seed);
                request.seed = seed;
                let arm = Arm {
                    label,
                    id: Some(format!("{id}.{index}")),
                    unmet: None,
                    planned: Some(planned.cost),
                    planned_seconds: rates.map(|rates| rates.seconds(planned.cost)),
                };
                (arm, Some(Runnable { request, planned }))
            }
            Err(Error::Budget(message)) if asked.contract.is_some() => {
                let (id, planned, planned_seconds) = (None, None, None);
                (Arm { label, id, unmet: Some(message), planned, planned_seconds }, None)
            }
            Err(error) => return Err(within(error.into())),
        };
        if arms.iter().any(|(other, _): &(Arm, _)| other.label == arm.label) {
            arm.label = format!("{} ({})", arm.label, index + 1);
        }
        arms.push((arm, runnable));
    }
    Ok(arms)
}

/// Names where a field of an arm's request was given.
fn locate(problem: Problem, asked: &CompareRequest, index: usize) -> Problem {
    let first = problem.field.as_deref().and_then(|f| f.split(['.', '[']).next()).unwrap_or("");
    let of_base = asked.base.contains_key(first) || SHARED.contains(&first);
    if of_base && !asked.arms[index].contains_key(first) {
        return problem.within("base");
    }
    problem.within(&format!("arms[{index}]"))
}

struct Planner<'a> {
    shared: &'a Shared,
    backend: &'a dyn Backend,
    contract: Option<Contract>,
}

impl Planner<'_> {
    /// Plans an arm within the contract; `Error::Budget` where it cannot meet it.
    fn plan(&self, request: &mut GenerateRequest) -> crate::Result<(Planned, Option<Rates>)> {
        let of = |f| Some(BudgetRequest::Forwards(f));
        match self.contract {
            None => Ok((self.backend.plan(request)?, None)),
            Some(Contract::EqualF(f)) => {
                request.budget = of(f);
                Ok((self.backend.plan(request)?, None))
            }
            Some(Contract::EqualLatencyMs(ms)) => {
                let seconds = ms as f64 / 1e3;
                let resolved = self.backend.plan(request)?.resolved;
                let (model, width, height) = (&resolved.model, resolved.width, resolved.height);
                let Some(rates) = self.shared.speed.rates(model, width, height) else {
                    let message = "nothing of this model and size has been measured yet; generate an image first";
                    return Err(Error::invalid("contract", message));
                };
                let images = u64::from(request.n.unwrap_or(1)).max(1);
                let found = rates.most_forwards(seconds, |f| {
                    let trial = GenerateRequest { budget: of(f), ..request.clone() };
                    let Units { f, v, y, l } = self.backend.plan(&trial)?.cost;
                    Ok(Units { f: f / images, v: v / images, y: y / images, l: l / images })
                })?;
                let Some(f) = found else {
                    let message = format!("nothing that it can do takes at most {ms} ms");
                    return Err(Error::Budget(message));
                };
                request.budget = of(f);
                Ok((self.backend.plan(request)?, Some(rates)))
            }
        }
    }
}

/// An arm's label and its whole request.
fn merge(
    asked: &CompareRequest,
    index: usize,
    arm: &Map<String, Value>,
) -> Result<(String, GenerateRequest), Problem> {
    let wrong = |name: &str, message: &str| {
        Err(Problem::field(Kind::InvalidValue, format!("arms[{index}].{name}"), message))
    };
    let (mut whole, mut label) = (asked.base.clone(), None);
    for (name, value) in arm {
        match (name.as_str(), value) {
            ("label", Value::String(text)) if !text.trim().is_empty() && text.len() <= 64 => {
                label = Some(text.trim().to_owned());
            }
            ("label", _) => return wrong("label", "must be a text of 1 to 64 bytes"),
            (name, _) if SHARED.contains(&name) => {
                return wrong(name, "belongs to base: arms share it");
            }
            _ => {
                whole.insert(name.clone(), value.clone());
            }
        }
    }
    if asked.contract.is_some() && whole.get("budget").is_some_and(|budget| !budget.is_null()) {
        return wrong("budget", "the contract says what every arm may spend");
    }
    let request = body::decode(Value::Object(whole).to_string().as_bytes())
        .map_err(|problem| locate(problem, asked, index))?;
    let label = label.unwrap_or_else(|| name_of(&request));
    Ok((label, request))
}

/// What an arm is called that has no label.
pub fn name_of(request: &GenerateRequest) -> String {
    let method = match &request.method {
        None => "plain",
        Some(MethodRequest::Name(name) | MethodRequest::Full { name, .. }) => name,
    };
    match &request.adapter {
        Some(adapter) => format!("{method}@{adapter}"),
        None => method.to_owned(),
    }
}

/// What an arm was allowed and did not spend, over `images`.
#[must_use]
pub fn unused(contract: Option<Contract>, images: u64, actual: Units, seconds: f64) -> Value {
    match contract {
        None => Value::Null,
        Some(Contract::EqualF(f)) => {
            json!({ "f": i128::from(f) * i128::from(images) - i128::from(actual.f) })
        }
        Some(Contract::EqualLatencyMs(ms)) => {
            json!({ "ms": ms as f64 * images as f64 - seconds * 1e3 })
        }
    }
}
