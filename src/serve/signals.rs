//! SIGTERM, SIGHUP and Ctrl-C.

use std::sync::atomic::{AtomicBool, Ordering};

use super::Stopper;
use crate::{Error, Result};

/// The first signal asks the server to drain; the second ends the process at
/// once with status 130.
///
/// # Errors
/// The process already has a handler.
pub fn stop_on_signals(stopper: Stopper) -> Result<()> {
    let asked = AtomicBool::new(false);
    ctrlc::set_handler(move || {
        if asked.swap(true, Ordering::SeqCst) {
            tracing::warn!("second signal: ending at once");
            std::process::exit(130);
        }
        tracing::info!("signal: finishing accepted work");
        stopper.stop();
    })
    .map_err(|e| Error::invalid("signals", e.to_string()))
}
