//! The OpenAPI document of this server, made from its handlers and types.

use actix_web::HttpResponse;
use actix_web::http::header;
use utoipa::openapi::security::{ApiKey, ApiKeyValue, Http, HttpAuthScheme, SecurityScheme};
use utoipa::{IntoResponses, Modify, OpenApi};

use super::{comparisons, generate, generations, listings, openai};
use crate::serve::problem::Body;

/// What any route may refuse with.
#[derive(IntoResponses)]
#[allow(dead_code, reason = "describes answers")]
pub enum Refusals {
    /// The body or the query is not what is described here.
    #[response(status = 400, content_type = "application/problem+json")]
    Malformed(Body),
    /// The server has API keys, and the request has none of them.
    #[response(status = 401, content_type = "application/problem+json")]
    Unauthorized(Body),
    /// The key has not the scope that this takes.
    #[response(status = 403, content_type = "application/problem+json")]
    Forbidden(Body),
    /// There is no such thing.
    #[response(status = 404, content_type = "application/problem+json")]
    NotFound(Body),
    /// A value cannot be used, or the work does not fit its budget or the device.
    #[response(status = 422, content_type = "application/problem+json")]
    Invalid(Body),
    /// The server failed; `instance` names the line in its log.
    #[response(status = 500, content_type = "application/problem+json")]
    Internal(Body),
    /// Loading, warming up, shutting down, or out of memory; `Retry-After`.
    #[response(status = 503, content_type = "application/problem+json")]
    Unavailable(Body),
}

/// What a route for work may refuse with besides.
#[derive(IntoResponses)]
#[allow(dead_code, reason = "describes answers")]
pub enum WorkRefusals {
    /// The body did not arrive in time.
    #[response(status = 408, content_type = "application/problem+json")]
    Timeout(Body),
    /// The id is another request's, or the work was cancelled.
    #[response(status = 409, content_type = "application/problem+json")]
    Conflict(Body),
    /// The body is too large.
    #[response(status = 413, content_type = "application/problem+json")]
    TooLarge(Body),
    /// The body is not `application/json`, or compressed.
    #[response(status = 415, content_type = "application/problem+json")]
    MediaType(Body),
    /// The queue is full; `Retry-After`.
    #[response(status = 429, content_type = "application/problem+json")]
    Full(Body),
}

struct Keys;

impl Modify for Keys {
    fn modify(&self, document: &mut utoipa::openapi::OpenApi) {
        let components = document.components.get_or_insert_default();
        let bearer = SecurityScheme::Http(Http::new(HttpAuthScheme::Bearer));
        components.add_security_scheme("bearer", bearer);
        let header = ApiKey::Header(ApiKeyValue::new("X-API-Key"));
        components.add_security_scheme("key", SecurityScheme::ApiKey(header));
    }
}

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Diffusion-Sharpening",
        description = "Images from prompts, by plain sampling and by search, at exactly metered \
                       cost. Errors are RFC 9457 problems.",
        license(name = "Apache-2.0 OR MIT"),
        contact()
    ),
    paths(
        generate::post,
        generate::estimate,
        comparisons::list,
        comparisons::post,
        comparisons::get,
        comparisons::delete,
        generations::list,
        generations::get,
        generate::put,
        generations::delete,
        generations::events,
        generations::bundle,
        generations::forget,
        generations::image,
        openai::post,
        listings::models,
        listings::methods,
        listings::rewards,
        listings::livez,
        listings::readyz,
        listings::metrics,
        document,
    ),
    modifiers(&Keys),
    // Also without: a server may have no keys.
    security((), ("bearer" = []), ("key" = []))
)]
pub struct Document;

/// This document.
#[utoipa::path(get, path = "/openapi.json", tag = "server", responses(
    (status = 200, description = "OpenAPI 3.1", content_type = "application/json"),
))]
pub async fn document() -> HttpResponse {
    HttpResponse::Ok().insert_header((header::CACHE_CONTROL, "no-cache")).json(Document::openapi())
}
