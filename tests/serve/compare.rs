//! Comparisons: one prompt and one noise, several arms.

use serde_json::{Value, json};

use crate::fake::Fake;
use crate::harness::{Server, server, server_with, settings, settings_in};
use crate::jobs::parse;

fn field(answer: &crate::harness::Answer, status: u16) -> String {
    let (_, body) = answer.problem(status);
    body["field"].as_str().unwrap_or("").to_owned()
}

#[test]
fn arms_share_prompt_and_noise_and_their_cost_is_said() {
    let server = server();
    let answer = server.compare(&json!({
        "base": {"prompt": "a red circle", "steps": 10, "n": 2},
        "arms": [
            {},
            {"method": {"name": "best-of-n"}, "label": "search"},
            {"adapter": "sharpened"},
            {"method": "plain", "steps": 5},
        ],
        "contract": {"equal_f": 90},
    }));
    assert_eq!(answer.status, 200, "{}", answer.text());
    let body = answer.json();
    assert_eq!(answer.header("location"), format!("/compare/{}", body["id"].as_str().unwrap()));
    assert_eq!(body["state"], "completed");
    assert_eq!(body["prompt"], "a red circle");
    assert_eq!(body["contract"], json!({"equal_f": 90}));
    let arms = body["arms"].as_array().unwrap();
    let labels: Vec<_> = arms.iter().map(|arm| arm["label"].as_str().unwrap()).collect();
    assert_eq!(labels, ["plain", "search", "plain@sharpened", "plain (4)"]);
    let seed = &arms[0]["result"]["resolved"]["seed"];
    for (arm, f) in arms.iter().zip([40, 160, 40, 20]) {
        assert_eq!(arm["state"], "completed");
        assert_eq!((&arm["planned"]["f"], &arm["actual"]["f"]), (&json!(f), &json!(f)));
        assert_eq!(arm["unused"], json!({"f": 180 - f}));
        assert_eq!(&arm["result"]["resolved"]["seed"], seed);
        assert_eq!(arm["result"]["resolved"]["prompt"], "a red circle");
        assert!(arm["seconds"].is_number());
        let url = arm["result"]["images"][0]["url"].as_str().unwrap();
        assert_eq!(server.get(url).status, 200);
    }
    let again = server.get(answer.header("location")).json();
    assert_eq!(again, body);
    // An arm is a generation of the history.
    let list = server.get("/generations?method=best-of-n").json();
    assert_eq!(list["generations"][0]["comparison"], body["id"]);
    let list = server.get("/compare?q=RED").json();
    assert_eq!(list["comparisons"][0]["id"], body["id"]);
    assert_eq!(list["comparisons"][0]["arms"][1]["label"], "search");
    assert!(server.get("/compare?q=blue").json()["comparisons"].as_array().unwrap().is_empty());
    server.get("/compare?model=tiny").problem(400);
}

#[test]
fn each_arm_is_told_what_is_before_it() {
    let server = server();
    let busy = server.post_async(&json!({"prompt": "wait", "steps": 5}));
    server.until("stepped", |s| s.status(&busy)["spent_f"] == 2);
    let body = json!({
        "base": {"prompt": "a", "steps": 3},
        "arms": [{}, {"method": "best-of-n"}, {"steps": 4}],
    });
    let answer = server.send("POST", "/compare", &[("prefer", "respond-async")], &body);
    assert_eq!(answer.status, 202, "{}", answer.text());
    let id = answer.json()["id"].as_str().unwrap().to_owned();
    server.fake.gate.open();
    server.until("completed", |s| s.get(&format!("/compare/{id}")).json()["state"] == "completed");
    // Eight forwards of what runs are left; then the arms, one after the other.
    for (index, (planned, before)) in [(6, 8), (24, 8 + 6), (8, 8 + 6 + 24)].into_iter().enumerate()
    {
        let events = parse(server.get(&format!("/generations/{id}.{index}/events")).text());
        let (_, name, queued) = &events[0];
        assert_eq!(name, "queued");
        assert_eq!(queued["planned"]["f"], planned);
        assert_eq!(queued["ahead"]["position"], index);
        assert_eq!(queued["ahead"]["f"], before);
    }
}

#[test]
fn an_arm_that_cannot_meet_the_contract_is_labelled() {
    let server = server();
    let arms = json!([{"steps": 10}, {"steps": 100}]);
    let ask = |f: u64| json!({"base": {"prompt": "a"}, "arms": arms, "contract": {"equal_f": f}});
    let body = server.compare(&ask(50)).json();
    assert_eq!(body["arms"][0]["state"], "completed");
    assert_eq!(body["arms"][1]["state"], "unmet");
    assert_eq!(body["arms"][1]["unmet"], "one trajectory needs 200 F, not 50");
    assert!(body["arms"][1].get("result").is_none());
    let refused = server.compare(&ask(10));
    assert_eq!(refused.problem(422).0, "budget");
    assert_eq!(field(&refused, 422), "contract");
}

#[test]
fn equal_latency_is_solved_from_what_was_measured() {
    let fake = Fake { step: std::time::Duration::from_millis(4), ..Fake::default() };
    let server = server_with(settings(), fake);
    let ask = |arms: Value| {
        server.compare(&json!({
            "base": {"prompt": "a", "steps": 5}, "arms": arms,
            "contract": {"equal_latency_ms": 2000},
        }))
    };
    // At least 4 ms for two forwards: at most a hundred trajectories of 10 forwards, and fewer
    // where other work slowed the measuring down.
    let body = ask(json!([{"method": "best-of-n"}])).json();
    let arm = &body["arms"][0];
    assert_eq!(arm["state"], "completed", "{body}");
    let (planned, f) = (arm["planned_seconds"].as_f64().unwrap(), arm["actual"]["f"].as_u64());
    assert!(planned <= 2.0 && planned > 0.02, "{arm}");
    assert!((10..=1000).contains(&f.unwrap()), "{arm}");
    assert!(arm["unused"]["ms"].is_number());
    // One size is nothing to another.
    let refused = server.compare(&json!({
        "base": {"prompt": "a", "width": 32}, "arms": [{}], "contract": {"equal_latency_ms": 100},
    }));
    assert_eq!(field(&refused, 422), "arms[0].contract");
}

#[test]
fn what_is_wrong_is_named_with_its_arm() {
    let server = server();
    let base = json!({"prompt": "a", "steps": 2});
    let ask = |base: &Value, arms: Value| server.compare(&json!({"base": base, "arms": arms}));
    for (arms, name) in [
        (json!([]), "arms"),
        (json!([{}, {"seed": 3}]), "arms[1].seed"),
        (json!([{"width": 32}]), "arms[0].width"),
        (json!([{"label": ""}]), "arms[0].label"),
        (json!([{}, {"method": "nonsense"}]), "arms[1].method"),
        (json!([{"adapter": "nonsense"}]), "arms[0].adapter"),
        (json!([{"steps": 100_000}]), "arms[0].steps"),
    ] {
        assert_eq!(field(&ask(&base, arms), 422), name);
    }
    for (arms, name) in
        [(json!([{"stps": 3}]), "arms[0].stps"), (json!([{"steps": "x"}]), "arms[0].steps")]
    {
        assert_eq!(field(&ask(&base, arms), 400), name);
    }
    assert_eq!(field(&ask(&json!({"prompt": "a", "steps": 0}), json!([{}])), 422), "base.steps");
    assert_eq!(field(&ask(&json!({"steps": 1}), json!([{}])), 400), "base.prompt");
    let budget = json!({
        "base": base, "arms": [{"budget": 3}], "contract": {"equal_f": 90},
    });
    assert_eq!(field(&server.compare(&budget), 422), "arms[0].budget");
    for body in [
        json!({"base": base}),
        json!({"base": base, "arms": [{}], "contract": 3}),
        json!({"base": base, "arms": [{}], "else": 1}),
        json!({"base": 3, "arms": [{}]}),
    ] {
        server.compare(&body).problem(400);
    }
    let contract = json!({"base": base, "arms": [{}], "contract": {"equal": 3}});
    assert_eq!(field(&server.compare(&contract), 422), "contract");
    assert!(server.get("/compare").json()["comparisons"].as_array().unwrap().is_empty());
    server.get("/compare/nobody").problem(404);
}

#[test]
fn a_comparison_is_admitted_whole_or_not() {
    let limits = diffusion_sharpening::serve::Settings { queue: 2, ..settings() };
    let server = server_with(limits, Fake::default());
    let busy = server.post_async(&json!({"prompt": "wait", "steps": 3}));
    server.until_state(&busy, "running");
    let three = json!({"base": {"prompt": "a", "steps": 1}, "arms": [{}, {}, {}]});
    assert_eq!(server.compare(&three).problem(429).0, "queue-full");
    assert_eq!(server.metric("ds_queue_depth"), 0.0);
    assert_eq!(server.get("/generations").json()["generations"].as_array().unwrap().len(), 1);
    let four = json!({"base": {"prompt": "a", "steps": 1}, "arms": [{}, {}, {}, {}]});
    assert_eq!(field(&server.compare(&four), 422), "arms");
    server.fake.gate.open();
    server.until_state(&busy, "completed");
    server.until("idle", |s| s.metric("ds_generations_running") == 0.0);
    assert_eq!(server.compare(&three).status, 200);
}

fn later(server: &Server, arms: Value) -> Value {
    let body = json!({"base": {"prompt": "wait", "steps": 3}, "arms": arms});
    let answer = server.send("POST", "/compare", &[("prefer", "respond-async")], &body);
    assert_eq!(answer.status, 202, "{}", answer.text());
    answer.json()
}

#[test]
fn a_comparison_is_cancelled_and_resumed_as_its_arms_are() {
    let folder = tempfile::tempdir().unwrap();
    let settings =
        || diffusion_sharpening::serve::Settings { drain_seconds: 0, ..settings_in(folder.path()) };
    let first = server_with(settings(), Fake::default());
    let body = later(&first, json!([{}, {"steps": 2}]));
    assert_eq!((&body["state"], &body["arms"][1]["state"]), (&json!("running"), &json!("queued")));
    let path = body["links"]["self"].as_str().unwrap().to_owned();
    first.until("running", |s| s.get(&path).json()["arms"][0]["state"] == "running");
    let gone = later(&first, json!([{}, {}]))["links"]["self"].as_str().unwrap().to_owned();
    assert_eq!(first.delete(&gone).json()["cancelled"], 2);
    first.delete(&gone).problem(409);
    let states = |server: &Server, path: &str| {
        let body = server.get(path).json();
        body["arms"].as_array().unwrap().iter().map(|a| a["state"].clone()).collect::<Vec<_>>()
    };
    assert_eq!(states(&first, &gone), ["cancelled", "cancelled"]);
    first.stopper.stop();
    first.ended().unwrap();
    let second = server_with(settings(), Fake::default());
    second.fake.gate.open();
    second.until("completed", |s| s.get(&path).json()["state"] == "completed");
    assert_eq!(states(&second, &path), ["completed", "completed"]);
    assert_eq!(states(&second, &gone), ["cancelled", "cancelled"]);
    // Forgetting its arms forgets it.
    let ids = second.get(&path).json()["arms"].as_array().unwrap().clone();
    for arm in ids {
        let id = arm["id"].as_str().unwrap();
        assert_eq!(second.delete(&format!("/history/{id}")).status, 204);
    }
    second.get(&path).problem(404);
}
