//! The alias in the words of OpenAI's Images API.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use diffusion_sharpening::serve::{Settings, auth};
use serde_json::{Value, json};

use crate::fake::Fake;
use crate::harness::{Answer, Server, server, server_with, settings};

fn post(server: &Server, body: &Value) -> Answer {
    server.send("POST", "/v1/images/generations", &[], body)
}

#[test]
fn an_openai_client_gets_its_images() {
    let server = server();
    let answer = post(
        &server,
        &json!({
            "prompt": "a red circle", "n": 2, "size": "48x32", "response_format": "b64_json",
            "seed": 7, "steps": 3, "method": {"name": "best-of-n", "candidates": 2},
        }),
    );
    assert_eq!(answer.status, 200, "{}", answer.text());
    let body = answer.json();
    assert!(body["created"].as_u64().unwrap() > 1_700_000_000);
    assert_eq!((&body["size"], &body["output_format"]), (&json!("48x32"), &json!("png")));
    let data = body["data"].as_array().unwrap();
    assert_eq!(data.len(), 2);
    assert_eq!(data[1]["seed"], 8);
    let bytes = STANDARD.decode(data[0]["b64_json"].as_str().unwrap()).unwrap();
    assert_eq!(image::load_from_memory(&bytes).unwrap().width(), 48);
    assert_eq!(body["cost"]["actual"]["f"], 24);
    // The same as by the real contract.
    let again = server.post(body["resolved"].clone()).json();
    assert_eq!(again["images"][0]["data"], data[0]["b64_json"]);
    assert_eq!(post(&server, &json!({"prompt": "a", "size": "auto", "steps": 1})).status, 200);
}

#[test]
fn what_it_cannot_do_it_refuses_in_openais_envelope() {
    let server = server();
    for (body, status, param, code) in [
        (json!({"prompt": "a", "quality": "hd"}), 400, "quality", "invalid_body"),
        (json!({"prompt": "a", "stream": true}), 400, "stream", "invalid_body"),
        (json!({"prompt": "a", "response_format": "url"}), 422, "response_format", "invalid_value"),
        (json!({"prompt": "a", "size": "big"}), 422, "size", "invalid_value"),
        (json!({"prompt": "a", "model": "dall-e-3"}), 422, "model", "unknown_name"),
        (json!({"prompt": ""}), 422, "prompt", "invalid_value"),
        (json!({"prompt": "a", "size": 5}), 400, "size", "invalid_body"),
        (json!({"prompt": "a", "response_format": 5}), 400, "response_format", "invalid_body"),
        (json!({"prompt": "a", "steps": "x"}), 400, "steps", "invalid_body"),
    ] {
        let answer = post(&server, &body);
        assert_eq!(answer.status, status, "{}", answer.text());
        let error = answer.json()["error"].clone();
        assert_eq!(error["type"], "invalid_request_error");
        assert_eq!((error["param"].as_str(), error["code"].as_str()), (Some(param), Some(code)));
        assert!(!error["message"].as_str().unwrap().is_empty());
    }
    for (body, param) in [("[]", Value::Null), (r#"{"prompt":"a","prompt":"b"}"#, json!("prompt"))]
    {
        let answer = server.post_to("/v1/images/generations", body);
        let error = answer.json()["error"].clone();
        assert_eq!((answer.status, &error["code"]), (400, &json!("invalid_body")));
        assert_eq!(error["param"], param);
    }
    let failed = post(&server, &json!({"prompt": "broken", "steps": 1}));
    assert_eq!(failed.status, 500);
    assert_eq!(failed.json()["error"]["type"], "server_error");
}

#[test]
fn whatever_goes_wrong_below_v1_is_said_in_openais_envelope() {
    let (key, hash) = auth::make_key().unwrap();
    let file = tempfile::NamedTempFile::new().unwrap();
    let text = format!("[[key]]\nid = \"a\"\nsha256 = [{hash:?}]\nscopes = [\"generate\"]\n");
    std::fs::write(file.path(), text).unwrap();
    let keys = file.path().to_path_buf();
    let server = server_with(Settings { keys, ..settings() }, Fake::default());
    let (path, good) = ("/v1/images/generations", format!("Bearer {key}"));
    let body = json!({"prompt": "a", "steps": 1});
    let plain = [("authorization", good.as_str())];
    let evil = [plain[0], ("origin", "http://evil.example")];
    for (method, path, headers, status, code) in [
        ("POST", path, &[][..], 401, "invalid_api_key"),
        ("POST", path, &[("x-api-key", "wrong")], 401, "invalid_api_key"),
        ("POST", path, &evil, 403, "forbidden"),
        ("POST", path, &[plain[0], ("host", "evil.example")], 421, "misdirected_request"),
        ("PUT", path, &plain, 405, "method_not_allowed"),
        ("POST", "/v1/images/edits", &plain, 404, "not_found"),
        ("POST", path, &[plain[0], ("content-encoding", "gzip")], 415, "unsupported_media_type"),
    ] {
        let answer = server.send(method, path, headers, &body);
        assert_eq!(answer.status, status, "{method} {path}: {}", answer.text());
        assert_eq!(answer.header("content-type"), "application/json");
        let whole = answer.json();
        let mut members: Vec<_> = whole["error"].as_object().unwrap().keys().cloned().collect();
        members.sort();
        assert_eq!(members, ["code", "message", "param", "type"]);
        assert_eq!(whole["error"]["type"], "invalid_request_error");
        assert_eq!(whole["error"]["code"], code);
        // What the status asks for is still there.
        assert_eq!(answer.header("www-authenticate") == "Bearer", status == 401);
        assert_eq!(answer.header("allow") == "POST", status == 405);
    }
    assert_eq!(server.send("POST", path, &plain, &body).status, 200);
    assert_eq!(server.send("GET", "/v2", &plain, &Value::Null).problem(404).0, "not-found");
}
