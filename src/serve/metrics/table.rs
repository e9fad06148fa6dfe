//! Every metric: its name, type, labels and meaning. docs/http.md has the same table.

use crate::serve::vote::Choice;

use super::labels::{METHODS, PHASES, REJECTIONS, STAGES, UNITS};

/// The type of a metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Type {
    Counter,
    Gauge,
    Histogram,
}

impl Type {
    fn name(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram => "histogram",
        }
    }
}

/// One metric.
#[derive(Clone, Copy, Debug)]
pub struct Family {
    pub name: &'static str,
    pub kind: Type,
    pub labels: &'static [&'static str],
    pub help: &'static str,
}

const fn counter(
    name: &'static str,
    labels: &'static [&'static str],
    help: &'static str,
) -> Family {
    Family { name, kind: Type::Counter, labels, help }
}

const fn gauge(name: &'static str, labels: &'static [&'static str], help: &'static str) -> Family {
    Family { name, kind: Type::Gauge, labels, help }
}

const fn histogram(
    name: &'static str,
    labels: &'static [&'static str],
    help: &'static str,
) -> Family {
    Family { name, kind: Type::Histogram, labels, help }
}

/// All of them.
pub const METRICS: &[Family] = &[
    counter(
        "ds_http_requests_total",
        &["route", "method", "status"],
        "Answered requests; status 499 is a client that left, route unmatched a path that is not there",
    ),
    histogram("ds_http_request_duration_seconds", &["route", "method"], "Time to answer"),
    gauge("ds_http_requests_in_flight", &[], "Requests being answered"),
    counter(
        "ds_generations_total",
        &["model", "method", "outcome"],
        "Generations that ended: completed, cancelled, deadline, budget (refused while running), failed",
    ),
    histogram("ds_generation_seconds", &["method"], "Time of a completed generation on its thread"),
    histogram(
        "ds_f_per_generation",
        &["method"],
        "U-Net forwards of a completed generation, all images",
    ),
    histogram(
        "ds_stage_duration_seconds",
        &["stage"],
        "Time of a generation by stage; observed is scoring for the record",
    ),
    histogram(
        "ds_denoise_step_seconds",
        &["model", "resolution"],
        "Time between two reports of U-Net forwards with no decode or score in between",
    ),
    histogram(
        "ds_cancel_latency_seconds",
        &[],
        "From a cancellation or a deadline until its thread had stopped",
    ),
    histogram("ds_queue_wait_seconds", &[], "From admission to a generation thread"),
    gauge("ds_queue_depth", &[], "Admitted requests that wait"),
    gauge(
        "ds_queue_f_backlog",
        &[],
        "U-Net forwards of waiting work and the rest of running work: the signal to scale on",
    ),
    gauge(
        "ds_retry_after_seconds",
        &[],
        "What a full queue would answer as Retry-After now: the backlog at the measured speed",
    ),
    gauge("ds_generations_running", &[], "Generations running now"),
    counter("ds_rejections_total", &["reason"], "Refused requests"),
    counter(
        "ds_client_disconnects_total",
        &["phase"],
        "Clients that left before their answer, and what their generation did then",
    ),
    counter(
        "ds_units_total",
        &["unit"],
        "Work done, cancelled work included: f U-Net forwards, v images scored, y VAE decodes, l calls to an outside grader",
    ),
    counter("ds_votes_total", &["choice"], "Votes"),
    gauge(
        "ds_plan_error_f",
        &[],
        "Actual minus planned U-Net forwards of the last completed generation; below 0 where a search needed less than its bound",
    ),
    gauge(
        "ds_seconds_per_f",
        &["model", "resolution"],
        "Measured seconds of a generation per U-Net forward, averaged over recent ones",
    ),
    gauge(
        "ds_model_info",
        &["model", "sha256_12", "dtype"],
        "Always 1; the models that are served",
    ),
    gauge("ds_model_load_seconds", &[], "Time to load all models"),
    gauge(
        "ds_model_ready",
        &["model"],
        "1 when the model is loaded and the server has made its first image",
    ),
    gauge(
        "ds_device_memory_bytes",
        &["kind"],
        "resident: of this process, on the host; free and total: of the device that the models are on",
    ),
    gauge(
        "ds_worker_heartbeat_age_seconds",
        &[],
        "Longest time that a running generation has reported nothing; 0 when none runs",
    ),
    gauge("ds_ready", &[], "1 when /readyz says 200"),
    gauge("ds_build_info", &["version", "commit"], "Always 1; what the server was built from"),
];

/// The metric of a name; every one that is made is in the table.
pub fn family(name: &str) -> Option<&'static Family> {
    METRICS.iter().find(|family| family.name == name)
}

/// The table as docs/http.md has it, with what the labels may be.
#[must_use]
pub fn markdown() -> String {
    let mut text = "| metric | type | meaning |\n| --- | --- | --- |\n".to_owned();
    for Family { name, kind, labels, help } in METRICS {
        let labels = match labels {
            [] => String::new(),
            labels => format!("{{{}}}", labels.join(",")),
        };
        text += &format!("| `{name}{labels}` | {} | {help} |\n", kind.name());
    }
    let list = |words: &[&str]| format!("`{}`", words.join("`, `"));
    let reasons = REJECTIONS.map(|kind| kind.slug());
    text += &format!(
        "\n`route` is a pattern of the [routes](#routes) or `unmatched`, `method` of a request {}. \
         `model` and a generation's `method` are names of `/models` and `/methods`, or `unknown`. \
         `stage` is {}; `unit` {}; `phase` {}; `choice` {}; `reason` {}. `resolution` is the least of these \
         with as many pixels as the image: {}.\n",
        list(METHODS),
        list(STAGES),
        list(UNITS),
        list(PHASES),
        list(&Choice::ALL.map(Choice::name)),
        list(&reasons),
        list(&super::labels::resolutions()),
    );
    text
}
