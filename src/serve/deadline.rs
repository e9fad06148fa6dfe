//! Deadlines of requests: whether work can be in time, and what is said when it is not.

use std::sync::atomic::Ordering;

use serde_json::json;

use super::live::Live;
use super::problem::{Kind, Problem};
use super::server::Shared;
use crate::engine::Planned;
use crate::engine::request::GenerateRequest;

/// Milliseconds in a week: no deadline is longer.
pub const LONGEST: u64 = 7 * 24 * 3600 * 1000;

/// Refuses work that cannot meet its deadline at the measured speed, `before` seconds of which are
/// taken by other work of the same request. Seconds that it takes; 0 while nothing like it has
/// been measured, and then it is not refused.
///
/// # Errors
/// The deadline cannot be met; the problem has the numbers.
pub fn check(
    shared: &Shared,
    client: &str,
    request: &GenerateRequest,
    planned: &Planned,
    before: f64,
) -> Result<f64, Problem> {
    let resolved = &planned.resolved;
    let rates = shared.speed.recent(&resolved.model, resolved.width, resolved.height);
    let Some(seconds) = rates.map(|rates| rates.seconds(planned.cost)) else { return Ok(0.0) };
    let Some(deadline_ms) = request.deadline_ms else { return Ok(seconds) };
    let ahead = shared.queue.ahead_of_new(client, planned.cost.f).seconds.unwrap_or(0.0);
    let whole = |seconds: f64| (seconds * 1e3).ceil() as u64;
    let (ahead_ms, planned_ms) =
        (whole(ahead + before / shared.settings.workers as f64), whole(seconds));
    if ahead_ms.saturating_add(planned_ms) <= deadline_ms {
        return Ok(seconds);
    }
    let message = format!(
        "{deadline_ms} ms are not enough: at the measured speed this takes about {planned_ms} ms, \
         after {ahead_ms} ms of other work"
    );
    let mut problem = Problem::field(Kind::DeadlineInfeasible, "deadline_ms", message);
    for (name, ms) in
        [("deadline_ms", deadline_ms), ("ahead_ms", ahead_ms), ("planned_ms", planned_ms)]
    {
        problem = problem.with(name, json!(ms));
    }
    Err(problem)
}

/// What ends a generation that was not finished in time.
pub fn missed(live: &Live) -> Problem {
    let (spent, planned) = (live.spent_f.load(Ordering::Relaxed), live.new.planned.cost.f);
    let ms = live.new.request.deadline_ms.unwrap_or(0);
    let detail = format!("{ms} ms had passed after {spent} of {planned} U-Net forwards");
    Problem::new(Kind::Deadline, detail)
}
