//! A folder as a tar archive, with the checksums of its files.

use std::collections::BTreeMap;
use std::io::{Result, Write};

use crate::util::sha256;

/// The name of the file that `sha256sum -c` reads.
pub const SUMS: &str = "SHA256SUMS";

/// Writes files of one folder, each of them once.
pub struct Folder<W: Write> {
    archive: tar::Builder<W>,
    name: String,
    /// Of every file, in seconds since 1970.
    modified: u64,
    sums: BTreeMap<String, String>,
}

impl<W: Write> Folder<W> {
    /// `name`: what the folder is called; `modified`: in seconds since 1970.
    pub fn new(into: W, name: String, modified: u64) -> Self {
        Self { archive: tar::Builder::new(into), name, modified, sums: BTreeMap::new() }
    }

    /// Whether a file is there already: images are named by their content, and arms may share one.
    pub fn has(&self, path: &str) -> bool {
        self.sums.contains_key(path)
    }

    /// Adds a file under a path within the folder.
    ///
    /// # Errors
    /// The writer's.
    pub fn add(&mut self, path: &str, bytes: &[u8]) -> Result<()> {
        self.append(path, bytes)?;
        self.sums.insert(path.to_owned(), sha256(bytes));
        Ok(())
    }

    fn append(&mut self, path: &str, bytes: &[u8]) -> Result<()> {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        header.set_mtime(self.modified);
        self.archive.append_data(&mut header, format!("{}/{path}", self.name), bytes)
    }

    /// Adds the checksums of all files and ends the archive.
    ///
    /// # Errors
    /// The writer's.
    pub fn finish(mut self) -> Result<W> {
        let lines: String =
            self.sums.iter().map(|(path, sum)| format!("{sum}  {path}\n")).collect();
        self.append(SUMS, lines.as_bytes())?;
        self.archive.into_inner()
    }
}
