//! Comparisons: one prompt and one noise, several arms.

use actix_web::http::header;
use actix_web::{HttpRequest, HttpResponse, web};
use serde_json::{Value, json};

use super::generate::{prefers_async, read};
use super::generations::{self, Query, id_of};
use super::openapi::{Refusals, WorkRefusals};
use super::{Data, apart, caller};
use crate::diffusion::cost::{Cost, Units};
use crate::serve::auth::Caller;
use crate::serve::compare::{self, Arm, CompareRequest};
use crate::serve::live::End;
use crate::serve::problem::{Body, Kind, Problem};
use crate::serve::server::Shared;
use crate::serve::store::{Comparison, Filter, New, State, now};
use crate::serve::{body, jobs};

/// Answers when every arm has ended, or at once where that is preferred. The arms go on when the
/// client leaves.
#[utoipa::path(
    post,
    path = "/compare",
    tag = "comparisons",
    request_body = CompareRequest,
    params(
        ("Prefer" = Option<String>, Header, description = "`respond-async`: 202 at once"),
    ),
    responses(
        (status = 200, description = "Every arm has ended", body = Object,
            headers(("Location" = String))),
        (status = 202, description = "Accepted for later", body = Object,
            headers(("Location" = String))),
        Refusals,
        WorkRefusals,
    )
)]
pub async fn post(
    shared: Data,
    request: HttpRequest,
    payload: web::Payload,
) -> Result<HttpResponse, Problem> {
    let accept = async || {
        let bytes = read(&shared, &request, payload).await?;
        let asked: CompareRequest = body::decode_bytes(&bytes)?;
        let caller = caller(&request);
        let (comparison, lives) = apart(&shared, move |s| submit(s, &caller, asked)).await??;
        Ok((comparison, lives))
    };
    let (id, lives) =
        accept().await.inspect_err(|problem: &Problem| shared.metrics.rejected(problem.kind))?;
    let later = prefers_async(&request);
    if !later {
        for live in lives {
            // An ending server leaves its arms to the next.
            if let (End::Problem(problem), false) = (live.over().await, live.state().is_final()) {
                return Err(problem);
            }
        }
    }
    let (asked, caller) = (id.clone(), caller(&request));
    let body = apart(&shared, move |s| described(s, &caller, &asked)).await??;
    let mut response = if later { HttpResponse::Accepted() } else { HttpResponse::Ok() };
    if later {
        response.insert_header(("Preference-Applied", "respond-async"));
    }
    Ok(response
        .insert_header((header::LOCATION, format!("/compare/{id}")))
        .insert_header((header::CACHE_CONTROL, "no-store"))
        .insert_header(("X-Request-Id", id))
        .json(body))
}

type Accepted = (String, Vec<std::sync::Arc<crate::serve::live::Live>>);

fn submit(shared: &Shared, caller: &Caller, asked: CompareRequest) -> Result<Accepted, Problem> {
    let (backend, id) = (shared.backend()?, uuid::Uuid::now_v7().to_string());
    let planned = compare::plan(shared, backend.as_ref(), &caller.name, &id, &asked)?;
    let created_ms = now();
    let (mut arms, mut runs): (Vec<Arm>, Vec<New>) = (Vec::new(), Vec::new());
    for (arm, runnable) in planned {
        if let (Some(id_of_arm), Some(run)) = (&arm.id, runnable) {
            runs.push(New {
                id: id_of_arm.clone(),
                created_ms,
                client: caller.name.clone(),
                comparison: Some(id.clone()),
                request: run.request,
                planned: run.planned,
            });
        }
        arms.push(arm);
    }
    let Some(first) = runs.first() else {
        let why = arms.iter().filter_map(|a| Some(format!("{}: {}", a.label, a.unmet.as_ref()?)));
        let message = format!("no arm can meet it: {}", why.collect::<Vec<_>>().join("; "));
        return Err(Problem::field(Kind::Budget, "contract", message));
    };
    let places = shared.settings.queue + shared.settings.workers;
    if runs.len() > places {
        let message = format!("{} arms; this server's queue has {places} places", runs.len());
        return Err(Problem::field(Kind::InvalidValue, "arms", message));
    }
    let prompt = first.request.prompt.clone();
    let client = caller.name.clone();
    let comparison = Comparison { id, created_ms, client, prompt, request: asked, arms };
    let lives = jobs::submit_comparison(shared, &comparison, runs)?;
    Ok((comparison.id, lives))
}

fn unknown(id: &str) -> Problem {
    Problem::new(Kind::NotFound, format!("there is no comparison {id}"))
}

/// # Errors
/// There is none that the caller sees.
pub fn find(shared: &Shared, caller: &Caller, id: &str) -> Result<Comparison, Problem> {
    let found = shared.store.comparison(id)?.filter(|c| caller.sees(&c.client));
    found.ok_or_else(|| unknown(id))
}

/// A comparison with what its arms have come to. Blocks.
///
/// # Errors
/// The history cannot be read.
pub fn describe(
    shared: &Shared,
    caller: &Caller,
    comparison: &Comparison,
) -> Result<Value, Problem> {
    let contract = comparison.request.contract;
    let mut arms = Vec::with_capacity(comparison.arms.len());
    let mut unfinished = false;
    for arm in &comparison.arms {
        let mut shown = serde_json::to_value(arm).map_err(Problem::internal)?;
        let Some(id_of_arm) = &arm.id else {
            shown["state"] = json!("unmet");
            arms.push(shown);
            continue;
        };
        let status = match generations::status(shared, caller, id_of_arm) {
            Ok(status) => status,
            Err(problem) if problem.kind == Kind::NotFound => {
                shown["state"] = json!("forgotten");
                arms.push(shown);
                continue;
            }
            Err(problem) => return Err(problem),
        };
        unfinished |= !status.state.is_final();
        let actual = status.result.as_ref().map(|result| &result["cost"]["actual"]);
        if let Some(cost) = actual.and_then(|a| serde_json::from_value::<Cost>(a.clone()).ok()) {
            let images = status.result.as_ref().and_then(|r| r["images"].as_array());
            let images = images.map_or(1, |images| images.len() as u64);
            let seconds = cost.seconds.values().sum::<f64>();
            shown["actual"] = json!(Units { ..cost.units });
            shown["seconds"] = json!(seconds);
            shown["unused"] = compare::unused(contract, images, cost.units, seconds);
        }
        let status = serde_json::to_value(&status).map_err(Problem::internal)?;
        for name in ["state", "spent_f", "ahead", "result", "problem"] {
            if let Some(value) = status.get(name) {
                shown[name] = value.clone();
            }
        }
        arms.push(shown);
    }
    Ok(json!({
        "id": comparison.id,
        "state": if unfinished { "running" } else { "completed" },
        "created_ms": comparison.created_ms,
        "prompt": comparison.prompt,
        "contract": contract,
        "base": comparison.request.base,
        "arms": arms,
        "links": { "self": format!("/compare/{}", comparison.id) },
    }))
}

fn described(shared: &Shared, caller: &Caller, id: &str) -> Result<Value, Problem> {
    describe(shared, caller, &find(shared, caller, id)?)
}

/// A comparison with what its arms have come to.
#[utoipa::path(
    get,
    path = "/compare/{id}",
    tag = "comparisons",
    params(
        ("id" = String, Path, min_length = 1, max_length = 64,
            pattern = "^[A-Za-z0-9][A-Za-z0-9._-]*$"),
    ),
    responses((status = 200, body = Object), Refusals)
)]
pub async fn get(shared: Data, request: HttpRequest) -> Result<HttpResponse, Problem> {
    let (id, caller) = (id_of(&request)?, caller(&request));
    let body = apart(&shared, move |s| described(s, &caller, &id)).await??;
    Ok(HttpResponse::Ok().insert_header((header::CACHE_CONTROL, "no-store")).json(body))
}

/// Cancels the arms that have not ended.
#[utoipa::path(
    delete,
    path = "/compare/{id}",
    tag = "comparisons",
    params(
        ("id" = String, Path, min_length = 1, max_length = 64,
            pattern = "^[A-Za-z0-9][A-Za-z0-9._-]*$"),
    ),
    responses(
        (status = 200, description = "Cancelled"),
        (status = 409, description = "Every arm has ended", body = Body,
            content_type = "application/problem+json"),
        Refusals,
    )
)]
pub async fn delete(shared: Data, request: HttpRequest) -> Result<HttpResponse, Problem> {
    let (id, caller) = (id_of(&request)?, caller(&request));
    let (asked, who) = (id.clone(), caller.clone());
    let stopped = apart(&shared, move |s| {
        let comparison = find(s, &who, &asked)?;
        let mut stopped = Vec::new();
        for arm in comparison.arms.iter().filter_map(|arm| arm.id.as_ref()) {
            match jobs::cancel(s, &who, arm) {
                Ok(live) => stopped.push(live),
                // It has ended, or was forgotten.
                Err(problem) if matches!(problem.kind, Kind::Conflict | Kind::NotFound) => {}
                Err(problem) => return Err(problem),
            }
        }
        Ok(stopped)
    })
    .await??;
    if stopped.is_empty() {
        let detail = format!("every arm of {id} has ended; only unfinished work is cancelled");
        return Err(Problem::new(Kind::Conflict, detail));
    }
    let mut cancelled = 0;
    for live in &stopped {
        live.over().await;
        cancelled += usize::from(live.state() == State::Cancelled);
    }
    Ok(HttpResponse::Ok()
        .insert_header((header::CACHE_CONTROL, "no-store"))
        .json(json!({ "id": id, "cancelled": cancelled })))
}

/// Comparisons: the newest first, by pages.
#[utoipa::path(
    get,
    path = "/compare",
    tag = "comparisons",
    params(
        ("q" = Option<String>, Query, description = "Words of the prompt"),
        ("before" = Option<String>, Query, pattern = "^[0-9]{1,18}_[A-Za-z0-9][A-Za-z0-9._-]*$",
            description = "The `next` of the page before"),
        ("limit" = Option<usize>, Query, minimum = 1, maximum = 200),
    ),
    responses((status = 200, body = Object), Refusals)
)]
pub async fn list(shared: Data, request: HttpRequest) -> Result<HttpResponse, Problem> {
    let caller = caller(&request);
    let filter = body::decode_pairs::<Query>(request.query_string())?.of_comparisons()?;
    let filter = filter.filter(&caller)?;
    let limit = filter.limit;
    let asked = Filter { limit: limit + 1, ..filter };
    let mut listed = apart(&shared, move |s| s.store.comparisons(&asked)).await??;
    let more = listed.len() > limit;
    listed.truncate(limit);
    let next = listed.last().filter(|_| more).map(|c| format!("{}_{}", c.created_ms, c.id));
    let comparisons: Vec<Value> = listed
        .iter()
        .map(|c| {
            json!({
                "id": c.id,
                "created_ms": c.created_ms,
                "prompt": c.prompt,
                "contract": c.request.contract,
                "arms": c.arms,
            })
        })
        .collect();
    Ok(HttpResponse::Ok()
        .insert_header((header::CACHE_CONTROL, "no-store"))
        .json(json!({ "comparisons": comparisons, "next": next })))
}
