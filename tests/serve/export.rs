//! Exports: folders that open from a disk; and sweeps to look at.

use std::collections::BTreeMap;
use std::io::Read;

use diffusion_sharpening::engine::bundle::Bundle;
use diffusion_sharpening::serve::Settings;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::fake::Fake;
use crate::harness::{Answer, Server, server, server_with, settings};

type Files = BTreeMap<String, Vec<u8>>;

/// The files of an archive by their paths within its one folder.
#[track_caller]
fn unpack(answer: &Answer, name: &str) -> Files {
    assert_eq!((answer.status, answer.header("content-type")), (200, "application/x-tar"));
    assert!(answer.header("content-disposition").contains(&format!("\"{name}.tar\"")));
    assert_eq!(answer.header("content-length"), answer.bytes.len().to_string());
    let mut files = Files::new();
    let mut archive = tar::Archive::new(&answer.bytes[..]);
    for entry in archive.entries().unwrap() {
        let mut entry = entry.unwrap();
        assert_eq!(entry.header().entry_type(), tar::EntryType::Regular);
        let path = entry.path().unwrap().to_str().unwrap().to_owned();
        let inside = path.strip_prefix(&format!("{name}/")).unwrap().to_owned();
        let mut bytes = Vec::new();
        entry.read_to_end(&mut bytes).unwrap();
        assert!(files.insert(inside, bytes).is_none(), "{path} is there twice");
    }
    files
}

fn text<'a>(files: &'a Files, path: &str) -> &'a str {
    std::str::from_utf8(files.get(path).unwrap_or_else(|| panic!("no {path}"))).unwrap()
}

/// The values of an attribute.
fn attributes<'a>(html: &'a str, name: &str) -> Vec<&'a str> {
    let start = format!(" {name}=\"");
    html.split(&start).skip(1).map(|rest| rest.split('"').next().unwrap()).collect()
}

/// What every export holds to.
#[track_caller]
fn check(files: &Files) {
    let mut sums: BTreeMap<&str, &str> = BTreeMap::new();
    for line in text(files, "SHA256SUMS").lines() {
        let (sum, path) = line.split_once("  ").unwrap();
        sums.insert(path, sum);
    }
    for (path, bytes) in files.iter().filter(|(path, _)| *path != "SHA256SUMS") {
        let sum: String = Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(sums.remove(path.as_str()), Some(sum.as_str()), "{path}");
    }
    assert!(sums.is_empty(), "{sums:?} are not there");
    let html = text(files, "index.html");
    let linked: Vec<&str> =
        [attributes(html, "src"), attributes(html, "href")].concat().into_iter().collect();
    assert!(linked.len() >= 4, "{linked:?}");
    for path in linked {
        assert!(files.contains_key(path), "the page has {path}, the folder has not");
    }
    for path in ["index.html", "export.css", "export.js"] {
        let text = text(files, path);
        for word in ["http:", "https:", "//cdn", "url(", "@import", "import ", "fetch(", "style=\""]
        {
            assert!(!text.contains(word), "{path} has {word}");
        }
    }
    // Classic scripts alone open from a disk.
    assert!(!html.contains("type=\"module\"") && html.matches("<script").count() == 1);
    assert!(!text(files, "data.json").contains("\"/"), "an address of the server");
}

/// A comparison of three arms, of which one cannot meet its contract.
fn compared(server: &Server) -> Value {
    let answer = server.compare(&json!({
        "base": {
            "prompt": "a <script>alert(\"1\")</script> & 'red' circle", "steps": 9, "n": 2,
            "previews": 3,
        },
        "arms": [
            {"label": "<img src=x onerror=alert(1)> \"plain\""},
            {"method": "best-of-n"},
            {"steps": 900},
        ],
        "contract": {"equal_f": 90},
    }));
    assert_eq!(answer.status, 200, "{}", answer.text());
    answer.json()
}

#[test]
fn a_comparison_opens_from_a_disk() {
    let server = server();
    let body = compared(&server);
    let id = body["id"].as_str().unwrap();
    let archive = server.get(&format!("/compare/{id}/export"));
    let files = unpack(&archive, &format!("comparison-{id}"));
    check(&files);
    let html = text(&files, "index.html");
    for raw in ["<script>alert", "<img src=x", "onerror=alert(1)> \""] {
        assert!(!html.contains(raw), "{raw} is not escaped");
    }
    assert!(html.contains(
        "<q dir=\"auto\">a &lt;script&gt;alert(&quot;1&quot;)&lt;/script&gt; &amp; 'red' circle"
    ));
    let alts = attributes(html, "alt");
    let whole = alts.iter().filter(|alt| alt.starts_with("a &lt;script&gt;")).count();
    assert_eq!(whole, 4, "an image of each of two arms has the prompt: {alts:?}");
    assert!(html.contains("cannot meet the contract: one trajectory needs 1800 F, not 90"));
    // 90 F an image: a plain one leaves 72, five trajectories leave none.
    for cell in ["<td>144 F</td>", "<td>0 F</td>", "<td>36</td>", "<td>180</td>", "<td>216</td>"] {
        assert!(html.contains(cell), "no {cell}");
    }
    assert_eq!(attributes(html, "data-f").len(), 6, "three estimates of an image of each arm");
    // Everything is in data.json, with paths instead of addresses.
    let data: Value = serde_json::from_str(text(&files, "data.json")).unwrap();
    assert_eq!((&data["format"], &data["id"]), (&json!(1), &body["id"]));
    assert_eq!(data["request"]["contract"], json!({"equal_f": 90}));
    assert_eq!(data["arms"].as_array().unwrap().len(), 3);
    for (index, shown) in body["arms"].as_array().unwrap().iter().enumerate() {
        let arm = &data["arms"][index];
        for field in ["label", "id", "state", "unmet", "planned", "actual", "seconds", "unused"] {
            assert_eq!(arm[field], shown[field], "{field}");
        }
        let Some(id) = arm["id"].as_str() else {
            assert_eq!(arm["state"], "unmet");
            continue;
        };
        assert_eq!(arm["request"]["prompt"], body["prompt"]);
        assert_eq!(arm["resolved"]["seed"], arm["result"]["images"][0]["seed"]);
        let images = arm["result"]["images"].as_array().unwrap();
        let trace = arm["result"]["trace"].as_array().unwrap();
        let frames = trace.iter().filter_map(|entry| entry.get("preview"));
        let urls: Vec<&str> =
            images.iter().chain(frames).map(|part| part["url"].as_str().unwrap()).collect();
        assert_eq!(urls.len(), 5);
        assert!(urls.iter().all(|url| files.contains_key(*url)), "{urls:?}");
        let path = format!("bundles/{id}.tar");
        assert_eq!(arm["bundle"], path);
        let bundle = Bundle::read(&files[&path][..]).unwrap();
        assert_eq!((bundle.images.len(), bundle.previews.len()), (2, 3));
        assert_eq!(bundle.images[0], files[urls[0]]);
        assert_eq!(bundle.previews[2], files[urls[4]]);
    }
    // The same again is the same.
    let again = server.get(&format!("/compare/{id}/export"));
    assert!(again.bytes == archive.bytes);
    let head = server.head(&format!("/compare/{id}/export"));
    assert_eq!((head.status, head.bytes.len()), (200, 0));
    assert_eq!(head.header("content-length"), archive.bytes.len().to_string());
}

#[test]
fn arms_without_images_say_why() {
    let server = server();
    let body = server
        .compare(&json!({
            "base": {"prompt": "a", "steps": 1},
            "arms": [{}, {"label": "gone"}, {"steps": 2}],
        }))
        .json();
    let id = body["id"].as_str().unwrap();
    assert_eq!(server.delete(&format!("/history/{id}.1")).status, 204);
    let files = unpack(&server.get(&format!("/compare/{id}/export")), &format!("comparison-{id}"));
    check(&files);
    assert!(text(&files, "index.html").contains("was removed from the history"));
    assert!(!files.contains_key(&format!("bundles/{id}.1.tar")));
    let broken = json!({"base": {"prompt": "broken", "steps": 1}, "arms": [{}]});
    let id = server.compare(&broken).json()["id"].as_str().unwrap().to_owned();
    let files = unpack(&server.get(&format!("/compare/{id}/export")), &format!("comparison-{id}"));
    check(&files);
    let html = text(&files, "index.html");
    assert!(html.contains("failed: the request was understood but running it failed"), "{html}");
    assert!(html.contains("No arm has completed."));
}

#[test]
fn a_generation_is_exported_like_one_arm() {
    let server = server();
    let body = json!({"prompt": "a <b>", "steps": 4, "previews": 2, "output_format": "webp"});
    assert_eq!(server.put("mine", &body).status, 200);
    let files = unpack(&server.get("/generations/mine/export"), "generation-mine");
    check(&files);
    assert!(text(&files, "index.html").contains("Contract: none, costs differ."));
    let data: Value = serde_json::from_str(text(&files, "data.json")).unwrap();
    assert_eq!(data["request"]["base"], body);
    assert_eq!(
        (&data["arms"][0]["label"], &data["arms"][0]["id"]),
        (&json!("plain"), &json!("mine"))
    );
    let formats = |end: &str| files.keys().filter(|path| path.ends_with(end)).count();
    assert_eq!((formats(".webp"), formats(".png"), formats(".tar")), (1, 2, 1));
}

#[test]
fn only_what_has_ended_is_exported() {
    let server = server_with(settings(), Fake::default());
    server.get("/compare/nobody/export").problem(404);
    server.get("/generations/nobody/export").problem(404);
    server.get("/compare/..%2f/export").problem(422);
    let asked = json!({"base": {"prompt": "wait", "steps": 3}, "arms": [{}, {}]});
    let answer = server.send("POST", "/compare", &[("prefer", "respond-async")], &asked);
    let id = answer.json()["id"].as_str().unwrap().to_owned();
    let refused = server.get(&format!("/compare/{id}/export"));
    assert_eq!(refused.problem(409).0, "conflict");
    assert_eq!(server.get(&format!("/generations/{id}.0/export")).problem(409).0, "conflict");
    server.fake.gate.open();
    server.until_state(&format!("{id}.1"), "completed");
    check(&unpack(&server.get(&format!("/compare/{id}/export")), &format!("comparison-{id}")));
    let refused = server.send("POST", &format!("/compare/{id}/export"), &[], &Value::Null);
    assert_eq!(refused.header("allow"), "GET, HEAD");
    assert_eq!(refused.problem(405).0, "method-not-allowed");
}

#[test]
fn sweeps_are_listed_where_there_are_any() {
    let shipped = Settings { sweeps: "docs/results".into(), ..settings() };
    let found = server_with(shipped, Fake::default()).get("/sweeps").json();
    let sweeps = found["sweeps"].as_array().unwrap();
    let figure = sweeps.iter().find(|sweep| sweep["id"] == "figure5").unwrap();
    assert_eq!((&figure["reward"], &figure["held_out"]), (&json!("scene-clip"), &json!("judge")));
    let points = figure["points"].as_array().unwrap();
    let plain = points.iter().find(|p| p["method"] == "plain" && p["budget"] == 100.0).unwrap();
    assert_eq!(plain["f"], 100.0);
    assert!(plain["scores"]["judge"]["low"].as_f64() < plain["scores"]["judge"]["mean"].as_f64());
    let none = Settings { sweeps: "no/such/folder".into(), ..settings() };
    assert_eq!(server_with(none, Fake::default()).get("/sweeps").json(), json!({"sweeps": []}));
}
