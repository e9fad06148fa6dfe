//! Asking for images: at once, later, or under an id of the client's choice.

use std::sync::Arc;
use std::time::{Duration, Instant};

use actix_web::http::{StatusCode, header};
use actix_web::{HttpRequest, HttpResponse, web};
use serde::Serialize;
use utoipa::ToSchema;

use super::generations::Status;
use super::openapi::{Refusals, WorkRefusals};
use super::{Data, apart, blocking, caller, generations};
use crate::diffusion::cost::Units;
use crate::engine::request::{GenerateRequest, Resolved};
use crate::serve::answer::Answer;
use crate::serve::events::{self, EventBody, Owner};
use crate::serve::jobs::{self, Put};
use crate::serve::live::{Done, End, Live, Waiter};
use crate::serve::problem::{Kind, Problem};
use crate::serve::queue::Ahead;
use crate::serve::server::Shared;
use crate::serve::store::{New, Record, State, now};
use crate::serve::{answer, body, deadline, limits};

/// Images, when they are there; at once and later, or as events, where a header says so.
#[utoipa::path(
    post,
    path = "/generate",
    tag = "generations",
    request_body = GenerateRequest,
    params(
        ("Prefer" = Option<String>, Header,
            description = "`respond-async`: 202 at once; the work goes on without its client"),
    ),
    responses(
        (status = 200, description = "The images, or events when `text/event-stream` is accepted",
            content((Answer = "application/json"), (EventBody = "text/event-stream"))),
        (status = 202, description = "Accepted for later", body = Status,
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
    if prefers_async(&request) {
        let accept = async || {
            let new = prepare(&shared, &request, payload, new_id(), as_it_is).await?;
            let (live, _) = apart(&shared, move |s| jobs::submit(s, new, true)).await??;
            generations::accepted(&shared, &request, &live.id, StatusCode::ACCEPTED).await
        };
        return accept()
            .await
            .inspect_err(|problem: &Problem| shared.metrics.rejected(problem.kind));
    }
    let accepted = submit(&shared, &request, payload, as_it_is).await?;
    if events::wanted(&request) {
        return Ok(events::respond(accepted.live, 0, Some(accepted.owner)));
    }
    accepted.answer().await
}

fn new_id() -> String {
    uuid::Uuid::now_v7().to_string()
}

/// How a body becomes that of a generation request.
type Translate = fn(&[u8]) -> Result<Vec<u8>, Problem>;

fn as_it_is(body: &[u8]) -> Result<Vec<u8>, Problem> {
    Ok(body.to_vec())
}

/// A generation that ends when its client leaves: when the owner is dropped.
pub struct Accepted {
    live: Arc<Live>,
    waiter: Waiter,
    owner: Owner,
}

impl Accepted {
    /// Waits for the answer.
    pub async fn answer(self) -> Result<HttpResponse, Problem> {
        let end = self.waiter.end().await;
        drop(self.owner);
        answer_of(&self.live.id, end)
    }
}

/// Accepts a generation for as long as its client stays.
pub async fn submit(
    shared: &Data,
    request: &HttpRequest,
    payload: web::Payload,
    translate: Translate,
) -> Result<Accepted, Problem> {
    let accept = async || {
        let new = prepare(shared, request, payload, new_id(), translate).await?;
        let (live, waiter) = jobs::submit(shared, new, false)?;
        let owner = Owner::new(shared, &live);
        Ok(Accepted { live, waiter, owner })
    };
    accept().await.inspect_err(|problem: &Problem| shared.metrics.rejected(problem.kind))
}

/// The same request under the same id is one generation, however often it is sent, and outlives
/// whoever sent it.
#[utoipa::path(
    put,
    path = "/generations/{id}",
    tag = "generations",
    request_body = GenerateRequest,
    params(
        ("id" = String, Path, description = "Chosen by the client", min_length = 1,
            max_length = 64, pattern = "^[A-Za-z0-9][A-Za-z0-9._-]*$"),
        ("Prefer" = Option<String>, Header,
            description = "`respond-async`: its state at once instead of its images"),
    ),
    responses(
        (status = 200, description = "The images, or its state when that is preferred, or events \
            when `text/event-stream` is accepted",
            content((Answer = "application/json"), (EventBody = "text/event-stream"))),
        (status = 202, description = "Accepted for later", body = Status,
            headers(("Location" = String))),
        Refusals,
        WorkRefusals,
    )
)]
pub async fn put(
    shared: Data,
    request: HttpRequest,
    payload: web::Payload,
) -> Result<HttpResponse, Problem> {
    let accept = async || {
        let id = generations::id_of(&request)?;
        let new = prepare(&shared, &request, payload, id.clone(), as_it_is).await?;
        let caller = caller(&request);
        let there = apart(&shared, move |s| jobs::put(s, &caller, new)).await??;
        if prefers_async(&request) {
            let ended = match &there {
                Put::Live(live) => live.state().is_final(),
                Put::Ended(_) => true,
            };
            let status = if ended { StatusCode::OK } else { StatusCode::ACCEPTED };
            return generations::accepted(&shared, &request, &id, status).await;
        }
        match there {
            Put::Live(live) if events::wanted(&request) => Ok(events::respond(live, 0, None)),
            Put::Live(live) => match live.wait().end().await {
                // It ended before anybody waited for its bytes.
                End::Completed(Done { inline: None, .. }) => {
                    let record = apart(&shared, move |s| s.store.get(&id)).await??;
                    stored(&shared, record.ok_or_else(|| jobs::unknown(&live.id))?).await
                }
                end => answer_of(&id, end),
            },
            Put::Ended(record) if events::wanted(&request) => Ok(events::respond_ended(&record, 0)),
            Put::Ended(record) => stored(&shared, *record).await,
        }
    };
    accept().await.inspect_err(|problem: &Problem| shared.metrics.rejected(problem.kind))
}

/// What a request would cost and when it would begin.
#[derive(Serialize, ToSchema)]
pub struct Estimate {
    planned: Units,
    ahead: Ahead,
    /// That it takes, at the measured speed.
    seconds: Option<f64>,
    resolved: Resolved,
}

/// What a request would cost and when it would begin; nothing is run. The query has the fields of
/// a generation request.
#[utoipa::path(
    get,
    path = "/estimate",
    tag = "generations",
    params(
        ("prompt" = String, Query, min_length = 1),
        ("model" = Option<String>, Query),
        ("adapter" = Option<String>, Query),
        ("method" = Option<String>, Query,
            pattern = r#"^([^{\s][^{]*|\{"name": ?"[a-z0-9-]+"\})$"#,
            description = "A name, or an object as JSON"),
        ("steps" = Option<u32>, Query, minimum = 1),
        ("n" = Option<u32>, Query, minimum = 1),
        ("budget" = Option<String>, Query, pattern = r#"^((0|[1-9][0-9]{0,17})|\{"f": ?(0|[1-9][0-9]{0,17})\})$"#,
            description = "A number, or an object as JSON"),
        ("deadline_ms" = Option<u64>, Query, minimum = 1),
    ),
    responses((status = 200, body = Estimate), Refusals)
)]
pub async fn estimate(shared: Data, request: HttpRequest) -> Result<HttpResponse, Problem> {
    shared.health.check(shared.settings.drain_seconds)?;
    let asked = body::decode_query(request.query_string())?;
    let client = caller(&request).name;
    let planned = plan(&shared, asked.clone()).await?;
    deadline::check(&shared, &client, &asked, &planned, 0.0)?;
    let ahead = shared.queue.ahead_of_new(&client, planned.cost.f);
    let each = shared.queue.stats().seconds_per_f;
    Ok(HttpResponse::Ok().insert_header((header::CACHE_CONTROL, "no-store")).json(Estimate {
        planned: planned.cost,
        ahead,
        seconds: each.map(|each| planned.cost.f as f64 * each),
        resolved: planned.resolved,
    }))
}

/// Reads, checks and plans a request.
async fn prepare(
    shared: &Data,
    request: &HttpRequest,
    payload: web::Payload,
    id: String,
    translate: Translate,
) -> Result<New, Problem> {
    let bytes = read(shared, request, payload).await?;
    let asked = body::decode(&translate(&bytes)?)?;
    let planned = plan(shared, asked.clone()).await?;
    let client = caller(request).name;
    Ok(New { id, created_ms: now(), client, comparison: None, request: asked, planned })
}

/// Reads the body of a request for work.
pub async fn read(
    shared: &Data,
    request: &HttpRequest,
    payload: web::Payload,
) -> Result<Vec<u8>, Problem> {
    let settings = &shared.settings;
    let timeout = Duration::from_secs(settings.body_seconds);
    let bytes = body::read(request, payload, settings.max_body_bytes, timeout).await?;
    shared.health.check(settings.drain_seconds)?;
    Ok(bytes)
}

async fn plan(shared: &Data, asked: GenerateRequest) -> Result<crate::engine::Planned, Problem> {
    limits::check_request(&asked, &shared.settings)?;
    let start = Instant::now();
    let planned = blocking(shared, move |backend| backend.plan(&asked)).await??;
    shared.metrics.stage("plan", start.elapsed().as_secs_f64());
    limits::check_plan(&planned, &shared.settings)?;
    Ok(planned)
}

/// `Prefer: respond-async` (RFC 7240).
pub fn prefers_async(request: &HttpRequest) -> bool {
    request.headers().get_all("prefer").any(|value| {
        let text = value.to_str().unwrap_or("");
        text.split(',').any(|preference| preference.trim().eq_ignore_ascii_case("respond-async"))
    })
}

fn answer_of(id: &str, end: End) -> Result<HttpResponse, Problem> {
    let done = match end {
        End::Problem(problem) => return Err(problem),
        End::Completed(done) => done,
    };
    let timing = format!(
        "queue;dur={:.1}, generate;dur={:.1}",
        done.queue_seconds * 1e3,
        done.seconds * 1e3
    );
    let body = done
        .inline
        .map_or_else(|| web::Bytes::from(done.linked.as_bytes().to_vec()), web::Bytes::from_owner);
    Ok(ok(id).insert_header(("Server-Timing", timing)).body(body))
}

/// The answer of a generation that ended before.
async fn stored(shared: &Data, record: Record) -> Result<HttpResponse, Problem> {
    match (record.state, record.answer) {
        (State::Completed, Some(linked)) => {
            let read = move |s: &Shared| answer::with_bytes(&linked, &s.store);
            Ok(ok(&record.id).body(apart(shared, read).await??))
        }
        // As it was told when it ended.
        (state, _) => {
            let problem = record.problem.and_then(|text| serde_json::from_str(&text).ok());
            Err(problem.as_ref().and_then(Problem::from_json).unwrap_or_else(|| {
                Problem::new(Kind::Conflict, format!("{} has {state}", record.id))
            }))
        }
    }
}

fn ok(id: &str) -> actix_web::HttpResponseBuilder {
    let mut response = HttpResponse::Ok();
    response
        .insert_header((header::CONTENT_TYPE, "application/json"))
        .insert_header((header::CACHE_CONTROL, "no-store"))
        .insert_header(("X-Request-Id", id));
    response
}
