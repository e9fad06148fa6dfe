//! A generation's way through the server: accepted, waited for, left, cancelled,
//! taken up again after a restart.

use std::sync::Arc;

use serde_json::json;

use super::auth::Caller;
use super::deadline;
use super::live::{End, Live, Phase, StoppedBy, Waiter};
use super::metrics::Outcome;
use super::problem::{Kind, Problem};
use super::server::Shared;
use super::store::{Comparison, New, Record, State};
use crate::Error;
use crate::engine::Backend;
use crate::engine::request::GenerateRequest;

/// How often a generation may begin: one that ends the process each time must not do so for ever.
const MOST_STARTS: u32 = 3;

/// What an id stands for that a client chose.
pub enum Put {
    /// This request, which was accepted now or is under way.
    Live(Arc<Live>),
    /// The same request, which has ended before.
    Ended(Box<Record>),
}

/// Accepts a planned request, and waits for it from before it begins: its answer has the images'
/// bytes. One that is durable is on the disk when this returns, which blocks for that.
pub fn submit(shared: &Shared, new: New, durable: bool) -> Result<(Arc<Live>, Waiter), Problem> {
    let live = Live::new(new, durable);
    let waiter = live.wait();
    shared.lives.claim(&live).map_err(|_| taken(&live.id))?;
    admit(shared, &live)?;
    Ok((live, waiter))
}

/// Accepts a durable request under an id of the client's, or finds what it stands for. Blocks.
pub fn put(shared: &Shared, caller: &Caller, new: New) -> Result<Put, Problem> {
    let same =
        |client: &str, request: &GenerateRequest| caller.sees(client) && *request == new.request;
    let under_way = |there: Arc<Live>| {
        let same = there.durable && same(&there.new.client, &there.new.request);
        if same { Ok(Put::Live(there)) } else { Err(taken(&new.id)) }
    };
    if let Some(there) = shared.lives.get(&new.id) {
        return under_way(there);
    }
    match shared.store.get(&new.id)? {
        Some(record) if !same(&record.client, &record.request) => return Err(taken(&new.id)),
        Some(record) if record.state.is_final() => return Ok(Put::Ended(Box::new(record))),
        // Somebody else put it meanwhile, or the server is ending.
        Some(_) => {
            let there = shared.lives.get(&new.id);
            return there.map_or_else(|| Err(idle(shared)), under_way);
        }
        None => {}
    }
    let live = Live::new(new.clone(), true);
    // Somebody else may have put it meanwhile.
    if let Err(there) = shared.lives.claim(&live) {
        return under_way(there);
    }
    admit(shared, &live)?;
    Ok(Put::Live(live))
}

fn taken(id: &str) -> Problem {
    Problem::new(Kind::Conflict, format!("{id} is another request's id"))
}

/// On failure nothing is left of it.
fn admit(shared: &Shared, live: &Arc<Live>) -> Result<(), Problem> {
    let (new, durable) = (&live.new, live.durable);
    let (id, planned) = (new.id.as_str(), new.planned.cost);
    let accept = || {
        deadline::check(shared, &new.client, &new.request, &new.planned, 0.0)?;
        if durable {
            shared.store.accept(new)?;
        }
        let ahead = shared.queue.ahead_of_new(&new.client, planned.f);
        live.push("queued", &json!({ "id": id, "planned": planned, "ahead": ahead }));
        shared.queue.push(vec![Arc::clone(live)]).inspect_err(|_| {
            if durable && let Err(error) = shared.store.forget(id) {
                tracing::error!(id, %error, "a refused request stays in the history");
            }
        })
    };
    accept().inspect_err(|problem: &Problem| {
        shared.lives.release(live);
        // For whoever found it by its id meanwhile.
        live.end(End::Problem(problem.clone()));
    })
}

/// Accepts a comparison: all of its arms or none. On the disk when this returns. Blocks.
pub fn submit_comparison(
    shared: &Shared,
    comparison: &Comparison,
    arms: Vec<New>,
) -> Result<Vec<Arc<Live>>, Problem> {
    let lives: Vec<_> = arms.iter().cloned().map(|new| Live::new(new, true)).collect();
    let forwards: Vec<u64> = arms.iter().map(|new| new.planned.cost.f).collect();
    let ahead = shared.queue.ahead_of_each(&comparison.client, &forwards);
    for (live, ahead) in lives.iter().zip(ahead) {
        // Their ids are new with the comparison's.
        shared.lives.claim(live).map_err(|_| taken(&live.id))?;
        let planned = live.new.planned.cost;
        live.push("queued", &json!({ "id": live.id, "planned": planned, "ahead": ahead }));
    }
    let accept = || {
        shared.store.accept_comparison(comparison, &arms)?;
        shared.queue.push(lives.clone()).inspect_err(|_| {
            if let Err(error) = shared.store.forget_comparison(&arms) {
                let id = &comparison.id;
                tracing::error!(id, %error, "a refused comparison stays in the history");
            }
        })
    };
    accept().inspect_err(|problem: &Problem| {
        for live in &lives {
            shared.lives.release(live);
            live.end(End::Problem(problem.clone()));
        }
    })?;
    Ok(lives)
}

/// Ends a generation that never began.
fn end_unbegun(shared: &Shared, live: &Live, problem: Problem) {
    record_end(shared, live, &problem);
    shared.metrics.generation(&live.new.planned.resolved, Outcome::of(&problem));
    live.end(End::Problem(problem));
}

/// Writes to the history how a durable generation ended without a result.
pub fn record_end(shared: &Shared, live: &Live, problem: &Problem) {
    if !live.durable {
        return;
    }
    let text = problem.to_json().to_string();
    if let Err(error) = shared.store.end(&live.id, problem.state(), &text) {
        tracing::error!(id = live.id, %error, "the end of a generation was not recorded");
    }
}

fn cancelled() -> Problem {
    Problem::new(Kind::Cancelled, "it was cancelled before it was finished")
}

/// The client of a synchronous generation left before its end.
pub fn leave(shared: &Shared, live: &Live) {
    if live.durable || live.ended().is_some() {
        return;
    }
    live.stop(StoppedBy::Leaving);
    let phase = match shared.queue.take(&live.id) {
        Some(job) => {
            end_unbegun(shared, &job.live, cancelled());
            Phase::Queued
        }
        None => Phase::Running,
    };
    shared.metrics.disconnected(phase);
}

/// Ends what waits in the queue when its deadline passes, until the server ends.
pub fn keep_deadlines(shared: &Shared) {
    while let Some(late) = shared.queue.overdue() {
        for job in late {
            end_unbegun(shared, &job.live, deadline::missed(&job.live));
        }
    }
}

/// A generation of this process that the caller may see.
pub fn live(shared: &Shared, caller: &Caller, id: &str) -> Option<Arc<Live>> {
    shared.lives.get(id).filter(|live| caller.sees(&live.new.client))
}

/// A recorded generation that the caller may see. Blocks.
pub fn record(shared: &Shared, caller: &Caller, id: &str) -> Result<Option<Record>, Problem> {
    Ok(shared.store.get(id)?.filter(|record| caller.sees(&record.client)))
}

/// Asks a generation to stop; its end follows. Blocks.
pub fn cancel(shared: &Shared, caller: &Caller, id: &str) -> Result<Arc<Live>, Problem> {
    let ended = |state: State| {
        Problem::new(Kind::Conflict, format!("{id} is {state}; only unfinished work is cancelled"))
    };
    let Some(live) = live(shared, caller, id) else {
        return Err(match record(shared, caller, id)? {
            None => unknown(id),
            Some(record) if record.state.is_final() => ended(record.state),
            Some(_) => idle(shared),
        });
    };
    if live.ended().is_some() {
        let state = live.state();
        return Err(if state.is_final() { ended(state) } else { idle(shared) });
    }
    live.stop(StoppedBy::Request);
    if let Some(job) = shared.queue.take(id) {
        end_unbegun(shared, &job.live, cancelled());
    }
    Ok(live)
}

/// Why nothing is done for accepted work: the server is loading or ending.
fn idle(shared: &Shared) -> Problem {
    let problem = shared.health.check(shared.settings.drain_seconds).err();
    problem.unwrap_or_else(|| Problem::from(Error::Cancelled).retry_after(10))
}

/// Removes a finished generation from the history. Blocks.
pub fn forget(shared: &Shared, caller: &Caller, id: &str) -> Result<(), Problem> {
    let unfinished = || {
        let detail = format!("{id} is unfinished; cancel it with DELETE /generations/{id}");
        Err(Problem::new(Kind::Conflict, detail))
    };
    if record(shared, caller, id)?.is_none() {
        // A synchronous one is recorded when it has ended.
        let running = live(shared, caller, id).is_some_and(|live| live.ended().is_none());
        return if running { unfinished() } else { Err(unknown(id)) };
    }
    if !shared.store.remove(id)? {
        return unfinished();
    }
    if let Some(live) = shared.lives.get(id).filter(|live| live.ended().is_some()) {
        shared.lives.release(&live);
    }
    Ok(())
}

/// There is no such generation.
pub fn unknown(id: &str) -> Problem {
    Problem::new(Kind::NotFound, format!("there is no generation {id}"))
}

/// Ends a generation whose thread was told to stop; work that the server's end stops is left to the next.
pub fn stopped(shared: &Shared, live: &Live) {
    // Whoever cancelled it before the server ended does not want it from the next one either.
    if live.stopped_by() != Some(StoppedBy::Shutdown) {
        record_end(shared, live, &cancelled());
        return live.end(End::Problem(cancelled()));
    }
    if live.durable
        && let Err(error) = shared.store.requeue(&live.id)
    {
        tracing::error!(id = live.id, %error, "will be counted as begun");
    }
    postpone(live);
}

/// What has not begun when the server ends.
pub fn postpone(live: &Live) {
    let problem = postponed(live);
    if live.durable { live.postpone(problem) } else { live.end(End::Problem(problem)) }
}

/// What clients of unfinished work are told when the server ends.
fn postponed(live: &Live) -> Problem {
    if !live.durable {
        return Problem::from(Error::Cancelled).retry_after(10);
    }
    let detail = format!(
        "the server stopped before {} was finished; it goes on when the server is back",
        live.id
    );
    Problem::new(Kind::Draining, detail).retry_after(10)
}

/// Takes up what an earlier process had accepted and not finished.
///
/// # Errors
/// The history cannot be read or written.
pub fn resume(shared: &Shared, backend: &dyn Backend) -> crate::Result<()> {
    let left = shared.store.unfinished()?;
    if !left.is_empty() {
        tracing::info!(generations = left.len(), "going on with accepted work");
    }
    for record in left {
        // What was asked for with the seed that was chosen then.
        let seed = Some(record.resolved.seed);
        let request = GenerateRequest { seed, ..record.request.clone() };
        let planned = if record.starts >= MOST_STARTS {
            let detail = format!("the server ended {MOST_STARTS} times while this was running");
            Err(Problem::new(Kind::Internal, detail))
        } else {
            backend.plan(&request).map_err(Problem::from)
        };
        match planned {
            Ok(planned) => {
                let Record { id, created_ms, client, comparison, request, .. } = record;
                let new = New { id, created_ms, client, comparison, request, planned };
                let live = Live::resumed(new);
                if shared.lives.claim(&live).is_ok() {
                    shared.queue.restore(live);
                }
            }
            Err(problem) => {
                let text = problem.to_json().to_string();
                shared.store.end(&record.id, problem.state(), &text)?;
            }
        }
    }
    Ok(())
}
