//! Host names, other sites' pages, and connections.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use diffusion_sharpening::serve::config::List;
use diffusion_sharpening::serve::{Settings, auth};
use serde_json::{Value, json};

use crate::fake::Fake;
use crate::harness::{Server, server_with, settings};

fn list(words: &[&str]) -> List {
    List(words.iter().map(|word| (*word).to_owned()).collect())
}

fn with(hosts: &[&str], origins: &[&str]) -> Server {
    let (hosts, cors_origins) = (list(hosts), list(origins));
    server_with(Settings { hosts, cors_origins, ..settings() }, Fake::default())
}

fn body() -> Value {
    json!({"prompt": "a", "steps": 1})
}

#[test]
fn a_page_that_points_its_name_here_gets_nothing() {
    let server = with(&[], &[]);
    let port = server.address().rsplit(':').next().unwrap().to_owned();
    for host in [format!("localhost:{port}"), format!("[::1]:{port}"), "127.0.0.1".to_owned()] {
        assert_eq!(server.get_with("/models", ("host", &host)).status, 200, "{host}");
    }
    for path in ["/models", "/", "/livez", "/nothing"] {
        let answer = server.get_with(path, ("host", &format!("evil.example:{port}")));
        assert_eq!(answer.problem(421).0, "misdirected-request");
    }
    let rebound = [("host", "evil.example"), ("origin", "http://evil.example")];
    server.send("POST", "/generate", &rebound, &body()).problem(421);
    let refused = "ds_rejections_total{reason=\"misdirected-request\"}";
    assert_eq!(server.metric(refused), 5.0);
    assert_eq!(server.fake.finished.lock().unwrap().len(), 1, "only the warm-up");
    let named = with(&["a.example"], &[]);
    for (host, status) in [("a.example", 200), ("A.example:443", 200), ("b.example", 421)] {
        assert_eq!(named.get_with("/models", ("host", host)).status, status, "{host}");
    }
}

#[test]
fn other_sites_pages_change_nothing_and_read_nothing() {
    let server = with(&[], &[]);
    for origin in ["http://evil.example", "null", "http://localhost:1"] {
        for (method, path) in
            [("POST", "/generate"), ("PUT", "/generations/a"), ("DELETE", "/history/a")]
        {
            let sent = if method == "DELETE" { Value::Null } else { body() };
            let answer = server.send(method, path, &[("origin", origin)], &sent);
            assert_eq!(answer.problem(403).0, "forbidden", "{origin} {method}");
        }
        let read = server.get_with("/models", ("origin", origin));
        assert_eq!((read.status, read.header("access-control-allow-origin")), (200, ""));
    }
    let own = server.url.clone();
    assert_eq!(server.send("POST", "/generate", &[("origin", &own)], &body()).status, 200);
    let preflight = [("origin", "http://evil.example"), ("access-control-request-method", "POST")];
    server.send("OPTIONS", "/generate", &preflight, &Value::Null).problem(405);
}

#[test]
fn listed_origins_may_use_the_api() {
    let (key, hash) = auth::make_key().unwrap();
    let file = tempfile::NamedTempFile::new().unwrap();
    let text = format!("[[key]]\nid = \"a\"\nsha256 = [{hash:?}]\nscopes = [\"generate\"]\n");
    std::fs::write(file.path(), text).unwrap();
    let keys = file.path().to_path_buf();
    let cors_origins = list(&["https://a.example"]);
    let server = server_with(Settings { keys, cors_origins, ..settings() }, Fake::default());
    let (allowed, good) = (("origin", "https://a.example"), ("x-api-key", key.as_str()));
    let asked = [
        allowed,
        ("access-control-request-method", "POST"),
        ("access-control-request-headers", "content-type,authorization,prefer"),
    ];
    // A browser asks without the key.
    let preflight = server.send("OPTIONS", "/generate", &asked, &Value::Null);
    assert_eq!(preflight.status, 200);
    assert_eq!(preflight.header("access-control-allow-origin"), "https://a.example");
    assert!(preflight.header("access-control-allow-methods").contains("POST"));
    assert!(preflight.header("access-control-allow-headers").contains("authorization"));
    assert_eq!(preflight.header("access-control-allow-credentials"), "");
    for (headers, status) in [(&[allowed, good][..], 200), (&[allowed], 401)] {
        let answer = server.send("POST", "/generate", headers, &body());
        assert_eq!(answer.status, status);
        assert_eq!(answer.header("access-control-allow-origin"), "https://a.example");
        assert!(answer.header("access-control-expose-headers").contains("retry-after"));
        assert!(answer.header("vary").to_lowercase().contains("origin"));
    }
    let evil = ("origin", "https://evil.example");
    assert_eq!(
        server.send("POST", "/generate", &[evil, good], &body()).problem(403).0,
        "forbidden"
    );
    let read = server.send("GET", "/models", &[evil, good], &Value::Null);
    assert_eq!((read.status, read.header("access-control-allow-origin")), (200, ""));
    let asked = [evil, asked[1]];
    let preflight = server.send("OPTIONS", "/generate", &asked, &Value::Null);
    assert_eq!(preflight.header("access-control-allow-origin"), "");
}

fn connect(server: &Server, text: &str) -> TcpStream {
    let mut stream = TcpStream::connect(server.address()).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    stream.write_all(text.as_bytes()).unwrap();
    stream
}

const LIVE: &str = "GET /livez HTTP/1.1\r\nHost: test\r\n\r\n";

#[test]
fn more_connections_than_allowed_wait() {
    let server = server_with(
        Settings { max_connections: 1, http_threads: 1, ..settings() },
        Fake::default(),
    );
    let mut first = connect(&server, LIVE);
    let mut bytes = [0; 12];
    first.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"HTTP/1.1 200");
    let mut second = connect(&server, LIVE);
    second.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    let waiting = second.read_exact(&mut bytes).unwrap_err().kind();
    assert!(matches!(waiting, ErrorKind::WouldBlock | ErrorKind::TimedOut), "{waiting}");
    drop(first);
    second.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    second.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"HTTP/1.1 200");
}

#[test]
fn idle_and_slow_connections_are_closed() {
    let server = server_with(
        Settings { keep_alive_seconds: 1, head_seconds: 1, ..settings() },
        Fake::default(),
    );
    for (text, status) in [(LIVE, "200"), ("GET /livez HTTP/1.1\r\nHost: te", "408")] {
        let mut answer = Vec::new();
        // To the end of the connection, which is the server's doing.
        connect(&server, text).read_to_end(&mut answer).unwrap();
        let answer = String::from_utf8(answer).unwrap();
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{answer}");
    }
}
