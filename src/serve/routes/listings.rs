//! What the server has, how it is, and its metrics.

use actix_web::HttpResponse;
use actix_web::http::header;
use serde_json::json;

use super::openapi::Refusals;
use super::{Data, blocking};
use crate::serve::problem::Problem;

/// Models, and what one request may ask for.
#[utoipa::path(
    get,
    path = "/models",
    tag = "server",
    responses((status = 200, body = Object), Refusals)
)]
pub async fn models(shared: Data) -> Result<HttpResponse, Problem> {
    let models = blocking(&shared, |backend| backend.models()).await?;
    let s = &shared.settings;
    Ok(HttpResponse::Ok().json(json!({
        "models": models,
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

/// 200 when generations are admitted.
#[utoipa::path(
    get,
    path = "/readyz",
    tag = "server",
    responses((status = 200, description = "Ready", body = Object), Refusals)
)]
pub async fn readyz(shared: Data) -> Result<HttpResponse, Problem> {
    shared.health.check(shared.settings.drain_seconds)?;
    let queue = shared.queue.stats();
    Ok(HttpResponse::Ok().json(json!({
        "status": "ready",
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
    let ready = shared.health.check(0).is_ok();
    let text = shared.metrics.render(shared.queue.stats(), ready).map_err(Problem::internal)?;
    Ok(HttpResponse::Ok()
        .insert_header((header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8"))
        .body(text))
}
