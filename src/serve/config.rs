//! Settings of the server: defaults < TOML file < environment < flags.

mod list;
mod origin;

use std::fmt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::nn::device::{DeviceChoice, NumberChoice};
use crate::{Error, Result};

pub use list::List;
pub use origin::Origins;

/// How log lines are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// One readable line per event.
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}

impl fmt::Display for LogFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Text => "text",
            Self::Json => "json",
        })
    }
}

/// One list of settings makes the concrete struct, its defaults, and the
/// optional form that a TOML file, the environment and the flags fill in.
macro_rules! settings {
    ($($name:ident: $ty:ty = $default:expr, $env:literal, $value:literal, $help:literal;)*) => {
        /// Every setting of the server, resolved.
        #[derive(Clone, Debug, PartialEq, Serialize)]
        pub struct Settings {
            $(#[doc = $help] pub $name: $ty,)*
        }

        impl Default for Settings {
            fn default() -> Self {
                Self { $($name: $default,)* }
            }
        }

        /// Settings that one source (a TOML file, or flags and environment) gives.
        #[derive(Clone, Debug, Default, Deserialize, clap::Args)]
        #[serde(deny_unknown_fields, default)]
        pub struct Overrides {
            $(
                #[doc = $help]
                #[arg(long, env = $env, value_name = $value, help = $help)]
                pub $name: Option<$ty>,
            )*
        }

        /// Name and environment variable of every setting, in order.
        pub const NAMES: &[(&str, &str)] = &[$((stringify!($name), $env),)*];

        impl Overrides {
            /// The names of the settings that it gives.
            #[must_use]
            pub fn given(&self) -> Vec<&'static str> {
                let all = [$((stringify!($name), self.$name.is_some()),)*];
                all.into_iter().filter(|(_, given)| *given).map(|(name, _)| name).collect()
            }
        }

        impl Settings {
            /// The same settings with every value that `over` gives.
            #[must_use]
            pub fn with(mut self, over: Overrides) -> Self {
                $(if let Some(value) = over.$name { self.$name = value; })*
                self
            }
        }
    };
}

settings! {
    listen: String = "127.0.0.1:8080".to_owned(), "DS_LISTEN", "ADDR:PORT",
        "Address to listen on; port 0 picks a free one and prints it [default: 127.0.0.1:8080]";
    models: PathBuf = PathBuf::from("models"), "DS_MODELS", "DIR",
        "Folder with one checkpoint folder per model [default: models]";
    data: PathBuf = PathBuf::from("data"), "DS_DATA", "DIR",
        "Folder for history: accepted work, results and images; made where it is not [default: data]";
    keep: u64 = 10_000, "DS_KEEP", "N",
        "Finished generations that are kept; the oldest beyond are removed with their images [default: 10000]";
    sweeps: PathBuf = PathBuf::from("docs/results"), "DS_SWEEPS", "DIR",
        "Folder with sweeps of ds-bench to show; there need not be one [default: docs/results]";
    votes_per_day: u64 = 500, "DS_VOTES_PER_DAY", "N",
        "Votes of one voter that are counted in 24 hours [default: 500]";
    keys: PathBuf = PathBuf::new(), "DS_KEYS", "FILE",
        "TOML file with the hashes of API keys that requests need; none: everybody may do everything [default: ]";
    hosts: List = List::default(), "DS_HOSTS", "NAMES",
        "Host names under which it is served, with commas between them, besides loopback's; none: loopback's alone when it listens there, else any [default: []]";
    cors_origins: List = List::default(), "DS_CORS_ORIGINS", "ORIGINS",
        "Origins of other sites whose pages may use the API, such as https://a.example, with commas between them [default: []]";
    max_connections: usize = 1024, "DS_MAX_CONNECTIONS", "N",
        "Connections at the same time; more wait to be taken [default: 1024]";
    keep_alive_seconds: u64 = 15, "DS_KEEP_ALIVE_SECONDS", "S",
        "Seconds that a connection without a request stays open [default: 15]";
    head_seconds: u64 = 5, "DS_HEAD_SECONDS", "S",
        "Seconds in which the head of a request must arrive [default: 5]";
    device: DeviceChoice = DeviceChoice::Auto, "DS_DEVICE", "DEVICE",
        "Where models run: auto, cpu or cuda:N [default: auto]";
    dtype: NumberChoice = NumberChoice::Auto, "DS_DTYPE", "TYPE",
        "Numbers of U-Net and text towers: auto (f32 on the CPU, bf16 on a GPU), f32, bf16 or f16 [default: auto]";
    vae_dtype: NumberChoice = NumberChoice::Auto, "DS_VAE_DTYPE", "TYPE",
        "Numbers of the VAE: auto (f32), f32, bf16 or f16 [default: auto]";
    workers: usize = 1, "DS_WORKERS", "N",
        "Generation threads: requests that run at the same time [default: 1]";
    threads: usize = 0, "DS_THREADS", "N",
        "Threads that models compute on, shared by all requests; 0 for one a processor [default: 0]";
    http_threads: usize = 2, "DS_HTTP_THREADS", "N",
        "Threads that serve HTTP; models never run on them [default: 2]";
    queue: usize = 64, "DS_QUEUE", "N",
        "Requests that may wait; one more is answered 429 [default: 64]";
    queue_f: u64 = 200_000, "DS_QUEUE_F", "F",
        "U-Net forwards that may wait or be unfinished; more is answered 429 [default: 200000]";
    max_request_f: u64 = 100_000, "DS_MAX_REQUEST_F", "F",
        "U-Net forwards that one request may plan [default: 100000]";
    max_prompt_chars: usize = 2_000, "DS_MAX_PROMPT_CHARS", "N",
        "Characters of a prompt or negative prompt [default: 2000]";
    max_images: u32 = 8, "DS_MAX_IMAGES", "N",
        "Images per request (n) [default: 8]";
    max_steps: u32 = 1_000, "DS_MAX_STEPS", "N",
        "Denoising steps per trajectory [default: 1000]";
    max_side: u32 = 2_048, "DS_MAX_SIDE", "PIXELS",
        "Width and height of an image [default: 2048]";
    max_body_bytes: usize = 65_536, "DS_MAX_BODY_BYTES", "BYTES",
        "Size of a request body [default: 65536]";
    body_seconds: u64 = 10, "DS_BODY_SECONDS", "S",
        "Seconds in which a request body must arrive [default: 10]";
    drain_seconds: u64 = 30, "DS_DRAIN_SECONDS", "S",
        "Seconds to finish accepted work after SIGTERM or Ctrl-C [default: 30]";
    stall_seconds: u64 = 600, "DS_STALL_SECONDS", "S",
        "Seconds without a step of a running generation after which /readyz says 503 [default: 600]";
    warm_up_steps: u32 = 2, "DS_WARM_UP_STEPS", "N",
        "Steps of the image generated before the server is ready; 0 for none [default: 2]";
    log: String = "info,actix_server=warn".to_owned(), "DS_LOG", "FILTER",
        "Log filter, such as debug or diffusion_sharpening=debug [default: info,actix_server=warn]";
    log_format: LogFormat = LogFormat::Text, "DS_LOG_FORMAT", "FORMAT",
        "Log lines as text or json, on standard error [default: text]";
}

impl Overrides {
    /// Reads a TOML file whose keys are the settings' names.
    ///
    /// # Errors
    /// The file cannot be read, or a key is unknown or has the wrong type; the
    /// message names the file, the line and the key.
    pub fn from_toml_file(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|e| Error::file(path, e))?;
        toml::from_str(&text).map_err(|e| Error::file(path, e.to_string().trim_end()))
    }
}

impl Settings {
    /// Defaults, then the TOML file, then flags and environment; checked.
    ///
    /// # Errors
    /// The file is unusable or a value is out of range.
    pub fn resolve(file: Option<&Path>, flags: Overrides) -> Result<Self> {
        let from_file = file.map(Overrides::from_toml_file).transpose()?.unwrap_or_default();
        let settings = Self::default().with(from_file).with(flags);
        settings.check()?;
        Ok(settings)
    }

    fn check(&self) -> Result<()> {
        let at_least_one = [
            ("keep", self.keep),
            ("votes_per_day", self.votes_per_day),
            ("workers", self.workers as u64),
            ("http_threads", self.http_threads as u64),
            ("queue_f", self.queue_f),
            ("max_request_f", self.max_request_f),
            ("max_prompt_chars", self.max_prompt_chars as u64),
            ("max_images", u64::from(self.max_images)),
            ("max_steps", u64::from(self.max_steps)),
            ("max_side", u64::from(self.max_side)),
            ("max_body_bytes", self.max_body_bytes as u64),
            ("body_seconds", self.body_seconds),
            ("max_connections", self.max_connections as u64),
            ("keep_alive_seconds", self.keep_alive_seconds),
            ("head_seconds", self.head_seconds),
            ("stall_seconds", self.stall_seconds),
        ];
        for (field, value) in at_least_one {
            if value == 0 {
                return Err(Error::invalid(field, "must be at least 1"));
            }
        }
        super::sites::check(&self.hosts, &self.cors_origins)
    }

    /// The settings as a TOML file that gives them back.
    ///
    /// # Errors
    /// A path that is not UTF-8 cannot be written.
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string(self).map_err(|e| Error::invalid("settings", e.to_string()))
    }

    /// The most U-Net forwards that a single request can be admitted with.
    #[must_use]
    pub fn request_f(&self) -> u64 {
        self.max_request_f.min(self.queue_f)
    }
}
