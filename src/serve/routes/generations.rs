//! Generations under their ids: state, result, events, images, history.

use actix_web::http::{StatusCode, header};
use actix_web::{HttpRequest, HttpResponse, web};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use utoipa::{IntoParams, ToSchema};

use super::openapi::Refusals;
use super::{Data, apart, archive, caller};
use crate::diffusion::cost::Units;
use crate::engine::request::{GenerateRequest, Resolved};
use crate::serve::auth::Caller;
use crate::serve::events::EventBody;
use crate::serve::live::{End, Live};
use crate::serve::problem::{Body, Kind, Problem};
use crate::serve::queue::Ahead;
use crate::serve::server::Shared;
use crate::serve::store::{Filter, Listed, Name, Record, State};
use crate::serve::{body, events, export, jobs};

/// Longest id that a client may choose.
const MAX_ID: usize = 64;
/// Generations on one page, unless asked otherwise, and at most.
const PAGE: (usize, usize) = (50, 200);

/// The id in the path.
///
/// # Errors
/// It is not one.
pub fn id_of(request: &HttpRequest) -> Result<String, Problem> {
    let id = request.match_info().get("id").unwrap_or("");
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
    let first = id.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric());
    if first && id.len() <= MAX_ID && id.bytes().all(plain) {
        return Ok(id.to_owned());
    }
    let message = format!(
        "must have 1 to {MAX_ID} letters, digits, '.', '_' or '-', the first a letter or digit"
    );
    Err(Problem::field(Kind::InvalidValue, "id", message))
}

/// What is known of a generation.
#[derive(Serialize, ToSchema)]
pub struct Status {
    id: String,
    pub state: State,
    created_ms: i64,
    #[serde(skip_serializing_if = "Option::is_none")]
    started_ms: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    finished_ms: Option<i64>,
    planned: Units,
    /// While it runs: U-Net forwards done.
    #[serde(skip_serializing_if = "Option::is_none")]
    spent_f: Option<u64>,
    /// While it waits.
    #[serde(skip_serializing_if = "Option::is_none")]
    ahead: Option<Ahead>,
    request: GenerateRequest,
    resolved: Resolved,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub result: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    problem: Option<Value>,
    links: Links,
}

#[derive(Serialize, ToSchema)]
struct Links {
    #[serde(rename = "self")]
    this: String,
    events: String,
}

impl Links {
    fn of(id: &str) -> Self {
        let this = format!("/generations/{id}");
        Self { events: format!("{this}/events"), this }
    }
}

/// Blocks.
pub fn status(shared: &Shared, caller: &Caller, id: &str) -> Result<Status, Problem> {
    // In this order: what ends in between is in the history before it is not alive any more.
    let ahead = shared.queue.ahead(id);
    let live = shared.lives.get(id);
    let Some(record) = jobs::record(shared, caller, id)? else {
        // A synchronous one is recorded with its result.
        let live = live.filter(|live| caller.sees(&live.new.client));
        let live = live.ok_or_else(|| jobs::unknown(id))?;
        return Ok(unrecorded(&live, ahead));
    };
    let spent = live.filter(|_| record.state == State::Running);
    let Record { id, state, created_ms, started_ms, finished_ms, planned, .. } = record;
    let parse = |text: Option<String>| text.and_then(|t| serde_json::from_str(&t).ok());
    Ok(Status {
        links: Links::of(&id),
        id,
        state,
        created_ms,
        started_ms,
        finished_ms,
        planned,
        spent_f: spent.map(|live| live.spent_f.load(std::sync::atomic::Ordering::Relaxed)),
        ahead: ahead.filter(|_| state == State::Queued),
        request: record.request,
        resolved: record.resolved,
        result: parse(record.answer),
        problem: parse(record.problem),
    })
}

fn unrecorded(live: &Live, ahead: Option<Ahead>) -> Status {
    let (new, state) = (&live.new, live.state());
    let running = state == State::Running;
    Status {
        id: live.id.clone(),
        state,
        created_ms: new.created_ms,
        started_ms: None,
        finished_ms: None,
        planned: new.planned.cost,
        spent_f: running.then(|| live.spent_f.load(std::sync::atomic::Ordering::Relaxed)),
        ahead: ahead.filter(|_| state == State::Queued),
        request: new.request.clone(),
        resolved: new.planned.resolved.clone(),
        result: None,
        problem: match live.ended() {
            Some(End::Problem(problem)) => Some(problem.to_json()),
            Some(End::Completed(_)) | None => None,
        },
        links: Links::of(&live.id),
    }
}

/// The answer to a request that is done later.
pub async fn accepted(
    shared: &Data,
    request: &HttpRequest,
    id: &str,
    code: StatusCode,
) -> Result<HttpResponse, Problem> {
    let (asked, location) = (id.to_owned(), format!("/generations/{id}"));
    let caller = caller(request);
    let status = apart(shared, move |s| status(s, &caller, &asked)).await??;
    Ok(HttpResponse::build(code)
        .insert_header((header::LOCATION, location))
        .insert_header(("Preference-Applied", "respond-async"))
        .insert_header((header::CACHE_CONTROL, "no-store"))
        .insert_header(("X-Request-Id", id))
        .json(status))
}

/// What is known of a generation.
#[utoipa::path(
    get,
    path = "/generations/{id}",
    tag = "generations",
    params(
        ("id" = String, Path, min_length = 1, max_length = 64,
            pattern = "^[A-Za-z0-9][A-Za-z0-9._-]*$"),
    ),
    responses((status = 200, body = Status), Refusals)
)]
pub async fn get(shared: Data, request: HttpRequest) -> Result<HttpResponse, Problem> {
    let (id, caller) = (id_of(&request)?, caller(&request));
    let status = apart(&shared, move |s| status(s, &caller, &id)).await??;
    Ok(HttpResponse::Ok().insert_header((header::CACHE_CONTROL, "no-store")).json(status))
}

/// Cancels it; the answer comes when its thread has stopped.
#[utoipa::path(
    delete,
    path = "/generations/{id}",
    tag = "generations",
    params(
        ("id" = String, Path, min_length = 1, max_length = 64,
            pattern = "^[A-Za-z0-9][A-Za-z0-9._-]*$"),
    ),
    responses(
        (status = 200, description = "Cancelled"),
        (status = 409, description = "It has ended", body = Body,
            content_type = "application/problem+json"),
        Refusals,
    )
)]
pub async fn delete(shared: Data, request: HttpRequest) -> Result<HttpResponse, Problem> {
    let id = id_of(&request)?;
    let (asked, caller) = (id.clone(), caller(&request));
    let live = apart(&shared, move |s| jobs::cancel(s, &caller, &asked)).await??;
    live.over().await;
    let state = live.state();
    if state != State::Cancelled {
        let detail = format!("{id} has {state} before it could be cancelled");
        return Err(Problem::new(Kind::Conflict, detail));
    }
    Ok(HttpResponse::Ok()
        .insert_header((header::CACHE_CONTROL, "no-store"))
        .json(json!({ "id": id, "state": state })))
}

/// Forgets a finished generation and the images that only it has.
#[utoipa::path(
    delete,
    path = "/history/{id}",
    tag = "history",
    params(
        ("id" = String, Path, min_length = 1, max_length = 64,
            pattern = "^[A-Za-z0-9][A-Za-z0-9._-]*$"),
    ),
    responses(
        (status = 204, description = "Forgotten"),
        (status = 409, description = "It is unfinished", body = Body,
            content_type = "application/problem+json"),
        Refusals,
    )
)]
pub async fn forget(shared: Data, request: HttpRequest) -> Result<HttpResponse, Problem> {
    let (id, caller) = (id_of(&request)?, caller(&request));
    apart(&shared, move |s| jobs::forget(s, &caller, &id)).await??;
    Ok(HttpResponse::NoContent().finish())
}

/// Its events as they happen.
#[utoipa::path(
    get,
    path = "/generations/{id}/events",
    tag = "generations",
    params(
        ("id" = String, Path, min_length = 1, max_length = 64,
            pattern = "^[A-Za-z0-9][A-Za-z0-9._-]*$"),
        ("Last-Event-ID" = Option<String>, Header, pattern = "^[0-9]{1,19}$",
            description = "The last event that the client has"),
    ),
    responses(
        (status = 200, description = "Events", content_type = "text/event-stream", body = EventBody),
        (status = 204, description = "There is nothing more"),
        Refusals,
    )
)]
pub async fn events(shared: Data, request: HttpRequest) -> Result<HttpResponse, Problem> {
    let id = id_of(&request)?;
    let last = events::last_seen(&request)?;
    let (asked, caller) = (id.clone(), caller(&request));
    if let Some(live) = jobs::live(&shared, &caller, &id) {
        return Ok(events::respond(live, last, None));
    }
    match apart(&shared, move |s| jobs::record(s, &caller, &asked)).await?? {
        Some(record) if record.state.is_final() => Ok(events::respond_ended(&record, last)),
        // Accepted by a process that has ended, and not taken up yet.
        Some(_) => Err(Problem::new(Kind::NotReady, "loading models").retry_after(5)),
        None => Err(jobs::unknown(&id)),
    }
}

/// Everything about a completed one in a tar archive.
#[utoipa::path(
    get,
    path = "/generations/{id}/bundle",
    tag = "generations",
    params(
        ("id" = String, Path, min_length = 1, max_length = 64,
            pattern = "^[A-Za-z0-9][A-Za-z0-9._-]*$"),
    ),
    responses(
        (status = 200, description = "The archive", content_type = "application/x-tar",
            body = Vec<u8>),
        (status = 409, description = "It has not completed", body = Body,
            content_type = "application/problem+json"),
        Refusals,
    )
)]
pub async fn bundle(shared: Data, request: HttpRequest) -> Result<HttpResponse, Problem> {
    let (id, caller) = (id_of(&request)?, caller(&request));
    let asked = id.clone();
    let bytes = apart(&shared, move |s| {
        let record = jobs::record(s, &caller, &asked)?.ok_or_else(|| jobs::unknown(&asked))?;
        export::bundle(s, record)
    })
    .await??;
    Ok(archive(&id).body(bytes))
}

/// Query of `GET /generations`.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct Query {
    /// Words of the prompt.
    pub q: Option<String>,
    model: Option<String>,
    adapter: Option<String>,
    method: Option<String>,
    state: Option<State>,
    /// The `next` of the page before.
    #[param(pattern = "^[0-9]{1,18}_[A-Za-z0-9][A-Za-z0-9._-]*$")]
    before: Option<String>,
    #[param(minimum = 1, maximum = 200)]
    limit: Option<usize>,
}

impl Query {
    /// Comparisons have words and pages only.
    pub fn of_comparisons(self) -> Result<Self, Problem> {
        let others = [
            ("model", self.model.is_some()),
            ("adapter", self.adapter.is_some()),
            ("method", self.method.is_some()),
            ("state", self.state.is_some()),
        ];
        match others.iter().find(|(_, given)| *given) {
            Some((name, _)) => {
                let message = "unknown field, expected one of q, before, limit";
                Err(Problem::field(Kind::InvalidQuery, *name, message))
            }
            None => Ok(self),
        }
    }

    pub fn filter(self, caller: &Caller) -> Result<Filter, Problem> {
        let invalid =
            |field: &str, message: String| Err(Problem::field(Kind::InvalidValue, field, message));
        let limit = self.limit.unwrap_or(PAGE.0);
        if !(1..=PAGE.1).contains(&limit) {
            return invalid("limit", format!("{limit} is outside 1..={}", PAGE.1));
        }
        let before = match self.before.as_deref().map(|text| text.split_once('_')) {
            None => None,
            Some(Some((ms, id))) if ms.parse::<i64>().is_ok() => {
                Some((ms.parse().unwrap_or_default(), id.to_owned()))
            }
            Some(_) => return invalid("before", "is not the `next` of an answer".to_owned()),
        };
        Ok(Filter {
            text: self.q,
            model: self.model,
            adapter: self.adapter,
            method: self.method,
            state: self.state,
            client: caller.only(),
            before,
            limit,
        })
    }
}

/// The history: the newest first, by pages.
#[utoipa::path(
    get,
    path = "/generations",
    tag = "history",
    params(Query),
    responses((status = 200, body = Object), Refusals)
)]
pub async fn list(shared: Data, request: HttpRequest) -> Result<HttpResponse, Problem> {
    let filter = body::decode_pairs::<Query>(request.query_string())?;
    let filter = filter.filter(&caller(&request))?;
    let limit = filter.limit;
    let asked = Filter { limit: limit + 1, ..filter };
    // Answers may be long: they are read where blocking is no harm.
    let read = move |s: &Shared| -> crate::Result<(Vec<Value>, Option<String>)> {
        let mut listed = s.store.list(&asked)?;
        let more = listed.len() > limit;
        listed.truncate(limit);
        let next = listed.last().filter(|_| more).map(|l| format!("{}_{}", l.created_ms, l.id));
        Ok((listed.into_iter().map(item).collect(), next))
    };
    let (generations, next) = apart(&shared, read).await??;
    Ok(HttpResponse::Ok()
        .insert_header((header::CACHE_CONTROL, "no-store"))
        .json(json!({ "generations": generations, "next": next })))
}

fn item(listed: Listed) -> Value {
    let answer: Value =
        listed.answer.and_then(|a| serde_json::from_str(&a).ok()).unwrap_or_default();
    json!({
        "id": listed.id,
        "state": listed.state,
        "created_ms": listed.created_ms,
        "finished_ms": listed.finished_ms,
        "comparison": listed.comparison,
        "prompt": listed.resolved.prompt,
        "model": listed.resolved.model,
        "adapter": listed.resolved.adapter,
        "method": listed.resolved.method,
        "seed": listed.resolved.seed,
        "planned": listed.planned,
        "actual": answer["cost"]["actual"],
        "images": answer["images"],
    })
}

/// An image of the history.
#[utoipa::path(
    get,
    path = "/images/{name}",
    tag = "history",
    params(
        ("name" = String, Path, description = "`SHA256.FORMAT`"),
    ),
    responses(
        (status = 200, description = "The file", content(
            (Vec<u8> = "image/png"),
            (Vec<u8> = "image/jpeg"),
            (Vec<u8> = "image/webp"),
        )),
        Refusals,
    )
)]
pub async fn image(shared: Data, request: HttpRequest) -> Result<HttpResponse, Problem> {
    let missing = || Problem::new(Kind::NotFound, format!("nothing is at {}", request.path()));
    let name = request.match_info().get("name").and_then(Name::parse).ok_or_else(missing)?;
    let asked = name.clone();
    let bytes = apart(&shared, move |s| s.store.image(&asked)).await??;
    let whose = if shared.keys.is_some() { "private" } else { "public" };
    Ok(HttpResponse::Ok()
        .insert_header((header::CONTENT_TYPE, name.media_type()))
        // Its name is its content. Caches must not give away what takes a key.
        .insert_header((header::CACHE_CONTROL, format!("{whose}, max-age=31536000, immutable")))
        .insert_header((header::CONTENT_SECURITY_POLICY, "default-src 'none'; sandbox"))
        .body(web::Bytes::from(bytes.ok_or_else(missing)?)))
}
