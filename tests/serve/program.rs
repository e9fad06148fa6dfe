//! The program: settings from its sources, messages, signals.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::time::Duration;

use diffusion_sharpening::engine::Backend;
use diffusion_sharpening::serve::config::List;
use diffusion_sharpening::serve::{self, Overrides, Settings};

use crate::fake::Fake;
use crate::harness::settings;

fn program() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ds-serve"));
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("DS_")) {
        command.env_remove(name);
    }
    command
}

fn texts(output: &Output) -> (String, String) {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    (text(&output.stdout), text(&output.stderr))
}

fn file(text: &str) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), text).unwrap();
    file
}

#[test]
fn the_shipped_configuration_states_every_default() {
    let path = std::path::Path::new("configs/serve.toml");
    let settings = Settings::resolve(Some(path), Overrides::default()).unwrap();
    assert_eq!(settings, Settings::default());
    let text = std::fs::read_to_string(path).unwrap();
    for line in Settings::default().to_toml().unwrap().lines() {
        assert!(text.lines().any(|l| l == line), "configs/serve.toml has no line {line}");
    }
}

#[test]
fn settings_are_printed_with_where_they_come_from_and_read_back() {
    let config = file("max_images = 12\nqueue = 13\nhosts = [\"a.example\", \"b\"]\n");
    let output = program()
        .arg("--config")
        .arg(config.path())
        .args(["--print-config", "--max-steps", "31", "--log", "info,x=\"#\""])
        .envs([
            ("DS_MAX_STEPS", "21"),
            ("DS_MAX_IMAGES", "22"),
            ("DS_CORS_ORIGINS", "http://a, http://b"),
        ])
        .output()
        .unwrap();
    let (out, err) = texts(&output);
    assert!(output.status.success(), "{err}");
    let origin = |line: &str| {
        let at =
            out.lines().position(|l| l == line).unwrap_or_else(|| panic!("no {line} in\n{out}"));
        out.lines().nth(at - 1).unwrap().to_owned()
    };
    let of_file = format!("# file {:?}", config.path());
    for (line, expected) in [
        ("max_steps = 31", "# flag --max-steps"),
        ("max_images = 22", "# environment DS_MAX_IMAGES"),
        ("cors_origins = [\"http://a\", \"http://b\"]", "# environment DS_CORS_ORIGINS"),
        ("queue = 13", &of_file),
        ("hosts = [\"a.example\", \"b\"]", &of_file),
        ("workers = 1", "# default"),
    ] {
        assert_eq!(origin(line), expected);
    }
    let again = file(&out);
    let read = Settings::resolve(Some(again.path()), Overrides::default()).unwrap();
    let list = |words: &[&str]| List(words.iter().map(|w| (*w).to_owned()).collect());
    let expected = Settings {
        max_steps: 31,
        max_images: 22,
        queue: 13,
        hosts: list(&["a.example", "b"]),
        cors_origins: list(&["http://a", "http://b"]),
        log: "info,x=\"#\"".to_owned(),
        ..Settings::default()
    };
    assert_eq!(read, expected);
    assert_eq!(out.lines().count(), 2 * expected.to_toml().unwrap().lines().count());
}

#[test]
fn a_health_check_ends_well_when_the_server_is() {
    let server = crate::harness::server();
    let check = |url: &str| {
        let mut command = program();
        let output = command.env("HTTP_PROXY", "http://127.0.0.1:1").args(["--health-check", url]);
        let output = output.output().unwrap();
        (output.status.code(), texts(&output).1)
    };
    assert_eq!(check(&format!("{}/startupz", server.url)), (Some(0), String::new()));
    let (code, err) = check(&format!("{}/nothing", server.url));
    assert_eq!(code, Some(1));
    assert!(err.contains("answers 404"), "{err}");
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    assert_eq!(check(&format!("http://{nobody}/startupz")).0, Some(1));
}

#[test]
fn flags_win_over_environment_over_file_over_defaults() {
    let config = file("max_steps = 11\nmax_images = 12\nqueue = 13\n");
    let output = program()
        .arg("--config")
        .arg(config.path())
        .args(["--print-config", "--max-steps", "31"])
        .envs([("DS_MAX_STEPS", "21"), ("DS_MAX_IMAGES", "22")])
        .output()
        .unwrap();
    let (out, err) = texts(&output);
    assert!(output.status.success(), "{err}");
    for line in ["max_steps = 31", "max_images = 22", "queue = 13", "workers = 1"] {
        assert!(out.lines().any(|l| l == line), "no {line} in\n{out}");
    }
}

#[test]
fn unusable_settings_are_named() {
    for (text, parts) in [
        ("lissten = \"x\"\n", vec!["unknown field", "lissten", "listen"]),
        ("workers = \"two\"\n", vec!["workers", "invalid type"]),
        ("workers = 0\n", vec!["workers", "at least 1"]),
        ("listen = \n", vec!["line 1"]),
        ("hosts = [\"a:80\"]\n", vec!["hosts: 'a:80'", "without a port"]),
        ("cors_origins = [\"*\"]\n", vec!["cors_origins: '*'"]),
    ] {
        let config = file(text);
        let output =
            program().arg("--config").arg(config.path()).arg("--print-config").output().unwrap();
        let (_, err) = texts(&output);
        assert_eq!(output.status.code(), Some(1), "{text}: {err}");
        for part in parts {
            assert!(err.contains(part), "{text}: no {part} in {err}");
        }
    }
    let output = program().args(["--models", "no/such/folder"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let (_, err) = texts(&output);
    assert!(err.contains("models: there is no folder no/such/folder"), "{err}");
}

#[test]
fn help_has_every_setting_with_its_default() {
    let help = texts(&program().arg("--help").output().unwrap()).0;
    for line in Settings::default().to_toml().unwrap().lines() {
        let (name, value) = line.split_once(" = ").unwrap();
        let flag = format!("--{} ", name.replace('_', "-"));
        let entry = help.split(&flag).nth(1).unwrap_or_else(|| panic!("no {flag} in\n{help}"));
        // The entry, without the line breaks that depend on the terminal.
        let words = entry.split_whitespace().collect::<Vec<_>>().join(" ");
        let default = format!("[default: {}]", value.trim_matches('"'));
        let first = words.find("[default:").map(|at| &words[at..]);
        assert!(first.is_some_and(|w| w.starts_with(&default)), "{name}: {words:.200}");
        assert!(words.contains(&format!("DS_{}", name.to_uppercase())), "{name}");
    }
    assert!(help.contains("--config") && help.contains("--print-config"));
}

/// Not a test: the server with the fake backend as a process of its own, for
/// the tests below and for trying the page:
/// `cargo test --release --test serve -- --ignored --exact program::fake_server --nocapture`
#[test]
#[ignore = "runs until it is signalled"]
fn fake_server() {
    let listen = std::env::var("FAKE_LISTEN").unwrap_or_else(|_| "127.0.0.1:0".to_owned());
    let step = std::env::var("FAKE_STEP_MS").map_or(10, |ms| ms.parse().unwrap());
    let fake = Fake { step: Duration::from_millis(step), ..Fake::default() };
    let backend: Arc<dyn Backend> = Arc::new(fake);
    let data = std::env::var_os("FAKE_DATA").map_or_else(|| settings().data, PathBuf::from);
    let drain = std::env::var("FAKE_DRAIN_SECONDS").map_or(60, |seconds| seconds.parse().unwrap());
    let settings = Settings {
        listen,
        data,
        drain_seconds: drain,
        queue: 1000,
        warm_up_steps: 1,
        ..Settings::default()
    };
    let running = serve::start(settings, move || Ok(backend)).unwrap();
    serve::stop_on_signals(running.stopper()).unwrap();
    println!("\nlistening on http://{}", running.address());
    running.wait().unwrap();
    println!("ended");
}

pub struct Process {
    pub child: Child,
    pub url: String,
}

impl Process {
    fn start() -> Self {
        Self::start_with(&[])
    }

    pub fn spawn(variables: &[(&str, &OsStr)]) -> Child {
        Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "program::fake_server", "--nocapture"])
            .envs(variables.iter().copied())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap()
    }

    pub fn start_with(variables: &[(&str, &OsStr)]) -> Self {
        let mut child = Self::spawn(variables);
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let url = lines
            .find_map(|line| line.unwrap().strip_prefix("listening on ").map(str::to_owned))
            .unwrap();
        // Keeps reading, so that the child never writes into a closed pipe.
        std::thread::spawn(move || lines.for_each(drop));
        let process = Self { child, url };
        crate::harness::until("ready", || {
            ureq::get(format!("{}/readyz", process.url)).call().is_ok()
        });
        process
    }

    pub fn signal(&self, name: &str) {
        let id = self.child.id().to_string();
        assert!(Command::new("kill").args([name, &id]).status().unwrap().success());
    }

    fn post(&self, body: &'static str) -> std::thread::JoinHandle<Result<u16, ureq::Error>> {
        let url = format!("{}/generate", self.url);
        std::thread::spawn(move || {
            let request = ureq::post(url).header("content-type", "application/json");
            request.send(body).map(|answer| answer.status().as_u16())
        })
    }

    fn running(&self) -> bool {
        let metrics = ureq::get(format!("{}/metrics", self.url)).call().unwrap();
        let text = metrics.into_body().read_to_string().unwrap();
        text.contains("ds_generations_running 1")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(unix)]
#[test]
fn the_first_signal_drains_and_the_process_ends_well() {
    let mut process = Process::start();
    let busy = process.post(r#"{"prompt": "a", "steps": 40}"#);
    crate::harness::until("running", || process.running());
    process.signal("-TERM");
    assert_eq!(busy.join().unwrap().unwrap(), 200);
    assert!(process.child.wait().unwrap().success());
}

#[cfg(unix)]
#[test]
fn the_second_signal_ends_the_process_at_once() {
    let mut process = Process::start();
    let busy = process.post(r#"{"prompt": "wait", "steps": 40}"#);
    crate::harness::until("running", || process.running());
    process.signal("-INT");
    crate::harness::until("draining", || {
        ureq::get(format!("{}/readyz", process.url)).call().is_err()
    });
    process.signal("-INT");
    assert_eq!(process.child.wait().unwrap().code(), Some(130));
    assert!(busy.join().unwrap().is_err());
}
