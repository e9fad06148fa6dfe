//! What the server logs: ids, never prompts.

use std::io::Write;
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};
use tracing_subscriber::EnvFilter;

use crate::harness::server;

#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_generation_is_logged_under_its_id_and_without_its_prompt() {
    let lines = Lines::default();
    let writer = lines.clone();
    // For the whole process: the server has threads of its own.
    tracing_subscriber::fmt()
        .json()
        .with_env_filter(EnvFilter::new("debug"))
        .with_writer(move || writer.clone())
        .try_init()
        .unwrap();
    let server = server();
    let secret = "a zebra whom nobody knows";
    let body = |more: &str| {
        json!({"prompt": format!("{secret} {more}"), "steps": 1,
        "negative_prompt": secret})
    };
    let id = server.post(body("")).json()["id"].as_str().unwrap().to_owned();
    assert_eq!(server.post(body("broken")).status, 500);
    assert_eq!(server.post(json!({"prompt": secret, "model": secret})).status, 422);
    let later = server.post_async(&body(""));
    server.until_state(&later, "completed");
    assert_eq!(server.compare(&json!({"base": body(""), "arms": [{}]})).status, 200);
    server.get(&format!("/estimate?prompt={}", secret.replace(' ', "+")));
    server.get("/generations?q=zebra");
    let text = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
    let all: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let ended = |id: &str| {
        let of_it =
            |line: &&Value| line["fields"]["message"] == "ended" && line["span"]["id"] == id;
        all.iter().filter(of_it).count()
    };
    assert_eq!((ended(&id), ended(&later)), (1, 1));
    let line = all.iter().find(|line| line["span"]["id"] == id).unwrap();
    assert_eq!(line["span"]["name"], "generation");
    assert_eq!(
        (&line["span"]["model"], &line["span"]["method"]),
        (&json!("tiny"), &json!("plain"))
    );
    // The line that a failure's `instance` names is in the span, too.
    let failed = all.iter().find(|line| line["fields"]["instance"].is_string()).unwrap();
    assert!(failed["span"]["id"].is_string(), "{failed}");
    assert!(!text.contains("zebra"), "a prompt is logged");
}
