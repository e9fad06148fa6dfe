//! Lists of prompts: from files, or the scene world's.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::de::{Deserializer, Error as _};
use serde::{Deserialize, Serialize};

use super::parquet_file::ParquetFile;
use super::scenes::Split;
use super::table::{self, Column, Row};
use super::{Skipped, complaint, source};
use crate::{Error, Result};

const FIELD: &str = "prompts";

/// Where prompts come from. Written `scenes:SPLIT:COUNT`, `COUNT` for `scenes:test:COUNT`, or
/// `PATH[?column=NAME]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PromptSource {
    /// The first `count` of a split's fixed list.
    Scenes { split: Split, count: usize },
    /// A file: `.csv`, `.tsv`, `.jsonl`, `.parquet`, or one prompt a line. Without a column the
    /// first of prompt, prompts, text and caption is read.
    File { path: PathBuf, column: Option<String> },
}

impl FromStr for PromptSource {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        if let Ok(count) = text.parse() {
            return Ok(Self::Scenes { split: Split::Test, count });
        }
        if let Some(scenes) = source::scenes(FIELD, text) {
            return match scenes? {
                (split, count) if count.len() == 1 => {
                    Ok(Self::Scenes { split, count: count[0] as usize })
                }
                _ => Err(Error::invalid(FIELD, "expected scenes:SPLIT:COUNT")),
            };
        }
        let (path, [column]) = source::path(FIELD, text, ["column"])?;
        Ok(Self::File { path, column })
    }
}

impl fmt::Display for PromptSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Scenes { split, count } => write!(f, "scenes:{split}:{count}"),
            Self::File { path, column } => source::write_path(f, path, [("column", column)]),
        }
    }
}

impl Serialize for PromptSource {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for PromptSource {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Raw {
            Count(usize),
            Text(String),
        }
        let raw = Raw::deserialize(d).map_err(|_| D::Error::custom("expected a number or a text"));
        match raw? {
            Raw::Count(count) => Ok(Self::Scenes { split: Split::Test, count }),
            Raw::Text(text) => text.parse().map_err(D::Error::custom),
        }
    }
}

/// Prompts in their order, and what was left out among them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PromptList {
    pub prompts: Vec<String>,
    pub skipped: Vec<Skipped>,
}

impl PromptList {
    fn add(&mut self, row: String, text: std::result::Result<&str, String>) {
        match text {
            Ok(text) => self.prompts.push(text.to_owned()),
            Err(reason) => self.skipped.push(Skipped { row, reason }),
        }
    }
}

/// The prompts that `source` names. Blank lines are no rows; rows that are empty or broken are
/// skipped and named.
///
/// # Errors
/// When the file cannot be read, lacks the column, holds no prompt, or more than a tenth of its
/// rows is unusable.
pub fn load(source: &PromptSource) -> Result<PromptList> {
    let (path, column) = match source {
        PromptSource::Scenes { count: 0, .. } => {
            return Err(Error::invalid(FIELD, "at least one prompt is needed"));
        }
        PromptSource::Scenes { split, count } => {
            let prompts = split.prompts(*count).iter().map(ToString::to_string).collect();
            return Ok(PromptList { prompts, skipped: Vec::new() });
        }
        PromptSource::File { path, column } => (path, column),
    };
    let list = read(path, column)?;
    let rows = list.prompts.len() + list.skipped.len();
    if list.skipped.len() * 10 > rows {
        return Err(Error::file(path, complaint(&list.skipped, rows)));
    }
    if list.prompts.is_empty() {
        return Err(Error::file(path, "holds no prompt"));
    }
    Ok(list)
}

fn read(path: &Path, given: &Option<String>) -> Result<PromptList> {
    let (mut list, column) = (PromptList::default(), Column::caption(given));
    if table::is_table(path) {
        for Row { name, cells } in table::read(path, [column])? {
            list.add(name, cells.as_ref().map(|[text]| text.as_str()).map_err(Clone::clone));
        }
    } else if table::extension(path) == "parquet" {
        let file = ParquetFile::open(path)?;
        let mut row = 0..;
        file.each(file.column(column, &[""])?, |value| {
            let name = format!("row {}", row.next().unwrap_or_default());
            list.add(name, value.ok_or("is null".into()).and_then(table::text));
        })?;
    } else {
        if let Some(name) = given {
            let message = format!("has no columns, and column={name} was asked for");
            return Err(Error::file(path, message));
        }
        for (name, line) in table::lines(&table::bytes(path)?) {
            list.add(name, line);
        }
    }
    Ok(list)
}
