//! Cells of a sweep and the file they are kept in: one JSON object a line,
//! appended and synced one by one, so that a killed sweep loses at most the
//! cell it was computing.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::replay::Candidates;
use crate::util::{Locked, lock};
use crate::{Error, Result};

/// One image of a sweep: what was asked, what it cost and how it scored.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Cell {
    /// The method that ran; see `requested_method`.
    pub method: String,
    /// Set when the budget is below one trajectory of the method asked for, and
    /// plain sampling ran in its place.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub requested_method: Option<String>,
    /// U-Net forwards allowed.
    pub budget: u64,
    pub prompt: String,
    pub prompt_index: usize,
    pub seed: u64,
    /// U-Net forwards spent.
    pub f: u64,
    /// Images scored.
    pub v: u64,
    /// VAE decodes.
    pub y: u64,
    /// Wall clock of the whole call.
    pub seconds: f64,
    /// Seconds by stage, as metered by the engine.
    pub stages: BTreeMap<String, f64>,
    /// Every reward; `null` where scoring failed.
    pub scores: BTreeMap<String, Option<f64>>,
    pub steps: u32,
    /// Every effective parameter of the method.
    pub params: Map<String, Value>,
    /// The image in small (`thumbnail`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub thumbnail: Option<String>,
    /// Scores of all candidates, where they are to be replayed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub candidates: Option<Candidates>,
    /// Why nothing ran.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub infeasible: Option<String>,
    /// Fingerprint of the settings that the values depend on.
    pub config: String,
}

/// What makes a cell the same cell.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CellKey {
    pub method: String,
    pub budget: u64,
    pub prompt_index: usize,
    pub prompt: String,
    pub seed: u64,
    pub config: String,
}

impl Cell {
    /// The method that the grid asked for.
    #[must_use]
    pub fn requested(&self) -> &str {
        self.requested_method.as_deref().unwrap_or(&self.method)
    }

    #[must_use]
    pub fn key(&self) -> CellKey {
        CellKey {
            method: self.requested().to_owned(),
            budget: self.budget,
            prompt_index: self.prompt_index,
            prompt: self.prompt.clone(),
            seed: self.seed,
            config: self.config.clone(),
        }
    }
}

/// The cells file, open and locked for appending.
#[derive(Debug)]
pub struct CellStore {
    file: Locked,
    path: PathBuf,
}

impl CellStore {
    /// Opens or creates the file, locks it against a second sweep, cuts off a
    /// torn last line, and returns the cells it holds.
    ///
    /// # Errors
    /// When another process holds it, it cannot be read, or a line other than
    /// the last is not a cell.
    pub fn open(path: &Path) -> Result<(Self, Vec<Cell>)> {
        let fail = |e: std::io::Error| Error::file(path, e);
        let file = File::options().read(true).append(true).create(true).open(path).map_err(fail)?;
        let mut file = lock(file, path)?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).map_err(fail)?;
        let (cells, whole) = parse(path, &bytes)?;
        if whole < bytes.len() {
            tracing::warn!(
                "{}: dropping a torn last line of {} bytes; its cell will run again",
                path.display(),
                bytes.len() - whole
            );
            file.set_len(whole as u64).map_err(fail)?;
            file.sync_data().map_err(fail)?;
        }
        file.seek(SeekFrom::End(0)).map_err(fail)?;
        Ok((Self { file, path: path.to_path_buf() }, cells))
    }

    /// Appends a cell and waits until it is on the disk.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn append(&mut self, cell: &Cell) -> Result<()> {
        let fail = |e: std::io::Error| Error::file(&self.path, e);
        self.file.write_all(&line(cell)?).map_err(fail)?;
        self.file.sync_data().map_err(fail)
    }
}

/// A cell as its line in the file.
///
/// # Errors
/// Never in practice: every field of a cell is plain data.
pub fn line(cell: &Cell) -> Result<Vec<u8>> {
    let mut line = serde_json::to_vec(cell).map_err(|e| Error::invalid("cell", e.to_string()))?;
    line.push(b'\n');
    Ok(line)
}

/// The cells of a file that nobody is writing to; a torn last line is left out.
///
/// # Errors
/// When the file cannot be read or a line other than the last is not a cell.
pub fn read(path: &Path) -> Result<Vec<Cell>> {
    let bytes = std::fs::read(path).map_err(|e| Error::file(path, e))?;
    Ok(parse(path, &bytes)?.0)
}

/// The whole lines of a cells file, as they are.
///
/// # Errors
/// See [`read`].
pub fn read_lines(path: &Path) -> Result<Vec<u8>> {
    let mut bytes = std::fs::read(path).map_err(|e| Error::file(path, e))?;
    let whole = parse(path, &bytes)?.1;
    bytes.truncate(whole);
    Ok(bytes)
}

/// The cells and the number of bytes that whole lines take.
fn parse(path: &Path, bytes: &[u8]) -> Result<(Vec<Cell>, usize)> {
    let mut cells = Vec::new();
    let mut whole = 0;
    for (i, line) in bytes.split_inclusive(|&b| b == b'\n').enumerate() {
        let last = whole + line.len() == bytes.len();
        if !line.ends_with(b"\n") {
            break;
        }
        match serde_json::from_slice(line) {
            Ok(cell) => cells.push(cell),
            Err(_) if last => break,
            Err(e) => return Err(Error::file(path, format!("line {}: {e}", i + 1))),
        }
        whole += line.len();
    }
    Ok((cells, whole))
}
