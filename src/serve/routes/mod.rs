//! The routes, and what every request passes through.

mod comparisons;
mod exports;
mod generate;
mod generations;
mod listings;
mod models;
pub mod openai;
mod openapi;
mod votes;

use std::sync::Arc;
use std::time::Instant;

use actix_web::body::MessageBody;
use actix_web::dev::{ServiceRequest, ServiceResponse};
use actix_web::http::{Method, header};
use actix_web::middleware::Next;
use actix_web::{
    Handler, HttpMessage, HttpRequest, HttpResponse, HttpResponseBuilder, Resource, Responder,
    Route, guard, web,
};

use super::assets;
use super::auth::{self, Caller};
use super::problem::{Kind, Problem};
use super::server::Shared;
use crate::engine::Backend;

type Data = web::Data<Shared>;

/// Registers every route; anything else is a problem, too.
pub fn configure(config: &mut web::ServiceConfig) {
    config
        .service(resource("/generate", "POST", [web::post().to(generate::post)]))
        .service(resource("/v1/images/generations", "POST", [web::post().to(openai::post)]))
        .service(readable("/estimate", generate::estimate))
        .service(resource(
            "/compare",
            "GET, HEAD, POST",
            [reading().to(comparisons::list), web::post().to(comparisons::post)],
        ))
        .service(resource(
            "/compare/{id}",
            "GET, HEAD, DELETE",
            [reading().to(comparisons::get), web::delete().to(comparisons::delete)],
        ))
        .service(readable("/compare/{id}/export", exports::comparison))
        .service(readable("/generations", generations::list))
        .service(resource(
            "/generations/{id}",
            "GET, HEAD, PUT, DELETE",
            [
                reading().to(generations::get),
                web::put().to(generate::put),
                web::delete().to(generations::delete),
            ],
        ))
        .service(readable("/generations/{id}/events", generations::events))
        .service(readable("/generations/{id}/bundle", generations::bundle))
        .service(readable("/generations/{id}/export", exports::generation))
        .service(resource("/history/{id}", "DELETE", [web::delete().to(generations::forget)]))
        .service(readable("/images/{name}", generations::image))
        .service(resource("/ballots", "POST", [web::post().to(votes::give)]))
        .service(readable("/ballots/{token}/{side}.png", votes::image))
        .service(resource("/votes", "POST", [web::post().to(votes::cast)]))
        .service(readable("/leaderboard", votes::table))
        .service(readable("/models", listings::models))
        .service(resource(
            "/models/{id}",
            "PUT, DELETE",
            [web::put().to(models::load), web::delete().to(models::unload)],
        ))
        .service(resource(
            "/models/{id}/adapters/{name}",
            "PUT, DELETE",
            [web::put().to(models::load_adapter), web::delete().to(models::unload_adapter)],
        ))
        .service(readable("/methods", listings::methods))
        .service(readable("/rewards", listings::rewards))
        .service(readable("/sweeps", listings::sweeps))
        .service(readable("/openapi.json", openapi::document))
        .service(readable("/livez", listings::livez))
        .service(readable("/readyz", listings::readyz))
        .service(readable("/startupz", listings::startupz))
        .service(readable("/metrics", listings::metrics))
        .default_service(web::to(not_found));
    for (index, asset) in assets::ASSETS.iter().enumerate() {
        config.service(readable(asset.path, move |request: HttpRequest| async move {
            assets::respond(&request, index)
        }));
    }
}

fn resource(path: &str, allow: &'static str, routes: impl IntoIterator<Item = Route>) -> Resource {
    let resource = routes.into_iter().fold(web::resource(path), Resource::route);
    resource.default_service(web::to(move |request: HttpRequest| async move {
        let detail = format!("{} takes {allow}, not {}", request.path(), request.method());
        let mut problem = Problem::new(Kind::MethodNotAllowed, detail);
        problem.allow = Some(allow);
        Err::<HttpResponse, _>(problem)
    }))
}

fn reading() -> Route {
    web::route().guard(guard::Any(guard::Get()).or(guard::Head()))
}

fn readable<F, Args>(path: &str, handler: F) -> Resource
where
    F: Handler<Args>,
    Args: actix_web::FromRequest + 'static,
    F::Output: Responder + 'static,
{
    resource(path, "GET, HEAD", [reading().to(handler)])
}

async fn not_found(request: HttpRequest) -> Result<HttpResponse, Problem> {
    Err(Problem::new(Kind::NotFound, format!("nothing is at {}", request.path())))
}

/// Calls the backend away from the HTTP threads: even a listing may block.
async fn blocking<T: Send + 'static>(
    shared: &Data,
    call: impl FnOnce(&dyn Backend) -> T + Send + 'static,
) -> Result<T, Problem> {
    let backend: Arc<dyn Backend> = shared.backend()?;
    web::block(move || call(backend.as_ref())).await.map_err(Problem::internal)
}

/// Runs what may block, such as the history, away from the HTTP threads.
async fn apart<T: Send + 'static>(
    shared: &Data,
    call: impl FnOnce(&Shared) -> T + Send + 'static,
) -> Result<T, Problem> {
    let shared = shared.clone();
    web::block(move || call(&shared)).await.map_err(Problem::internal)
}

/// The head of an answer with a tar archive, to be saved as `NAME.tar`.
fn archive(name: &str) -> HttpResponseBuilder {
    let disposition = format!("attachment; filename=\"{name}.tar\"");
    let mut answer = HttpResponse::Ok();
    answer
        .insert_header((header::CONTENT_TYPE, "application/x-tar"))
        .insert_header((header::CACHE_CONTROL, "no-store"))
        .insert_header((header::CONTENT_DISPOSITION, disposition));
    answer
}

/// Who sent a request, as [`admit`] found.
fn caller(request: &HttpRequest) -> Caller {
    request.extensions().get().cloned().unwrap_or_else(Caller::nobody)
}

/// Lets a request through that may do what it asks for, and notes whose it is.
pub async fn admit(
    request: ServiceRequest,
    next: Next<impl MessageBody + 'static>,
) -> Result<ServiceResponse<impl MessageBody>, actix_web::Error> {
    let Some(shared) = request.app_data::<Data>().cloned() else {
        return Ok(next.call(request).await?.map_into_left_body());
    };
    let is_asset = |path: &str| assets::ASSETS.iter().any(|asset| asset.path == path);
    let checked = shared
        .sites
        .admit(request.request())
        .and_then(|()| auth::check(shared.keys.as_ref(), request.request(), is_asset));
    match checked {
        Ok(caller) => {
            request.extensions_mut().insert(caller);
            Ok(next.call(request).await?.map_into_left_body())
        }
        // An answer, not an error: headers for pages of other sites are added to answers.
        Err(problem) => {
            shared.metrics.rejected(problem.kind);
            Ok(request.error_response(problem).map_into_right_body())
        }
    }
}

/// Counts, times and logs a request; a client that left is counted as 499.
pub async fn observe(
    request: ServiceRequest,
    next: Next<impl MessageBody>,
) -> Result<ServiceResponse<impl MessageBody>, actix_web::Error> {
    let Some(shared) = request.app_data::<Data>().cloned() else {
        return next.call(request).await;
    };
    // Patterns, not paths: this label is bounded.
    let route = request.match_pattern().unwrap_or_else(|| "unmatched".to_owned());
    let method = request.method().clone();
    let mut seen = Seen { shared, route, method, start: Instant::now(), status: 499 };
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
    method: Method,
    start: Instant,
    status: u16,
}

impl Drop for Seen {
    fn drop(&mut self) {
        let seconds = self.start.elapsed().as_secs_f64();
        let metrics = &self.shared.metrics;
        let (route, status) = (self.route.as_str(), self.status);
        metrics.http_in_flight.dec();
        metrics.answered(route, self.method.as_str(), status, seconds);
        tracing::debug!(route, method = %self.method, status, seconds, "request");
    }
}
