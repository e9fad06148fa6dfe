//! Clients that leave, in every way and at every time.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};

use diffusion_sharpening::serve::Settings;
use serde_json::{Value, json};

use crate::fake::Fake;
use crate::harness::{Server, server, server_with, settings};

const RUNNING: &str = "ds_generations_running";
const FORWARDS: &str = "ds_units_total{unit=\"f\"}";

fn connect(server: &Server) -> TcpStream {
    let stream = TcpStream::connect(server.address()).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    stream
}

/// A connection on which one request has been answered.
fn used(server: &Server) -> TcpStream {
    let stream = connect(server);
    (&stream).write_all(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
    let mut answer = BufReader::new(&stream);
    let (mut line, mut length) = (String::new(), 0);
    while line != "\r\n" {
        line.clear();
        answer.read_line(&mut line).unwrap();
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().unwrap();
        }
    }
    answer.read_exact(&mut vec![0; length]).unwrap();
    assert!(answer.buffer().is_empty());
    stream
}

fn head(accept: &str, length: usize) -> String {
    format!(
        "POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\
         Accept: {accept}\r\nContent-Length: {length}\r\n\r\n"
    )
}

/// Asks for an image with many steps.
fn ask(mut stream: &TcpStream, prompt: &str, accept: &str) {
    let body = json!({"prompt": prompt, "steps": 1000}).to_string();
    write!(stream, "{}{body}", head(accept, body.len())).unwrap();
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Leaving {
    /// With the end of its stream; what the server still sends is taken.
    Fin,
    /// Closing with something unread: the connection is reset.
    Rst,
}

/// Leaves; a stream that is only ended stays with the caller.
fn leave(stream: TcpStream, leaving: Leaving) -> Option<TcpStream> {
    match leaving {
        Leaving::Fin => {
            stream.shutdown(Shutdown::Write).unwrap();
            Some(stream)
        }
        Leaving::Rst => None,
    }
}

#[test]
fn work_stops_within_a_step_however_its_client_leaves() {
    const JSON: &str = "application/json";
    const EVENTS: &str = "text/event-stream";
    // A step of 20 ms, a thousand of them: what ends soon was stopped.
    let fake = Fake { step: Duration::from_millis(20), ..Fake::default() };
    let server = server_with(settings(), fake);
    let mut cases = 0;
    for leaving in [Leaving::Fin, Leaving::Rst] {
        for (accept, reused) in [(JSON, false), (JSON, true), (EVENTS, false), (EVENTS, true)] {
            let case = format!("{accept}, reused: {reused}, {leaving:?}");
            let mut stream = if reused { used(&server) } else { connect(&server) };
            if accept == JSON && leaving == Leaving::Rst {
                // An answer that is never read. Events are there to be left unread anyway.
                stream.write_all(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
            }
            let before = server.metric(FORWARDS);
            ask(&stream, &case, accept);
            server.until("stepped", |s| s.metric(FORWARDS) > before + 4.0);
            if accept == EVENTS {
                stream.read_exact(&mut [0; 64]).unwrap();
            }
            let left = Instant::now();
            let stream = leave(stream, leaving);
            server.until("stopped", |s| s.metric(RUNNING) == 0.0);
            // Twenty seconds of work; a busy machine has its time.
            assert!(left.elapsed() < Duration::from_secs(8), "{case}");
            assert_eq!(server.fake.cancelled.lock().unwrap().last(), Some(&case));
            let spent = server.metric(FORWARDS);
            std::thread::sleep(Duration::from_millis(60));
            assert_eq!(server.metric(FORWARDS), spent, "{case}: nothing is done any more");
            drop(stream);
            cases += 1;
        }
    }
    let gone = "ds_client_disconnects_total{phase=\"running\"}";
    assert_eq!(server.metric(gone), f64::from(cases), "each is counted once");
    assert_eq!(server.post(json!({"prompt": "a", "steps": 1})).status, 200, "the place is free");
}

/// One place, and nobody may wait: a place given back twice would let two run.
#[test]
fn a_place_is_given_back_once() {
    let server = server_with(Settings { queue: 0, ..settings() }, Fake::default());
    for phase in ["wait", "decode"] {
        for leaving in [Leaving::Fin, Leaving::Rst] {
            let stream = connect(&server);
            ask(&stream, phase, "text/event-stream");
            // All forwards are done in the second phase.
            let all = |s: &Server| s.metric("ds_queue_f_backlog") == 0.0;
            server.until("there", |s| s.metric(RUNNING) == 1.0 && (phase == "wait" || all(s)));
            let stream = leave(stream, leaving);
            server.until("stopped", |s| s.metric(RUNNING) == 0.0);
            drop(stream);
            let cancelled = server.fake.cancelled.lock().unwrap().last().cloned();
            assert_eq!(cancelled.as_deref(), Some(phase));
            std::thread::scope(|scope| {
                let first = scope.spawn(|| server.put("one", &json!({"prompt": "wait"})));
                server.until("taken", |s| s.metric(RUNNING) == 1.0);
                assert_eq!(server.post(json!({"prompt": "b"})).problem(429).0, "queue-full");
                assert_eq!(server.delete("/generations/one").status, 200);
                first.join().unwrap().problem(409);
            });
            assert_eq!(server.delete("/history/one").status, 204);
        }
    }
}

#[test]
fn who_leaves_while_sending_asked_for_nothing() {
    let server = server();
    let made = server.fake.finished.lock().unwrap().len();
    for leaving in [Leaving::Fin, Leaving::Rst] {
        let mut stream = connect(&server);
        if leaving == Leaving::Rst {
            stream.write_all(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
        }
        write!(stream, "{}{{\"prompt\":", head("application/json", 60)).unwrap();
        server.until("reading", |s| s.metric("ds_http_requests_in_flight") == 2.0);
        let stream = leave(stream, leaving);
        // The one that asks.
        server.until("over", |s| s.metric("ds_http_requests_in_flight") == 1.0);
        drop(stream);
    }
    assert_eq!(server.metric(RUNNING), 0.0);
    assert_eq!(server.fake.finished.lock().unwrap().len(), made);
}

#[test]
fn a_client_that_only_stops_sending_is_taken_for_one_that_left() {
    let server = server();
    let mut stream = connect(&server);
    ask(&stream, "wait", "application/json");
    server.until("running", |s| s.metric(RUNNING) == 1.0);
    stream.shutdown(Shutdown::Write).unwrap();
    server.until("stopped", |s| s.metric(RUNNING) == 0.0);
    assert_eq!(*server.fake.cancelled.lock().unwrap(), ["wait"]);
    let mut rest = Vec::new();
    let _ = stream.read_to_end(&mut rest);
    assert!(rest.is_empty(), "{}", String::from_utf8_lossy(&rest));
}

#[test]
fn who_waits_for_what_somebody_cancels_is_told() {
    let server = server();
    std::thread::scope(|scope| {
        let asked = scope.spawn(|| server.put("mine", &json!({"prompt": "wait", "steps": 3})));
        server.until("running", |s| s.metric(RUNNING) == 1.0);
        assert_eq!(server.delete("/generations/mine").status, 200);
        assert_eq!(asked.join().unwrap().problem(409).0, "cancelled");
    });
}

/// What only its own client waits for can be cancelled, too, by whoever knows its id.
#[test]
fn a_synchronous_request_that_somebody_cancels_is_told() {
    let server = server();
    let stream = connect(&server);
    ask(&stream, "wait", "text/event-stream");
    let mut lines = BufReader::new(&stream).lines().map(Result::unwrap);
    let mut data = |event: &str| -> Value {
        assert!(lines.any(|line| line == format!("event: {event}")), "no {event}");
        serde_json::from_str(lines.next().unwrap().trim_start_matches("data: ")).unwrap()
    };
    let id = data("queued")["id"].as_str().unwrap().to_owned();
    server.until_state(&id, "running");
    assert_eq!(server.delete(&format!("/generations/{id}")).status, 200);
    let problem = data("cancelled");
    assert_eq!(problem["type"], "urn:problem-type:diffusion-sharpening:cancelled");
    assert_eq!(problem["status"], 409);
    assert_eq!(server.get(&format!("/generations/{id}/events")).status, 200, "kept for a while");
}
