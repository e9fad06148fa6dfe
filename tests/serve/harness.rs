//! A server on a free port of this machine, and a client that shows every status.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use diffusion_sharpening::Result;
use diffusion_sharpening::engine::Backend;
use diffusion_sharpening::serve::config::List;
use diffusion_sharpening::serve::{self, Settings, Stopper};
use serde_json::Value;

use crate::fake::Fake;

pub struct Server {
    pub url: String,
    pub fake: Arc<Fake>,
    pub stopper: Stopper,
    agent: ureq::Agent,
    data: PathBuf,
    thread: Option<JoinHandle<Result<()>>>,
}

pub struct Answer {
    pub status: u16,
    pub headers: ureq::http::HeaderMap,
    pub bytes: Vec<u8>,
}

impl Answer {
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |v| v.to_str().unwrap())
    }

    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.bytes).unwrap()
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.bytes).unwrap_or_else(|e| panic!("{e}: {}", self.text()))
    }

    /// Checks that this is a complete problem and returns its type's last part.
    #[track_caller]
    pub fn problem(&self, status: u16) -> (String, Value) {
        assert_eq!(self.status, status, "{}", self.text());
        assert_eq!(self.header("content-type"), "application/problem+json");
        let body = self.json();
        assert_eq!(body["status"], status);
        assert!(body["title"].as_str().is_some_and(|t| !t.is_empty()));
        assert!(body["detail"].as_str().is_some_and(|t| !t.is_empty()));
        let kind = body["type"].as_str().unwrap().rsplit(':').next().unwrap().to_owned();
        (kind, body)
    }
}

/// Folders of histories, each removed with its server.
const DATA: &str = concat!(env!("CARGO_TARGET_TMPDIR"), "/serve");

pub fn settings() -> Settings {
    static COUNT: AtomicUsize = AtomicUsize::new(0);
    let number = COUNT.fetch_add(1, Ordering::Relaxed);
    let data = Path::new(DATA).join(format!("{}-{number}", std::process::id()));
    settings_in(&data)
}

/// Settings of a server that goes on with the history in `data`.
pub fn settings_in(data: &Path) -> Settings {
    let (listen, data) = ("127.0.0.1:0".to_owned(), data.to_path_buf());
    // What requests by hand are for.
    let hosts = List(vec!["test".to_owned()]);
    Settings { listen, data, hosts, drain_seconds: 5, ..Settings::default() }
}

/// A ready server with ordinary settings.
pub fn server() -> Server {
    server_with(settings(), Fake::default())
}

pub fn server_with(settings: Settings, fake: Fake) -> Server {
    let fake = Arc::new(fake);
    let backend: Arc<dyn Backend> = fake.clone();
    let server = unready(settings, fake, move || Ok(backend));
    server.until("ready", |s| s.get("/readyz").status == 200);
    server
}

/// A server that loads until it is told to go on.
pub fn loading() -> (Server, mpsc::Sender<()>) {
    let fake = Arc::new(Fake::default());
    let backend: Arc<dyn Backend> = fake.clone();
    let (go, wait) = mpsc::channel();
    let server = unready(settings(), fake, move || {
        wait.recv().unwrap();
        Ok(backend)
    });
    (server, go)
}

/// A server whose backend comes from `open`, which may take its time or fail.
pub fn unready(
    settings: Settings,
    fake: Arc<Fake>,
    open: impl FnOnce() -> Result<Arc<dyn Backend>> + Send + 'static,
) -> Server {
    let data = settings.data.clone();
    let running = serve::start(settings, open).unwrap();
    let url = format!("http://{}", running.address());
    let stopper = running.stopper();
    let agent = ureq::Agent::config_builder()
        .http_status_as_error(false)
        .timeout_global(Some(Duration::from_secs(30)))
        .max_idle_connections(0)
        .build()
        .into();
    let thread = Some(std::thread::spawn(|| running.wait()));
    Server { url, fake, stopper, agent, data, thread }
}

impl Server {
    pub fn address(&self) -> &str {
        self.url.trim_start_matches("http://")
    }

    pub fn get(&self, path: &str) -> Answer {
        read(self.agent.get(format!("{}{path}", self.url)).call().unwrap())
    }

    pub fn head(&self, path: &str) -> Answer {
        read(self.agent.head(format!("{}{path}", self.url)).call().unwrap())
    }

    pub fn get_with(&self, path: &str, header: (&str, &str)) -> Answer {
        let request = self.agent.get(format!("{}{path}", self.url)).header(header.0, header.1);
        read(request.call().unwrap())
    }

    pub fn post(&self, body: Value) -> Answer {
        self.post_bytes("application/json", body.to_string().as_bytes())
    }

    pub fn post_bytes(&self, content_type: &str, body: &[u8]) -> Answer {
        let request = self.agent.post(format!("{}/generate", self.url));
        read(request.header("content-type", content_type).send(body).unwrap())
    }

    /// Sends a body as it is, as JSON.
    pub fn post_to(&self, path: &str, body: &str) -> Answer {
        let request = self.agent.post(format!("{}{path}", self.url));
        read(request.header("content-type", "application/json").send(body).unwrap())
    }

    pub fn delete(&self, path: &str) -> Answer {
        read(self.agent.delete(format!("{}{path}", self.url)).call().unwrap())
    }

    /// Sends a request with any method, headers and body.
    pub fn send(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &Value) -> Answer {
        let mut request = ureq::http::Request::builder().method(method);
        request = request.uri(format!("{}{path}", self.url));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        if body.is_null() {
            return read(self.agent.run(request.body(()).unwrap()).unwrap());
        }
        let request = request.header("content-type", "application/json");
        read(self.agent.run(request.body(body.to_string()).unwrap()).unwrap())
    }

    /// Posts a generation that outlives its client; its id.
    #[track_caller]
    pub fn post_async(&self, body: &Value) -> String {
        let answer = self.send("POST", "/generate", &[("prefer", "respond-async")], body);
        assert_eq!(answer.status, 202, "{}", answer.text());
        answer.json()["id"].as_str().unwrap().to_owned()
    }

    pub fn put(&self, id: &str, body: &Value) -> Answer {
        self.send("PUT", &format!("/generations/{id}"), &[], body)
    }

    pub fn compare(&self, body: &Value) -> Answer {
        self.send("POST", "/compare", &[], body)
    }

    /// What the server knows of a generation.
    #[track_caller]
    pub fn status(&self, id: &str) -> Value {
        let answer = self.get(&format!("/generations/{id}"));
        assert_eq!(answer.status, 200, "{}", answer.text());
        answer.json()
    }

    /// Waits until a generation has a state.
    #[track_caller]
    pub fn until_state(&self, id: &str, state: &str) -> Value {
        self.until(state, |s| s.status(id)["state"] == state);
        self.status(id)
    }

    /// Posts from another thread.
    pub fn later(&self, body: Value) -> JoinHandle<Answer> {
        let request = self.agent.post(format!("{}/generate", self.url));
        std::thread::spawn(move || {
            let request = request.header("content-type", "application/json");
            read(request.send(body.to_string().as_bytes()).unwrap())
        })
    }

    /// The value of one line of /metrics.
    pub fn metric(&self, line: &str) -> f64 {
        let answer = self.get("/metrics");
        let value = answer.text().lines().find_map(|l| l.strip_prefix(line)?.strip_prefix(' '));
        value.unwrap_or_else(|| panic!("no {line} in\n{}", answer.text())).parse().unwrap()
    }

    #[track_caller]
    pub fn until(&self, what: &str, holds: impl Fn(&Self) -> bool) {
        until(what, || holds(self));
    }

    /// Waits for a server that has been told to stop.
    pub fn ended(mut self) -> Result<()> {
        self.thread.take().unwrap().join().unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.fake.gate.open();
        self.stopper.stop();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        if self.data.starts_with(DATA) {
            let _ = std::fs::remove_dir_all(&self.data);
        }
    }
}

#[track_caller]
pub fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < Duration::from_secs(60), "never {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn read(mut response: ureq::http::Response<ureq::Body>) -> Answer {
    Answer {
        status: response.status().as_u16(),
        headers: response.headers().clone(),
        bytes: response.body_mut().read_to_vec().unwrap(),
    }
}
