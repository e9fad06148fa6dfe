//! `POST /v1/images/generations`: a thin alias in the words of OpenAI's Images
//! API, for clients that speak nothing else. What it cannot do it refuses.

use actix_web::http::header;
use actix_web::{HttpRequest, HttpResponse, ResponseError, web};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::Data;
use super::generate::submit;
use crate::serve::problem::{Kind, Problem};

/// Fields that mean the same here and there.
const SAME: [&str; 5] = ["prompt", "model", "n", "output_format", "negative_prompt"];
/// This server's own, as in `POST /generate`.
const EXTENSIONS: [&str; 9] = [
    "seed",
    "steps",
    "guidance_scale",
    "guidance_rescale",
    "solver",
    "adapter",
    "method",
    "reward",
    "budget",
];

/// Images in the words of OpenAI's Images API. Errors are in its envelope.
#[utoipa::path(
    post,
    path = "/v1/images/generations",
    tag = "generations",
    request_body(content = Object, description = "`prompt`, `model`, `n`, `size`, \
        `output_format`, `response_format`, and this server's own fields"),
    responses(
        (status = 200, description = "`created`, `data`, `size`, `output_format`, `id`, `cost`, \
            `resolved`", body = Object),
        (status = "4XX", description = "`error`: `message`, `type`, `param`, `code`",
            body = Object),
        (status = "5XX", description = "`error`: `message`, `type`, `param`, `code`",
            body = Object),
    )
)]
pub async fn post(shared: Data, request: HttpRequest, payload: web::Payload) -> HttpResponse {
    match generate(&shared, &request, payload).await {
        Ok(response) => response,
        Err(problem) => refusal(&problem),
    }
}

async fn generate(
    shared: &Data,
    request: &HttpRequest,
    payload: web::Payload,
) -> Result<HttpResponse, Problem> {
    let answer = submit(shared, request, payload, translate).await?.answer().await?;
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
fn translate(body: &[u8]) -> Result<Vec<u8>, Problem> {
    let asked: Map<String, Value> = serde_json::from_slice(body)
        .map_err(|e| Problem::new(Kind::MalformedJson, e.to_string()))?;
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
            ("size", other) => return wrong("size", format!("{other} is not a text")),
            ("response_format", Value::Null) => {}
            ("response_format", Value::String(text)) if text == "b64_json" => {}
            ("response_format", other) => {
                return wrong("response_format", format!("{other}: only b64_json is served"));
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

/// A problem in OpenAI's envelope.
fn refusal(problem: &Problem) -> HttpResponse {
    let kind = match problem.kind.status() {
        429 => "rate_limit_error",
        400..500 => "invalid_request_error",
        _ => "server_error",
    };
    let mut response = HttpResponse::build(problem.status_code());
    response.insert_header((header::CACHE_CONTROL, "no-store"));
    if let Some(seconds) = problem.retry_after {
        response.insert_header((header::RETRY_AFTER, seconds.to_string()));
    }
    response.json(json!({ "error": {
        "message": problem.detail,
        "type": kind,
        "param": problem.field,
        "code": problem.kind.slug().replace('-', "_"),
    } }))
}
