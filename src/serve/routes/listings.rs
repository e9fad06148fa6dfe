//! What the server has, how it is, and its metrics.

use actix_web::HttpResponse;
use actix_web::http::header;
use serde_json::json;

use super::openapi::Refusals;
use super::{Data, apart, blocking};
use crate::serve::health::Life;
use crate::serve::metrics::Reading;
use crate::serve::problem::Problem;
use crate::serve::{ready, sweeps};

/// Models, and what one request may ask for.
#[utoipa::path(
    get,
    path = "/models",
    tag = "server",
    responses((status = 200, body = Object), Refusals)
)]
pub async fn models(shared: Data) -> Result<HttpResponse, Problem> {
    let (models, unloaded) =
        blocking(&shared, |backend| (backend.models(), backend.unloaded())).await?;
    let s = &shared.settings;
    Ok(HttpResponse::Ok().json(json!({
        "models": models,
        "unloaded": unloaded,
        "limits": {
            "max_prompt_chars": s.max_prompt_chars,
            "max_images": s.max_images,
            "max_steps": s.max_steps,
            "max_side": s.max_side,
            "max_request_f": s.request_f(),
        },
    })))
}

/// Methods with their parameters.
#[utoipa::path(
    get,
    path = "/methods",
    tag = "server",
    responses((status = 200, body = Object), Refusals)
)]
pub async fn methods(shared: Data) -> Result<HttpResponse, Problem> {
    let methods = blocking(&shared, |backend| backend.methods()).await?;
    Ok(HttpResponse::Ok().json(json!({ "methods": methods })))
}

/// Rewards.
#[utoipa::path(
    get,
    path = "/rewards",
    tag = "server",
    responses((status = 200, body = Object), Refusals)
)]
pub async fn rewards(shared: Data) -> Result<HttpResponse, Problem> {
    let rewards = blocking(&shared, |backend| backend.rewards()).await?;
    Ok(HttpResponse::Ok().json(json!({ "rewards": rewards })))
}

/// 200 while the process serves.
#[utoipa::path(
    get,
    path = "/livez",
    tag = "server",
    responses((status = 200, description = "Live"))
)]
pub async fn livez() -> HttpResponse {
    HttpResponse::Ok().json(json!({ "status": "live" }))
}

/// 200 from the first image on, whatever happens then.
#[utoipa::path(
    get,
    path = "/startupz",
    tag = "server",
    responses((status = 200, description = "Started"), Refusals)
)]
pub async fn startupz(shared: Data) -> Result<HttpResponse, Problem> {
    if shared.health.life() < Life::Ready {
        shared.health.check(shared.settings.drain_seconds)?;
    }
    Ok(HttpResponse::Ok().json(json!({ "status": "started" })))
}

/// 200 when generations are admitted. `checks` says of everything that this needs how it is, also
/// in the problem when they are not.
#[utoipa::path(
    get,
    path = "/readyz",
    tag = "server",
    responses((status = 200, description = "Ready", body = Object), Refusals)
)]
pub async fn readyz(shared: Data) -> Result<HttpResponse, Problem> {
    let checks = ready::check(&shared)?;
    let queue = shared.queue.stats();
    Ok(HttpResponse::Ok().json(json!({
        "status": "ready",
        "checks": checks,
        "waiting": queue.waiting,
        "running": queue.running,
        "backlog_f": queue.backlog_f,
        "seconds_per_f": queue.seconds_per_f,
    })))
}

/// Prometheus text.
#[utoipa::path(
    get,
    path = "/metrics",
    tag = "server",
    responses((status = 200, description = "Metrics", content_type = "text/plain", body = String), Refusals)
)]
pub async fn metrics(shared: Data) -> Result<HttpResponse, Problem> {
    let device = match shared.backend() {
        Ok(_) => blocking(&shared, |backend| backend.memory()).await?,
        Err(_) => None,
    };
    let reading = Reading {
        queue: shared.queue.stats(),
        ready: ready::check(&shared).is_ok(),
        heartbeat: ready::heartbeat(&shared),
        device,
    };
    let text = shared.metrics.render(&reading).map_err(Problem::internal)?;
    Ok(HttpResponse::Ok()
        .insert_header((header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8"))
        .body(text))
}

/// Sweeps of ds-bench: quality against cost by method, with intervals.
#[utoipa::path(
    get,
    path = "/sweeps",
    tag = "server",
    responses((status = 200, body = Object), Refusals)
)]
pub async fn sweeps(shared: Data) -> Result<HttpResponse, Problem> {
    let found = apart(&shared, |s| sweeps::sweeps(&s.settings.sweeps)).await?;
    Ok(HttpResponse::Ok().json(json!({ "sweeps": found })))
}
