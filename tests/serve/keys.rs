//! API keys: who may do what.

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
    for path in ["/livez", "/readyz", "/openapi.json", "/", "/docs", "/app.js", "/style.css"] {
        assert_eq!(server.get(path).status, 200, "{path}");
    }
    let body = json!({"prompt": "a", "steps": 1});
    for (method, path) in [
        ("POST", "/generate"),
        ("POST", "/compare"),
        ("POST", "/v1/images/generations"),
        ("PUT", "/generations/a"),
        ("DELETE", "/generations/a"),
        ("DELETE", "/history/a"),
        ("GET", "/generations"),
        ("GET", "/generations/a"),
        ("GET", "/generations/a/events"),
        ("GET", "/compare"),
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
}

#[test]
fn an_unusable_file_of_keys_ends_the_start() {
    let settings = Settings { keys: "no/such/keys.toml".into(), ..settings() };
    let open = || -> diffusion_sharpening::Result<_> { panic!("not opened") };
    let error = diffusion_sharpening::serve::start(settings, open).err().unwrap().to_string();
    assert!(error.starts_with("no/such/keys.toml: "), "{error}");
}
