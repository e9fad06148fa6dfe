//! `POST /v1/images/generations`: a thin alias in the words of OpenAI's Images
//! API, for clients that speak nothing else. What it cannot do it refuses.

use actix_web::body::{BoxBody, MessageBody};
use actix_web::dev::{ServiceRequest, ServiceResponse};
use actix_web::http::header;
use actix_web::middleware::Next;
use actix_web::{HttpRequest, HttpResponse, web};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use utoipa::ToSchema;

use super::Data;
use super::generate::submit;
use crate::engine::request::{BudgetRequest, ImageFormat, MethodRequest};
use crate::serve::body;
use crate::serve::problem::{Kind, Problem};

/// Where everything is in OpenAI's words.
const BELOW: &str = "/v1/";
/// Fields that mean the same here and there.
const SAME: [&str; 5] = ["prompt", "model", "n", "output_format", "negative_prompt"];
/// This server's own, as in `POST /generate`.
const EXTENSIONS: [&str; 10] = [
    "seed",
    "steps",
    "guidance_scale",
    "guidance_rescale",
    "solver",
    "adapter",
    "method",
    "reward",
    "budget",
    "deadline_ms",
];

/// What it takes.
#[derive(ToSchema)]
#[allow(dead_code, reason = "describes bodies")]
#[serde(deny_unknown_fields)]
pub struct OpenAiBody {
    #[schema(min_length = 1, pattern = r"\S")]
    prompt: String,
    model: Option<String>,
    #[schema(minimum = 1)]
    n: Option<u32>,
    /// `WIDTHxHEIGHT`, or `auto`.
    #[schema(pattern = "^([1-9][0-9]*x[1-9][0-9]*|auto)$")]
    size: Option<String>,
    output_format: Option<ImageFormat>,
    #[schema(pattern = "^b64_json$")]
    response_format: Option<String>,
    negative_prompt: Option<String>,
    seed: Option<u64>,
    #[schema(minimum = 1)]
    steps: Option<u32>,
    #[schema(minimum = 0, maximum = 100)]
    guidance_scale: Option<f64>,
    #[schema(minimum = 0, maximum = 1)]
    guidance_rescale: Option<f64>,
    solver: Option<String>,
    adapter: Option<String>,
    method: Option<MethodRequest>,
    reward: Option<String>,
    budget: Option<BudgetRequest>,
}

/// Images in the words of OpenAI's Images API. Errors are in its envelope.
#[utoipa::path(
    post,
    path = "/v1/images/generations",
    tag = "generations",
    request_body = OpenAiBody,
    responses(
        (status = 200, description = "`created`, `data`, `size`, `output_format`, `id`, `cost`, \
            `resolved`", body = Object),
        (status = "4XX", description = "`error`: `message`, `type`, `param`, `code`",
            body = Object),
        (status = "5XX", description = "`error`: `message`, `type`, `param`, `code`",
            body = Object),
    )
)]
pub async fn post(
    shared: Data,
    request: HttpRequest,
    payload: web::Payload,
) -> Result<HttpResponse, Problem> {
    let answer = submit(&shared, &request, payload, translate).await?.answer().await?;
    let body = actix_web::body::to_bytes(answer.into_body()).await.map_err(Problem::internal)?;
    let body: Answer = serde_json::from_slice(&body).map_err(Problem::internal)?;
    let data: Vec<Value> = body
        .images
        .iter()
        .map(|image| json!({ "b64_json": image["data"], "seed": image["seed"] }))
        .collect();
    let format = &body.resolved["output_format"];
    let size = format!("{}x{}", body.resolved["width"], body.resolved["height"]);
    let created = crate::serve::store::now() / 1000;
    Ok(HttpResponse::Ok()
        .insert_header((header::CACHE_CONTROL, "no-store"))
        .insert_header(("X-Request-Id", body.id.as_str()))
        .json(json!({
            "created": created,
            "data": data,
            "output_format": format,
            "size": size,
            "id": body.id,
            "cost": body.cost,
            "resolved": body.resolved,
        })))
}

#[derive(Deserialize)]
struct Answer {
    id: String,
    images: Vec<Value>,
    cost: Value,
    resolved: Value,
}

/// The body of the same request to `POST /generate`.
fn translate(bytes: &[u8]) -> Result<Vec<u8>, Problem> {
    let asked = body::object(bytes)?;
    let wrong =
        |field: &str, message: String| Err(Problem::field(Kind::InvalidValue, field, message));
    let mut own = Map::new();
    for (name, value) in asked {
        match (name.as_str(), &value) {
            ("size", Value::Null) => {}
            ("size", Value::String(text)) if text == "auto" => {}
            ("size", Value::String(text)) => {
                let sides = text
                    .split_once('x')
                    .and_then(|(w, h)| Some((w.parse::<u32>().ok()?, h.parse::<u32>().ok()?)));
                let Some((width, height)) = sides else {
                    return wrong("size", format!("'{text}' is neither WIDTHxHEIGHT nor auto"));
                };
                own.insert("width".to_owned(), width.into());
                own.insert("height".to_owned(), height.into());
            }
            ("size", other) => return Err(body::wrong_type("size", other, "a string")),
            ("response_format", Value::Null) => {}
            ("response_format", Value::String(text)) if text == "b64_json" => {}
            ("response_format", Value::String(text)) => {
                return wrong("response_format", format!("'{text}': only b64_json is served"));
            }
            ("response_format", other) => {
                return Err(body::wrong_type("response_format", other, "a string"));
            }
            (known, _) if SAME.contains(&known) || EXTENSIONS.contains(&known) => {
                own.insert(name, value);
            }
            (unknown, _) => {
                let known = [&SAME[..], &["size", "response_format"], &EXTENSIONS[..]].concat();
                let message = format!("unknown field, expected one of {}", known.join(", "));
                return Err(Problem::field(Kind::InvalidBody, unknown, message));
            }
        }
    }
    Ok(Value::Object(own).to_string().into_bytes())
}

/// Answers problems of everything under `/v1` in OpenAI's envelope, also those of a wrong key, path
/// or method.
pub async fn in_its_words(
    request: ServiceRequest,
    next: Next<impl MessageBody + 'static>,
) -> Result<ServiceResponse<BoxBody>, actix_web::Error> {
    let answer = next.call(request).await?.map_into_boxed_body();
    if !answer.request().path().starts_with(BELOW) {
        return Ok(answer);
    }
    let problem = answer.response().error().and_then(|error| error.as_error::<Problem>());
    let Some(body) = problem.map(|problem| envelope(problem).to_string()) else {
        return Ok(answer);
    };
    let mut answer = answer.map_body(|_, _| BoxBody::new(body));
    let json = header::HeaderValue::from_static("application/json");
    answer.headers_mut().insert(header::CONTENT_TYPE, json);
    Ok(answer)
}

/// A problem in OpenAI's envelope.
fn envelope(problem: &Problem) -> Value {
    let kind = match problem.kind.status() {
        429 => "rate_limit_error",
        400..500 => "invalid_request_error",
        _ => "server_error",
    };
    let code = match problem.kind {
        Kind::Unauthorized => "invalid_api_key".to_owned(),
        kind => kind.slug().replace('-', "_"),
    };
    json!({ "error": {
        "message": problem.detail,
        "type": kind,
        "param": problem.field,
        "code": code,
    } })
}
