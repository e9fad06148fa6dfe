//! Small things every floor shares: atomic files, cancellation, listings.

use std::fs::{File, TryLockError};
use std::io::Write;
use std::ops::{Deref, DerefMut};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use sha2::{Digest, Sha256};

use crate::{Error, Result};

/// Writes `bytes` to `path` whole, as [`write_atomic_with`] does.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    write_atomic_with(path, |file| file.write_all(bytes).map_err(|e| Error::file(path, e)))
}

/// Has `write` fill a temporary file beside `path`, syncs it and renames it
/// over `path`, so that a reader or a crash sees the old file or the new one.
pub fn write_atomic_with(path: &Path, write: impl FnOnce(&mut File) -> Result<()>) -> Result<()> {
    let dir = match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    };
    std::fs::create_dir_all(dir).map_err(|e| Error::file(dir, e))?;
    let mut builder = tempfile::Builder::new();
    // Temporary files are private by default; a result is as readable as any other file.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    let mut file = builder.tempfile_in(dir).map_err(|e| Error::file(dir, e))?;
    write(file.as_file_mut())?;
    file.as_file().sync_all().map_err(|e| Error::file(path, e))?;
    file.persist(path).map_err(|e| Error::file(path, e.error))?;
    Ok(())
}

/// A file that this process has locked. Dropping it unlocks it, which closing alone does not do
/// while a child that is being started still has its copy of the file.
#[derive(Debug)]
pub struct Locked(File);

impl Locked {
    /// Lets others lock it. Closing the file, which follows sooner or later, is the second try.
    pub fn release(&self) {
        let _ = self.0.unlock();
    }
}

impl Deref for Locked {
    type Target = File;

    fn deref(&self) -> &File {
        &self.0
    }
}

impl DerefMut for Locked {
    fn deref_mut(&mut self) -> &mut File {
        &mut self.0
    }
}

impl Drop for Locked {
    fn drop(&mut self) {
        self.release();
    }
}

/// Keeps others from locking `file`, which is at `path`. File systems without locks have none.
///
/// # Errors
/// When another process holds it.
pub fn lock(file: File, path: &Path) -> Result<Locked> {
    match file.try_lock() {
        Ok(()) => Ok(Locked(file)),
        Err(TryLockError::WouldBlock) => Err(Error::file(path, "another process is writing to it")),
        Err(TryLockError::Error(e)) if e.kind() == std::io::ErrorKind::Unsupported => {
            Ok(Locked(file))
        }
        Err(TryLockError::Error(e)) => Err(Error::file(path, e)),
    }
}

/// A flag that a caller raises and long work checks between steps; it may have a deadline, too.
#[derive(Clone, Debug, Default)]
pub struct CancelToken {
    raised: Arc<AtomicBool>,
    deadline: Option<Instant>,
}

/// What shells report for a process that SIGINT ended.
pub const INTERRUPTED: u8 = 130;

impl CancelToken {
    /// A token that the first Ctrl-C (or SIGTERM) raises, which is then told; the second ends
    /// the process.
    ///
    /// # Errors
    /// When another handler is set already.
    pub fn on_signal(told: &'static str) -> Result<Self> {
        let cancel = Self::default();
        let raised = cancel.clone();
        ctrlc::set_handler(move || {
            if raised.is_cancelled() {
                std::process::exit(i32::from(INTERRUPTED));
            }
            raised.cancel();
            eprintln!("\n{told}; again to stop at once");
        })
        .map_err(|e| Error::invalid("signals", format!("cannot watch for Ctrl-C: {e}")))?;
        Ok(cancel)
    }

    /// A token that stops its work at `deadline`, if nobody raises it before.
    #[must_use]
    pub fn until(deadline: Instant) -> Self {
        Self { deadline: Some(deadline), ..Self::default() }
    }

    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    pub fn cancel(&self) {
        self.raised.store(true, Ordering::Relaxed);
    }

    /// Whether somebody has raised it.
    pub fn is_cancelled(&self) -> bool {
        self.raised.load(Ordering::Relaxed)
    }

    /// # Errors
    /// `Error::Cancelled` once the flag is up, else `Error::Deadline` from the deadline on.
    pub fn check(&self) -> Result<()> {
        if self.is_cancelled() {
            return Err(Error::Cancelled);
        }
        match self.deadline {
            Some(deadline) if Instant::now() >= deadline => Err(Error::Deadline),
            _ => Ok(()),
        }
    }
}

/// A method or reward as listed to callers.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize, utoipa::ToSchema)]
pub struct Listing {
    pub name: String,
    pub summary: String,
    /// JSON-schema-like description of each parameter: name → {type, default, description}.
    #[schema(value_type = Object)]
    pub params: serde_json::Map<String, serde_json::Value>,
}

/// The SHA-256 of `bytes` in lower-case hexadecimal digits.
#[must_use]
pub fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Bytes in GiB, for people.
pub fn gib(bytes: u64) -> String {
    format!("{:.3} GiB", bytes as f64 / f64::from(1 << 30))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_token_stops_work_when_it_is_raised_or_late() {
        let hour = Duration::from_secs(3600);
        assert!(CancelToken::default().check().is_ok());
        assert!(CancelToken::until(Instant::now() + hour).check().is_ok());
        let late = CancelToken::until(Instant::now());
        assert!(matches!(late.check(), Err(Error::Deadline)));
        assert!(!late.is_cancelled());
        late.clone().cancel();
        assert!(matches!(late.check(), Err(Error::Cancelled)));
    }
}
