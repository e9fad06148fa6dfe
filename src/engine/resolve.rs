//! From a request to effective values and a planned cost.

use std::ops::RangeInclusive;

use serde_json::{Map, Value, json};

use super::Planned;
use super::model::{DEFAULT_GUIDANCE, DEFAULT_STEPS, Model};
use super::previews;
use super::request::{BudgetRequest, GenerateRequest, MethodRequest, Resolved};
use crate::diffusion::cost::{Budget, Units};
use crate::diffusion::denoiser::NoiseModel;
use crate::diffusion::solver::SolverKind;
use crate::rewards::ensemble::Ensemble;
use crate::search::{EnvSpec, Plan, SearchMethod, method};
use crate::{Error, Result};

/// Largest image side, in pixels.
const MOST_PIXELS: u32 = 4096;
const MOST_IMAGES: u32 = 64;

/// A resolved request with the plan of its method.
pub struct Resolution {
    pub planned: Planned,
    pub method: &'static dyn SearchMethod,
    pub plan: Plan,
    pub solver: SolverKind,
}

/// `memory`: bytes that there are in all, where that is known.
///
/// # Errors
/// `Error::Invalid` and `Error::Unknown` name the field; `Error::Budget` and
/// `Error::InsufficientMemory` have the numbers.
pub fn resolve(
    model: &Model,
    request: &GenerateRequest,
    memory: Option<u64>,
) -> Result<Resolution> {
    let (name, params) = method_of(request.method.as_ref());
    let method = method(&name)?;
    let (width, height) = size(model, request)?;
    let most_steps = model.schedule.num_train_timesteps() as u64;
    let steps =
        within("steps", request.steps.map(u64::from), DEFAULT_STEPS.into(), 1..=most_steps)? as u32;
    let n = within("n", request.n.map(u64::from), 1, 1..=MOST_IMAGES.into())? as u32;
    let guidance_scale =
        within("guidance_scale", request.guidance_scale, DEFAULT_GUIDANCE, 0.0..=100.0)?;
    if let Some(bytes) = memory
        && let Some(plan) = model.memory(width, height, guidance_scale != 1.0)?
    {
        plan.ensure_fits(bytes)?;
    }
    let guidance_rescale = within("guidance_rescale", request.guidance_rescale, 0.0, 0.0..=1.0)?;
    let solver = match &request.solver {
        Some(name) => name.parse()?,
        None => model.solver,
    };
    if let Some(adapter) = &request.adapter {
        model.adapter(adapter)?;
    }
    let reward = match &request.reward {
        Some(text) => Some(Ensemble::parse(text, &model.rewards)?),
        None if method.needs_reward() => {
            let first = model.rewards.names().next();
            first.map(|name| Ensemble::parse(name, &model.rewards)).transpose()?
        }
        None => None,
    };
    let budget = match request.budget {
        None => Budget::default(),
        Some(BudgetRequest::Forwards(f)) => Budget { f: Some(f), ..Budget::default() },
        Some(BudgetRequest::Full(budget)) => budget,
    };
    let search_calls = reward.as_ref().map_or(0, Ensemble::external_calls);
    let all_calls: u64 = model.rewards.iter().map(|r| r.external_calls()).sum();
    let spec = EnvSpec {
        schedule: &model.schedule,
        steps: steps as usize,
        solver,
        forwards_per_eval: if guidance_scale == 1.0 { 1 } else { 2 },
        searches: reward.is_some(),
        reports: !model.rewards.is_empty(),
        relative: reward.as_ref().is_some_and(Ensemble::is_relative),
        search_calls,
        report_calls: all_calls - search_calls,
    };
    let previews = within("previews", request.previews, 0, 0..=previews::MOST)?;
    let plan_with =
        |previews| plan_with(previews, &budget, |left| method.plan(&params, &spec, left));
    let mut plan = plan_with(previews)?;
    let most = previews::most(plan.predicted.f, spec.forwards_per_eval);
    let previews = previews.min(u32::try_from(most).unwrap_or(u32::MAX));
    if request.previews.is_some_and(|asked| asked > previews) {
        plan = plan_with(previews)?;
    }
    let mut effective = Map::from_iter([("name".to_owned(), json!(plan.method))]);
    effective.extend(plan.params.clone());
    let resolved = Resolved {
        prompt: request.prompt.clone(),
        negative_prompt: request.negative_prompt.clone(),
        model: model.id.clone(),
        adapter: request.adapter.clone(),
        method: effective,
        seed: request.seed.unwrap_or_else(|| rand::random::<u32>().into()),
        width,
        height,
        steps,
        guidance_scale,
        guidance_rescale,
        solver: solver.name().to_owned(),
        n,
        reward: reward.map(|ensemble| ensemble.name()),
        budget,
        output_format: request.output_format.unwrap_or_default(),
        digests: request.digests.unwrap_or_default(),
        previews,
        alone: request.alone.unwrap_or_default(),
    };
    let each = Units { y: plan.predicted.y + u64::from(previews), ..plan.predicted };
    let cost = (0..n).fold(Units::default(), |sum, _| sum + each);
    Ok(Resolution { planned: Planned { resolved, cost }, method, plan, solver })
}

/// A method's plan with what `budget` leaves it beside the decodes of `previews`.
fn plan_with(
    previews: u32,
    budget: &Budget,
    plan: impl FnOnce(&Budget) -> Result<Plan>,
) -> Result<Plan> {
    let previews = u64::from(previews);
    let y = match budget.y {
        Some(y) if y < previews => {
            return Err(Error::Budget(format!("y: {previews} previews need as many, {y} allowed")));
        }
        y => y.map(|y| y - previews),
    };
    plan(&Budget { y, ..*budget })
}

/// Asks again for what was resolved before.
pub fn request_of(resolved: &Resolved) -> GenerateRequest {
    let mut params = resolved.method.clone();
    let name =
        params.remove("name").and_then(|v| v.as_str().map(str::to_owned)).unwrap_or_default();
    GenerateRequest {
        prompt: resolved.prompt.clone(),
        negative_prompt: resolved.negative_prompt.clone(),
        model: Some(resolved.model.clone()),
        adapter: resolved.adapter.clone(),
        method: Some(MethodRequest::Full { name, params }),
        seed: Some(resolved.seed),
        width: Some(resolved.width),
        height: Some(resolved.height),
        steps: Some(resolved.steps),
        guidance_scale: Some(resolved.guidance_scale),
        guidance_rescale: Some(resolved.guidance_rescale),
        solver: Some(resolved.solver.clone()),
        n: Some(resolved.n),
        reward: resolved.reward.clone(),
        budget: Some(BudgetRequest::Full(resolved.budget)),
        output_format: Some(resolved.output_format),
        digests: resolved.digests.then_some(true),
        previews: Some(resolved.previews).filter(|n| *n > 0),
        alone: resolved.alone.then_some(true),
        deadline_ms: None,
    }
}

fn method_of(request: Option<&MethodRequest>) -> (String, Map<String, Value>) {
    match request {
        None => ("plain".to_owned(), Map::new()),
        Some(MethodRequest::Name(name)) => (name.clone(), Map::new()),
        Some(MethodRequest::Full { name, params }) => (name.clone(), params.clone()),
    }
}

fn size(model: &Model, request: &GenerateRequest) -> Result<(u32, u32)> {
    let (width, height) = model.base().folder().default_size();
    let most = MOST_PIXELS.into();
    let width = within("width", request.width.map(u64::from), width.into(), 1..=most)? as u32;
    let height = within("height", request.height.map(u64::from), height.into(), 1..=most)? as u32;
    model.base().latent_shape(width, height)?;
    Ok((width, height))
}

/// The value or its default, inside `range`.
fn within<T: Copy + PartialOrd + std::fmt::Display>(
    field: &str,
    value: Option<T>,
    default: T,
    range: RangeInclusive<T>,
) -> Result<T> {
    let value = value.unwrap_or(default);
    if range.contains(&value) {
        return Ok(value);
    }
    Err(Error::invalid(
        field,
        format!("expected {} to {}, got {value}", range.start(), range.end()),
    ))
}
