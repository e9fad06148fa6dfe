//! Bodies, queries, ids and headers of a whole server: whatever is sent, the answer is one that
//! docs/http.md has. The first byte says where the rest goes.

#![no_main]

use diffusion_sharpening_fuzz::http::{Answer, exchange, raw};
use libfuzzer_sys::fuzz_target;

const JSON: &str = "Content-Type: application/json\r\n";

/// A query or a part of a path: what cannot be in one is percent-encoded.
fn encoded(bytes: &[u8]) -> String {
    let plain = |b: &u8| b.is_ascii_alphanumeric() || b"-._~=&%/".contains(b);
    bytes
        .iter()
        .map(|b| if plain(b) { char::from(*b).to_string() } else { format!("%{b:02X}") })
        .collect()
}

/// A header's value: what cannot be in one is left out.
fn value(bytes: &[u8]) -> String {
    bytes.iter().filter(|b| (32..127).contains(*b)).map(|b| char::from(*b)).collect()
}

fn check(answer: &Answer) {
    let Answer { status, media_type, body } = answer;
    let text = String::from_utf8_lossy(body);
    assert!(*status < 500 || *status == 503, "{status}: {text}");
    if *status >= 400 {
        let problem: serde_json::Value = serde_json::from_slice(body).expect("a problem is JSON");
        let is_problem = media_type == "application/problem+json" && problem["status"] == *status;
        assert!(is_problem || problem["error"].is_object(), "{media_type}: {text}");
    }
}

fuzz_target!(|data: &[u8]| {
    let Some((route, data)) = data.split_first() else { return };
    if data.len() > 8_000 {
        return;
    }
    let post = |path: &str| check(&exchange(&format!("POST {path} HTTP/1.1\r\n{JSON}"), data));
    let get = |path: String| check(&exchange(&format!("GET {path} HTTP/1.1\r\n"), b""));
    match route {
        b'g' => post("/generate"),
        b'c' => post("/compare"),
        b'o' => post("/v1/images/generations"),
        b'v' => post("/ballots"),
        b'q' => get(format!("/estimate?{}", encoded(data))),
        b'h' => get(format!("/generations?{}", encoded(data))),
        b'l' => get(format!("/compare?{}", encoded(data))),
        b'i' => get(format!("/images/{}", encoded(data))),
        b'b' => get(format!("/generations/{}/bundle", encoded(data))),
        b'p' => {
            let head = format!("PUT /generations/{} HTTP/1.1\r\n{JSON}", encoded(data));
            check(&exchange(&head, br#"{"prompt": "a", "steps": 1, "seed": 1}"#));
        }
        b'e' => {
            // One that has ended, so that the stream ends.
            let put = format!("PUT /generations/events HTTP/1.1\r\n{JSON}");
            exchange(&put, br#"{"prompt": "a", "steps": 1, "seed": 1}"#);
            let last = value(data);
            let text = raw(
                format!(
                    "GET /generations/events/events HTTP/1.0\r\nHost: localhost\r\n\
                     Last-Event-ID: {last}\r\n\r\n"
                )
                .as_bytes(),
            );
            let statuses = ["200", "204", "400"].map(|s| format!(" {s} "));
            let text = String::from_utf8_lossy(&text);
            assert!(statuses.iter().any(|s| text.lines().next().is_some_and(|l| l.contains(s))), "{text}");
        }
        b'r' => {
            let text = raw(data);
            assert!(!text.windows(9).any(|w| w == b"/1.1 500 "), "{}", String::from_utf8_lossy(&text));
        }
        _ => {}
    }
});
