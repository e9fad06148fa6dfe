//! Generation threads: take a job, run it, encode its images, answer.

use std::any::Any;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;
use std::time::Instant;

use serde_json::Value;

use super::answer::{self, AnswerError};
use super::problem::Problem;
use super::queue::{Job, Reply};
use super::server::Shared;
use crate::diffusion::cost::Units;
use crate::engine::{Backend, Progress};
use crate::{Error, Result};

/// Deep recursion in tensor graphs needs far more than the usual 2 MiB.
pub const STACK_BYTES: usize = 64 << 20;

/// A finished generation, ready to be written to its client.
pub struct Done {
    pub id: String,
    pub body: Vec<u8>,
    pub queue_seconds: f64,
    pub seconds: f64,
}

/// Serves jobs until the queue ends.
pub fn work(shared: &Shared) {
    while let Some(job) = shared.queue.next() {
        let (id, start) = (job.id, Instant::now());
        let queue_seconds = start.duration_since(job.enqueued).as_secs_f64();
        shared.metrics.queue_wait.observe(queue_seconds);
        let reply = run(shared, &job, start, queue_seconds);
        // The place is free before the client hears of it.
        shared.queue.finish(id);
        // A client that already left needs no answer.
        let _ = job.reply.send(reply);
    }
}

fn run(shared: &Shared, job: &Job, start: Instant, queue_seconds: f64) -> Reply {
    let backend = shared.backend()?;
    let id = uuid::Uuid::now_v7().to_string();
    let method = match job.planned.resolved.method.get("name") {
        Some(Value::String(name)) => name.as_str(),
        _ => "other",
    };
    let mut counted = Units::default();
    let mut stages = BTreeMap::new();
    // The backend owns its state behind its own locks; a job that panics takes
    // nothing else with it.
    let result = catch_unwind(AssertUnwindSafe(|| {
        generate(shared, backend.as_ref(), job, &id, &mut counted, &mut stages)
    }))
    .unwrap_or_else(|panic| {
        Err(Failure::Internal(format!("panic: {}", message_of(panic.as_ref()))))
    });
    let seconds = start.elapsed().as_secs_f64();
    let outcome = match &result {
        Ok(_) => "completed",
        Err(Failure::Error(Error::Cancelled)) => "cancelled",
        Err(_) => "failed",
    };
    shared.metrics.generation(method, outcome, seconds, &stages);
    tracing::info!(
        id,
        method,
        outcome,
        f = counted.f,
        v = counted.v,
        y = counted.y,
        seconds,
        queue_seconds,
        "generation"
    );
    match result {
        Ok(body) => Ok(Done { id, body, queue_seconds, seconds }),
        Err(Failure::Error(error)) => {
            let retry_after = match &error {
                Error::Cancelled => Some(10),
                Error::OutOfMemory { cause, .. } => {
                    tracing::error!(id, %cause, "{error}");
                    Some(shared.queue.stats().retry_after)
                }
                _ => None,
            };
            Err(Problem { retry_after, ..Problem::from(error) })
        }
        Err(Failure::Internal(message)) => {
            Err(Problem::internal(format!("generation {id}: {message}")))
        }
    }
}

enum Failure {
    Error(Error),
    Internal(String),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Error(error)
    }
}

impl From<AnswerError> for Failure {
    fn from(error: AnswerError) -> Self {
        Self::Internal(error.to_string())
    }
}

fn generate(
    shared: &Shared,
    backend: &dyn Backend,
    job: &Job,
    id: &str,
    counted: &mut Units,
    stages: &mut BTreeMap<String, f64>,
) -> Result<Vec<u8>, Failure> {
    job.cancel.check()?;
    let start = Instant::now();
    // Counts each unit once, whichever of the reports is further.
    let mut count = |spent: Units| {
        let more = Units {
            f: spent.f.saturating_sub(counted.f),
            v: spent.v.saturating_sub(counted.v),
            y: spent.y.saturating_sub(counted.y),
            l: spent.l.saturating_sub(counted.l),
        };
        *counted += more;
        shared.metrics.spent(more);
        job.spent_f.store(spent.f, Ordering::Relaxed);
    };
    let mut progress = |progress: Progress| count(progress.spent);
    let generation = backend.generate(&job.planned, &job.cancel, &mut progress)?;
    let units = generation.cost.actual.units;
    count(units);
    shared.queue.measure(start.elapsed().as_secs_f64(), units.f);
    shared.metrics.plan_error(job.planned.cost.f, units.f);
    stages.clone_from(&generation.cost.actual.seconds);
    let encoding = Instant::now();
    let body = answer::write(id, generation)?;
    *stages.entry("encode".to_owned()).or_default() += encoding.elapsed().as_secs_f64();
    Ok(body)
}

fn message_of(panic: &(dyn Any + Send)) -> String {
    panic
        .downcast_ref::<String>()
        .cloned()
        .or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned()))
        .unwrap_or_else(|| "no message".to_owned())
}
