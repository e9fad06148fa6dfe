//! More work than the machine can do: some of it is refused, and the rest goes on as before.

use std::time::{Duration, Instant};

use diffusion_sharpening::serve::Settings;
use serde_json::{Value, json};

use crate::fake::Fake;
use crate::harness::{Server, server_with, settings};

/// Of a generation, on the fake's thread.
const WORK: Duration = Duration::from_millis(20);
const WAITING: usize = 4;

struct Load {
    /// Finished generations a second, while requests were sent.
    goodput: f64,
    refused: usize,
    /// Of /readyz, meanwhile.
    slowest: Duration,
}

/// Sends requests at their times, `times` as many as can be done, whether or not earlier ones
/// have ended.
fn load(server: &Server, times: f64) -> Load {
    let count = (times * 60.0) as u32;
    let (start, before) = (Instant::now(), finished(server));
    let (mut clients, mut slowest) = (Vec::new(), Duration::ZERO);
    for number in 0..count {
        let due = WORK.div_f64(times) * number;
        std::thread::sleep(due.saturating_sub(start.elapsed()));
        clients.push(server.later(json!({"prompt": "a", "steps": 2})));
        if number % 10 == 9 {
            let asked = Instant::now();
            let answer = server.get("/readyz");
            slowest = slowest.max(asked.elapsed());
            // Nothing but a full queue keeps it from being ready.
            let failing = |check: &Value| check["ok"] == false && check["name"] != "queue";
            assert!(!answer.json()["checks"].as_array().unwrap().iter().any(failing));
            // And one that the worker is about to take.
            assert!(server.metric("ds_queue_depth") <= WAITING as f64 + 1.0);
        }
    }
    let (seconds, done) = (start.elapsed().as_secs_f64(), finished(server) - before);
    let mut refused = 0;
    for client in clients {
        let answer = client.join().unwrap();
        if answer.status == 200 {
            continue;
        }
        assert_eq!(answer.problem(429).0, "queue-full");
        assert!(!answer.header("retry-after").is_empty());
        refused += 1;
    }
    Load { goodput: done / seconds, refused, slowest }
}

fn finished(server: &Server) -> f64 {
    server.fake.finished.lock().unwrap().len() as f64
}

#[test]
fn twice_the_load_is_refused_by_half_and_takes_nothing_from_the_rest() {
    // Two steps.
    let fake = Fake { step: WORK / 2, ..Fake::default() };
    let server = server_with(Settings { queue: WAITING, ..settings() }, fake);
    let mut seen = Vec::new();
    // Another program may have had the machine meanwhile.
    for _ in 0..5 {
        let (once, twice) = (load(&server, 1.0), load(&server, 2.0));
        assert!(twice.refused > 0, "nothing was refused");
        let quick = once.slowest.max(twice.slowest) < Duration::from_secs(1);
        let ratio = twice.goodput / once.goodput;
        if quick && ratio >= 0.9 {
            return;
        }
        seen.push((ratio, once.slowest, twice.slowest));
    }
    panic!("goodput at 2x to that at 1x, and the slowest /readyz: {seen:?}");
}
