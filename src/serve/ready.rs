//! Whether the server takes work, and why not.

use std::time::Duration;

use serde::Serialize;
use serde_json::json;
use utoipa::ToSchema;

use super::health::Life;
use super::problem::{Kind, Problem};
use super::server::Shared;

/// One thing that readiness needs.
#[derive(Debug, Serialize, ToSchema)]
pub struct Check {
    name: &'static str,
    ok: bool,
    /// In words.
    reason: String,
}

/// The longest time that a running generation has reported nothing.
pub fn heartbeat(shared: &Shared) -> Duration {
    shared.queue.running().iter().map(|live| live.silence()).max().unwrap_or_default()
}

/// Everything that readiness needs.
pub fn checks(shared: &Shared) -> Vec<Check> {
    let life = shared.health.life();
    let model = match life {
        Life::Loading => "models are being loaded",
        Life::Warming => "a first image is being generated",
        Life::Ready | Life::Draining => "models are loaded and have made an image",
    };
    let draining = match life {
        Life::Draining => "the server is shutting down",
        _ => "the server is not shutting down",
    };
    let queue = shared.queue.stats();
    let room = if queue.full { "the queue is full" } else { "the queue has room" };
    let (waiting, running, f) = (queue.waiting, queue.running, queue.backlog_f);
    let (silence, most) = (heartbeat(shared).as_secs(), shared.settings.stall_seconds);
    let worker = match running {
        0 => "no generation runs".to_owned(),
        _ => format!("running generations reported {silence} s ago; {most} s are allowed"),
    };
    vec![
        Check { name: "model", ok: life >= Life::Ready, reason: model.to_owned() },
        Check { name: "accepting", ok: life != Life::Draining, reason: draining.to_owned() },
        Check {
            name: "queue",
            ok: !queue.full,
            reason: format!("{room}: {waiting} wait and {running} run, {f} U-Net forwards"),
        },
        Check { name: "workers", ok: silence < most, reason: worker },
    ]
}

/// # Errors
/// The server takes no work now; the problem has every check.
pub fn check(shared: &Shared) -> Result<Vec<Check>, Problem> {
    let checks = checks(shared);
    let of_life = shared.health.check(shared.settings.drain_seconds);
    let verdict = of_life.and_then(|()| match checks.iter().find(|check| !check.ok) {
        None => Ok(()),
        Some(check) => {
            let seconds = shared.queue.stats().retry_after;
            Err(Problem::new(Kind::NotReady, check.reason.clone()).retry_after(seconds))
        }
    });
    match verdict {
        Ok(()) => Ok(checks),
        Err(problem) => Err(problem.with("checks", json!(checks))),
    }
}
