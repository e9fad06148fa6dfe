//! Whether the server takes work, and why not.

use diffusion_sharpening::serve::Settings;
use serde_json::{Value, json};

use crate::fake::Fake;
use crate::harness::{Server, loading, server, server_with, settings};

/// The checks that are not fulfilled; every one has a reason.
#[track_caller]
fn failing(body: &Value) -> Vec<&str> {
    let checks = body["checks"].as_array().unwrap();
    let names: Vec<_> = checks.iter().map(|check| check["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["model", "accepting", "queue", "workers"]);
    assert!(checks.iter().all(|check| check["reason"].as_str().is_some_and(|r| r.len() > 10)));
    checks.iter().zip(names).filter(|(c, _)| c["ok"] == false).map(|(_, name)| name).collect()
}

#[track_caller]
fn unready_for(server: &Server, kind: &str, checks: &[&str]) {
    let answer = server.get("/readyz");
    let (found, body) = answer.problem(503);
    assert_eq!(found, kind);
    assert_eq!(failing(&body), checks, "{body}");
    assert!(!answer.header("retry-after").is_empty());
    assert_eq!(server.metric("ds_ready"), 0.0);
}

#[test]
fn readiness_says_what_it_waits_for_from_start_to_end() {
    let (server, go) = loading();
    unready_for(&server, "not-ready", &["model"]);
    assert_eq!(server.get("/startupz").problem(503).0, "not-ready");
    assert!(!server.get("/metrics").text().contains("ds_model_ready{"));
    go.send(()).unwrap();
    server.until("started", |s| s.get("/startupz").status == 200);
    let ready = server.get("/readyz");
    assert_eq!((ready.status, &ready.json()["status"]), (200, &json!("ready")));
    assert!(failing(&ready.json()).is_empty());
    assert_eq!(server.metric("ds_ready"), 1.0);
    for model in ["tiny", "second"] {
        assert_eq!(server.metric(&format!("ds_model_ready{{model=\"{model}\"}}")), 1.0);
    }
    let info = "ds_model_info{dtype=\"f32\",model=\"tiny\",sha256_12=\"5eed5eed5eed\"}";
    assert_eq!(server.metric(info), 1.0);
    assert!(server.metric("ds_model_load_seconds") >= 0.0);
    let busy = server.later(json!({"prompt": "wait", "steps": 2}));
    server.until("running", |s| s.metric("ds_generations_running") == 1.0);
    server.stopper.stop();
    server.until("draining", |s| s.get("/readyz").status == 503);
    unready_for(&server, "draining", &["accepting"]);
    assert_eq!(server.get("/startupz").status, 200);
    server.fake.gate.open();
    assert_eq!(busy.join().unwrap().status, 200);
}

#[test]
fn a_full_queue_is_not_ready_until_there_is_room() {
    let server = server_with(Settings { queue: 0, ..settings() }, Fake::default());
    let busy = server.later(json!({"prompt": "wait", "steps": 2}));
    server.until("running", |s| s.metric("ds_generations_running") == 1.0);
    unready_for(&server, "not-ready", &["queue"]);
    assert_eq!(server.get("/startupz").status, 200);
    assert!(server.metric("ds_retry_after_seconds") >= 1.0);
    server.fake.gate.open();
    assert_eq!(busy.join().unwrap().status, 200);
    assert!(failing(&server.get("/readyz").json()).is_empty());
}

#[test]
fn a_generation_that_stands_still_is_noticed() {
    let server = server_with(Settings { stall_seconds: 1, ..settings() }, Fake::default());
    assert_eq!(server.metric("ds_worker_heartbeat_age_seconds"), 0.0);
    let busy = server.later(json!({"prompt": "wait", "steps": 2}));
    server.until("stalled", |s| s.get("/readyz").status == 503);
    unready_for(&server, "not-ready", &["workers"]);
    assert!(server.metric("ds_worker_heartbeat_age_seconds") >= 1.0);
    server.fake.gate.open();
    assert_eq!(busy.join().unwrap().status, 200);
    assert_eq!(server.get("/readyz").status, 200);
    assert_eq!(server.metric("ds_worker_heartbeat_age_seconds"), 0.0);
}

#[test]
fn the_commit_and_the_memory_are_told() {
    let server = server();
    let text = server.get("/metrics").text().to_owned();
    let commit = option_env!("DS_COMMIT").unwrap_or("unknown");
    let version = env!("CARGO_PKG_VERSION");
    let built = format!("ds_build_info{{commit=\"{commit}\",version=\"{version}\"}} 1\n");
    assert!(text.contains(&built), "{built}");
    if cfg!(target_os = "linux") {
        assert!(server.metric("ds_device_memory_bytes{kind=\"resident\"}") > 1e6);
    }
}
