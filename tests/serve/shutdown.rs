//! Signals in the middle of work, and what the next process makes of it.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};

use crate::harness::until;
use crate::program::Process;

/// What clients were told.
#[derive(Default)]
struct Told {
    /// Statuses, each with its problem's type.
    answers: Mutex<BTreeSet<(u16, String)>>,
    /// Ids whose work must not be lost.
    accepted: Mutex<BTreeSet<String>>,
    /// Last events of streams.
    ends: Mutex<BTreeSet<String>>,
    count: AtomicUsize,
    /// The server has been signalled.
    signalled: AtomicBool,
    /// Requests of before the signal that got no answer.
    lost: AtomicUsize,
}

#[derive(Clone, Copy)]
enum Kind {
    Now,
    Later,
    Events,
    Put,
}

fn agent() -> ureq::Agent {
    let config = ureq::Agent::config_builder().http_status_as_error(false);
    config.timeout_global(Some(Duration::from_secs(60))).build().into()
}

impl Told {
    /// Asks again and again until there is no server any more.
    fn keep_asking(&self, url: &str, kind: Kind, client: &str) {
        let agent = agent();
        for turn in 0.. {
            let late = self.signalled.load(Ordering::Relaxed);
            if !self.ask(&agent, url, kind, &format!("{client}.{turn}")) {
                self.lost.fetch_add(usize::from(!late), Ordering::Relaxed);
                return;
            }
            if matches!(kind, Kind::Later) {
                // Leaves the others a place in the queue.
                thread::sleep(Duration::from_millis(30));
            }
        }
    }

    /// One request. False when there is no answer.
    fn ask(&self, agent: &ureq::Agent, url: &str, kind: Kind, name: &str) -> bool {
        let body = json!({"prompt": name, "steps": 2}).to_string();
        let request = match kind {
            Kind::Put => agent.put(format!("{url}/generations/{name}")),
            _ => agent.post(format!("{url}/generate")),
        };
        let request = request.header("content-type", "application/json");
        let request = match kind {
            Kind::Later => request.header("prefer", "respond-async"),
            Kind::Events => request.header("accept", "text/event-stream"),
            _ => request,
        };
        let Ok(answer) = request.send(body) else { return false };
        let status = answer.status().as_u16();
        self.count.fetch_add(1, Ordering::Relaxed);
        if matches!(kind, Kind::Events) && status == 200 {
            let lines = BufReader::new(answer.into_body().into_reader()).lines();
            let mut last = String::new();
            for line in lines.map_while(Result::ok) {
                if let Some(event) = line.strip_prefix("event: ") {
                    event.clone_into(&mut last);
                }
            }
            self.ends.lock().unwrap().insert(last);
            return true;
        }
        let Ok(text) = answer.into_body().read_to_string() else { return false };
        let body: Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"));
        let problem = body["type"].as_str().and_then(|t| t.rsplit(':').next()).unwrap_or("");
        self.answers.lock().unwrap().insert((status, problem.to_owned()));
        match (kind, status) {
            (Kind::Later, 202) => {
                let id = body["id"].as_str().unwrap().to_owned();
                self.accepted.lock().unwrap().insert(id);
            }
            // A PUT that waited until the end of the process was accepted.
            (Kind::Put, 200) => drop(self.accepted.lock().unwrap().insert(name.to_owned())),
            (Kind::Put, 503) if text.contains("goes on") => {
                self.accepted.lock().unwrap().insert(name.to_owned());
            }
            _ => {}
        }
        true
    }
}

fn start(data: &Path) -> Process {
    let step = OsStr::new("3");
    Process::start_with(&[("FAKE_DATA", data.as_os_str()), ("FAKE_STEP_MS", step)])
}

/// Signals a server that many clients are using; its exit status.
fn under_load(data: &Path, told: &Told, signals: usize) -> Option<i32> {
    let mut process = start(data);
    let url = process.url.clone();
    thread::scope(|scope| {
        let kinds = [Kind::Now, Kind::Later, Kind::Events, Kind::Put].into_iter().cycle();
        for (number, kind) in kinds.take(8).enumerate() {
            let url = &url;
            scope.spawn(move || told.keep_asking(url, kind, &format!("{signals}.{number}")));
        }
        until("busy", || told.count.load(Ordering::Relaxed) > 100);
        // The first signal alone waits for this for longer than the test does.
        let endless = (signals > 1).then(|| {
            let request = agent().post(format!("{url}/generate"));
            let request = request.header("content-type", "application/json");
            let request = request.header("accept", "text/event-stream");
            request.send(json!({"prompt": "wait", "steps": 2}).to_string()).unwrap()
        });
        told.signalled.store(true, Ordering::Relaxed);
        for _ in 0..signals {
            process.signal("-TERM");
            thread::sleep(Duration::from_millis(200));
        }
        drop(endless);
        process.child.wait().unwrap().code()
    })
}

fn all_are_finished(data: &Path, told: &Told) {
    let process = start(data);
    let accepted = told.accepted.lock().unwrap();
    assert!(accepted.len() > 10, "{}", accepted.len());
    for id in accepted.iter() {
        let state = || {
            let answer = agent().get(format!("{}/generations/{id}", process.url)).call().unwrap();
            assert_eq!(answer.status(), 200, "{id} is lost");
            let text = answer.into_body().read_to_string().unwrap();
            serde_json::from_str::<Value>(&text).unwrap()["state"].clone()
        };
        until("completed", || state() == "completed");
    }
}

#[cfg(unix)]
#[test]
fn a_signal_under_load_answers_everybody_and_loses_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let told = Told::default();
    assert_eq!(under_load(folder.path(), &told, 1), Some(0));
    for (status, problem) in told.answers.lock().unwrap().iter() {
        assert!(
            matches!((status, problem.as_str()), (200 | 202, "") | (503, "draining")),
            "{status} {problem}"
        );
    }
    assert_eq!(told.lost.load(Ordering::Relaxed), 0, "requests of before the signal");
    assert_eq!(*told.ends.lock().unwrap(), BTreeSet::from(["completed".to_owned()]));
    all_are_finished(folder.path(), &told);
}

#[cfg(unix)]
#[test]
fn a_second_signal_under_load_ends_at_once_and_loses_nothing_that_was_accepted() {
    let folder = tempfile::tempdir().unwrap();
    let told = Told::default();
    assert_eq!(under_load(folder.path(), &told, 2), Some(130));
    for (status, problem) in told.answers.lock().unwrap().iter() {
        assert!(
            matches!((status, problem.as_str()), (200 | 202, "") | (503, "draining")),
            "{status} {problem}"
        );
    }
    all_are_finished(folder.path(), &told);
}
