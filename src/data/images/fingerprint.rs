//! What tells one state of a set from another.

use std::path::Path;
use std::time::UNIX_EPOCH;

use sha2::{Digest, Sha256};

/// A hash over texts and files, each told from the next.
pub(super) struct Fingerprint(Sha256);

impl Fingerprint {
    /// `layout` says how the rest is to be read.
    pub fn new(layout: &str) -> Self {
        Self(Sha256::new()).text(layout)
    }

    #[must_use]
    pub fn text(mut self, text: &str) -> Self {
        self.0.update((text.len() as u64).to_le_bytes());
        self.0.update(text);
        self
    }

    /// A file by its length and its time of change.
    #[must_use]
    pub fn file(self, path: &Path) -> Self {
        let Ok(metadata) = std::fs::metadata(path) else { return self.text("missing") };
        let changed = metadata.modified().ok().and_then(|t| t.duration_since(UNIX_EPOCH).ok());
        let changed = changed.map_or(0, |t| t.as_nanos());
        self.text(&format!("{} {changed}", metadata.len()))
    }

    /// In hex.
    pub fn finish(self) -> String {
        self.0.finalize().iter().map(|b| format!("{b:02x}")).collect()
    }
}
