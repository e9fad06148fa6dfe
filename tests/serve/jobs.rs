//! Generations that are done later, watched, cancelled, repeated, and taken up
//! again after a restart.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::path::Path;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use diffusion_sharpening::bench::remote::RemoteBackend;
use diffusion_sharpening::bench::reproduce::{self, Likeness};
use diffusion_sharpening::engine::CancelToken;
use diffusion_sharpening::engine::bundle::Bundle;
use serde_json::{Value, json};

use crate::fake::Fake;
use crate::harness::{Server, server, server_with, settings, settings_in, until};
use crate::program::Process;

fn running(server: &Server) -> f64 {
    server.metric("ds_generations_running")
}

fn keys(value: &Value) -> Vec<&str> {
    value.as_object().unwrap().keys().map(String::as_str).collect()
}

#[test]
fn work_for_later_is_accepted_and_found_under_its_id() {
    let server = server();
    let body = json!({"prompt": "wait", "steps": 3, "seed": 5});
    let answer = server.send("POST", "/generate", &[("prefer", "respond-async, wait=9")], &body);
    assert_eq!(answer.status, 202);
    let id = answer.json()["id"].as_str().unwrap().to_owned();
    assert_eq!(answer.header("location"), format!("/generations/{id}"));
    assert_eq!(answer.header("preference-applied"), "respond-async");
    assert_eq!(answer.header("x-request-id"), id);
    server.until("stepped", |s| s.status(&id)["spent_f"] == 2);
    let status = server.until_state(&id, "running");
    assert_eq!(
        keys(&status),
        [
            "id",
            "state",
            "created_ms",
            "started_ms",
            "planned",
            "spent_f",
            "request",
            "resolved",
            "links"
        ]
    );
    let behind = server.post_async(&json!({"prompt": "b", "steps": 2}));
    let status = server.status(&behind);
    assert_eq!(status["state"], "queued");
    assert_eq!(status["ahead"]["position"], 0);
    assert_eq!(status["ahead"]["f"], 4, "what is left of the first one");
    assert!(status["ahead"]["seconds"].is_number());
    server.fake.gate.open();
    let status = server.until_state(&id, "completed");
    assert_eq!(status["request"]["seed"], 5);
    let result = &status["result"];
    assert_eq!(keys(result), ["id", "images", "cost", "resolved", "model", "trace"]);
    let image = &result["images"][0];
    assert_eq!(keys(image), ["url", "format", "seed", "scores"]);
    let file = server.get(image["url"].as_str().unwrap());
    assert_eq!((file.status, file.header("content-type")), (200, "image/png"));
    assert!(file.header("cache-control").contains("immutable"));
    assert_eq!(image::load_from_memory(&file.bytes).unwrap().width(), 64);
    // The same picture as at once.
    let now = server.post(body).json();
    assert_eq!(now["images"][0]["url"], image["url"]);
}

#[test]
fn work_for_later_fails_with_its_reason() {
    let server = server();
    for (prompt, kind) in
        [("broken", "internal"), ("crowded", "out-of-memory"), ("panic", "internal")]
    {
        let id = server.post_async(&json!({"prompt": prompt, "steps": 1}));
        let status = server.until_state(&id, "failed");
        let slug = status["problem"]["type"].as_str().unwrap().rsplit(':').next();
        assert_eq!(slug, Some(kind));
        assert!(!status["problem"]["detail"].as_str().unwrap().contains("/a/path"));
    }
    let refused = server.send(
        "POST",
        "/generate",
        &[("prefer", "respond-async")],
        &json!({"prompt": "a", "method": "nonsense"}),
    );
    assert_eq!(refused.problem(422).0, "unknown-name");
}

/// Events as (id, name, data), to the end of the stream.
pub fn parse(text: &str) -> Vec<(u64, String, Value)> {
    let mut events = Vec::new();
    for block in text.split("\n\n") {
        let field = |name: &str| block.lines().find_map(|l| l.strip_prefix(name));
        let Some(data) = field("data: ") else { continue };
        events.push((
            field("id: ").unwrap().parse().unwrap(),
            field("event: ").unwrap().to_owned(),
            serde_json::from_str(data).unwrap(),
        ));
    }
    events
}

fn names(events: &[(u64, String, Value)]) -> Vec<&str> {
    events.iter().map(|(_, name, _)| name.as_str()).collect()
}

#[test]
fn a_stream_tells_every_step_and_the_end() {
    let server = server();
    let answer = server.send(
        "POST",
        "/generate",
        &[("accept", "text/event-stream")],
        &json!({"prompt": "a", "steps": 3}),
    );
    assert_eq!(answer.status, 200);
    assert_eq!(answer.header("content-type"), "text/event-stream");
    assert_eq!(answer.header("x-accel-buffering"), "no");
    let events = parse(answer.text());
    let expected = ["queued", "started", "step", "decision", "step", "step", "completed"];
    assert_eq!(names(&events), expected);
    assert!(events.iter().enumerate().all(|(i, (id, ..))| *id == i as u64 + 1));
    assert_eq!(
        events[2].2,
        json!({"spent": {"f": 2, "v": 0, "y": 0}, "planned": {"f": 6, "v": 1, "y": 1}})
    );
    let id = events[0].2["id"].as_str().unwrap();
    assert_eq!(events[6].2, server.status(id)["result"]);
    // Whoever comes back gets what is missing, and then nothing more.
    let path = format!("/generations/{id}/events");
    assert_eq!(parse(server.get(&path).text()), events);
    let rest = server.get_with(&path, ("last-event-id", "5"));
    assert_eq!(parse(rest.text()), events[5..]);
    assert_eq!(server.get_with(&path, ("last-event-id", "7")).status, 204);
    server.get_with(&path, ("last-event-id", "x")).problem(400);
    server.get("/generations/nobody/events").problem(404);
    // A refusal is a problem, not a stream.
    let refused = server.send(
        "POST",
        "/generate",
        &[("accept", "text/event-stream")],
        &json!({"prompt": ""}),
    );
    refused.problem(422);
}

/// Where else would it be found?
#[test]
fn a_stream_has_the_images_that_could_not_be_stored() {
    let settings = settings();
    let images = settings.data.join("images");
    let server = server_with(settings, Fake::default());
    std::fs::remove_dir_all(&images).unwrap();
    std::fs::write(&images, "no folder").unwrap();
    let body = json!({"prompt": "a", "steps": 2, "n": 2});
    let answer = server
        .send("POST", "/generate", &[("accept", "text/event-stream")], &body)
        .text()
        .to_owned();
    let events = parse(&answer);
    let (_, name, streamed) = events.last().unwrap();
    assert_eq!(name, "completed");
    let answered = server.post(body.clone()).json();
    for result in [streamed, &answered] {
        let images = result["images"].as_array().unwrap();
        assert_eq!(images.len(), 2);
        for image in images {
            assert_eq!(image["url"], Value::Null);
            let bytes = STANDARD.decode(image["data"].as_str().unwrap()).unwrap();
            assert_eq!(image::load_from_memory(&bytes).unwrap().width(), 64);
        }
    }
    // What was to last has failed.
    assert_eq!(server.put("kept", &body).problem(500).0, "internal");
}

fn open_events(server: &Server, prompt: &str) -> BufReader<TcpStream> {
    let mut stream = TcpStream::connect(server.address()).unwrap();
    let body = json!({"prompt": prompt, "steps": 3}).to_string();
    write!(
        stream,
        "POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\
         Accept: text/event-stream\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
    .unwrap();
    BufReader::new(stream)
}

#[test]
fn a_quiet_stream_has_heartbeats_and_a_listener_who_leaves_is_noticed() {
    let server = server();
    let mut stream = open_events(&server, "wait");
    let mut line = String::new();
    while line.trim_end() != ":" {
        line.clear();
        assert!(stream.read_line(&mut line).unwrap() > 0, "the stream ended");
    }
    assert_eq!(running(&server), 1.0);
    // Its events say its id, under which it is found though it is not in the history yet.
    let mut line = String::new();
    let mut again = open_events(&server, "wait again");
    while !line.starts_with("data: ") {
        line.clear();
        assert!(again.read_line(&mut line).unwrap() > 0);
    }
    let queued: Value = serde_json::from_str(line.trim_start_matches("data: ")).unwrap();
    let id = queued["id"].as_str().unwrap();
    let status = server.status(id);
    assert_eq!((&status["state"], &status["ahead"]["position"]), (&json!("queued"), &json!(0)));
    // It cannot be forgotten before it has ended.
    assert_eq!(server.delete(&format!("/history/{id}")).problem(409).0, "conflict");
    assert_eq!(server.delete(&format!("/generations/{id}")).status, 200);
    let status = server.status(id);
    assert_eq!(
        (&status["state"], &status["problem"]["status"]),
        (&json!("cancelled"), &json!(409))
    );
    server.delete(&format!("/history/{id}")).problem(404);
    drop(stream);
    server.until("cancelled", |s| running(s) == 0.0);
    assert_eq!(*server.fake.cancelled.lock().unwrap(), ["wait"]);
}

#[test]
fn a_watcher_who_leaves_stops_nothing() {
    let server = server();
    let id = server.post_async(&json!({"prompt": "wait", "steps": 3}));
    server.until_state(&id, "running");
    let mut stream = TcpStream::connect(server.address()).unwrap();
    write!(stream, "GET /generations/{id}/events HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
    let mut lines = BufReader::new(&stream).lines();
    assert!(lines.any(|line| line.unwrap() == "event: started"));
    drop(stream);
    server.fake.gate.open();
    server.until_state(&id, "completed");
}

#[test]
fn a_put_is_done_once_however_often_it_is_sent() {
    let server = server();
    let body = json!({"prompt": "a", "steps": 2, "seed": 3});
    let first = server.put("my-id_1.x", &body);
    assert_eq!(first.status, 200, "{}", first.text());
    assert_eq!(first.json()["id"], "my-id_1.x");
    let again = server.put("my-id_1.x", &body);
    assert_eq!(again.json(), first.json(), "with the images' bytes");
    assert!(first.json()["images"][0]["data"].is_string());
    let later = server.send("PUT", "/generations/my-id_1.x", &[("prefer", "respond-async")], &body);
    assert_eq!((later.status, later.json()["state"].as_str()), (200, Some("completed")));
    assert_eq!(server.fake.finished.lock().unwrap().iter().filter(|p| *p == "a").count(), 1);
    let other = server.put("my-id_1.x", &json!({"prompt": "b", "steps": 2, "seed": 3}));
    assert_eq!(other.problem(409).0, "conflict");
    let long = "x".repeat(65);
    for id in ["-a", "a%2Fb", "..", "a%00", &long, "a%20b", "%C3%A9"] {
        let answer = server.put(id, &body);
        assert!([404, 422].contains(&answer.status), "{id}: {}", answer.status);
    }
    server.put("z", &json!({"prompt": "a", "steps": 0})).problem(422);
    server.get("/generations/z").problem(404);
}

#[test]
fn puts_at_the_same_time_share_one_generation() {
    let server = server();
    let body = json!({"prompt": "wait", "steps": 2});
    std::thread::scope(|scope| {
        let puts: Vec<_> = (0..4).map(|_| scope.spawn(|| server.put("same", &body))).collect();
        server.until("all there", |s| s.metric("ds_http_requests_in_flight") >= 5.0);
        server.until("running", |s| running(s) == 1.0);
        server.fake.gate.open();
        let answers: Vec<_> = puts.into_iter().map(|p| p.join().unwrap().json()).collect();
        assert!(answers.iter().all(|a| *a == answers[0] && a["images"][0]["data"].is_string()));
    });
    assert_eq!(server.fake.finished.lock().unwrap().iter().filter(|p| *p == "wait").count(), 1);
}

#[test]
fn deleting_cancels_what_waits_and_what_runs() {
    let server = server();
    let first = server.post_async(&json!({"prompt": "wait 1", "steps": 3}));
    server.until_state(&first, "running");
    let second = server.post_async(&json!({"prompt": "wait 2", "steps": 3}));
    let third = server.later(json!({"prompt": "wait 3", "steps": 3}));
    server.until("waiting", |s| s.metric("ds_queue_depth") == 2.0);
    for id in [&second, &first] {
        let answer = server.delete(&format!("/generations/{id}"));
        assert_eq!((answer.status, answer.json()["state"].as_str()), (200, Some("cancelled")));
        let status = server.status(id);
        assert_eq!(status["state"], "cancelled");
        assert!(status["problem"]["type"].as_str().unwrap().ends_with(":cancelled"));
        assert_eq!(server.delete(&format!("/generations/{id}")).problem(409).0, "conflict");
    }
    // What others wait for goes on.
    server.until("running", |s| running(s) == 1.0);
    server.fake.gate.open();
    assert_eq!(third.join().unwrap().status, 200);
    assert_eq!(*server.fake.cancelled.lock().unwrap(), ["wait 1"]);
    server.delete("/generations/nobody").problem(404);
    let done = server.post(json!({"prompt": "a", "steps": 1})).json();
    let path = format!("/generations/{}", done["id"].as_str().unwrap());
    assert_eq!(server.delete(&path).problem(409).0, "conflict");
}

#[test]
fn the_history_is_listed_searched_and_forgotten() {
    let server = server();
    for (prompt, method) in [("a red circle", "plain"), ("Blue 100%", "plain"), ("c", "best-of-n")]
    {
        assert_eq!(
            server.post(json!({"prompt": prompt, "method": method, "steps": 1})).status,
            200
        );
    }
    let list = |query: &str| {
        let answer = server.get(&format!("/generations{query}"));
        assert_eq!(answer.status, 200, "{}", answer.text());
        answer.json()
    };
    let prompts = |list: &Value| -> Vec<String> {
        let items = list["generations"].as_array().unwrap().iter();
        items.map(|g| g["prompt"].as_str().unwrap().to_owned()).collect()
    };
    let all = list("");
    assert_eq!(prompts(&all), ["c", "Blue 100%", "a red circle"]);
    assert_eq!(all["next"], Value::Null);
    let item = &all["generations"][0];
    assert_eq!(item["method"]["name"], "best-of-n");
    assert_eq!(item["actual"]["f"], 8);
    assert!(item["images"][0]["url"].is_string());
    let page = list("?limit=2");
    assert_eq!(prompts(&page), ["c", "Blue 100%"]);
    let next = page["next"].as_str().unwrap();
    assert_eq!(prompts(&list(&format!("?limit=2&before={next}"))), ["a red circle"]);
    assert_eq!(prompts(&list("?q=RED")), ["a red circle"]);
    assert_eq!(prompts(&list("?q=100%25")), ["Blue 100%"]);
    assert_eq!(prompts(&list("?method=best-of-n&state=completed&model=tiny")), ["c"]);
    assert!(prompts(&list("?state=failed")).is_empty());
    for query in ["?limit=0", "?limit=201", "?before=x", "?before=1"] {
        server.get(&format!("/generations{query}")).problem(422);
    }
    for query in ["state=x", "limit=x", "nothing=1", "q=a&q=b"] {
        let (kind, body) = server.get(&format!("/generations?{query}")).problem(400);
        assert_eq!(kind, "invalid-query");
        assert_eq!(body["field"], query.split('=').next().unwrap(), "{body}");
    }
    let id = item["id"].as_str().unwrap();
    let url = item["images"][0]["url"].as_str().unwrap();
    assert_eq!(server.delete(&format!("/history/{id}")).status, 204);
    server.get(&format!("/generations/{id}")).problem(404);
    server.get(&format!("/generations/{id}/events")).problem(404);
    server.get(url).problem(404);
    server.delete(&format!("/history/{id}")).problem(404);
    for name in ["x", "..", "..%2f..%2fhistory.sqlite", &format!("{}.png", "0".repeat(64))] {
        server.get(&format!("/images/{name}")).problem(404);
    }
}

#[test]
fn work_that_is_under_way_is_not_forgotten() {
    let server = server();
    let id = server.post_async(&json!({"prompt": "wait", "steps": 3}));
    server.until_state(&id, "running");
    assert_eq!(server.delete(&format!("/history/{id}")).problem(409).0, "conflict");
}

#[test]
fn an_estimate_says_cost_and_time_and_runs_nothing() {
    let server = server();
    let query = "?prompt=a%20red%20circle&steps=10&method=%7B%22name%22%3A%22best-of-n%22%2C%22candidates%22%3A3%7D";
    let answer = server.get(&format!("/estimate{query}"));
    assert_eq!(answer.status, 200, "{}", answer.text());
    let body = answer.json();
    assert_eq!(body["planned"], json!({"f": 60, "v": 3, "y": 3}));
    assert_eq!(body["ahead"]["position"], 0);
    assert_eq!(body["ahead"]["f"], 0);
    assert!(body["seconds"].as_f64().unwrap() >= 0.0);
    assert_eq!(body["resolved"]["prompt"], "a red circle");
    assert_eq!(server.fake.finished.lock().unwrap().len(), 1, "only the warm-up");
    server.get("/estimate").problem(400);
    server.get("/estimate?prompt=a&prompt=b").problem(400);
    server.get("/estimate?prompt=a&stps=3").problem(400);
    server.get("/estimate?prompt=a&method=plan").problem(422);
    // A name, whatever it looks like.
    for name in ["0", "null", "%22plain%22", "[]"] {
        let refused = server.get(&format!("/estimate?prompt=a&method={name}"));
        assert_eq!(refused.problem(422).0, "unknown-name");
    }
    server.get("/estimate?prompt=a&method=%7B%22name%22").problem(422);
    server.get("/estimate?prompt=a&method=%7B%22name%22%3A0%7D").problem(400);
    assert_eq!(server.get("/estimate?prompt=12&method=plain&budget=40").status, 200);
}

#[test]
fn an_ending_server_leaves_accepted_work_to_the_next() {
    let folder = tempfile::tempdir().unwrap();
    let settings =
        || diffusion_sharpening::serve::Settings { drain_seconds: 0, ..settings_in(folder.path()) };
    let first = server_with(settings(), Fake::default());
    let ids: Vec<_> = (0..3)
        .map(|i| first.post_async(&json!({"prompt": format!("wait {i}"), "steps": 3})))
        .collect();
    first.until_state(&ids[0], "running");
    let body = json!({"prompt": "put", "steps": 3});
    let put = std::thread::scope(|scope| {
        let put = scope.spawn(|| first.put("put", &body));
        first.until("waiting", |s| s.metric("ds_queue_depth") == 3.0);
        first.stopper.stop();
        put.join().unwrap()
    });
    let (kind, body) = put.problem(503);
    assert_eq!(kind, "draining");
    assert!(body["detail"].as_str().unwrap().contains("goes on"), "{body}");
    let fake = first.fake.clone();
    first.ended().unwrap();
    assert_eq!(*fake.cancelled.lock().unwrap(), ["wait 0"]);
    let second = server_with(settings(), Fake::default());
    second.fake.gate.open();
    for id in ids.iter().map(String::as_str).chain(["put"]) {
        let status = second.until_state(id, "completed");
        assert!(status["result"]["images"][0]["url"].is_string());
    }
    // The seed that was chosen first is kept.
    let chosen = second.status(&ids[0])["resolved"]["seed"].clone();
    assert_eq!(second.status(&ids[0])["result"]["images"][0]["seed"], chosen);
    let finished = second.fake.finished.lock().unwrap().clone();
    assert_eq!(finished[1..], ["wait 0", "wait 1", "wait 2", "put"]);
}

fn process(data: &Path, step_ms: &str) -> Process {
    let step = OsStr::new(step_ms);
    Process::start_with(&[("FAKE_DATA", data.as_os_str()), ("FAKE_STEP_MS", step)])
}

fn send_async(process: &Process, prompt: &str) -> Option<String> {
    let request = ureq::post(format!("{}/generate", process.url))
        .header("content-type", "application/json")
        .header("prefer", "respond-async");
    let body = json!({"prompt": prompt, "steps": 1}).to_string();
    let mut answer = request.send(body).ok().filter(|a| a.status().as_u16() == 202)?;
    let status: Value = serde_json::from_str(&answer.body_mut().read_to_string().ok()?).ok()?;
    Some(status["id"].as_str()?.to_owned())
}

fn status_of(process: &Process, id: &str) -> Value {
    let answer = ureq::get(format!("{}/generations/{id}", process.url)).call().unwrap();
    serde_json::from_str(&answer.into_body().read_to_string().unwrap()).unwrap()
}

#[test]
fn nothing_accepted_is_lost_when_the_process_is_killed() {
    const JOBS: usize = 200;
    let folder = tempfile::tempdir().unwrap();
    let mut ids: Vec<String> = Vec::new();
    // Killed four times, while it accepts, runs and stores.
    for round in 1..=4 {
        let mut process = process(folder.path(), "8");
        while ids.len() < JOBS * round / 4 {
            let id = send_async(&process, &format!("job {}", ids.len())).expect("accepted");
            ids.push(id);
        }
        process.child.kill().unwrap();
        process.child.wait().unwrap();
    }
    // As if it had been killed between an image and its row, and in the middle of an image.
    let orphan = folder.path().join("images/00").join(format!("{}.png", "0".repeat(64)));
    std::fs::create_dir_all(orphan.parent().unwrap()).unwrap();
    std::fs::write(&orphan, "x").unwrap();
    let temporary = orphan.with_file_name(".tmpAbCdEf");
    std::fs::write(&temporary, "x").unwrap();
    let process = process(folder.path(), "0");
    assert!(!orphan.exists() && !temporary.exists());
    for (number, id) in ids.iter().enumerate() {
        until("completed", || status_of(&process, id)["state"] == "completed");
        let status = status_of(&process, id);
        assert_eq!(status["request"]["prompt"], format!("job {number}"));
        let url = status["result"]["images"][0]["url"].as_str().unwrap().to_owned();
        assert!(ureq::get(format!("{}{url}", process.url)).call().is_ok());
    }
    // None is there twice: the server knows as many as were accepted.
    let mut known = std::collections::BTreeSet::new();
    let mut before = String::new();
    loop {
        let url = format!("{}/generations?limit=200&state=completed{before}", process.url);
        let text = ureq::get(url).call().unwrap().into_body().read_to_string().unwrap();
        let page: Value = serde_json::from_str(&text).unwrap();
        for item in page["generations"].as_array().unwrap() {
            assert!(known.insert(item["id"].as_str().unwrap().to_owned()));
        }
        let Some(next) = page["next"].as_str() else { break };
        before = format!("&before={next}");
    }
    assert_eq!(known, ids.into_iter().collect());
}

#[test]
fn work_that_ends_the_process_each_time_is_given_up() {
    let folder = tempfile::tempdir().unwrap();
    let id = "deadly";
    let mut first = process(folder.path(), "0");
    // The process ends before or after it has answered.
    let _ = ureq::put(format!("{}/generations/{id}", first.url))
        .header("content-type", "application/json")
        .send(json!({"prompt": "deadly", "steps": 1}).to_string());
    first.child.wait().unwrap();
    for _ in 0..2 {
        // It begins with it as soon as it is ready, and ends.
        let mut child = Process::spawn(&[("FAKE_DATA", folder.path().as_os_str())]);
        child.wait().unwrap();
    }
    let last = process(folder.path(), "0");
    let status = status_of(&last, id);
    assert_eq!(status["state"], "failed");
    assert!(status["problem"]["detail"].as_str().unwrap().contains("3 times"), "{status}");
}

#[test]
fn settings_of_the_history_are_used() {
    let server = server_with(
        diffusion_sharpening::serve::Settings { keep: 2, ..settings() },
        Fake::default(),
    );
    for i in 0..4 {
        assert_eq!(server.post(json!({"prompt": format!("p{i}"), "steps": 1})).status, 200);
    }
    let list = server.get("/generations").json();
    let prompts: Vec<_> =
        list["generations"].as_array().unwrap().iter().map(|g| g["prompt"].clone()).collect();
    assert_eq!(prompts, ["p3", "p2"]);
}

#[test]
fn a_bundle_has_everything_to_run_it_again() {
    let server = server();
    let body = json!({
        "prompt": "a", "steps": 2, "n": 2, "seed": 3, "digests": true, "previews": 3,
    });
    let answer = server.post(body).json();
    let id = answer["id"].as_str().unwrap();
    let archive = server.get(&format!("/generations/{id}/bundle"));
    assert_eq!((archive.status, archive.header("content-type")), (200, "application/x-tar"));
    assert!(archive.header("content-disposition").contains(&format!("{id}.tar")));
    let bundle = Bundle::read(&archive.bytes[..]).unwrap();
    assert_eq!(bundle.manifest.id, id);
    assert_eq!(bundle.manifest.resolved.seed, 3);
    assert_eq!((bundle.images.len(), bundle.previews.len()), (2, 3));
    let replay = |seed: u64, sha256: &str| {
        let mut other = bundle.clone();
        other.manifest.resolved.seed = seed;
        other.manifest.model.sha256 = sha256.to_owned();
        reproduce::replay(&other, server.fake.as_ref(), 2, &CancelToken::default())
    };
    let sha256 = bundle.manifest.model.sha256.clone();
    let same = replay(3, &sha256).unwrap();
    assert_eq!(same.images, [Likeness::Equal, Likeness::Equal]);
    assert_eq!(same.parted, [None]);
    assert!(same.is_same());
    let other = replay(4, &sha256).unwrap();
    assert!(!other.is_same() && matches!(other.images[0], Likeness::Different(..)));
    assert!(replay(3, "0000").unwrap_err().to_string().contains("other weights"));
    // Over HTTP it is the same.
    let remote = RemoteBackend::connect(&server.url, None).unwrap();
    let over = reproduce::replay(&bundle, &remote, 2, &CancelToken::default()).unwrap();
    assert_eq!(over, same);
    server.get("/generations/nobody/bundle").problem(404);
    let waiting = server.post_async(&json!({"prompt": "wait", "steps": 2}));
    server.get(&format!("/generations/{waiting}/bundle")).problem(409);
}

#[test]
fn previews_are_events_and_stay_with_the_result() {
    let server = server();
    let body = json!({"prompt": "a", "steps": 9, "previews": 3});
    let answer = server.send("PUT", "/generations/seen", &[("accept", "text/event-stream")], &body);
    let events: Vec<Value> = answer
        .text()
        .split("\n\n")
        .filter(|block| block.contains("event: preview\n"))
        .map(|block| serde_json::from_str(block.split("data: ").nth(1).unwrap()).unwrap())
        .collect();
    assert_eq!(events.len(), 3);
    let result = server.get("/generations/seen").json()["result"].clone();
    let trace = result["trace"].as_array().unwrap().clone();
    let kept: Vec<&Value> = trace.iter().filter(|e| e["preview"].is_object()).collect();
    assert_eq!(kept.len(), 3);
    for (event, kept) in events.iter().zip(&kept) {
        for field in ["f", "of", "t", "scores"] {
            assert_eq!(event["preview"][field], kept["preview"][field]);
        }
        let url = kept["preview"]["url"].as_str().unwrap();
        let file = server.get(url);
        assert_eq!((file.status, file.header("content-type")), (200, "image/png"));
        assert_eq!(event["preview"]["data"], STANDARD.encode(&file.bytes));
        assert!(kept["preview"].get("data").is_none());
    }
    assert_eq!(result["images"].as_array().unwrap().len(), 1);
    assert_eq!(server.get("/generations/seen/bundle").status, 200);
    let urls: Vec<&str> = kept.iter().map(|e| e["preview"]["url"].as_str().unwrap()).collect();
    assert_eq!(server.delete("/history/seen").status, 204);
    for url in urls {
        assert_eq!(server.get(url).status, 404);
    }
}

#[test]
fn what_was_cancelled_is_not_begun_again_by_the_next() {
    let folder = tempfile::tempdir().unwrap();
    // A step that outlasts the server's patience.
    let variables = [("FAKE_STEP_MS", "6000"), ("FAKE_DRAIN_SECONDS", "0")];
    let variables = variables.map(|(name, value)| (name, OsStr::new(value)));
    let data = ("FAKE_DATA", folder.path().as_os_str());
    let mut process = Process::start_with(&[&variables[..], &[data]].concat());
    let ids = ["cancelled", "wanted"].map(|prompt| send_async(&process, prompt).unwrap());
    until("running", || status_of(&process, &ids[0])["state"] == "running");
    let cancelling = {
        let url = format!("{}/generations/{}", process.url, ids[0]);
        std::thread::spawn(move || ureq::delete(url).call())
    };
    // Nothing says that it has been told; the step goes on for long enough.
    std::thread::sleep(Duration::from_secs(1));
    process.signal("-TERM");
    assert_eq!(cancelling.join().unwrap().unwrap().status(), 200);
    assert!(process.child.wait().unwrap().success());
    let second = server_with(settings_in(folder.path()), Fake::default());
    second.until_state(&ids[1], "completed");
    assert_eq!(second.status(&ids[0])["state"], "cancelled");
}
