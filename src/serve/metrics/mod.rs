//! Prometheus metrics: [`METRICS`] lists them, [`Metrics`] counts.

mod labels;
mod memory;
mod table;

use std::time::Duration;

use prometheus::core::Collector;
use prometheus::{
    Encoder, Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounterVec, IntGauge,
    IntGaugeVec, Opts, Registry, TextEncoder,
};

pub use labels::Outcome;
pub use table::{Family, METRICS, Type, markdown};

use super::live::Phase;
use super::problem::Kind;
use super::queue::Stats;
use super::vote::Choice;
use crate::diffusion::cost::Units;
use crate::engine::request::{Listing, ModelInfo, Resolved};
use crate::nn::device_memory::DeviceMemory;
use crate::{Error, Result};
use labels::{PHASES, REJECTIONS, UNITS};

/// Upper bounds of histograms of seconds.
const SECONDS: [f64; 18] = [
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0,
    1200.0, 1800.0,
];
/// Upper bounds of U-Net forwards.
const FORWARDS: [f64; 9] = [50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0, 10_000.0, 20_000.0];
/// How much a new measurement counts.
const WEIGHT: f64 = 0.3;
/// Hexadecimal digits of a checkpoint's hash that tell it from others.
const SHA_DIGITS: usize = 12;

/// Makes and registers metrics with the labels and the help of the table.
struct Maker(Registry);

impl Maker {
    fn add<C: Collector + Clone + 'static>(
        &self,
        name: &str,
        make: impl FnOnce(Opts, &'static [&'static str]) -> prometheus::Result<C>,
    ) -> prometheus::Result<C> {
        let family = table::family(name)
            .ok_or_else(|| prometheus::Error::Msg(format!("{name} is not in the table")))?;
        let made = make(Opts::new(family.name, family.help), family.labels)?;
        self.0.register(Box::new(made.clone()))?;
        Ok(made)
    }

    fn counters(&self, name: &str) -> prometheus::Result<IntCounterVec> {
        self.add(name, IntCounterVec::new)
    }

    fn gauge(&self, name: &str) -> prometheus::Result<IntGauge> {
        self.add(name, |opts, _| IntGauge::with_opts(opts))
    }

    fn gauges(&self, name: &str) -> prometheus::Result<IntGaugeVec> {
        self.add(name, IntGaugeVec::new)
    }

    fn histogram(&self, name: &str) -> prometheus::Result<Histogram> {
        self.add(name, |opts, _| Histogram::with_opts(bounded(opts, &SECONDS)))
    }

    fn histograms(&self, name: &str, bounds: &[f64]) -> prometheus::Result<HistogramVec> {
        self.add(name, |opts, labels| HistogramVec::new(bounded(opts, bounds), labels))
    }
}

fn bounded(opts: Opts, bounds: &[f64]) -> HistogramOpts {
    HistogramOpts::from(opts).buckets(bounds.to_vec())
}

/// What is read when somebody asks.
pub(super) struct Reading {
    pub queue: Stats,
    pub ready: bool,
    /// Longest silence of a running generation.
    pub heartbeat: Duration,
    pub device: Option<DeviceMemory>,
}

/// Every metric of one server.
pub struct Metrics {
    all: Registry,
    registry: labels::Registry,
    pub http_in_flight: IntGauge,
    pub queue_wait: Histogram,
    http_requests: IntCounterVec,
    http_seconds: HistogramVec,
    generations: IntCounterVec,
    generation_seconds: HistogramVec,
    generation_f: HistogramVec,
    stage_seconds: HistogramVec,
    step_seconds: HistogramVec,
    cancel_latency: Histogram,
    queue_depth: IntGauge,
    queue_f_backlog: IntGauge,
    retry_after: IntGauge,
    running: IntGauge,
    rejections: IntCounterVec,
    disconnects: IntCounterVec,
    units: IntCounterVec,
    votes: IntCounterVec,
    plan_error_f: IntGauge,
    seconds_per_f: GaugeVec,
    model_info: IntGaugeVec,
    model_load_seconds: Gauge,
    model_ready: IntGaugeVec,
    device_memory: IntGaugeVec,
    heartbeat_age: Gauge,
    ready: IntGauge,
}

impl Metrics {
    /// # Errors
    /// Only if the table had a name twice, or not.
    pub fn new() -> Result<Self> {
        Self::build().map_err(|e| Error::invalid("metrics", e.to_string()))
    }

    fn build() -> prometheus::Result<Self> {
        let make = Maker(Registry::new());
        let commit = option_env!("DS_COMMIT").unwrap_or("unknown");
        let info = make.gauges("ds_build_info")?;
        info.with_label_values(&[env!("CARGO_PKG_VERSION"), commit]).set(1);
        let metrics = Self {
            registry: labels::Registry::default(),
            http_in_flight: make.gauge("ds_http_requests_in_flight")?,
            queue_wait: make.histogram("ds_queue_wait_seconds")?,
            http_requests: make.counters("ds_http_requests_total")?,
            http_seconds: make.histograms("ds_http_request_duration_seconds", &SECONDS)?,
            generations: make.counters("ds_generations_total")?,
            generation_seconds: make.histograms("ds_generation_seconds", &SECONDS)?,
            generation_f: make.histograms("ds_f_per_generation", &FORWARDS)?,
            stage_seconds: make.histograms("ds_stage_duration_seconds", &SECONDS)?,
            step_seconds: make.histograms("ds_denoise_step_seconds", &SECONDS)?,
            cancel_latency: make.histogram("ds_cancel_latency_seconds")?,
            queue_depth: make.gauge("ds_queue_depth")?,
            queue_f_backlog: make.gauge("ds_queue_f_backlog")?,
            retry_after: make.gauge("ds_retry_after_seconds")?,
            running: make.gauge("ds_generations_running")?,
            rejections: make.counters("ds_rejections_total")?,
            disconnects: make.counters("ds_client_disconnects_total")?,
            units: make.counters("ds_units_total")?,
            votes: make.counters("ds_votes_total")?,
            plan_error_f: make.gauge("ds_plan_error_f")?,
            seconds_per_f: make.add("ds_seconds_per_f", GaugeVec::new)?,
            model_info: make.gauges("ds_model_info")?,
            model_load_seconds: make
                .add("ds_model_load_seconds", |opts, _| Gauge::with_opts(opts))?,
            model_ready: make.gauges("ds_model_ready")?,
            device_memory: make.gauges("ds_device_memory_bytes")?,
            heartbeat_age: make
                .add("ds_worker_heartbeat_age_seconds", |opts, _| Gauge::with_opts(opts))?,
            ready: make.gauge("ds_ready")?,
            all: make.0,
        };
        // A counter that has not counted yet reads 0 instead of being absent.
        for unit in UNITS {
            metrics.units.with_label_values(&[unit]);
        }
        for choice in Choice::ALL {
            metrics.votes.with_label_values(&[choice.name()]);
        }
        for kind in REJECTIONS {
            metrics.rejections.with_label_values(&[kind.slug()]);
        }
        for phase in PHASES {
            metrics.disconnects.with_label_values(&[phase]);
        }
        Ok(metrics)
    }

    /// A request was answered.
    pub fn answered(&self, route: &str, method: &str, status: u16, seconds: f64) {
        let method = labels::method(method);
        self.http_requests.with_label_values(&[route, method, &status.to_string()]).inc();
        self.http_seconds.with_label_values(&[route, method]).observe(seconds);
    }

    /// The models are loaded, which took `seconds`; `unloaded` are ids of those that may be later.
    pub fn loaded(
        &self,
        models: &[ModelInfo],
        unloaded: &[String],
        methods: &[Listing],
        seconds: f64,
    ) {
        self.registry.learn(models, unloaded, methods);
        self.model_load_seconds.set(seconds);
        for model in models {
            self.model(model, false);
        }
    }

    /// A model is loaded; it has made its first image, or not.
    pub fn model(&self, model: &ModelInfo, ready: bool) {
        let id = self.registry.model(&model.id);
        let sha = model.sha256.get(..SHA_DIGITS).unwrap_or(&model.sha256);
        self.model_info.with_label_values(&[id, sha, &model.dtype]).set(1);
        self.model_ready.with_label_values(&[id]).set(ready.into());
    }

    /// A model is not loaded any more.
    pub fn unloaded(&self, model: &ModelInfo) {
        let id = self.registry.model(&model.id);
        let sha = model.sha256.get(..SHA_DIGITS).unwrap_or(&model.sha256);
        // It may be there twice, under names that are unknown.
        let _ = self.model_info.remove_label_values(&[id, sha, &model.dtype]);
        self.model_ready.with_label_values(&[id]).set(0);
    }

    /// Counts work that has been done.
    pub fn spent(&self, units: Units) {
        for (unit, by) in UNITS.iter().zip([units.f, units.v, units.y, units.l]) {
            self.units.with_label_values(&[unit]).inc_by(by);
        }
    }

    /// Counts a vote.
    pub fn voted(&self, choice: Choice) {
        self.votes.with_label_values(&[choice.name()]).inc();
    }

    /// A stage of a generation took `seconds`.
    pub fn stage(&self, stage: &str, seconds: f64) {
        if seconds.is_finite() && seconds >= 0.0 {
            self.stage_seconds.with_label_values(&[labels::stage(stage)]).observe(seconds);
        }
    }

    /// A denoising step took `seconds`.
    pub fn step(&self, resolved: &Resolved, seconds: f64) {
        self.step_seconds.with_label_values(&self.shape(resolved)).observe(seconds);
    }

    fn shape<'a>(&self, resolved: &'a Resolved) -> [&'a str; 2] {
        let resolution = labels::resolution(resolved.width, resolved.height);
        [self.registry.model(&resolved.model), resolution]
    }

    /// A generation has ended.
    pub fn generation(&self, resolved: &Resolved, outcome: Outcome) {
        let method = self.registry.method(resolved.method_name());
        let model = self.registry.model(&resolved.model);
        self.generations.with_label_values(&[model, method, outcome.name()]).inc();
    }

    /// What a completed generation took: `total` seconds on its thread, `running` of them in the
    /// models, and `f` forwards where `planned_f` were planned.
    pub fn completed(&self, resolved: &Resolved, total: f64, running: f64, f: u64, planned_f: u64) {
        let method = self.registry.method(resolved.method_name());
        self.generation_seconds.with_label_values(&[method]).observe(total);
        self.generation_f.with_label_values(&[method]).observe(f as f64);
        let of = |f: u64| i64::try_from(f).unwrap_or(i64::MAX);
        self.plan_error_f.set(of(f) - of(planned_f));
        if f > 0 {
            let gauge = self.seconds_per_f.with_label_values(&self.shape(resolved));
            let (old, new) = (gauge.get(), running / f as f64);
            gauge.set(if old > 0.0 { (1.0 - WEIGHT) * old + WEIGHT * new } else { new });
        }
    }

    /// A thread has stopped, so long after it was told to.
    pub fn stopped_after(&self, latency: Duration) {
        self.cancel_latency.observe(latency.as_secs_f64());
    }

    /// A request was refused; not every problem is counted.
    pub fn rejected(&self, kind: Kind) {
        if REJECTIONS.contains(&kind) {
            self.rejections.with_label_values(&[kind.slug()]).inc();
        }
    }

    /// A client left before its answer.
    pub(super) fn disconnected(&self, phase: Phase) {
        let phase = match phase {
            Phase::Queued => PHASES[0],
            Phase::Running => PHASES[1],
        };
        self.disconnects.with_label_values(&[phase]).inc();
    }

    /// The text exposition format.
    pub(super) fn render(&self, reading: &Reading) -> Result<Vec<u8>> {
        let (queue, of) = (reading.queue, |n: usize| i64::try_from(n).unwrap_or(i64::MAX));
        let of_u64 = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
        self.queue_depth.set(of(queue.waiting));
        self.running.set(of(queue.running));
        self.queue_f_backlog.set(of_u64(queue.backlog_f));
        self.retry_after.set(of_u64(queue.retry_after));
        self.ready.set(i64::from(reading.ready));
        self.heartbeat_age.set(reading.heartbeat.as_secs_f64());
        let device = reading.device;
        for (kind, bytes) in [
            ("resident", memory::resident()),
            ("free", device.map(|memory| memory.free)),
            ("total", device.map(|memory| memory.total)),
        ] {
            if let Some(bytes) = bytes {
                self.device_memory.with_label_values(&[kind]).set(of_u64(bytes));
            }
        }
        let mut text = Vec::new();
        TextEncoder::new()
            .encode(&self.all.gather(), &mut text)
            .map_err(|e| Error::invalid("metrics", e.to_string()))?;
        Ok(text)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_metric_of_the_table_is_there() {
        let metrics = Metrics::new().unwrap();
        let resolved = super::super::store::New::example("a", 0).planned.resolved;
        metrics.answered("/", "GET", 200, 0.1);
        metrics.loaded(&[], &[], &[], 0.1);
        let model = crate::engine::request::ModelInfo {
            id: "tiny".to_owned(),
            sha256: "é".to_owned(),
            default_width: 8,
            default_height: 8,
            default_steps: 1,
            default_guidance_scale: 1.0,
            adapters: Vec::new(),
            unet_parameters: 1,
            dtype: "f32".to_owned(),
            example_prompts: Vec::new(),
        };
        metrics.loaded(&[model], &[], &[], 0.1);
        metrics.generation(&resolved, Outcome::Completed);
        metrics.completed(&resolved, 0.2, 0.1, 4, 4);
        metrics.step(&resolved, 0.1);
        metrics.stage("unet", 0.1);
        let queue = Stats {
            waiting: 0,
            running: 0,
            backlog_f: 0,
            seconds_per_f: None,
            retry_after: 5,
            full: false,
        };
        let device = Some(DeviceMemory { free: 1, total: 2 });
        let reading = Reading { queue, ready: true, heartbeat: Duration::ZERO, device };
        metrics.render(&reading).unwrap();
        let gathered: BTreeSet<_> =
            metrics.all.gather().iter().map(|f| f.name().to_owned()).collect();
        let listed: BTreeSet<_> = METRICS.iter().map(|family| family.name.to_owned()).collect();
        assert_eq!(gathered, listed);
        assert_eq!(METRICS.len(), listed.len());
        assert!(METRICS.iter().all(|family| !family.help.is_empty()));
    }
}
