//! API keys: who may do what.

use std::process::Command;

use diffusion_sharpening::bench::remote::RemoteBackend;
use diffusion_sharpening::engine::{Backend, CancelToken};
use diffusion_sharpening::serve::{Settings, auth};
use serde_json::{Value, json};

use crate::fake::Fake;
use crate::harness::{Answer, Server, server_with, settings};

struct Keyed {
    server: Server,
    alice: String,
    bob: String,
    admin: String,
    _file: tempfile::NamedTempFile,
}

fn keyed() -> Keyed {
    let (alice, a) = auth::make_key().unwrap();
    let (bob, b) = auth::make_key().unwrap();
    let (admin, c) = auth::make_key().unwrap();
    let file = tempfile::NamedTempFile::new().unwrap();
    let text = format!(
        "[[key]]\nid = \"alice\"\nsha256 = [{a:?}]\nscopes = [\"generate\"]\n\
         [[key]]\nid = \"bob\"\nsha256 = [{b:?}]\nscopes = [\"generate\"]\n\
         [[key]]\nid = \"boss\"\nsha256 = [{c:?}]\nscopes = [\"admin\"]\n"
    );
    std::fs::write(file.path(), text).unwrap();
    let settings = Settings { keys: file.path().to_path_buf(), ..settings() };
    Keyed { server: server_with(settings, Fake::default()), alice, bob, admin, _file: file }
}

impl Keyed {
    fn send(&self, key: &str, method: &str, path: &str, body: &Value) -> Answer {
        self.server.send(method, path, &[("authorization", &format!("Bearer {key}"))], body)
    }
}

#[test]
fn every_route_but_probes_and_the_page_asks_for_a_key() {
    let keyed = keyed();
    let server = &keyed.server;
    for path in
        ["/livez", "/readyz", "/startupz", "/openapi.json", "/", "/docs", "/app.js", "/style.css"]
    {
        assert_eq!(server.get(path).status, 200, "{path}");
    }
    let body = json!({"prompt": "a", "steps": 1});
    for (method, path) in [
        ("POST", "/generate"),
        ("POST", "/compare"),
        ("PUT", "/generations/a"),
        ("DELETE", "/generations/a"),
        ("DELETE", "/history/a"),
        ("PUT", "/models/tiny"),
        ("DELETE", "/models/tiny/adapters/a"),
        ("GET", "/generations"),
        ("GET", "/generations/a"),
        ("GET", "/generations/a/events"),
        ("GET", "/compare"),
        ("GET", "/compare/a/export"),
        ("GET", "/generations/a/export"),
        ("GET", "/estimate?prompt=a"),
        ("GET", "/images/a"),
        ("GET", "/models"),
        ("GET", "/methods"),
        ("GET", "/rewards"),
        ("GET", "/metrics"),
        ("GET", "/nothing"),
    ] {
        for key in ["", "wrong", &keyed.alice.to_uppercase()] {
            let body = if method == "GET" || method == "DELETE" { &Value::Null } else { &body };
            let answer = keyed.send(key, method, path, body);
            assert_eq!(answer.problem(401).0, "unauthorized", "{method} {path}");
            assert_eq!(answer.header("www-authenticate"), "Bearer");
        }
    }
    assert_eq!(server.fake.finished.lock().unwrap().len(), 1, "only the warm-up");
    assert_eq!(keyed.send(&keyed.alice, "POST", "/generate", &body).status, 200);
    let other = server.send("POST", "/generate", &[("x-api-key", &keyed.bob)], &body);
    assert_eq!(other.status, 200);
    let metrics = keyed.send(&keyed.alice, "GET", "/metrics", &Value::Null);
    assert!(metrics.text().contains("ds_rejections_total{reason=\"unauthorized\"}"));
    for key in [&keyed.alice, &keyed.bob] {
        assert_eq!(
            keyed.send(key, "DELETE", "/models/tiny", &Value::Null).problem(403).0,
            "forbidden"
        );
    }
    assert_eq!(keyed.send(&keyed.admin, "PUT", "/models/tiny", &Value::Null).status, 200);
    // Admins look after the server; they have no key to generate with.
    let refused = keyed.send(&keyed.admin, "POST", "/generate", &body);
    assert_eq!(refused.problem(403).0, "forbidden");
}

#[test]
fn each_sees_and_stops_its_own_and_admins_see_all() {
    let keyed = keyed();
    let body = json!({"prompt": "wait", "steps": 2});
    let put = |key: &str, id: &str| {
        let headers = [("x-api-key", key), ("prefer", "respond-async")];
        keyed.server.send("PUT", &format!("/generations/{id}"), &headers, &body)
    };
    assert_eq!(put(&keyed.alice, "one").status, 202);
    assert_eq!(put(&keyed.bob, "two").status, 202);
    // Whose an id is, is not told; that it is taken, is.
    assert_eq!(put(&keyed.bob, "one").problem(409).0, "conflict");
    let get = |key: &str, path: &str| keyed.send(key, "GET", path, &Value::Null);
    assert_eq!(get(&keyed.alice, "/generations/one").status, 200);
    get(&keyed.bob, "/generations/one").problem(404);
    get(&keyed.bob, "/generations/one/events").problem(404);
    keyed.send(&keyed.bob, "DELETE", "/generations/one", &Value::Null).problem(404);
    keyed.send(&keyed.bob, "DELETE", "/history/one", &Value::Null).problem(404);
    let ids = |key: &str| -> Vec<String> {
        let list = get(key, "/generations").json();
        let items = list["generations"].as_array().unwrap().iter();
        let mut ids: Vec<_> = items.map(|g| g["id"].as_str().unwrap().to_owned()).collect();
        ids.sort();
        ids
    };
    assert_eq!(ids(&keyed.alice), ["one"]);
    assert_eq!(ids(&keyed.bob), ["two"]);
    assert_eq!(ids(&keyed.admin), ["one", "two"]);
    assert_eq!(get(&keyed.admin, "/generations/one").status, 200);
    let stopped = keyed.send(&keyed.admin, "DELETE", "/generations/two", &Value::Null);
    assert_eq!(stopped.json()["state"], "cancelled");
    keyed.server.fake.gate.open();
    keyed.server.until("completed", |_| {
        get(&keyed.alice, "/generations/one").json()["state"] == "completed"
    });
    for (key, status) in [(&keyed.alice, 200), (&keyed.bob, 404), (&keyed.admin, 200)] {
        assert_eq!(get(key, "/generations/one/export").status, status);
    }
}

#[test]
fn an_unusable_file_of_keys_ends_the_start() {
    let settings = Settings { keys: "no/such/keys.toml".into(), ..settings() };
    let open = || -> diffusion_sharpening::Result<_> { panic!("not opened") };
    let error = diffusion_sharpening::serve::start(settings, open).err().unwrap().to_string();
    assert!(error.starts_with("no/such/keys.toml: "), "{error}");
}

#[test]
fn the_bench_brings_its_key() {
    let keyed = keyed();
    let url = &keyed.server.url;
    let remote = RemoteBackend::connect(url, Some(&keyed.alice)).unwrap();
    let request = serde_json::from_value(json!({"prompt": "from the bench", "steps": 1})).unwrap();
    let planned = remote.plan(&request).unwrap();
    remote.generate(&planned, &CancelToken::default(), &mut |_| {}).unwrap();
    assert_eq!(keyed.server.fake.finished.lock().unwrap()[1..], ["from the bench"]);
    for key in [None, Some("wrong")] {
        let error = RemoteBackend::connect(url, key).unwrap_err().to_string();
        assert!(error.contains("DS_API_KEY"), "{error}");
    }
    let error = RemoteBackend::connect(url, Some("a\nb")).unwrap_err().to_string();
    assert!(error.starts_with("DS_API_KEY"), "{error}");
    let program = |key: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ds-bench"));
        let options = ["--methods", "plain", "--budgets", "4", "--prompts", "1", "--dry-run"];
        command.args(["nfe-sweep", "--url", url, "--out", "x"]).args(options);
        command.env("DS_API_KEY", key);
        command.output().unwrap()
    };
    let output = program(&keyed.bob);
    assert!(output.status.success(), "{output:?}");
    let output = program("wrong");
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("DS_API_KEY"), "{output:?}");
}
