//! Asking a running server how it is: for container health checks.

use std::time::Duration;

use crate::{Error, Result};

/// # Errors
/// The address does not answer 200 within five seconds.
pub fn health_check(url: &str) -> Result<()> {
    let agent: ureq::Agent = ureq::Agent::config_builder()
        .http_status_as_error(false)
        .timeout_global(Some(Duration::from_secs(5)))
        // It is beside this program: never through a proxy.
        .proxy(None)
        .build()
        .into();
    let wrong = |message: String| Error::invalid("health check", message);
    let answer = agent.get(url).call().map_err(|e| wrong(format!("{url}: {e}")))?;
    match answer.status().as_u16() {
        200 => Ok(()),
        status => Err(wrong(format!("{url} answers {status}"))),
    }
}
