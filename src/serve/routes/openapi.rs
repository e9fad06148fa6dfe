//! The OpenAPI document of this server, made from its handlers and types.

use actix_web::HttpResponse;
use actix_web::http::header;
use serde_json::Value;
use utoipa::openapi::schema::{SchemaType, Type};
use utoipa::openapi::security::{ApiKey, ApiKeyValue, Http, HttpAuthScheme, SecurityScheme};
use utoipa::openapi::{RefOr, Schema};
use utoipa::{IntoResponses, Modify, OpenApi};

use super::{comparisons, exports, generate, generations, listings, models, openai, votes};
use crate::serve::problem::{Body, Problem};

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
    /// The server is not reached under this name.
    #[response(status = 421, content_type = "application/problem+json")]
    Misdirected(Body),
    /// A value cannot be used, or the work does not fit its budget, its deadline or the device.
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
    /// The work was not done by its deadline.
    #[response(status = 504, content_type = "application/problem+json")]
    Late(Body),
}

struct Keys;

/// A parameter is there or not; there is no null in a query or a header.
struct NoNulls;

impl Modify for NoNulls {
    fn modify(&self, document: &mut utoipa::openapi::OpenApi) {
        let items = document.paths.paths.values_mut();
        let operations = items.flat_map(|item| {
            [&mut item.get, &mut item.put, &mut item.post, &mut item.delete].into_iter().flatten()
        });
        for parameter in operations.flat_map(|o| o.parameters.iter_mut().flatten()) {
            if let RefOr::T(parameter) = parameter
                && let Some(RefOr::T(Schema::Object(object))) = &mut parameter.schema
                && let SchemaType::Array(types) = &object.schema_type
                && let [only] = types.iter().filter(|t| **t != Type::Null).collect::<Vec<_>>()[..]
            {
                object.schema_type = SchemaType::Type(only.clone());
            }
        }
    }
}

/// Each operation has a name of its own: its method and path.
struct Ids;

impl Modify for Ids {
    fn modify(&self, document: &mut utoipa::openapi::OpenApi) {
        for (path, item) in &mut document.paths.paths {
            let words = path.split(|c: char| !c.is_ascii_alphanumeric()).filter(|w| !w.is_empty());
            let name = words.collect::<Vec<_>>().join("_");
            let operations = [
                ("get", &mut item.get),
                ("put", &mut item.put),
                ("post", &mut item.post),
                ("delete", &mut item.delete),
            ];
            for (method, operation) in operations {
                if let Some(operation) = operation {
                    operation.operation_id = Some(format!("{method}_{name}"));
                }
            }
        }
    }
}

/// Numbers without a sign go further than the signed formats that they are described with.
fn unsigned(value: &mut Value) {
    match value {
        Value::Array(all) => all.iter_mut().for_each(unsigned),
        Value::Object(object) => {
            let range = match object.get("format").and_then(Value::as_str) {
                Some("int32") => Some(("uint32", u64::from(u32::MAX))),
                Some("int64") => Some(("uint64", u64::MAX)),
                _ => None,
            };
            if let Some((format, most)) = range
                && object.get("minimum").is_some_and(Value::is_u64)
            {
                object.insert("format".to_owned(), format.into());
                object.entry("maximum").or_insert(most.into());
            }
            object.values_mut().for_each(unsigned);
        }
        _ => {}
    }
}

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
        exports::comparison,
        generations::list,
        generations::get,
        generate::put,
        generations::delete,
        generations::events,
        generations::bundle,
        exports::generation,
        generations::forget,
        generations::image,
        openai::post,
        listings::models,
        votes::give,
        votes::image,
        votes::cast,
        votes::table,
        models::load,
        models::unload,
        models::load_adapter,
        models::unload_adapter,
        listings::methods,
        listings::rewards,
        listings::sweeps,
        listings::livez,
        listings::readyz,
        listings::startupz,
        listings::metrics,
        document,
    ),
    modifiers(&Keys, &NoNulls, &Ids),
    // Also without: a server may have no keys.
    security((), ("bearer" = []), ("key" = []))
)]
pub struct Document;

/// This document.
#[utoipa::path(get, path = "/openapi.json", tag = "server", responses(
    (status = 200, description = "OpenAPI 3.1", content_type = "application/json"),
))]
pub async fn document() -> Result<HttpResponse, Problem> {
    let mut document = serde_json::to_value(Document::openapi()).map_err(Problem::internal)?;
    unsigned(&mut document);
    Ok(HttpResponse::Ok().insert_header((header::CACHE_CONTROL, "no-cache")).json(document))
}
