//! `metrics.jsonl`: one object a step.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::util::write_atomic;
use crate::{Error, Result};

/// Its name in a run's folder.
pub const FILE: &str = "metrics.jsonl";
/// Fields that every record has.
const OWN: [&str; 2] = ["step", "time"];

/// The open file.
pub struct Lines {
    path: PathBuf,
    file: File,
    last: Option<u64>,
}

#[derive(Deserialize)]
struct Record {
    step: u64,
}

impl Lines {
    /// Opens the file in `dir` without its records of steps after `from_step`, and for 0 without
    /// any.
    pub fn open(dir: &Path, from_step: u64) -> Result<Self> {
        let path = dir.join(FILE);
        let text = text(&path)?;
        let (kept, last) =
            if from_step == 0 { Default::default() } else { cut(&path, &text, from_step)? };
        if kept != text {
            write_atomic(&path, &kept)?;
        }
        let opened = OpenOptions::new().append(true).create(true).open(&path);
        Ok(Self { file: opened.map_err(|e| Error::file(&path, e))?, path, last })
    }

    pub fn append(&mut self, step: u64, time: f64, scalars: &BTreeMap<String, f64>) -> Result<()> {
        if let Some(last) = self.last.filter(|last| step <= *last) {
            return Err(Error::invalid("step", format!("{step} after {last} is recorded")));
        }
        if let Some(tag) = OWN.into_iter().find(|own| scalars.contains_key(*own)) {
            return Err(Error::invalid("tag", format!("'{tag}' is every record's own field")));
        }
        let mut record =
            Map::from_iter([("step".into(), json!(step)), ("time".into(), json!(time))]);
        // JSON has no word for NaN and infinities: they become null.
        record.extend(scalars.iter().map(|(tag, value)| (tag.clone(), json!(value))));
        let line = format!("{}\n", Value::Object(record));
        self.file.write_all(line.as_bytes()).map_err(|e| Error::file(&self.path, e))?;
        self.last = Some(step);
        Ok(())
    }

    pub fn sync(&self) -> Result<()> {
        self.file.sync_data().map_err(|e| Error::file(&self.path, e))
    }
}

/// The records of the run in `dir`, none where there are none; half a last line is left out.
///
/// # Errors
/// When the file cannot be read, or another line is no record.
pub fn read(dir: &Path) -> Result<Vec<Map<String, Value>>> {
    let path = dir.join(FILE);
    let (kept, _) = cut(&path, &text(&path)?, u64::MAX)?;
    let record = |line: &[u8]| serde_json::from_slice(line).map_err(|e| Error::file(&path, e));
    kept.split(|b| *b == b'\n').filter(|line| !line.is_empty()).map(record).collect()
}

/// What the file holds, nothing where it is not there.
fn text(path: &Path) -> Result<Vec<u8>> {
    match std::fs::read(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        found => found.map_err(|e| Error::file(path, e)),
    }
}

/// The records up to `from_step`, whole lines, and the highest step of them.
fn cut(path: &Path, text: &[u8], from_step: u64) -> Result<(Vec<u8>, Option<u64>)> {
    let (mut kept, mut last) = (Vec::with_capacity(text.len()), None);
    let mut lines = text.split_inclusive(|b| *b == b'\n').enumerate().peekable();
    while let Some((i, line)) = lines.next() {
        match serde_json::from_slice::<Record>(line) {
            Ok(record) if record.step <= from_step => {
                kept.extend_from_slice(line.strip_suffix(b"\n").unwrap_or(line));
                kept.push(b'\n');
                last = last.max(Some(record.step));
            }
            Ok(_) => {}
            // A process that was killed leaves half a line.
            Err(_) if lines.peek().is_none() => {}
            Err(e) => return Err(Error::file(path, format!("line {}: {e}", i + 1))),
        }
    }
    Ok((kept, last))
}
