//! Small things every floor shares: atomic files, cancellation, listings.

use std::fs::{File, TryLockError};
use std::io::Write;
use std::path::Path;

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

/// Keeps other processes from locking `file`, which is at `path`, until it is closed. File systems
/// without locks have none.
///
/// # Errors
/// When another process holds it.
pub fn lock(file: &File, path: &Path) -> Result<()> {
    match file.try_lock() {
        Ok(()) => Ok(()),
        Err(TryLockError::WouldBlock) => Err(Error::file(path, "another process is writing to it")),
        Err(TryLockError::Error(e)) if e.kind() == std::io::ErrorKind::Unsupported => Ok(()),
        Err(TryLockError::Error(e)) => Err(Error::file(path, e)),
    }
}

/// A flag that a caller raises and long work checks between steps.
#[derive(Clone, Debug, Default)]
pub struct CancelToken(std::sync::Arc<std::sync::atomic::AtomicBool>);

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

    pub fn cancel(&self) {
        self.0.store(true, std::sync::atomic::Ordering::Relaxed);
    }

    pub fn is_cancelled(&self) -> bool {
        self.0.load(std::sync::atomic::Ordering::Relaxed)
    }

    /// # Errors
    /// `Error::Cancelled` once the flag is up.
    pub fn check(&self) -> Result<()> {
        if self.is_cancelled() { Err(Error::Cancelled) } else { Ok(()) }
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

/// Bytes in GiB, for people.
pub fn gib(bytes: u64) -> String {
    format!("{:.3} GiB", bytes as f64 / f64::from(1 << 30))
}
