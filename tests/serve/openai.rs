//! The alias in the words of OpenAI's Images API.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use crate::harness::{Answer, Server, server};

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
        (json!({"prompt": "a", "steps": "x"}), 400, "steps", "invalid_body"),
    ] {
        let answer = post(&server, &body);
        assert_eq!(answer.status, status, "{}", answer.text());
        let error = answer.json()["error"].clone();
        assert_eq!(error["type"], "invalid_request_error");
        assert_eq!((error["param"].as_str(), error["code"].as_str()), (Some(param), Some(code)));
        assert!(!error["message"].as_str().unwrap().is_empty());
    }
    let failed = post(&server, &json!({"prompt": "broken", "steps": 1}));
    assert_eq!(failed.status, 500);
    assert_eq!(failed.json()["error"]["type"], "server_error");
}
