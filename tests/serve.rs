//! The HTTP contract, through real connections to a server in this process.

#[path = "serve/compare.rs"]
mod compare;
#[path = "serve/deadlines.rs"]
mod deadlines;
#[path = "serve/disconnect.rs"]
mod disconnect;
#[path = "serve/export.rs"]
mod export;
#[path = "serve/fake.rs"]
mod fake;
#[path = "serve/harness.rs"]
mod harness;
#[path = "serve/jobs.rs"]
mod jobs;
#[path = "serve/keys.rs"]
mod keys;
#[path = "serve/lifecycle.rs"]
mod lifecycle;
#[path = "serve/logs.rs"]
mod logs;
#[path = "serve/metrics.rs"]
mod metrics;
#[path = "serve/models.rs"]
mod models;
#[path = "serve/openai.rs"]
mod openai;
#[path = "serve/overload.rs"]
mod overload;
#[path = "serve/parsers.rs"]
mod parsers;
#[path = "serve/program.rs"]
mod program;
#[path = "serve/raw.rs"]
mod raw;
#[path = "serve/ready.rs"]
mod ready;
#[path = "serve/shutdown.rs"]
mod shutdown;
#[path = "serve/sites.rs"]
mod sites;
#[path = "serve/votes.rs"]
mod votes;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use diffusion_sharpening::serve::Settings;
use diffusion_sharpening::serve::problem::Kind;
use serde_json::{Value, json};

use fake::Fake;
use harness::{Server, server, server_with, settings};

fn names(value: &Value) -> Vec<&str> {
    value.as_object().unwrap().keys().map(String::as_str).collect()
}

#[test]
fn a_generation_answers_everything_that_is_promised() {
    let server = server();
    let answer = server.post(json!({
        "prompt": "a red circle", "seed": 11, "n": 2, "steps": 5, "reward": "judge",
        "method": {"name": "best-of-n", "candidates": 3}, "width": 48, "height": 32,
    }));
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert_eq!(answer.header("content-type"), "application/json");
    assert_eq!(answer.header("cache-control"), "no-store");
    assert!(answer.header("server-timing").starts_with("queue;dur="));
    let body = answer.json();
    assert_eq!(names(&body), ["id", "images", "cost", "resolved", "model", "trace"]);
    assert_eq!(answer.header("x-request-id"), body["id"]);
    let images = body["images"].as_array().unwrap();
    assert_eq!(images.len(), 2);
    for (image, seed) in images.iter().zip([11, 12]) {
        assert_eq!(names(image), ["data", "url", "format", "seed", "scores"]);
        assert_eq!(image["format"], "png");
        assert_eq!(image["seed"], seed);
        assert_eq!(names(&image["scores"]), ["aesthetic", "clip", "judge"]);
        let bytes = STANDARD.decode(image["data"].as_str().unwrap()).unwrap();
        let picture = image::load_from_memory(&bytes).unwrap();
        assert_eq!((picture.width(), picture.height()), (48, 32));
    }
    assert_eq!(body["cost"]["planned"], json!({"f": 60, "v": 6, "y": 6}));
    let actual = &body["cost"]["actual"];
    assert_eq!(names(actual), ["f", "v", "y", "seconds"]);
    assert_eq!((&actual["f"], &actual["v"], &actual["y"]), (&json!(60), &json!(6), &json!(6)));
    assert_eq!(names(&actual["seconds"]), ["encode", "text", "unet", "vae_decode"]);
    assert_eq!(body["resolved"]["method"], json!({"name": "best-of-n", "candidates": 3}));
    assert_eq!(body["resolved"]["solver"], "ddim");
    assert_eq!(body["model"], json!({"id": "tiny", "sha256": "5eed".repeat(16)}));
    assert_eq!(body["trace"][0]["event"], "chosen");
}

#[test]
fn scores_that_are_not_finite_are_null() {
    let server = server();
    let body = server.post(json!({"prompt": "nan", "steps": 1})).json();
    let scores = &body["images"][0]["scores"];
    assert_eq!(scores["clip"], Value::Null);
    assert_eq!(scores["aesthetic"], Value::Null);
    assert!(scores["judge"].is_number());
}

#[test]
fn each_output_format_is_what_it_says() {
    let server = server();
    for (name, format) in [
        ("png", image::ImageFormat::Png),
        ("jpeg", image::ImageFormat::Jpeg),
        ("webp", image::ImageFormat::WebP),
    ] {
        let body = server.post(json!({"prompt": "a", "steps": 1, "output_format": name})).json();
        assert_eq!(body["images"][0]["format"], name);
        let bytes = STANDARD.decode(body["images"][0]["data"].as_str().unwrap()).unwrap();
        assert_eq!(image::guess_format(&bytes).unwrap(), format);
    }
}

#[track_caller]
fn refused(server: &Server, body: Value, status: u16, kind: &str, field: &str) -> String {
    let (found, problem) = server.post(body).problem(status);
    assert_eq!(found, kind, "{problem}");
    assert_eq!(problem["field"], field, "{problem}");
    let detail = problem["detail"].as_str().unwrap().to_owned();
    assert!(detail.starts_with(field), "{detail}");
    detail
}

#[test]
fn unusable_requests_name_their_field() {
    let server = server();
    let s = &server;
    let detail = refused(s, json!({"prompt": "a", "stepz": 3}), 400, "invalid-body", "stepz");
    assert!(detail.starts_with("stepz: unknown field, expected one of"), "{detail}");
    let detail = refused(s, json!({"prompt": "a", "steps": "x"}), 400, "invalid-body", "steps");
    assert_eq!(detail, "steps: invalid type: string \"x\", expected u32");
    refused(s, json!({"steps": 3}), 400, "invalid-body", "prompt");
    refused(s, json!({"prompt": "a", "method": {}}), 400, "invalid-body", "method.name");
    refused(s, json!({"prompt": "a", "budget": {"x": 1}}), 400, "invalid-body", "budget.x");
    refused(s, json!({"prompt": " \n"}), 422, "invalid-value", "prompt");
    refused(s, json!({"prompt": "é".repeat(2001)}), 422, "invalid-value", "prompt");
    let long = json!({"prompt": "a", "negative_prompt": "x".repeat(2001)});
    refused(s, long, 422, "invalid-value", "negative_prompt");
    for (field, most) in [("n", 8), ("steps", 1000), ("width", 2048), ("height", 2048)] {
        for value in [json!(0), json!(most + 1), json!(-1)] {
            refused(s, json!({"prompt": "a", field: value}), 422, "invalid-value", field);
        }
    }
    let last = json!({"prompt": "a", "seed": u64::MAX, "n": 2});
    refused(s, last, 422, "invalid-value", "seed");
    for field in ["model", "adapter", "reward", "method"] {
        let detail = refused(s, json!({"prompt": "a", field: "nope"}), 422, "unknown-name", field);
        assert!(detail.contains("'nope'"), "{detail}");
    }
    refused(
        s,
        json!({"prompt": "a", "output_format": "gif"}),
        422,
        "unknown-name",
        "output_format",
    );
    refused(s, json!({"prompt": "a", "budget": 3}), 422, "budget", "budget");
    let heavy = json!({"prompt": "a", "method": "best-of-n", "budget": 100_002, "steps": 1});
    refused(s, heavy, 422, "budget", "budget");
}

#[test]
fn bodies_that_are_not_json_are_problems() {
    let server = server();
    for body in ["", "{", "{\"prompt\": \"a\"", "{\"prompt\": NaN}", "\u{feff}{}"] {
        let (kind, _) = server.post_bytes("application/json", body.as_bytes()).problem(400);
        assert_eq!(kind, "malformed-json", "{body:?}");
    }
    assert_eq!(server.post(json!(["a"])).problem(400).0, "invalid-body");
    assert_eq!(server.post_bytes("application/json", b"\xff\xfe").problem(400).0, "malformed-json");
    for content_type in ["text/plain", "application/x-www-form-urlencoded", "application/jsonx"] {
        let (kind, _) = server.post_bytes(content_type, br#"{"prompt":"a"}"#).problem(415);
        assert_eq!(kind, "unsupported-media-type");
    }
    let utf8 = "application/json; charset=utf-8";
    let answer = server.post_bytes(utf8, br#"{"prompt":"a","steps":1}"#);
    assert_eq!(answer.status, 200);
}

#[test]
fn bodies_that_are_too_large_are_refused() {
    let server = server();
    for size in [65_537, 3_000_000] {
        let body = vec![b' '; size];
        let (kind, problem) = server.post_bytes("application/json", &body).problem(413);
        assert_eq!(kind, "body-too-large");
        assert!(problem["detail"].as_str().unwrap().contains("65536"));
    }
    let mut body = br#"{"prompt":"a","steps":1}"#.to_vec();
    body.resize(65_536, b' ');
    assert_eq!(server.post_bytes("application/json", &body).status, 200);
}

#[test]
fn other_paths_and_methods_are_problems() {
    let server = server();
    assert_eq!(server.get("/nothing").problem(404).0, "not-found");
    assert_eq!(server.get("/models/../../etc/passwd").problem(404).0, "not-found");
    let answer = server.get("/generate");
    assert_eq!(answer.problem(405).0, "method-not-allowed");
    assert_eq!(answer.header("allow"), "POST");
    for path in ["/", "/models", "/metrics", "/livez", "/app.js"] {
        let answer = server.delete(path);
        assert_eq!(answer.problem(405).0, "method-not-allowed");
        assert_eq!(answer.header("allow"), "GET, HEAD");
    }
}

#[test]
fn listings_say_what_is_there() {
    let server = server();
    let models = server.get("/models").json();
    assert_eq!(models["models"][0]["id"], "tiny");
    assert!(models["models"][0]["example_prompts"].as_array().is_some_and(|p| !p.is_empty()));
    assert_eq!(models["limits"]["max_images"], 8);
    let methods = server.get("/methods").json();
    assert_eq!(methods["methods"][1]["name"], "best-of-n");
    assert_eq!(methods["methods"][1]["params"]["candidates"]["type"], "integer");
    assert_eq!(server.get("/rewards").json()["rewards"][0]["name"], "judge");
    assert_eq!(server.get("/livez").json()["status"], "live");
    assert_eq!(server.get("/readyz").json()["status"], "ready");
}

#[test]
fn the_page_and_its_files_are_served_with_their_guards() {
    let server = server();
    let page = server.get("/");
    assert_eq!(page.status, 200);
    assert_eq!(page.header("content-type"), "text/html; charset=utf-8");
    assert!(page.header("content-security-policy").starts_with("default-src 'none'"));
    assert_eq!(page.header("x-content-type-options"), "nosniff");
    // Every local file that the page or one of its modules names is served.
    let mut files = vec![page.text().to_owned()];
    let mut seen = Vec::new();
    while let Some(text) = files.pop() {
        for quoted in text.split('"').skip(1) {
            let name = quoted.trim_start_matches("./").trim_start_matches('/');
            let local = [".js", ".css", ".svg"].iter().any(|ext| name.ends_with(ext));
            if local && !name.contains([' ', ':', '\n']) && !seen.contains(&name.to_owned()) {
                let file = server.get(&format!("/{name}"));
                assert_eq!(file.status, 200, "{name}");
                seen.push(name.to_owned());
                files.push(file.text().to_owned());
            }
        }
    }
    for name in ["app.js", "arms.js", "results.js", "style.css", "favicon.svg"] {
        assert!(seen.contains(&name.to_owned()), "{name} is not reached from {seen:?}");
    }
    let head = server.head("/");
    assert_eq!((head.status, head.bytes.len()), (200, 0));
    assert_eq!(head.header("content-length"), page.bytes.len().to_string());
    let tag = page.header("etag").to_owned();
    let again = server.get_with("/", ("if-none-match", &tag));
    assert_eq!((again.status, again.bytes.len()), (304, 0));
    assert_eq!(server.get_with("/", ("if-none-match", "\"other\"")).status, 200);
}

#[test]
fn a_failing_backend_is_a_problem_without_internals_and_the_thread_lives() {
    let server = server();
    for prompt in ["panic now", "broken weights"] {
        let (kind, problem) = server.post(json!({"prompt": prompt, "steps": 1})).problem(500);
        assert_eq!(kind, "internal");
        assert!(problem["instance"].as_str().unwrap().starts_with("urn:uuid:"));
        assert!(!problem["detail"].as_str().unwrap().contains("/a/path"), "{problem}");
    }
    assert_eq!(server.post(json!({"prompt": "a", "steps": 1})).status, 200);
    let failed = "ds_generations_total{method=\"plain\",model=\"tiny\",outcome=\"failed\"}";
    assert_eq!(server.metric(failed), 2.0);
}

#[test]
fn too_little_memory_is_a_problem_of_its_own_and_the_thread_lives() {
    let server = server();
    let answer = server.post(json!({"prompt": "huge", "steps": 1}));
    assert_eq!(answer.header("retry-after"), "");
    let never = json!({
        "type": "urn:problem-type:diffusion-sharpening:insufficient-memory",
        "title": "The work does not fit the device's memory",
        "status": 422,
        "detail": "insufficient memory: 2048 x 2048 px take at least 12.345 GiB, there is \
                   8.000 GiB",
    });
    assert_eq!(answer.problem(422).1, never);
    assert_eq!(server.metric("ds_rejections_total{reason=\"insufficient-memory\"}"), 1.0);
    for _ in 0..3 {
        let answer = server.post(json!({"prompt": "crowded", "steps": 1}));
        let now = json!({
            "type": "urn:problem-type:diffusion-sharpening:out-of-memory",
            "title": "The device has no memory left for now",
            "status": 503,
            "detail": "out of memory in the U-Net: make smaller images",
        });
        assert_eq!(answer.problem(503).1, now);
        let seconds: u64 = answer.header("retry-after").parse().unwrap();
        assert!((1..=600).contains(&seconds), "{seconds}");
    }
    assert_eq!(server.post(json!({"prompt": "a", "steps": 1})).status, 200);
    assert_eq!(server.get("/readyz").status, 200);
    let failed = "ds_generations_total{method=\"plain\",model=\"tiny\",outcome=\"failed\"}";
    assert_eq!(server.metric(failed), 3.0);
}

#[test]
fn work_is_admitted_by_its_forwards() {
    let limits = Settings { max_request_f: 500, queue_f: 300, ..settings() };
    let server = server_with(limits, Fake::default());
    // 301 could never be admitted: that is the request's fault, not the queue's.
    let many = json!({"prompt": "a", "method": "best-of-n", "budget": 301, "steps": 1, "n": 1});
    assert_eq!(server.post(json!({"prompt": "a", "steps": 151})).problem(422).0, "budget");
    assert_eq!(server.post(many).status, 200);
    let running = server.later(json!({"prompt": "wait", "steps": 100}));
    server.until("running", |s| s.metric("ds_generations_running") == 1.0);
    assert!(server.metric("ds_queue_f_backlog") <= 200.0);
    let refused = server.post(json!({"prompt": "a", "steps": 100}));
    assert_eq!(refused.problem(429).0, "queue-full");
    let waiting = server.later(json!({"prompt": "b", "steps": 10}));
    server.until("waiting", |s| s.metric("ds_queue_depth") == 1.0);
    server.fake.gate.open();
    assert_eq!(running.join().unwrap().status, 200);
    assert_eq!(waiting.join().unwrap().status, 200);
}

/// `UPDATE=1 cargo test --release --test serve the_openapi` writes the copy anew.
#[test]
fn the_openapi_document_is_that_of_the_program() {
    let server = server();
    let answer = server.get("/openapi.json");
    assert_eq!(answer.header("content-type"), "application/json");
    let document = answer.json();
    let text = serde_json::to_string_pretty(&document).unwrap() + "\n";
    let path = "docs/openapi.json";
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(path, &text).unwrap();
    }
    assert!(std::fs::read_to_string(path).unwrap() == text, "{path} is not up to date");
    let operations = document["paths"].as_object().unwrap().values();
    let mut ids: Vec<_> = operations
        .flat_map(|item| item.as_object().unwrap().values())
        .map(|operation| operation["operationId"].as_str().unwrap())
        .collect();
    let count = ids.len();
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), count, "an operation's id is its own");
    let seed = &document["components"]["schemas"]["GenerateRequest"]["properties"]["seed"];
    assert_eq!((&seed["format"], &seed["maximum"]), (&json!("uint64"), &json!(u64::MAX)));
    let manual = std::fs::read_to_string("docs/http.md").unwrap();
    let paths = document["paths"].as_object().unwrap();
    for (path, operations) in paths {
        // Exactly the methods that the server takes.
        let mut described: Vec<String> =
            operations.as_object().unwrap().keys().map(|m| m.to_uppercase()).collect();
        if described.iter().any(|m| m == "GET") {
            described.push("HEAD".to_owned());
        }
        described.sort();
        let concrete = path
            .replace("{id}", "a")
            .replace("{name}", "a")
            .replace("{token}", "a")
            .replace("{side}", "a");
        let refused = server.send("PATCH", &concrete, &[], &Value::Null);
        if path.starts_with("/v1/") {
            assert_eq!(refused.json()["error"]["code"], "method_not_allowed", "{path}");
        } else {
            assert_eq!(refused.problem(405).0, "method-not-allowed", "{path}");
        }
        let mut taken: Vec<_> = refused.header("allow").split(", ").map(str::to_owned).collect();
        taken.sort();
        assert_eq!(described, taken, "{path}");
        let named = path.replace("/images/{name}", "/images/{sha256}.{format}");
        assert!(manual.contains(&named), "docs/http.md does not name {named}");
    }
    assert!(paths.len() >= 17);
    // What is only described has the fields of what is read.
    let fields = |name: &str| -> std::collections::BTreeSet<String> {
        let properties = &document["components"]["schemas"][name]["properties"];
        properties.as_object().unwrap().keys().cloned().collect()
    };
    let shared = ["prompt", "negative_prompt", "seed", "n", "width", "height", "output_format"];
    let mut arm = fields("GenerateRequest");
    arm.retain(|field| !shared.contains(&field.as_str()));
    arm.insert("label".to_owned());
    assert_eq!(fields("ArmBody"), arm);
    for field in fields("OpenAiBody") {
        let body = json!({"prompt": "a", field.as_str(): [1]});
        let refused = server.send("POST", "/v1/images/generations", &[], &body);
        assert_ne!(refused.json()["error"]["message"].as_str().unwrap_or(""), "");
        assert!(!refused.text().contains("unknown field"), "{field}: {}", refused.text());
    }
}

#[test]
fn the_documentation_names_everything() {
    let text = std::fs::read_to_string("docs/http.md").unwrap();
    for kind in Kind::ALL {
        let row = format!("| `{}` | {} |", kind.slug(), kind.status());
        assert!(text.contains(&row), "docs/http.md has no row {row}");
    }
    let settings = toml::to_string(&Settings::default()).unwrap();
    for line in settings.lines() {
        let name = line.split(" = ").next().unwrap();
        assert!(text.contains(&format!("`{name}`")), "docs/http.md does not name {name}");
    }
    let server = server();
    let problem = server.post(json!({"prompt": "a", "?": 1})).json();
    let fields = problem["detail"].as_str().unwrap().split('`').skip(1).step_by(2);
    for field in fields.map(str::to_owned) {
        assert!(text.contains(&format!("| `{field}` |")), "docs/http.md has no row {field}");
    }
}
