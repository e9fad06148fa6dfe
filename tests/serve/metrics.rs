//! The metrics: what they count, how they are written, and that nobody makes them grow.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::net::TcpStream;

use diffusion_sharpening::serve::metrics::{METRICS, Type, markdown};
use serde_json::json;

use crate::harness::{Server, server};

#[test]
fn metrics_follow_the_work() {
    let server = server();
    let before = server.metric("ds_units_total{unit=\"f\"}");
    assert_eq!(before, 0.0, "warming up is not counted");
    server.post(json!({"prompt": "a", "steps": 5, "method": "best-of-n"}));
    server.post(json!({"prompt": "a", "steps": "x"}));
    server.get("/a/path/that/is/not/there");
    for (unit, count) in [("f", 40.0), ("v", 4.0), ("y", 4.0), ("l", 0.0)] {
        assert_eq!(server.metric(&format!("ds_units_total{{unit=\"{unit}\"}}")), count);
    }
    for (line, value) in [
        ("ds_generations_total{method=\"best-of-n\",model=\"tiny\",outcome=\"completed\"}", 1.0),
        ("ds_generation_seconds_count{method=\"best-of-n\"}", 1.0),
        ("ds_f_per_generation_bucket{method=\"best-of-n\",le=\"50\"}", 1.0),
        ("ds_f_per_generation_sum{method=\"best-of-n\"}", 40.0),
        ("ds_http_requests_total{method=\"POST\",route=\"/generate\",status=\"200\"}", 1.0),
        ("ds_http_requests_total{method=\"POST\",route=\"/generate\",status=\"400\"}", 1.0),
        ("ds_http_requests_total{method=\"GET\",route=\"unmatched\",status=\"404\"}", 1.0),
        ("ds_http_request_duration_seconds_count{method=\"POST\",route=\"/generate\"}", 2.0),
        ("ds_stage_duration_seconds_count{stage=\"plan\"}", 1.0),
        ("ds_stage_duration_seconds_count{stage=\"unet\"}", 1.0),
        ("ds_stage_duration_seconds_count{stage=\"encode\"}", 1.0),
        // Twenty reports of two forwards have nineteen steps between them.
        ("ds_denoise_step_seconds_count{model=\"tiny\",resolution=\"128x128\"}", 19.0),
        ("ds_cancel_latency_seconds_count", 0.0),
        ("ds_plan_error_f", 0.0),
        ("ds_ready", 1.0),
        ("ds_queue_depth", 0.0),
    ] {
        assert_eq!(server.metric(line), value, "{line}");
    }
    assert!(server.metric("ds_seconds_per_f{model=\"tiny\",resolution=\"128x128\"}") >= 0.0);
    let answer = server.get("/metrics");
    assert!(answer.header("content-type").starts_with("text/plain; version=0.0.4"));
}

/// `UPDATE=1 cargo test --release --test serve the_table_of_metrics` writes the table anew.
#[test]
fn the_table_of_metrics_is_that_of_the_program() {
    let path = "docs/http.md";
    let text = std::fs::read_to_string(path).unwrap();
    let (head, rest) = text.split_once("<!-- metrics -->\n").unwrap();
    let (_, tail) = rest.split_once("<!-- /metrics -->").unwrap();
    let right = format!("{head}<!-- metrics -->\n{}<!-- /metrics -->{tail}", markdown());
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(path, &right).unwrap();
    }
    let now = std::fs::read_to_string(path).unwrap();
    assert!(now == right, "the table of metrics in {path} is not up to date");
}

/// The series of an exposition, without their values.
fn series(server: &Server) -> BTreeSet<String> {
    let answer = server.get("/metrics");
    let lines = answer.text().lines().filter(|line| !line.starts_with('#'));
    lines.map(|line| line.rsplit_once(' ').unwrap().0.to_owned()).collect()
}

/// Everything that a caller can write, in another way for every `i`.
fn attack(server: &Server, i: usize) {
    let odd = format!("x{i}\"}} 1\\n");
    for field in ["prompt", "model", "method", "adapter", "reward", "solver"] {
        server.post(json!({"prompt": "a", "steps": 1, field: odd}));
    }
    let side = 8 * (1 + i % 14);
    server.post(json!({"prompt": odd, "steps": 1, "width": side, "height": side, "seed": i}));
    server.put(&format!("id-{i}"), &json!({"prompt": "a", "steps": 1}));
    server.get(&format!("/x{i}/y{i}?z={i}"));
    server.get(&format!("/generations/x{i}"));
    server.get_with("/models", ("origin", &format!("http://x{i}.example")));
    server.get_with("/models", ("host", &format!("x{i}.example")));
    server.get_with("/models", ("x-api-key", &odd.replace('\n', "")));
    let mut stream = TcpStream::connect(server.address()).unwrap();
    write!(stream, "BREW{i} /models HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 405"), "{answer}");
}

#[test]
fn no_caller_makes_the_metrics_grow() {
    let server = server();
    (0..2).for_each(|i| attack(&server, i));
    series(&server);
    let before = series(&server);
    (2..16).for_each(|i| attack(&server, i));
    let after = series(&server);
    let new: Vec<_> = after.difference(&before).collect();
    assert!(new.is_empty(), "{new:?}");
    assert!(after.len() < 2000, "{}", after.len());
}

/// A sample's name, labels and value.
fn sample(line: &str) -> (String, BTreeMap<String, String>, f64) {
    let (series, value) = line.rsplit_once(' ').unwrap();
    let (name, labels) = match series.split_once('{') {
        None => (series, ""),
        Some((name, rest)) => (name, rest.strip_suffix('}').unwrap()),
    };
    let word = |text: &str| {
        let mut chars = text.chars();
        let first = chars.next().is_some_and(|c| c.is_ascii_alphabetic() || c == '_');
        assert!(first && chars.all(|c| c.is_ascii_alphanumeric() || c == '_'), "{line}");
        text.to_owned()
    };
    let pairs = labels.split_terminator("\",").filter(|pair| !pair.is_empty()).map(|pair| {
        let (name, value) = pair.split_once("=\"").unwrap();
        let value = value.strip_suffix('"').unwrap_or(value);
        assert!(!value.contains(['"', '\\', '\n']), "{line}");
        (word(name), value.to_owned())
    });
    (word(name), pairs.collect(), value.replace("+Inf", "inf").parse().unwrap())
}

#[test]
fn the_text_is_prometheus_own() {
    let server = server();
    server.post(json!({"prompt": "a", "steps": 5, "method": "best-of-n"}));
    let answer = server.get("/metrics");
    let text = answer.text();
    assert!(text.ends_with('\n'));
    let (mut seen, mut families) = (BTreeSet::new(), BTreeSet::new());
    let mut lines = text.lines().peekable();
    while let Some(line) = lines.next() {
        let (name, help) = line.strip_prefix("# HELP ").unwrap().split_once(' ').unwrap();
        let family = METRICS.iter().find(|f| f.name == name).unwrap();
        assert!(families.insert(name), "{name} comes twice");
        assert_eq!(help, family.help);
        let kind = match family.kind {
            Type::Counter => "counter",
            Type::Gauge => "gauge",
            Type::Histogram => "histogram",
        };
        assert_eq!(lines.next().unwrap(), format!("# TYPE {name} {kind}"));
        assert_eq!(name.ends_with("_total"), family.kind == Type::Counter, "{name}");
        let mut buckets: BTreeMap<String, Vec<f64>> = BTreeMap::new();
        while let Some(line) = lines.next_if(|line| !line.starts_with('#')) {
            let (full, mut labels, value) = sample(line);
            let suffix = full.strip_prefix(name).unwrap();
            let expected: &[&str] =
                if family.kind == Type::Histogram { &["_bucket", "_sum", "_count"] } else { &[""] };
            assert!(expected.contains(&suffix), "{line}");
            assert!(seen.insert(format!("{full}{labels:?}")), "{line} comes twice");
            let bound = labels.remove("le");
            assert_eq!(bound.is_some(), suffix == "_bucket");
            let mut names: Vec<_> = labels.keys().map(String::as_str).collect();
            let mut listed = family.labels.to_vec();
            names.sort_unstable();
            listed.sort_unstable();
            assert_eq!(names, listed, "{line}");
            let counts = buckets.entry(format!("{labels:?}")).or_default();
            match suffix {
                "_bucket" => {
                    assert!(counts.last().is_none_or(|last| *last <= value), "{line}");
                    counts.push(value);
                }
                "_count" => assert_eq!(counts.last(), Some(&value), "{line}"),
                _ => assert!(!value.is_nan(), "{line}"),
            }
        }
    }
    // Nothing that this server did not have to count is absent without a reason.
    assert!(families.len() >= METRICS.len() - 1, "{families:?}");
}
