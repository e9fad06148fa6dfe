//! Requests with deadlines: refused, stopped, never begun.

use std::time::Duration;

use diffusion_sharpening::serve::Settings;
use serde_json::{Value, json};

use crate::fake::Fake;
use crate::harness::{Server, server, server_with, settings, settings_in};

const MISSED: &str = "ds_generations_total{method=\"plain\",model=\"tiny\",outcome=\"deadline\"}";

fn slow() -> Server {
    server_with(settings(), Fake { step: Duration::from_millis(20), ..Fake::default() })
}

#[test]
fn what_is_not_done_in_time_stops_at_a_step() {
    let server = server();
    let late = json!({"prompt": "wait", "steps": 3, "deadline_ms": 200});
    let (kind, problem) = server.post(late.clone()).problem(504);
    assert_eq!(kind, "deadline");
    assert_eq!(problem["detail"], "200 ms had passed after 2 of 6 U-Net forwards");
    assert_eq!(*server.fake.cancelled.lock().unwrap(), ["wait"]);
    assert_eq!(server.metric(MISSED), 1.0);
    assert_eq!(server.metric("ds_cancel_latency_seconds_count"), 1.0);
    // The thread is free, and there was time enough for others.
    let early = json!({"prompt": "a", "steps": 3, "deadline_ms": 600_000});
    let answer = server.post(early);
    assert_eq!(answer.status, 200);
    assert!(answer.json()["resolved"]["deadline_ms"].is_null(), "not what was made");
    let streamed = server.send("POST", "/generate", &[("accept", "text/event-stream")], &late);
    assert_eq!(streamed.status, 200);
    let last = streamed.text().split("event: ").last().unwrap();
    assert!(last.starts_with("failed\n") && last.contains("sharpening:deadline\""), "{last}");
}

#[test]
fn what_waits_too_long_is_not_begun() {
    let server = server();
    let first = server.later(json!({"prompt": "wait 1", "steps": 3}));
    server.until("running", |s| s.metric("ds_generations_running") == 1.0);
    let late = json!({"prompt": "wait 2", "steps": 3, "deadline_ms": 150});
    let (kind, problem) = server.post(late.clone()).problem(504);
    assert_eq!(kind, "deadline");
    assert!(problem["detail"].as_str().unwrap().contains("after 0 of 6"), "{problem}");
    assert_eq!(server.metric("ds_queue_depth"), 0.0);
    assert_eq!(server.metric("ds_generations_running"), 1.0, "the other goes on");
    let id = server.post_async(&late);
    let status = server.until_state(&id, "failed");
    assert!(status["problem"]["type"].as_str().unwrap().ends_with(":deadline"), "{status}");
    assert_eq!(server.metric(MISSED), 2.0);
    server.fake.gate.open();
    assert_eq!(first.join().unwrap().status, 200);
    assert!(!server.fake.finished.lock().unwrap().contains(&"wait 2".to_owned()));
    assert!(server.fake.cancelled.lock().unwrap().is_empty());
}

#[test]
fn arms_have_deadlines_of_their_own() {
    let server = server();
    let answer = server.compare(&json!({
        "base": {"prompt": "wait", "steps": 3, "deadline_ms": 150},
        "arms": [{}, {"deadline_ms": 250, "steps": 2}],
    }));
    assert_eq!(answer.status, 200, "{}", answer.text());
    for arm in answer.json()["arms"].as_array().unwrap() {
        assert_eq!(arm["state"], "failed");
        assert!(arm["problem"]["type"].as_str().unwrap().ends_with(":deadline"), "{arm}");
    }
}

#[test]
fn what_cannot_be_in_time_is_refused_before_it_waits() {
    let server = slow();
    let body = |steps: u32, ms: u64| json!({"prompt": "a", "steps": steps, "deadline_ms": ms});
    // Nothing but the first image has been measured: it is tried.
    assert_eq!(server.post(body(5, 1)).problem(504).0, "deadline");
    assert_eq!(server.post(json!({"prompt": "a", "steps": 10})).status, 200);
    // Now it is known that a forward takes at least 10 ms.
    let finished = server.fake.finished.lock().unwrap().len();
    let infeasible = body(100, 500);
    let (kind, problem) = server.post(infeasible.clone()).problem(422);
    assert_eq!((kind.as_str(), &problem["field"]), ("deadline-infeasible", &json!("deadline_ms")));
    assert_eq!((&problem["deadline_ms"], &problem["ahead_ms"]), (&json!(500), &json!(0)));
    let planned = problem["planned_ms"].as_u64().unwrap();
    assert!(planned >= 2000, "{problem}");
    assert!(problem["detail"].as_str().unwrap().contains(&format!("about {planned} ms")));
    assert_eq!(server.metric("ds_rejections_total{reason=\"deadline-infeasible\"}"), 1.0);
    let async_ = [("prefer", "respond-async")];
    server.send("POST", "/generate", &async_, &infeasible).problem(422);
    server.put("a", &infeasible).problem(422);
    server.get("/generations/a").problem(404);
    server.get("/estimate?prompt=a&steps=100&deadline_ms=500").problem(422);
    assert_eq!(server.get("/estimate?prompt=a&steps=100&deadline_ms=600000").status, 200);
    for (comparison, field) in [
        (
            json!({"base": {"prompt": "a", "deadline_ms": 500}, "arms": [{"steps": 1}, {"steps": 100}]}),
            "base.deadline_ms",
        ),
        (
            json!({"base": {"prompt": "a"}, "arms": [{"steps": 100}, {"steps": 1, "deadline_ms": 500}]}),
            "arms[1].deadline_ms",
        ),
    ] {
        let (kind, problem) = server.compare(&comparison).problem(422);
        assert_eq!((kind.as_str(), &problem["field"]), ("deadline-infeasible", &json!(field)));
    }
    let alias = server.send("POST", "/v1/images/generations", &[], &infeasible);
    assert_eq!(alias.json()["error"]["code"], "deadline_infeasible");
    assert_eq!(server.fake.finished.lock().unwrap().len(), finished, "nothing was run");
    // The same work is in time alone, and not behind other work.
    let short = json!({"prompt": "b", "steps": 1, "deadline_ms": 1500});
    assert_eq!(server.post(short.clone()).status, 200);
    let busy = server.later(json!({"prompt": "wait", "steps": 400}));
    server.until("running", |s| s.metric("ds_generations_running") == 1.0);
    let (_, problem) = server.post(short).problem(422);
    assert!(problem["ahead_ms"].as_u64().unwrap() > 1500, "{problem}");
    drop(server);
    busy.join().unwrap();
}

#[test]
fn a_deadline_goes_on_while_the_server_is_away() {
    let folder = tempfile::tempdir().unwrap();
    let settings = || Settings { drain_seconds: 0, ..settings_in(folder.path()) };
    let server = server_with(settings(), Fake::default());
    let first = server.post_async(&json!({"prompt": "wait", "steps": 2}));
    server.until_state(&first, "running");
    let second = server.post_async(&json!({"prompt": "b", "steps": 2, "deadline_ms": 60_000}));
    let third = server.post_async(&json!({"prompt": "c", "steps": 2, "deadline_ms": 600}));
    assert_eq!(server.status(&third)["state"], "queued");
    server.stopper.stop();
    server.ended().unwrap();
    std::thread::sleep(Duration::from_millis(600));
    let server = server_with(settings(), Fake::default());
    server.fake.gate.open();
    for id in [&first, &second] {
        server.until_state(id, "completed");
    }
    let status = server.until_state(&third, "failed");
    assert!(status["problem"]["type"].as_str().unwrap().ends_with(":deadline"), "{status}");
}

#[test]
fn a_deadline_is_a_number_of_milliseconds() {
    let server = server();
    for (value, status) in
        [(json!(0), 422), (json!(604_800_001), 422), (json!(-1), 422), (json!("1 s"), 400)]
    {
        let body = json!({"prompt": "a", "deadline_ms": value});
        let (_, problem) = server.post(body).problem(status);
        assert_eq!(problem["field"], "deadline_ms", "{problem}");
    }
    let body = json!({"prompt": "a", "steps": 1, "deadline_ms": Value::Null});
    assert_eq!(server.post(body).status, 200);
}
