//! Waiting, leaving, refusing, draining.

use std::io::Write;
use std::net::TcpStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use diffusion_sharpening::Error;
use diffusion_sharpening::engine::Backend;
use diffusion_sharpening::serve::{self, Settings};
use serde_json::json;

use crate::fake::Fake;
use crate::harness::{Server, loading, server, server_with, settings, unready, until};

fn running(server: &Server) -> f64 {
    server.metric("ds_generations_running")
}

#[test]
fn http_answers_while_a_generation_runs() {
    let server = server_with(Settings { http_threads: 1, ..settings() }, Fake::default());
    let busy = server.later(json!({"prompt": "wait", "steps": 3}));
    server.until("running", |s| running(s) == 1.0);
    let start = Instant::now();
    for path in ["/livez", "/readyz", "/models", "/", "/metrics"] {
        assert_eq!(server.get(path).status, 200);
    }
    assert!(start.elapsed() < Duration::from_secs(10));
    assert_eq!(server.metric("ds_http_requests_in_flight"), 2.0);
    server.fake.gate.open();
    assert_eq!(busy.join().unwrap().status, 200);
}

#[test]
fn a_full_queue_says_when_to_come_back() {
    let server = server_with(Settings { queue: 1, ..settings() }, Fake::default());
    let first = server.later(json!({"prompt": "wait 1", "steps": 3}));
    server.until("running", |s| running(s) == 1.0);
    let second = server.later(json!({"prompt": "wait 2", "steps": 3}));
    server.until("waiting", |s| s.metric("ds_queue_depth") == 1.0);
    let refused = server.post(json!({"prompt": "c", "steps": 3}));
    assert_eq!(refused.problem(429).0, "queue-full");
    let seconds: u64 = refused.header("retry-after").parse().unwrap();
    assert!((1..=600).contains(&seconds));
    assert_eq!(server.metric("ds_rejections_total{reason=\"queue-full\"}"), 1.0);
    server.fake.gate.open();
    for answer in [first, second] {
        assert_eq!(answer.join().unwrap().status, 200);
    }
    assert_eq!(server.post(json!({"prompt": "c", "steps": 3})).status, 200);
}

#[test]
fn retry_after_is_the_backlog_at_the_measured_speed() {
    let fake = Fake { step: Duration::from_millis(20), ..Fake::default() };
    let server = server_with(Settings { queue: 0, drain_seconds: 0, ..settings() }, fake);
    // Measured while warming up: 20 ms for two forwards, so 400 take about 4 s.
    let busy = server.later(json!({"prompt": "wait", "steps": 200}));
    server.until("running", |s| running(s) == 1.0);
    let refused = server.post(json!({"prompt": "a", "steps": 1}));
    refused.problem(429);
    let seconds: u64 = refused.header("retry-after").parse().unwrap();
    // A busy machine may have been slower than that.
    assert!((4..=40).contains(&seconds), "{seconds}");
    drop(server);
    busy.join().unwrap();
}

fn half_request(server: &Server, prompt: &str) -> TcpStream {
    let mut stream = TcpStream::connect(server.address()).unwrap();
    let body = json!({"prompt": prompt, "steps": 3}).to_string();
    write!(
        stream,
        "POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    )
    .unwrap();
    stream
}

#[test]
fn a_client_that_leaves_takes_its_work_along() {
    let server = server();
    let first = half_request(&server, "wait 1");
    server.until("running", |s| running(s) == 1.0);
    let second = half_request(&server, "wait 2");
    server.until("waiting", |s| s.metric("ds_queue_depth") == 1.0);
    drop(second);
    server.until("forgotten", |s| s.metric("ds_queue_depth") == 0.0);
    assert_eq!(running(&server), 1.0);
    drop(first);
    server.until("cancelled", |s| running(s) == 0.0);
    assert_eq!(*server.fake.cancelled.lock().unwrap(), ["wait 1"]);
    let cancelled = "ds_generations_total{method=\"plain\",model=\"tiny\",outcome=\"cancelled\"}";
    server.until("counted", |s| s.get("/metrics").text().contains(cancelled));
    for phase in ["queued", "running"] {
        let line = format!("ds_client_disconnects_total{{phase=\"{phase}\"}}");
        assert_eq!(server.metric(&line), 1.0, "{phase}");
    }
    assert_eq!(
        server.metric("ds_http_requests_total{method=\"POST\",route=\"/generate\",status=\"499\"}"),
        2.0
    );
    assert_eq!(server.metric("ds_units_total{unit=\"f\"}"), 2.0, "cancelled work is counted");
    assert_eq!(server.post(json!({"prompt": "a", "steps": 1})).status, 200);
}

#[test]
fn a_body_that_never_arrives_is_given_up() {
    let server = server_with(Settings { body_seconds: 1, ..settings() }, Fake::default());
    let mut stream = TcpStream::connect(server.address()).unwrap();
    stream
        .write_all(
            b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\
              Content-Length: 50\r\n\r\n{",
        )
        .unwrap();
    let mut answer = [0; 512];
    let n = std::io::Read::read(&mut stream, &mut answer).unwrap();
    assert!(answer[..n].starts_with(b"HTTP/1.1 408"), "{}", String::from_utf8_lossy(&answer));
}

#[test]
fn nothing_is_generated_before_the_backend_is_warm() {
    let (server, go) = loading();
    assert_eq!(server.get("/livez").status, 200);
    assert_eq!(server.get("/").status, 200);
    for answer in
        [server.get("/readyz"), server.get("/models"), server.post(json!({"prompt": "a"}))]
    {
        assert_eq!(answer.problem(503).0, "not-ready");
        assert!(!answer.header("retry-after").is_empty());
    }
    assert_eq!(server.metric("ds_ready"), 0.0);
    go.send(()).unwrap();
    server.until("ready", |s| s.get("/readyz").status == 200);
    // The warm-up image has been made, from the model's first example.
    assert_eq!(
        *server.fake.finished.lock().unwrap(),
        ["a red circle left of a striped blue square"]
    );
}

#[test]
fn a_backend_that_cannot_be_opened_ends_the_server() {
    let open = || Err(Error::file("models/tiny", "model_index.json is missing"));
    let server = unready(settings(), Arc::new(Fake::default()), open);
    let error = server.ended().unwrap_err().to_string();
    assert_eq!(error, "models/tiny: model_index.json is missing");
}

#[test]
fn draining_finishes_accepted_work() {
    let server = server();
    let first = server.later(json!({"prompt": "wait 1", "steps": 3}));
    server.until("running", |s| running(s) == 1.0);
    let second = server.later(json!({"prompt": "wait 2", "steps": 3}));
    server.until("waiting", |s| s.metric("ds_queue_depth") == 1.0);
    server.stopper.stop();
    server.until("unready", |s| s.get("/readyz").status == 503);
    assert_eq!(server.get("/livez").status, 200);
    let refused = server.post(json!({"prompt": "c"}));
    assert_eq!(refused.problem(503).0, "draining");
    assert!(!refused.header("retry-after").is_empty());
    server.fake.gate.open();
    assert_eq!(first.join().unwrap().status, 200);
    assert_eq!(second.join().unwrap().status, 200);
    let (address, fake) = (server.address().to_owned(), server.fake.clone());
    server.ended().unwrap();
    assert_eq!(fake.finished.lock().unwrap().len(), 3);
    assert!(TcpStream::connect(address).is_err());
}

#[test]
fn work_that_outlasts_the_drain_is_told_so() {
    let server = server_with(Settings { drain_seconds: 1, ..settings() }, Fake::default());
    let first = server.later(json!({"prompt": "wait 1", "steps": 3}));
    server.until("running", |s| running(s) == 1.0);
    let second = server.later(json!({"prompt": "wait 2", "steps": 3}));
    server.until("waiting", |s| s.metric("ds_queue_depth") == 1.0);
    server.stopper.stop();
    for answer in [first, second] {
        let answer = answer.join().unwrap();
        assert_eq!(answer.problem(503).0, "draining");
        assert!(!answer.header("retry-after").is_empty());
    }
    let fake = server.fake.clone();
    server.ended().unwrap();
    assert_eq!(*fake.cancelled.lock().unwrap(), ["wait 1"]);
}

#[test]
fn several_workers_run_side_by_side() {
    let server = server_with(Settings { workers: 3, ..settings() }, Fake::default());
    let busy: Vec<_> =
        (0..3).map(|i| server.later(json!({"prompt": format!("wait {i}"), "steps": 2}))).collect();
    server.until("all running", |s| running(s) == 3.0);
    server.fake.gate.open();
    for answer in busy {
        assert_eq!(answer.join().unwrap().status, 200);
    }
}

#[test]
fn a_port_in_use_is_said() {
    let server = server();
    let taken = Settings { listen: server.address().to_owned(), ..settings() };
    let fake: Arc<dyn Backend> = Arc::new(Fake::default());
    let error = serve::start(taken, move || Ok(fake)).err().unwrap().to_string();
    assert!(error.starts_with("listen: ") && error.contains("already in use"), "{error}");
    until("still there", || server.get("/livez").status == 200);
}
