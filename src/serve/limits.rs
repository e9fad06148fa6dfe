//! Checks of a request against the server's own limits, before it is planned.

use super::Settings;
use super::deadline::LONGEST;
use super::problem::{Kind, Problem};
use crate::engine::Planned;
use crate::engine::request::GenerateRequest;

/// Refuses a request whose own values are outside the limits.
pub fn check_request(request: &GenerateRequest, settings: &Settings) -> Result<(), Problem> {
    if request.prompt.trim().is_empty() {
        return Err(invalid("prompt", "must not be empty"));
    }
    for (field, text) in
        [("prompt", Some(&request.prompt)), ("negative_prompt", request.negative_prompt.as_ref())]
    {
        let length = text.map_or(0, |t| t.chars().count());
        if length > settings.max_prompt_chars {
            let most = settings.max_prompt_chars;
            return Err(invalid(field, format!("has {length} characters; at most {most}")));
        }
    }
    let bounded = [
        ("n", request.n, settings.max_images),
        ("steps", request.steps, settings.max_steps),
        ("width", request.width, settings.max_side),
        ("height", request.height, settings.max_side),
    ];
    for (field, value, most) in bounded {
        if let Some(value) = value
            && !(1..=most).contains(&value)
        {
            return Err(invalid(field, format!("{value} is outside 1..={most}")));
        }
    }
    if let Some(ms) = request.deadline_ms
        && !(1..=LONGEST).contains(&ms)
    {
        return Err(invalid("deadline_ms", format!("{ms} is outside 1..={LONGEST}")));
    }
    if let (Some(seed), Some(n)) = (request.seed, request.n)
        && seed.checked_add(u64::from(n) - 1).is_none()
    {
        return Err(invalid("seed", "seed + n - 1 is larger than a 64-bit number"));
    }
    Ok(())
}

/// Refuses work that this server never admits, however empty its queue is.
pub fn check_plan(planned: &Planned, settings: &Settings) -> Result<(), Problem> {
    let (f, most) = (planned.cost.f, settings.request_f());
    if f > most {
        let message = format!(
            "the request plans {f} U-Net forwards; this server admits at most {most} a request"
        );
        return Err(Problem::field(Kind::Budget, "budget", message));
    }
    Ok(())
}

fn invalid(field: &str, message: impl std::fmt::Display) -> Problem {
    Problem::field(Kind::InvalidValue, field, message)
}
