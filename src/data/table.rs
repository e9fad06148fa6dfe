//! Columns of text files: CSV, TSV and JSON lines.

use std::path::Path;

use serde_json::Value;

use crate::{Error, Result};

/// What the column with a prompt or a caption is called.
pub(super) const CAPTION: [&str; 4] = ["prompt", "prompts", "text", "caption"];

/// A column: the one that is asked for, or the first of those that are usual. Names are compared
/// without regard to case.
#[derive(Clone, Copy, Debug)]
pub(super) struct Column<'a> {
    pub given: Option<&'a str>,
    pub usual: &'a [&'a str],
}

impl<'a> Column<'a> {
    pub fn caption(given: &'a Option<String>) -> Self {
        Self { given: given.as_deref(), usual: &CAPTION }
    }

    /// The names to be looked for, the best first.
    pub fn names(self) -> Vec<&'a str> {
        self.given.map_or_else(|| self.usual.to_vec(), |given| vec![given])
    }

    /// Which of `columns` it is.
    pub fn find(self, columns: &[String]) -> Option<usize> {
        let position =
            |name: &&str| columns.iter().position(|c| c.trim().eq_ignore_ascii_case(name));
        self.names().iter().find_map(position)
    }

    pub fn missing(self, columns: &[String]) -> String {
        format!("no column {} among: {}", self.names().join(", "), columns.join(", "))
    }
}

/// A row by its place in the file, with a text for every column that was asked for or what is
/// wrong with it.
pub(super) struct Row<const N: usize> {
    pub name: String,
    pub cells: Result<[String; N], String>,
}

/// Whether [`read`] knows this file's format, by its name.
pub(super) fn is_table(path: &Path) -> bool {
    matches!(extension(path).as_str(), "csv" | "tsv" | "jsonl" | "ndjson")
}

/// In lower case.
pub(super) fn extension(path: &Path) -> String {
    path.extension().map(|e| e.to_string_lossy().to_lowercase()).unwrap_or_default()
}

/// A file's bytes without a byte order mark.
pub(super) fn bytes(path: &Path) -> Result<Vec<u8>> {
    let mut bytes = std::fs::read(path).map_err(|e| Error::file(path, e))?;
    if bytes.starts_with(b"\xef\xbb\xbf") {
        bytes.drain(..3);
    }
    Ok(bytes)
}

/// The lines that are not blank, by number.
pub(super) fn lines(bytes: &[u8]) -> impl Iterator<Item = (String, Result<&str, String>)> {
    let lines = bytes.split(|b| *b == b'\n').enumerate();
    let lines = lines.filter(|(_, line)| !line.trim_ascii().is_empty());
    lines.map(|(i, line)| (format!("line {}", i + 1), text(line)))
}

/// Trimmed; it has to hold something.
pub(super) fn text(bytes: &[u8]) -> Result<&str, String> {
    let text = std::str::from_utf8(bytes).map_err(|_| "is not UTF-8".to_owned())?.trim();
    if text.is_empty() { Err("is empty".into()) } else { Ok(text) }
}

/// The rows of a CSV, TSV or JSON-lines file.
pub(super) fn read<const N: usize>(path: &Path, columns: [Column; N]) -> Result<Vec<Row<N>>> {
    let bytes = bytes(path)?;
    match extension(path).as_str() {
        "csv" => separated(path, &bytes, b',', columns),
        "tsv" => separated(path, &bytes, b'\t', columns),
        _ => Ok(lines(&bytes)
            .map(|(name, line)| Row { name, cells: line.and_then(|l| json(l, columns)) })
            .collect()),
    }
}

fn json<const N: usize>(line: &str, columns: [Column; N]) -> Result<[String; N], String> {
    let row: Value = serde_json::from_str(line).map_err(|e| e.to_string())?;
    all(columns.map(|column| json_text(&row, column)))
}

/// The text that an object has in a column.
pub(super) fn json_text(row: &Value, column: Column) -> Result<String, String> {
    let object = row.as_object().ok_or("is no JSON object")?;
    let keys: Vec<String> = object.keys().cloned().collect();
    let key = column.find(&keys).ok_or_else(|| column.missing(&keys))?;
    let value = object[&keys[key]].as_str();
    let value = value.ok_or_else(|| format!("'{}' is no text", keys[key]))?;
    text(value.as_bytes()).map(str::to_owned).map_err(|e| format!("'{}' {e}", keys[key]))
}

fn all<const N: usize>(cells: [Result<String, String>; N]) -> Result<[String; N], String> {
    if let Some(reason) = cells.iter().find_map(|c| c.as_ref().err()) {
        return Err(reason.clone());
    }
    Ok(cells.map(Result::unwrap_or_default))
}

fn separated<const N: usize>(
    path: &Path,
    bytes: &[u8],
    delimiter: u8,
    columns: [Column; N],
) -> Result<Vec<Row<N>>> {
    let mut reader = csv::ReaderBuilder::new()
        .delimiter(delimiter)
        // Tab-separated prompt lists hold bare quotation marks.
        .quoting(delimiter == b',')
        .flexible(true)
        .from_reader(bytes);
    let header = reader.headers().map_err(|e| Error::file(path, e))?;
    let header: Vec<String> = header.iter().map(str::to_owned).collect();
    let mut places = [0; N];
    for (place, column) in places.iter_mut().zip(columns) {
        let found = column.find(&header);
        *place = found.ok_or_else(|| Error::file(path, column.missing(&header)))?;
    }
    let row = |record: csv::Result<csv::ByteRecord>| {
        let record = record.map_err(|e| Error::file(path, e))?;
        let line = record.position().map_or(0, csv::Position::line);
        let cell = |place: usize| {
            let bytes = record.get(place).unwrap_or_default();
            text(bytes).map(str::to_owned).map_err(|e| format!("'{}' {e}", header[place]))
        };
        Ok(Row { name: format!("line {line}"), cells: all(places.map(cell)) })
    };
    reader.into_byte_records().map(row).collect()
}
