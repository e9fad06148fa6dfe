//! From bytes on the wire to a request: reading with a size and time limit,
//! and decoding with messages that name the field.

use std::time::Duration;

use actix_web::http::header;
use actix_web::{HttpRequest, web};
use futures_util::StreamExt;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::distinct::repeated;
use super::problem::{Kind, Problem};
use crate::diffusion::cost::Budget;
use crate::engine::request::GenerateRequest;

/// Reads a JSON body of at most `limit` bytes within `timeout`.
pub async fn read(
    request: &HttpRequest,
    mut payload: web::Payload,
    limit: usize,
    timeout: Duration,
) -> Result<Vec<u8>, Problem> {
    let media_type = check_headers(request);
    let collect = async {
        let mut body = Vec::new();
        let mut seen = 0_usize;
        while let Some(chunk) = payload.next().await {
            let chunk = chunk.map_err(|e| {
                Problem::new(Kind::MalformedJson, format!("the body could not be read: {e}"))
            })?;
            seen = seen.saturating_add(chunk.len());
            // A moderate excess is read and dropped, so that the client is done
            // sending and sees the answer instead of a broken connection.
            if seen <= limit {
                body.extend_from_slice(&chunk);
            } else if seen > limit.saturating_mul(16).saturating_add(1 << 22) {
                break;
            }
        }
        if seen > limit {
            return Err(Problem::new(
                Kind::BodyTooLarge,
                format!("the body has more than {limit} bytes"),
            ));
        }
        Ok(body)
    };
    let body = tokio::time::timeout(timeout, collect).await.unwrap_or_else(|_| {
        let detail = format!("the body did not arrive within {} s", timeout.as_secs());
        Err(Problem::new(Kind::BodyTimeout, detail))
    });
    media_type.and(body)
}

fn check_headers(request: &HttpRequest) -> Result<(), Problem> {
    let headers = request.headers();
    let text = |name: header::HeaderName| {
        headers.get(name).and_then(|v| v.to_str().ok()).unwrap_or("").trim().to_ascii_lowercase()
    };
    let content_type = text(header::CONTENT_TYPE);
    let essence = content_type.split(';').next().unwrap_or("").trim();
    if essence != "application/json" {
        let found = if essence.is_empty() { "none" } else { essence };
        return Err(Problem::new(
            Kind::UnsupportedMediaType,
            format!("Content-Type must be application/json, not {found}"),
        ));
    }
    let encoding = text(header::CONTENT_ENCODING);
    if !encoding.is_empty() && encoding != "identity" {
        return Err(Problem::new(
            Kind::UnsupportedMediaType,
            format!("compressed bodies ({encoding}) are not accepted"),
        ));
    }
    Ok(())
}

/// Decodes a generation request. The shape of the two free-form fields is
/// checked first, because an untagged enum cannot say what is wrong with it.
pub fn decode(bytes: &[u8]) -> Result<GenerateRequest, Problem> {
    let object = object(bytes)?;
    match object.get("method") {
        None | Some(Value::Null | Value::String(_)) => {}
        Some(Value::Object(method)) => match method.get("name") {
            Some(Value::String(_)) => {}
            Some(other) => return Err(wrong_type("method.name", other, "a string")),
            None => return Err(required("method.name")),
        },
        Some(other) => {
            return Err(wrong_type("method", other, "a name or an object with a name"));
        }
    }
    match object.get("budget") {
        None | Some(Value::Null) => {}
        Some(Value::Number(number)) if number.is_u64() => {}
        Some(Value::Number(number)) if number.is_i64() => {
            return Err(Problem::field(
                Kind::InvalidValue,
                "budget",
                format_args!("{number} must not be negative"),
            ));
        }
        Some(budget @ Value::Object(_)) => {
            decode_at::<Budget, _>("budget", budget)?;
        }
        Some(other) => {
            let expected = "a whole number of U-Net forwards or an object with f, v, y";
            return Err(wrong_type("budget", other, expected));
        }
    }
    decode_at("", &mut serde_json::Deserializer::from_slice(bytes))
}

/// The fields of a body.
pub fn object(bytes: &[u8]) -> Result<Map<String, Value>, Problem> {
    let value: Value = serde_json::from_slice(bytes)
        .map_err(|e| Problem::new(Kind::MalformedJson, e.to_string()))?;
    distinct(bytes)?;
    match value {
        Value::Object(object) => Ok(object),
        _ => Err(Problem::new(Kind::InvalidBody, "the body must be a JSON object")),
    }
}

/// Maps would take the last of several fields of one name.
fn distinct(bytes: &[u8]) -> Result<(), Problem> {
    let twice = |field| Err(Problem::field(Kind::InvalidBody, field, "the field is given twice"));
    repeated(bytes).map_or(Ok(()), twice)
}

/// Fields of a request that are text; others are JSON, where it can be read as such.
const TEXTS: [&str; 7] =
    ["prompt", "negative_prompt", "model", "adapter", "solver", "reward", "output_format"];

/// Decodes a generation request from a query: its fields by name, with objects as JSON.
pub fn decode_query(query: &str) -> Result<GenerateRequest, Problem> {
    let pairs: Vec<(String, String)> = decode_pairs(query)?;
    let mut object = serde_json::Map::new();
    for (name, text) in pairs {
        let value = match name.as_str() {
            // A method's name is text, its object JSON.
            "method" if !text.trim_start().starts_with('{') => Value::String(text),
            name if TEXTS.contains(&name) => Value::String(text),
            _ => serde_json::from_str(&text).unwrap_or(Value::String(text)),
        };
        if object.insert(name.clone(), value).is_some() {
            return Err(Problem::field(Kind::InvalidQuery, name, "the field is given twice"));
        }
    }
    decode(Value::Object(object).to_string().as_bytes())
}

/// Decodes a query's pairs; problems name the field.
pub fn decode_pairs<T: DeserializeOwned>(query: &str) -> Result<T, Problem> {
    let pairs = serde_urlencoded::Deserializer::new(form_urlencoded::parse(query.as_bytes()));
    serde_path_to_error::deserialize(pairs).map_err(|error| {
        let path = error.path().to_string();
        let path = if path == "." { "" } else { path.as_str() };
        Problem { kind: Kind::InvalidQuery, ..explain(path, &error.into_inner().to_string()) }
    })
}

/// Decodes a body; problems name the field.
pub fn decode_bytes<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Problem> {
    distinct(bytes)?;
    decode_at("", &mut serde_json::Deserializer::from_slice(bytes))
}

fn decode_at<'de, T, D>(base: &str, deserializer: D) -> Result<T, Problem>
where
    T: DeserializeOwned,
    D: serde::Deserializer<'de, Error = serde_json::Error>,
{
    serde_path_to_error::deserialize(deserializer).map_err(|error| {
        let path = match error.path().to_string() {
            path if path == "." => base.to_owned(),
            path if base.is_empty() => path,
            path => format!("{base}.{path}"),
        };
        explain(&path, &error.into_inner().to_string())
    })
}

/// Turns serde's words into a problem that names the field.
fn explain(path: &str, message: &str) -> Problem {
    // The position in the body says nothing that the field's name does not.
    let message = message.split(" at line ").next().unwrap_or(message);
    let quoted = || message.split('`').nth(1).unwrap_or("").to_owned();
    if message.starts_with("missing field") {
        return required(join(path, &quoted()));
    }
    if let Some((_, expected)) =
        message.strip_prefix("unknown field").and_then(|m| m.split_once(','))
    {
        let name = quoted();
        let field = if path.ends_with(&name) { path.to_owned() } else { join(path, &name) };
        return Problem::field(Kind::InvalidBody, field, format!("unknown field,{expected}"));
    }
    if message.starts_with("duplicate field") {
        let name = quoted();
        let field = if path.ends_with(&name) { path.to_owned() } else { join(path, &name) };
        return Problem::field(Kind::InvalidBody, field, "the field is given twice");
    }
    let kind = match message {
        m if m.starts_with("invalid value") => Kind::InvalidValue,
        m if m.starts_with("unknown variant") => Kind::UnknownName,
        _ => Kind::InvalidBody,
    };
    if path.is_empty() {
        return Problem::new(kind, message);
    }
    Problem::field(kind, path, message)
}

fn join(path: &str, name: &str) -> String {
    if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") }
}

fn required(field: impl Into<String>) -> Problem {
    Problem::field(Kind::InvalidBody, field, "the field is required")
}

pub fn wrong_type(field: &str, found: &Value, expected: &str) -> Problem {
    let found = match found {
        Value::Null => "null".to_owned(),
        Value::Bool(b) => format!("boolean `{b}`"),
        Value::Number(n) => format!("number `{n}`"),
        Value::String(s) => format!("string {s:?}"),
        Value::Array(_) => "an array".to_owned(),
        Value::Object(_) => "an object".to_owned(),
    };
    let message = format!("invalid type: {found}, expected {expected}");
    Problem::field(Kind::InvalidBody, field, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(body: &str) -> (u16, Option<String>, String) {
        let problem = decode(body.as_bytes()).expect_err(body);
        (problem.kind.status(), problem.field, problem.detail)
    }

    #[track_caller]
    fn names(body: &str, status: u16, field: &str, detail: &str) {
        let found = refused(body);
        assert_eq!(found.0, status, "{found:?}");
        assert_eq!(found.1.as_deref(), Some(field), "{found:?}");
        assert!(found.2.starts_with(&format!("{field}: ")), "{found:?}");
        assert!(found.2.contains(detail), "{found:?}");
    }

    #[test]
    fn every_wrong_body_names_its_field() {
        names(
            r#"{"prompt":"a","steps":"x"}"#,
            400,
            "steps",
            r#"invalid type: string "x", expected u32"#,
        );
        names(r#"{"prompt":"a","steps":1.5}"#, 400, "steps", "floating point");
        names(r#"{"prompt":"a","steps":-1}"#, 422, "steps", "invalid value");
        names(r#"{"prompt":"a","prmpt":"b"}"#, 400, "prmpt", "unknown field, expected one of");
        names(r#"{"steps":3}"#, 400, "prompt", "required");
        names(r#"{"prompt":"a","prompt":"b"}"#, 400, "prompt", "twice");
        let params = r#"{"prompt":"a","method":{"name":"x","k":1,"k":2}}"#;
        names(params, 400, "method.k", "twice");
        names(r#"{"prompt":null}"#, 400, "prompt", "expected a string");
        names(r#"{"prompt":"a","method":3}"#, 400, "method", "number `3`");
        names(r#"{"prompt":"a","method":["plain"]}"#, 400, "method", "an array");
        names(r#"{"prompt":"a","method":{"kernel":"sde"}}"#, 400, "method.name", "required");
        names(r#"{"prompt":"a","method":{"name":7}}"#, 400, "method.name", "number `7`");
        names(r#"{"prompt":"a","budget":"many"}"#, 400, "budget", "string \"many\"");
        names(r#"{"prompt":"a","budget":[1,2,3]}"#, 400, "budget", "an array");
        names(r#"{"prompt":"a","budget":-5}"#, 422, "budget", "negative");
        names(r#"{"prompt":"a","budget":{"f":"x"}}"#, 400, "budget.f", "string \"x\"");
        names(r#"{"prompt":"a","budget":{"g":1}}"#, 400, "budget.g", "unknown field");
        names(r#"{"prompt":"a","output_format":"gif"}"#, 422, "output_format", "png");
        names(r#"{"prompt":"a","seed":18446744073709551616}"#, 400, "seed", "invalid type");
    }

    #[test]
    fn what_is_not_an_object_is_refused() {
        for body in ["", "{", "nonsense", "{\"prompt\":\"a\"} x", "{\"prompt\":\"\u{1}\"}"] {
            assert_eq!(refused(body).0, 400, "{body:?}");
        }
        for body in ["[]", r#"["a red circle"]"#, "null", "3", "\"prompt\""] {
            assert_eq!(refused(body).2, "the body must be a JSON object");
        }
        let deep = "[".repeat(200_000);
        assert_eq!(refused(&deep).0, 400);
    }

    #[test]
    fn both_forms_of_method_and_budget_decode() {
        let body = r#"{"prompt":"a","method":{"name":"best-of-n","kernel":"sde"},
            "budget":{"f":100},"seed":18446744073709551615,"steps":null}"#;
        let request = decode(body.as_bytes()).unwrap();
        assert_eq!(request.seed, Some(u64::MAX));
        let again = decode(br#"{"prompt":"a","method":"plain","budget":100}"#).unwrap();
        assert!(again.method.is_some() && again.budget.is_some());
    }
}
