//! Generation threads: take a job, run it, encode its images, answer.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Instant;

use super::answer::{self, Answer, AnswerError};
use super::deadline;
use super::jobs;
use super::live::{Done, End};
use super::metrics::Outcome;
use super::problem::Problem;
use super::queue::Job;
use super::server::Shared;
use super::store::Lasting;
use crate::diffusion::cost::Units;
use crate::engine::Progress;
use crate::{Error, Result};

/// Deep recursion in tensor graphs needs far more than the usual 2 MiB.
pub const STACK_BYTES: usize = 64 << 20;

/// Serves jobs until the queue ends.
pub fn work(shared: &Shared) {
    while let Some(job) = shared.queue.next() {
        let start = Instant::now();
        let queue_seconds = start.duration_since(job.enqueued).as_secs_f64();
        shared.metrics.queue_wait.observe(queue_seconds);
        let resolved = &job.live.new.planned.resolved;
        // What is logged on the way has the id. Prompts are not logged.
        let span = tracing::info_span!(
            "generation",
            id = %job.live.id,
            model = %resolved.model,
            method = %resolved.method_name()
        );
        let outcome = span.in_scope(|| run(shared, &job, start, queue_seconds));
        if matches!(outcome, Err(Stop::Told)) {
            // Recorded before the server may end.
            jobs::stopped(shared, &job.live);
        }
        // The place is free before the client hears of it.
        shared.queue.finish(&job.live.id);
        match outcome {
            Ok(done) => job.live.end(End::Completed(done)),
            Err(Stop::Problem(problem)) => job.live.end(End::Problem(problem)),
            Err(Stop::Told) => {}
        }
    }
}

/// Why a generation has no result.
enum Stop {
    Problem(Problem),
    /// Somebody asked it to stop.
    Told,
}

fn run(shared: &Shared, job: &Job, start: Instant, queue_seconds: f64) -> Result<Done, Stop> {
    let (live, id) = (&job.live, job.live.id.as_str());
    let resolved = &live.new.planned.resolved;
    let mut counted = Units::default();
    // The backend owns its state behind its own locks; a job that panics takes
    // nothing else with it.
    let result = catch_unwind(AssertUnwindSafe(|| {
        begin(shared, job, queue_seconds)?;
        generate(shared, job, &mut counted)
    }))
    .unwrap_or_else(|panic| {
        Err(Failure::Internal(format!("panic: {}", message_of(panic.as_ref()))))
    });
    let seconds = start.elapsed().as_secs_f64();
    let outcome = match &result {
        Ok(_) => Outcome::Completed,
        Err(Failure::Error(Error::Cancelled)) => Outcome::Cancelled,
        Err(Failure::Error(Error::Deadline)) => Outcome::Deadline,
        Err(Failure::Error(Error::Budget(_))) => Outcome::Budget,
        Err(_) => Outcome::Failed,
    };
    shared.metrics.generation(resolved, outcome);
    if matches!(outcome, Outcome::Cancelled | Outcome::Deadline)
        && let Some(told) = live.told_at()
    {
        shared.metrics.stopped_after(told.elapsed());
    }
    tracing::info!(
        outcome = outcome.name(),
        f = counted.f,
        v = counted.v,
        y = counted.y,
        seconds,
        queue_seconds,
        "ended"
    );
    let failure = match result {
        Ok(Written { linked, inline, running_seconds }) => {
            let planned_f = live.new.planned.cost.f;
            shared.metrics.completed(resolved, seconds, running_seconds, counted.f, planned_f);
            return Ok(Done { linked: linked.into(), inline, queue_seconds, seconds });
        }
        Err(failure) => failure,
    };
    let problem = match failure {
        Failure::Error(Error::Cancelled) => return Err(Stop::Told),
        Failure::Error(Error::Deadline) => deadline::missed(live),
        Failure::Error(error) => {
            let retry_after = match &error {
                Error::OutOfMemory { cause, .. } => {
                    tracing::error!(%cause, "{error}");
                    Some(shared.queue.stats().retry_after)
                }
                _ => None,
            };
            Problem { retry_after, ..Problem::from(error) }
        }
        Failure::Internal(message) => Problem::internal(format!("generation {id}: {message}")),
    };
    jobs::record_end(shared, live, &problem);
    Err(Stop::Problem(problem))
}

fn begin(shared: &Shared, job: &Job, queue_seconds: f64) -> Result<(), Failure> {
    let live = &job.live;
    live.cancel.check()?;
    if live.durable {
        shared.store.start(&live.id)?;
    }
    live.started(queue_seconds);
    Ok(())
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

struct Written {
    /// The answer with images as addresses.
    linked: String,
    /// With their bytes, if somebody waits for them.
    inline: Option<Arc<[u8]>>,
    /// Seconds in the models.
    running_seconds: f64,
}

fn generate(shared: &Shared, job: &Job, counted: &mut Units) -> Result<Written, Failure> {
    let backend = shared.backend().map_err(|problem| Failure::Internal(problem.to_string()))?;
    let (live, planned) = (&job.live, &job.live.new.planned);
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
        if more.f > 0 {
            live.spent(spent, planned.cost);
        }
    };
    let (mut before, mut at) = (Units::default(), Instant::now());
    let mut progress = |progress: Progress| {
        let Units { f, v, y, .. } = progress.spent;
        // Only denoising lies between two reports that differ in nothing else.
        if before.f > 0 && f > before.f && (v, y) == (before.v, before.y) {
            shared.metrics.step(&planned.resolved, at.elapsed().as_secs_f64());
        }
        (before, at) = (progress.spent, Instant::now());
        count(progress.spent);
        if let Some(event) = progress.event {
            live.push("decision", &event);
        }
        if let Some(preview) = progress.preview {
            answer::push_preview(live, &preview);
        }
    };
    let generation = backend.generate(planned, &live.cancel, &mut progress)?;
    let units = generation.cost.actual.units;
    count(units);
    let running_seconds = start.elapsed().as_secs_f64();
    shared.queue.measure(running_seconds, units.f);
    shared.speed.learn(&generation.resolved, &generation.cost.actual, running_seconds);
    for (stage, &seconds) in &generation.cost.actual.seconds {
        shared.metrics.stage(stage, seconds);
    }
    let encoding = Instant::now();
    let answer = Answer::new(&live.id, generation)?;
    shared.metrics.stage("encode", encoding.elapsed().as_secs_f64());
    let storing = Instant::now();
    let (linked, answer) = store(shared, job, answer)?;
    shared.metrics.stage("store", storing.elapsed().as_secs_f64());
    let inline = if live.is_awaited() { Some(answer.inline()?.into()) } else { None };
    Ok(Written { linked, inline, running_seconds })
}

/// Writes the result down before anybody hears of it. A client that waits or watches gets the
/// images' bytes even when that fails.
fn store(shared: &Shared, job: &Job, mut answer: Answer) -> Result<(String, Answer), Failure> {
    let (live, linked) = (&job.live, answer.linked()?);
    let (new, lasting) = match live.durable {
        true => (None, Lasting::Machine),
        false => (Some(&live.new), Lasting::Process),
    };
    match shared.store.complete(&live.id, new, answer.files(), &linked, lasting) {
        Ok(()) => Ok((linked, answer)),
        Err(error) if live.durable => Err(error.into()),
        Err(error) => {
            tracing::error!(id = live.id, %error, "a result was not stored");
            answer.forget_addresses();
            answer.embed();
            Ok((answer.linked()?, answer))
        }
    }
}

fn message_of(panic: &(dyn Any + Send)) -> String {
    panic
        .downcast_ref::<String>()
        .cloned()
        .or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned()))
        .unwrap_or_else(|| "no message".to_owned())
}
