//! The routes, and what every request passes through.

use std::sync::Arc;
use std::time::{Duration, Instant};

use actix_web::body::MessageBody;
use actix_web::dev::{ServiceRequest, ServiceResponse};
use actix_web::http::header;
use actix_web::middleware::Next;
use actix_web::{Handler, HttpRequest, HttpResponse, Resource, Responder, guard, web};
use serde_json::json;

use super::problem::{Kind, Problem};
use super::server::Shared;
use super::{assets, body, limits};
use crate::engine::Backend;

type Data = web::Data<Shared>;

/// Registers every route; anything else is a problem, too.
pub fn configure(config: &mut web::ServiceConfig) {
    config
        .service(resource("/generate", "POST", web::post().to(generate)))
        .service(readable("/models", models))
        .service(readable("/methods", methods))
        .service(readable("/rewards", rewards))
        .service(readable("/livez", livez))
        .service(readable("/readyz", readyz))
        .service(readable("/metrics", metrics))
        .default_service(web::to(not_found));
    for (index, asset) in assets::ASSETS.iter().enumerate() {
        config.service(readable(asset.path, move |request: HttpRequest| async move {
            assets::respond(&request, index)
        }));
    }
}

fn resource(path: &str, allow: &'static str, route: actix_web::Route) -> Resource {
    web::resource(path).route(route).default_service(web::to(
        move |request: HttpRequest| async move {
            let detail = format!("{} takes {allow}, not {}", request.path(), request.method());
            let mut problem = Problem::new(Kind::MethodNotAllowed, detail);
            problem.allow = Some(allow);
            Err::<HttpResponse, _>(problem)
        },
    ))
}

fn readable<F, Args>(path: &str, handler: F) -> Resource
where
    F: Handler<Args>,
    Args: actix_web::FromRequest + 'static,
    F::Output: Responder + 'static,
{
    let reading = guard::Any(guard::Get()).or(guard::Head());
    resource(path, "GET, HEAD", web::route().guard(reading).to(handler))
}

async fn not_found(request: HttpRequest) -> Result<HttpResponse, Problem> {
    Err(Problem::new(Kind::NotFound, format!("nothing is at {}", request.path())))
}

async fn generate(
    shared: Data,
    request: HttpRequest,
    payload: web::Payload,
) -> Result<HttpResponse, Problem> {
    admit_and_run(shared.clone(), request, payload).await.inspect_err(|problem| {
        if matches!(
            problem.kind,
            Kind::QueueFull
                | Kind::Budget
                | Kind::InsufficientMemory
                | Kind::NotReady
                | Kind::Draining
        ) {
            shared.metrics.rejected(problem.kind.slug());
        }
    })
}

async fn admit_and_run(
    shared: Data,
    request: HttpRequest,
    payload: web::Payload,
) -> Result<HttpResponse, Problem> {
    let settings = &shared.settings;
    let timeout = Duration::from_secs(settings.body_seconds);
    let bytes = body::read(&request, payload, settings.max_body_bytes, timeout).await?;
    shared.health.check(settings.drain_seconds)?;
    let asked = body::decode(&bytes)?;
    limits::check_request(&asked, settings)?;
    let planned = blocking(&shared, move |backend| backend.plan(&asked)).await??;
    limits::check_plan(&planned, settings)?;
    let mut ticket = shared.queue.push(planned)?;
    let told = shared.clone();
    ticket.on_leave(move |phase| told.metrics.disconnected(phase));
    let done = ticket.answer().await?;
    let timing = format!(
        "queue;dur={:.1}, generate;dur={:.1}",
        done.queue_seconds * 1e3,
        done.seconds * 1e3
    );
    Ok(HttpResponse::Ok()
        .insert_header((header::CONTENT_TYPE, "application/json"))
        .insert_header((header::CACHE_CONTROL, "no-store"))
        .insert_header(("X-Request-Id", done.id))
        .insert_header(("Server-Timing", timing))
        .body(done.body))
}

/// Calls the backend away from the HTTP threads: even a listing may block.
async fn blocking<T: Send + 'static>(
    shared: &Data,
    call: impl FnOnce(&dyn Backend) -> T + Send + 'static,
) -> Result<T, Problem> {
    let backend: Arc<dyn Backend> = shared.backend()?;
    web::block(move || call(backend.as_ref())).await.map_err(Problem::internal)
}

async fn models(shared: Data) -> Result<HttpResponse, Problem> {
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

async fn methods(shared: Data) -> Result<HttpResponse, Problem> {
    let methods = blocking(&shared, |backend| backend.methods()).await?;
    Ok(HttpResponse::Ok().json(json!({ "methods": methods })))
}

async fn rewards(shared: Data) -> Result<HttpResponse, Problem> {
    let rewards = blocking(&shared, |backend| backend.rewards()).await?;
    Ok(HttpResponse::Ok().json(json!({ "rewards": rewards })))
}

async fn livez() -> HttpResponse {
    HttpResponse::Ok().json(json!({ "status": "live" }))
}

async fn readyz(shared: Data) -> Result<HttpResponse, Problem> {
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

async fn metrics(shared: Data) -> Result<HttpResponse, Problem> {
    let ready = shared.health.check(0).is_ok();
    let text = shared.metrics.render(shared.queue.stats(), ready).map_err(Problem::internal)?;
    Ok(HttpResponse::Ok()
        .insert_header((header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8"))
        .body(text))
}

/// Counts, times and logs a request; a client that left is counted as 499.
pub async fn observe(
    request: ServiceRequest,
    next: Next<impl MessageBody>,
) -> Result<ServiceResponse<impl MessageBody>, actix_web::Error> {
    let Some(shared) = request.app_data::<Data>().cloned() else {
        return next.call(request).await;
    };
    // Every pattern is a literal path, so this label is bounded.
    let route = request.match_pattern().unwrap_or_else(|| "unmatched".to_owned());
    let mut seen = Seen { shared, route, start: Instant::now(), status: 499 };
    seen.shared.metrics.http_in_flight.inc();
    let result = next.call(request).await;
    seen.status = match &result {
        Ok(response) => response.status().as_u16(),
        Err(error) => error.as_response_error().status_code().as_u16(),
    };
    let mut response = result?;
    response
        .headers_mut()
        .insert(header::X_CONTENT_TYPE_OPTIONS, header::HeaderValue::from_static("nosniff"));
    Ok(response)
}

struct Seen {
    shared: Data,
    route: String,
    start: Instant,
    status: u16,
}

impl Drop for Seen {
    fn drop(&mut self) {
        let seconds = self.start.elapsed().as_secs_f64();
        let metrics = &self.shared.metrics;
        let (route, status) = (self.route.as_str(), self.status);
        metrics.http_in_flight.dec();
        metrics.http_requests.with_label_values(&[route, &status.to_string()]).inc();
        metrics.http_seconds.with_label_values(&[route]).observe(seconds);
        tracing::debug!(route, status, seconds, "request");
    }
}
