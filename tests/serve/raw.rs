//! Bytes that no client should send.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::Duration;

use diffusion_sharpening::serve::Settings;
use serde_json::json;

use crate::fake::Fake;
use crate::harness::{Server, server, server_with, settings};

fn connect(server: &Server) -> TcpStream {
    let stream = TcpStream::connect(server.address()).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(8))).unwrap();
    stream
}

/// What the server answers until it closes the connection, or says nothing more for a while.
fn rest(stream: &mut TcpStream) -> String {
    let mut answer = Vec::new();
    let mut part = [0; 4096];
    loop {
        match stream.read(&mut part) {
            Ok(0) => break,
            Ok(n) => answer.extend_from_slice(&part[..n]),
            Err(error) => {
                assert!(!answer.is_empty(), "no answer: {error}");
                break;
            }
        }
    }
    String::from_utf8_lossy(&answer).into_owned()
}

fn answers(text: &str) -> Vec<u16> {
    let parts = text.split("HTTP/1.").skip(1);
    parts.map(|part| part[2..5].parse().unwrap()).collect()
}

/// The statuses of all answers, and whether the server closed the connection after them.
fn to_the_end(server: &Server, bytes: &[u8]) -> (Vec<u16>, String, bool) {
    let mut stream = connect(server);
    stream.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
    // The server may hang up before all is sent.
    let _ = stream.write_all(bytes);
    let (mut answer, mut part) = (Vec::new(), [0; 4096]);
    let closed = loop {
        match stream.read(&mut part) {
            Ok(0) => break true,
            Ok(n) => answer.extend_from_slice(&part[..n]),
            Err(error) => break error.kind() == ErrorKind::ConnectionReset,
        }
    };
    let text = String::from_utf8_lossy(&answer).into_owned();
    (answers(&text), text, closed)
}

fn exchange(server: &Server, bytes: &[u8]) -> (Vec<u16>, String) {
    let mut stream = connect(server);
    stream.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    stream.write_all(bytes).unwrap();
    let text = rest(&mut stream);
    (answers(&text), text)
}

const HEAD: &str =
    "POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n";

#[test]
fn a_request_cannot_hide_in_another() {
    let server = server();
    let made = server.fake.finished.lock().unwrap().len();
    let inner = "POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\
                 Content-Length: 25\r\n\r\n{\"prompt\":\"s\",\"steps\":1} \r\n";
    let length = inner.len();
    for framing in [
        format!("Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n{inner}"),
        format!("Transfer-Encoding: chunked\r\nContent-Length: {length}\r\n\r\n0\r\n\r\n{inner}"),
        format!("Content-Length: 0\r\nContent-Length: {length}\r\n\r\n{inner}"),
        format!("Content-Length: 0, {length}\r\n\r\n{inner}"),
        format!("Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n{inner}"),
        format!("Transfer-Encoding: identity, chunked, identity\r\n\r\n0\r\n\r\n{inner}"),
        format!("Content-Length: +0\r\n\r\n{inner}"),
        format!("Content-Length: -1\r\n\r\n{inner}"),
        format!("Content-Length: 0x0\r\n\r\n{inner}"),
        format!("Content-Length : 0\r\n\r\n{inner}"),
        format!("Transfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\n{inner}"),
        format!("Transfer-Encoding: chunked\r\n\r\n-1\r\n{inner}"),
        format!("Content-Length: {length}\r\nContent-Length: {length}\r\n\r\n{inner}{inner}"),
        format!("Content-Length: 0 0\r\n\r\n{inner}"),
        format!("Content-Length: \r\n\r\n{inner}"),
        format!("Content-Length: 18446744073709551616\r\n\r\n{inner}"),
        format!(
            "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n{inner}"
        ),
        format!("Transfer-Encoding: \u{b}chunked\r\n\r\n0\r\n\r\n{inner}"),
        format!("Transfer-Encoding: chunked\r\n\r\n0x0\r\n\r\n{inner}"),
        format!("Transfer-Encoding: chunked\r\n\r\n10000000000000000\r\n{inner}"),
        format!("X: a\r\n\tContent-Length: 0\r\n\r\n{inner}"),
        format!("X: a\rContent-Length: 0\r\n\r\n{inner}"),
        format!("Transfer-Encoding: chunked\r\n\r\n2;\nxx\r\n4c\r\n0\r\n\r\n{inner}"),
        format!("Transfer-Encoding: chunked\r\n\r\n1\r\naa\r\n0\r\n\r\n{inner}"),
        format!("X\r\nContent-Length: 0\r\n\r\n{inner}"),
    ] {
        let (statuses, text, closed) = to_the_end(&server, format!("{HEAD}{framing}").as_bytes());
        assert_eq!(statuses, [400], "{framing}: {text}");
        assert!(closed, "{framing}: the connection stays open");
    }
    assert_eq!(server.fake.finished.lock().unwrap().len(), made, "nothing was generated");
    assert_eq!(server.post(json!({"prompt": "a", "steps": 1})).status, 200);
    // Two requests: a line may end without CR (RFC 9112, section 2.2; a proxy that reads on has to
    // refuse it), and what a trailer says of the length is nothing (section 7.1.2).
    for framing in [
        "X: a\nContent-Length: 0\r\n\r\n",
        "Transfer-Encoding: chunked\r\n\r\n0\r\nContent-Length: 9\r\n\r\n",
    ] {
        let last = inner.replace("Host", "Connection: close\r\nHost");
        let (statuses, text) = exchange(&server, format!("{HEAD}{framing}{last}").as_bytes());
        assert_eq!(statuses, [400, 200], "{framing}: {text}");
    }
}

#[test]
fn what_follows_a_body_is_no_part_of_it() {
    let server = server();
    let body = json!({"prompt": "a", "steps": 1}).to_string();
    let length = body.len();
    let (statuses, text, closed) = to_the_end(
        &server,
        format!("{HEAD}Content-Length: {length}\r\n\r\n{body}, \"more\": 1}}\r\n\r\n").as_bytes(),
    );
    // It may be hung up on before the first answer: nothing that it says can be relied on.
    assert!(closed && [&[][..], &[200], &[200, 400]].contains(&&statuses[..]), "{text}");
    let (statuses, text) =
        exchange(&server, format!("{HEAD}Content-Length: 5\r\n\r\n{body}").as_bytes());
    assert!(statuses.iter().all(|s| *s == 400), "{text}");
}

#[test]
fn compressed_bodies_are_refused() {
    let server = server();
    // An empty stream.
    let gzip = [31, 139, 8, 0, 0, 0, 0, 0, 0, 3, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    for coding in ["gzip", "br", "deflate", "zstd", "identity, gzip"] {
        let head = format!(
            "{HEAD}Connection: close\r\nContent-Encoding: {coding}\r\nContent-Length: 20\r\n\r\n"
        );
        let (statuses, text) = exchange(&server, &[head.as_bytes(), &gzip].concat());
        assert_eq!(statuses, [415], "{coding}: {text}");
    }
}

#[test]
fn nonsense_is_answered_or_hung_up_on() {
    let server = server();
    let long = "x".repeat(1 << 20);
    for bytes in [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03".to_vec(),
        b"GET / HTTP/9.9\r\n\r\n".to_vec(),
        b"GET /\x00 HTTP/1.1\r\nHost: localhost\r\n\r\n".to_vec(),
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: \x00\r\n\r\n".to_vec(),
        format!("GET /{long} HTTP/1.1\r\nHost: localhost\r\n\r\n").into_bytes(),
        format!("GET / HTTP/1.1\r\nHost: localhost\r\nX: {long}\r\n\r\n").into_bytes(),
        [
            b"GET / HTTP/1.1\r\nHost: localhost\r\n".to_vec(),
            b"X: y\r\n".repeat(10_000),
            b"\r\n".to_vec(),
        ]
        .concat(),
        b"G\r\n\r\n".to_vec(),
    ] {
        let mut stream = connect(&server);
        // The server may hang up before all is sent.
        let _ = stream.write_all(&bytes);
        let _ = stream.shutdown(Shutdown::Write);
        let mut text = Vec::new();
        let _ = stream.read_to_end(&mut text);
        let text = String::from_utf8_lossy(&text);
        let statuses = answers(&text);
        let ok = statuses.iter().all(|s| (400..=505).contains(s));
        assert!(statuses.len() <= 1 && ok, "{:.60}: {text:.200}", String::from_utf8_lossy(&bytes));
    }
    assert_eq!(server.get("/livez").status, 200);
}

#[test]
fn a_body_in_drops_is_given_up_in_time() {
    let server = server_with(Settings { body_seconds: 1, ..settings() }, Fake::default());
    let mut stream = connect(&server);
    write!(stream, "{HEAD}Content-Length: 60\r\n\r\n").unwrap();
    // A byte every 100 ms would take six seconds.
    for _ in 0..30 {
        std::thread::sleep(Duration::from_millis(100));
        if stream.write_all(b" ").is_err() {
            break;
        }
    }
    let text = rest(&mut stream);
    assert_eq!(answers(&text), [408], "{text}");
    assert!(text.contains("body-timeout"));
}

#[test]
fn what_is_cut_off_is_no_request() {
    let server = server();
    let made = server.fake.finished.lock().unwrap().len();
    let cut = |bytes: &[u8]| {
        let mut stream = connect(&server);
        stream.write_all(bytes).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut text = Vec::new();
        let _ = stream.read_to_end(&mut text);
        answers(&String::from_utf8_lossy(&text))
    };
    let statuses = cut(format!("{HEAD}Content-Length: 60\r\n\r\n{{\"prompt\":").as_bytes());
    assert!(statuses.iter().all(|s| *s == 400), "{statuses:?}");
    let statuses = cut(b"POST /generate HTTP/1.1\r\nHost: loc");
    assert!(statuses.iter().all(|s| *s >= 400), "{statuses:?}");
    assert_eq!(server.fake.finished.lock().unwrap().len(), made);
}

#[test]
fn requests_in_a_row_are_answered_in_a_row() {
    let server = server();
    let body = json!({"prompt": "a", "steps": 1}).to_string();
    let one = format!("{HEAD}Content-Length: {}\r\n\r\n{body}", body.len());
    let last = "GET /livez HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
    let mut stream = connect(&server);
    stream.write_all(format!("{one}{one}{last}").as_bytes()).unwrap();
    assert_eq!(answers(&rest(&mut stream)), [200, 200, 200]);
    // HTTP/1.0, a whole address as target, and other methods.
    let close = "Host: localhost\r\nConnection: close\r\n\r\n";
    for (line, status) in [
        ("GET /livez HTTP/1.0", 200),
        ("GET http://localhost/livez HTTP/1.1", 200),
        ("HEAD /livez HTTP/1.1", 200),
        ("OPTIONS /generate HTTP/1.1", 405),
        ("TRACE /livez HTTP/1.1", 405),
        ("CONNECT localhost:80 HTTP/1.1", 404),
        ("FROB /livez HTTP/1.1", 405),
        ("GET //livez HTTP/1.1", 404),
        ("GET /LIVEZ HTTP/1.1", 404),
    ] {
        let (statuses, text) = exchange(&server, format!("{line}\r\n{close}").as_bytes());
        assert_eq!(statuses, [status], "{line}: {text}");
    }
}

#[test]
fn names_never_lead_out_of_the_data() {
    let server = server();
    for name in [
        "..",
        "%2e%2e",
        "..%2fhistory.sqlite",
        "%2e%2e%2flock",
        "a%00b",
        "%c0%ae%c0%ae",
        "．．",
        "a/../../lock",
        "....//lock",
        "%252e%252e",
        "C:%5clock",
        "-rf",
        ".hidden",
        "%ff",
    ] {
        for route in [
            "/images/{}",
            "/generations/{}",
            "/generations/{}/bundle",
            "/generations/{}/events",
            "/generations/{}/export",
            "/compare/{}",
            "/compare/{}/export",
            "/ballots/{}/left.png",
            "/models/{}",
        ] {
            let path = route.replace("{}", name);
            let line =
                format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
            let (statuses, text) = exchange(&server, line.as_bytes());
            assert!(statuses.len() == 1 && (400..500).contains(&statuses[0]), "{path}: {text}");
            assert!(!text.contains("SQLite"), "{path}: {text}");
        }
    }
}

#[test]
fn depth_is_no_way_to_overflow_a_stack() {
    let server = server_with(Settings { max_body_bytes: 1 << 20, ..settings() }, Fake::default());
    for (open, rest) in [("[", ""), ("{\"a\":", ""), ("[", "]")] {
        let deep = format!("{}{}", open.repeat(100_000), rest.repeat(100_000));
        for body in [deep.clone(), format!("{{\"prompt\":\"a\",\"method\":{deep}}}")] {
            for path in ["/generate", "/compare", "/v1/images/generations"] {
                let head = HEAD.replace("/generate", path);
                let length = body.len();
                let (statuses, text) = exchange(
                    &server,
                    format!("{head}Connection: close\r\nContent-Length: {length}\r\n\r\n{body}")
                        .as_bytes(),
                );
                assert_eq!(statuses, [400], "{path} {open}: {text}");
            }
        }
    }
}

#[test]
fn values_at_the_edges_are_used_or_refused() {
    let server = server();
    let status = |body: &str| server.post_bytes("application/json", body.as_bytes()).status;
    assert_eq!(status(r#"{"prompt":"a","seed":18446744073709551615,"steps":1}"#), 200);
    for body in [
        r#"{"prompt":"a","seed":1.5}"#,
        r#"{"prompt":"a","seed":1.0}"#,
        r#"{"prompt":"a","seed":1.8446744073709552e19}"#,
        r#"{"prompt":"a","seed":18446744073709551616}"#,
        r#"{"prompt":"a","seed":18446744073709551615,"n":2}"#,
        r#"{"prompt":"a","seed":-1}"#,
        r#"{"prompt":"a","guidance_scale":NaN}"#,
        r#"{"prompt":"a","guidance_scale":1e400}"#,
        r#"{"prompt":"a","guidance_scale":"Infinity"}"#,
        r#"{"prompt":"a","width":4294967296}"#,
        r#"{"prompt":"a","width":2000000,"height":2000000,"n":8}"#,
        r#"{"prompt":"a","width":2048,"height":4294967295}"#,
        r#"{"prompt":"a","n":4294967295}"#,
        r#"{"prompt":"a","n":4294967295,"width":4294967295,"height":4294967295}"#,
        r#"{"prompt":"a","steps":0}"#,
        r#"{"prompt":"a","previews":4294967296}"#,
        "{\"prompt\":\"\u{feff}\",\"steps\":",
        "\u{feff}{\"prompt\":\"a\"}",
    ] {
        let status = status(body);
        assert!([400, 422].contains(&status), "{body}: {status}");
    }
    // Odd characters are a prompt like any other, and come back as they were.
    let prompt = "a\u{0}b \u{202e}c \u{1f469}\u{200d}\u{1f680} <script>";
    let answer = server.post(json!({"prompt": prompt, "steps": 1}));
    assert_eq!((answer.status, answer.json()["resolved"]["prompt"].clone()), (200, json!(prompt)));
}
