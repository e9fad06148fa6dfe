//! Models and adapters that come and go.

use std::sync::atomic::Ordering;

use serde_json::{Value, json};

use crate::harness::server;

#[test]
fn models_are_unloaded_and_loaded() {
    let server = server();
    let listed = || {
        let listing = server.get("/models").json();
        let ids = listing["models"].as_array().unwrap().iter().map(|m| m["id"].clone());
        (ids.collect::<Vec<Value>>(), listing["unloaded"].clone())
    };
    let on_second = json!({"prompt": "a", "model": "second", "steps": 1});
    assert_eq!(listed(), (vec![json!("tiny"), json!("second")], json!([])));
    assert_eq!(server.delete("/models/second").status, 204);
    assert_eq!(listed(), (vec![json!("tiny")], json!(["second"])));
    assert_eq!(server.post(on_second.clone()).problem(422).1["field"], "model");
    let made = server.fake.finished.lock().unwrap().len();
    let loaded = server.send("PUT", "/models/second", &[], &Value::Null);
    assert_eq!((loaded.status, loaded.json()["id"].clone()), (200, json!("second")));
    assert_eq!(server.fake.finished.lock().unwrap().len(), made + 1, "it made a first image");
    assert_eq!(server.post(on_second).status, 200);
    // One that cannot make an image is not served, and what was there is.
    server.fake.unfit.store(true, Ordering::Relaxed);
    let unfit = server.send("PUT", "/models/second", &[], &Value::Null);
    assert!(unfit.problem(422).1["detail"].as_str().unwrap().contains("not finite"));
    assert_eq!(listed(), (vec![json!("tiny"), json!("second")], json!([])));
    assert_eq!(server.metric("ds_model_ready{model=\"second\"}"), 1.0);
    let unknown = server.send("PUT", "/models/third", &[], &Value::Null);
    assert_eq!(unknown.problem(404).0, "not-found");
    let broken = server.send("PUT", "/models/broken", &[], &Value::Null);
    assert!(broken.problem(422).1["detail"].as_str().unwrap().contains("no weights"));
    assert_eq!(server.get("/models/second").problem(405).0, "method-not-allowed");
    let outside = server.send("PUT", "/models/..%2Fsecond", &[], &Value::Null);
    assert_eq!(outside.problem(404).0, "not-found");
}

#[test]
fn adapters_are_unloaded_and_loaded() {
    let server = server();
    let adapted = json!({"prompt": "a", "adapter": "sharpened", "steps": 1});
    let path = "/models/tiny/adapters/sharpened";
    assert_eq!(server.delete(path).status, 204);
    assert_eq!(server.get("/models").json()["models"][0]["adapters"], json!([]));
    assert_eq!(server.post(adapted.clone()).problem(422).1["field"], "adapter");
    assert_eq!(server.send("PUT", path, &[], &Value::Null).status, 204);
    assert_eq!(server.post(adapted).status, 200);
    let unknown = server.send("PUT", "/models/tiny/adapters/other", &[], &Value::Null);
    assert_eq!(unknown.problem(404).0, "not-found");
}

#[test]
fn arms_of_a_comparison_do_not_go_with_others() {
    let server = server();
    let body = json!({"base": {"prompt": "a", "steps": 1}, "arms": [{}, {"alone": false}]});
    let answer = server.send("POST", "/compare", &[], &body).json();
    assert_eq!(answer["arms"][0]["result"]["resolved"]["alone"], true);
    assert_eq!(answer["arms"][1]["result"]["resolved"].get("alone"), None);
}
