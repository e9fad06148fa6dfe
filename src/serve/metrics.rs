//! Prometheus metrics. Labels come from fixed lists or from the registry of
//! methods, never from what a caller writes.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, PoisonError};

use prometheus::core::Collector;
use prometheus::{
    CounterVec, Encoder, Gauge, Histogram, HistogramOpts, HistogramVec, IntCounterVec, IntGauge,
    Opts, Registry, TextEncoder,
};

use super::live::Phase;
use super::queue::Stats;
use crate::diffusion::cost::Units;
use crate::{Error, Result};

/// Name and help of every metric, in the order of docs/http.md.
pub const METRICS: [(&str, &str); 17] = [
    ("ds_http_requests_total", "Answered requests by route and status"),
    ("ds_http_request_duration_seconds", "Time to answer by route"),
    ("ds_http_requests_in_flight", "Requests being answered"),
    ("ds_generations_total", "Generations by method and outcome"),
    ("ds_generation_seconds", "Time of a completed generation on its thread, by method"),
    ("ds_queue_wait_seconds", "Time from admission to a generation thread"),
    ("ds_queue_depth", "Admitted requests that wait"),
    ("ds_queue_f_backlog", "U-Net forwards of waiting work and the rest of running work"),
    ("ds_generations_running", "Generations running now"),
    ("ds_rejections_total", "Refused requests by reason"),
    ("ds_client_disconnects_total", "Clients that left before their answer, by phase"),
    (
        "ds_units_total",
        "Work done: f U-Net forwards, v images scored, y VAE decodes, l grader calls",
    ),
    ("ds_plan_error_f", "Actual minus planned U-Net forwards of the last completed generation"),
    ("ds_stage_seconds_total", "Time by stage of a generation"),
    ("ds_seconds_per_f", "Measured seconds per U-Net forward, averaged over recent generations"),
    ("ds_ready", "1 when the server accepts generations"),
    ("ds_build_info", "Always 1; the version of the server"),
];

/// The most label values that stages and methods may take; the rest is "other".
const MOST_LABELS: usize = 32;

fn help(name: &str) -> &'static str {
    METRICS.iter().find(|(n, _)| *n == name).map_or("", |(_, help)| help)
}

struct Maker(Registry);

impl Maker {
    fn add<C: Collector + Clone + 'static>(
        &self,
        made: prometheus::Result<C>,
    ) -> prometheus::Result<C> {
        let made = made?;
        self.0.register(Box::new(made.clone()))?;
        Ok(made)
    }

    fn counters(&self, name: &str, labels: &[&str]) -> prometheus::Result<IntCounterVec> {
        self.add(IntCounterVec::new(Opts::new(name, help(name)), labels))
    }

    fn gauge(&self, name: &str) -> prometheus::Result<IntGauge> {
        self.add(IntGauge::new(name, help(name)))
    }

    fn histogram(&self, name: &str) -> HistogramOpts {
        let buckets = vec![
            0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0,
            300.0, 600.0, 1200.0, 1800.0,
        ];
        HistogramOpts::new(name, help(name)).buckets(buckets)
    }
}

/// Every metric of one server.
pub struct Metrics {
    registry: Registry,
    pub http_requests: IntCounterVec,
    pub http_seconds: HistogramVec,
    pub http_in_flight: IntGauge,
    generations: IntCounterVec,
    generation_seconds: HistogramVec,
    pub queue_wait: Histogram,
    queue_depth: IntGauge,
    queue_f_backlog: IntGauge,
    running: IntGauge,
    rejections: IntCounterVec,
    disconnects: IntCounterVec,
    units: IntCounterVec,
    plan_error_f: IntGauge,
    stage_seconds: CounterVec,
    seconds_per_f: Gauge,
    ready: IntGauge,
    labels: Mutex<BTreeSet<String>>,
}

impl Metrics {
    /// # Errors
    /// Only if two metrics had the same name.
    pub fn new() -> Result<Self> {
        Self::build().map_err(|e| Error::invalid("metrics", e.to_string()))
    }

    fn build() -> prometheus::Result<Self> {
        let registry = Registry::new();
        let make = Maker(registry.clone());
        let info = make.add(IntCounterVec::new(
            Opts::new("ds_build_info", help("ds_build_info")),
            &["version"],
        ))?;
        info.with_label_values(&[env!("CARGO_PKG_VERSION")]).inc();
        let metrics = Self {
            http_requests: make.counters("ds_http_requests_total", &["route", "status"])?,
            http_seconds: make.add(HistogramVec::new(
                make.histogram("ds_http_request_duration_seconds"),
                &["route"],
            ))?,
            http_in_flight: make.gauge("ds_http_requests_in_flight")?,
            generations: make.counters("ds_generations_total", &["method", "outcome"])?,
            generation_seconds: make
                .add(HistogramVec::new(make.histogram("ds_generation_seconds"), &["method"]))?,
            queue_wait: make.add(Histogram::with_opts(make.histogram("ds_queue_wait_seconds")))?,
            queue_depth: make.gauge("ds_queue_depth")?,
            queue_f_backlog: make.gauge("ds_queue_f_backlog")?,
            running: make.gauge("ds_generations_running")?,
            rejections: make.counters("ds_rejections_total", &["reason"])?,
            disconnects: make.counters("ds_client_disconnects_total", &["phase"])?,
            units: make.counters("ds_units_total", &["unit"])?,
            plan_error_f: make.gauge("ds_plan_error_f")?,
            stage_seconds: make.add(CounterVec::new(
                Opts::new("ds_stage_seconds_total", help("ds_stage_seconds_total")),
                &["stage"],
            ))?,
            seconds_per_f: make.add(Gauge::new("ds_seconds_per_f", help("ds_seconds_per_f")))?,
            ready: make.gauge("ds_ready")?,
            labels: Mutex::default(),
            registry,
        };
        // A counter that has not counted yet reads 0 instead of being absent.
        for unit in ["f", "v", "y", "l"] {
            metrics.units.with_label_values(&[unit]);
        }
        for reason in [
            "queue-full",
            "budget",
            "insufficient-memory",
            "not-ready",
            "draining",
            "unauthorized",
            "forbidden",
        ] {
            metrics.rejections.with_label_values(&[reason]);
        }
        for phase in ["queued", "running"] {
            metrics.disconnects.with_label_values(&[phase]);
        }
        Ok(metrics)
    }

    /// Keeps the number of label values bounded whatever the backend reports.
    fn label(&self, kind: char, value: &str) -> String {
        let mut seen = self.labels.lock().unwrap_or_else(PoisonError::into_inner);
        let key = format!("{kind}{value}");
        if !seen.contains(&key) {
            if seen.iter().filter(|k| k.starts_with(kind)).count() >= MOST_LABELS {
                return "other".to_owned();
            }
            seen.insert(key);
        }
        value.to_owned()
    }

    /// Counts work that has been done.
    pub fn spent(&self, units: Units) {
        for (unit, by) in [("f", units.f), ("v", units.v), ("y", units.y), ("l", units.l)] {
            self.units.with_label_values(&[unit]).inc_by(by);
        }
    }

    /// A generation has ended; `seconds` by stage where it completed.
    pub fn generation(
        &self,
        method: &str,
        outcome: &str,
        total: f64,
        seconds: &BTreeMap<String, f64>,
    ) {
        let method = self.label('m', method);
        self.generations.with_label_values(&[method.as_str(), outcome]).inc();
        if outcome == "completed" {
            self.generation_seconds.with_label_values(&[&method]).observe(total);
        }
        for (stage, &seconds) in seconds {
            if seconds.is_finite() && seconds >= 0.0 {
                self.stage_seconds.with_label_values(&[&self.label('s', stage)]).inc_by(seconds);
            }
        }
    }

    /// How far a plan was off.
    pub fn plan_error(&self, planned_f: u64, actual_f: u64) {
        let of = |f: u64| i64::try_from(f).unwrap_or(i64::MAX);
        self.plan_error_f.set(of(actual_f) - of(planned_f));
    }

    /// A request was refused; `reason` is the slug of its problem.
    pub fn rejected(&self, reason: &'static str) {
        self.rejections.with_label_values(&[reason]).inc();
    }

    /// A client left before its answer.
    pub(super) fn disconnected(&self, phase: Phase) {
        let phase = match phase {
            Phase::Queued => "queued",
            Phase::Running => "running",
        };
        self.disconnects.with_label_values(&[phase]).inc();
    }

    /// The text exposition format.
    pub(super) fn render(&self, queue: Stats, ready: bool) -> Result<Vec<u8>> {
        let of = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
        self.queue_depth.set(of(queue.waiting));
        self.running.set(of(queue.running));
        self.queue_f_backlog.set(i64::try_from(queue.backlog_f).unwrap_or(i64::MAX));
        self.seconds_per_f.set(queue.seconds_per_f.unwrap_or(f64::NAN));
        self.ready.set(i64::from(ready));
        let mut text = Vec::new();
        TextEncoder::new()
            .encode(&self.registry.gather(), &mut text)
            .map_err(|e| Error::invalid("metrics", e.to_string()))?;
        Ok(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn label_values_are_bounded() {
        let metrics = Metrics::new().unwrap();
        for i in 0..200 {
            metrics.generation(&format!("m{i}"), "completed", 0.1, &BTreeMap::new());
        }
        let families = metrics.registry.gather();
        let generations =
            families.iter().find(|f| f.name() == "ds_generations_total").unwrap().get_metric();
        assert_eq!(generations.len(), MOST_LABELS + 1);
    }

    #[test]
    fn every_metric_is_listed() {
        let metrics = Metrics::new().unwrap();
        metrics.http_requests.with_label_values(&["/", "200"]).inc();
        metrics.http_seconds.with_label_values(&["/"]).observe(0.1);
        metrics.generation("plain", "completed", 0.1, &[("unet".to_owned(), 0.1)].into());
        let gathered: BTreeSet<_> =
            metrics.registry.gather().iter().map(|f| f.name().to_owned()).collect();
        let listed: BTreeSet<_> = METRICS.iter().map(|(name, _)| (*name).to_owned()).collect();
        assert_eq!(gathered, listed);
        assert!(METRICS.iter().all(|(_, help)| !help.is_empty()));
    }
}
