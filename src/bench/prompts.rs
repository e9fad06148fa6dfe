//! Where a sweep's prompts come from: a file, or the scene world's test split.

use std::convert::Infallible;
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::de::{Deserializer, Error as _};
use serde::{Deserialize, Serialize};

use super::wiring;
use crate::{Error, Result};

/// `--prompts`: a number (the first N of the scene world's held-out test
/// split) or a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PromptSpec {
    Scenes(usize),
    File(PathBuf),
}

impl FromStr for PromptSpec {
    type Err = Infallible;

    fn from_str(text: &str) -> std::result::Result<Self, Infallible> {
        Ok(text.parse().map_or_else(|_| Self::File(text.into()), Self::Scenes))
    }
}

impl fmt::Display for PromptSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Scenes(count) => write!(f, "{count}"),
            Self::File(path) => write!(f, "{}", path.display()),
        }
    }
}

impl Serialize for PromptSpec {
    fn serialize<S: serde::Serializer>(&self, s: S) -> std::result::Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for PromptSpec {
    fn deserialize<D: Deserializer<'de>>(d: D) -> std::result::Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Raw {
            Count(usize),
            Text(String),
        }
        match Raw::deserialize(d).map_err(|_| D::Error::custom("expected a number or a file"))? {
            Raw::Count(count) => Ok(Self::Scenes(count)),
            Raw::Text(text) => text.parse().map_err(D::Error::custom),
        }
    }
}

/// The prompts that `spec` names, in order.
///
/// # Errors
/// When the file cannot be read or holds no prompt, or the scene world has too few.
pub fn load(spec: &PromptSpec) -> Result<Vec<String>> {
    load_with(spec, wiring::scene_prompts)
}

/// [`load`] with another source for `PromptSpec::Scenes`.
///
/// # Errors
/// See [`load`].
pub fn load_with(
    spec: &PromptSpec,
    scenes: impl Fn(usize) -> Result<Vec<String>>,
) -> Result<Vec<String>> {
    match spec {
        PromptSpec::Scenes(0) => Err(Error::invalid("prompts", "at least one prompt is needed")),
        PromptSpec::Scenes(count) => scenes(*count),
        PromptSpec::File(path) => read_file(path),
    }
}

/// Prompts of a file by its extension: `.jsonl` (key `prompt`), `.csv`/`.tsv`
/// (a column `prompt` or `prompts`, any case), otherwise one a line. Blank ones are skipped.
///
/// # Errors
/// When the file cannot be read or understood, or holds no prompt.
pub fn read_file(path: &Path) -> Result<Vec<String>> {
    let text = std::fs::read_to_string(path).map_err(|e| Error::file(path, e))?;
    let text = text.strip_prefix('\u{feff}').unwrap_or(&text);
    let extension = path.extension().map(|e| e.to_string_lossy().to_lowercase());
    let all = match extension.as_deref() {
        Some("jsonl" | "ndjson") => json_lines(path, text)?,
        Some("csv") => table(path, text, b',')?,
        Some("tsv") => table(path, text, b'\t')?,
        _ => text.lines().map(str::to_owned).collect(),
    };
    let prompts: Vec<String> =
        all.iter().map(|p| p.trim()).filter(|p| !p.is_empty()).map(str::to_owned).collect();
    if prompts.is_empty() {
        return Err(Error::file(path, "holds no prompt"));
    }
    Ok(prompts)
}

fn json_lines(path: &Path, text: &str) -> Result<Vec<String>> {
    #[derive(Deserialize)]
    struct Line {
        prompt: String,
    }
    text.lines()
        .enumerate()
        .filter(|(_, line)| !line.trim().is_empty())
        .map(|(i, line)| {
            serde_json::from_str::<Line>(line)
                .map(|l| l.prompt)
                .map_err(|e| Error::file(path, format!("line {}: {e}", i + 1)))
        })
        .collect()
}

fn table(path: &Path, text: &str, delimiter: u8) -> Result<Vec<String>> {
    let mut reader = csv::ReaderBuilder::new()
        .delimiter(delimiter)
        // Tab-separated prompt lists hold bare quotation marks.
        .quoting(delimiter == b',')
        .flexible(true)
        .from_reader(text.as_bytes());
    let headers = reader.headers().map_err(|e| Error::file(path, e))?;
    let column = headers
        .iter()
        .position(|h| matches!(h.trim().to_lowercase().as_str(), "prompt" | "prompts"))
        .ok_or_else(|| {
            let found = headers.iter().collect::<Vec<_>>().join(", ");
            Error::file(path, format!("no column 'prompt' or 'prompts' among: {found}"))
        })?;
    reader
        .records()
        .map(|record| {
            let record = record.map_err(|e| Error::file(path, e))?;
            Ok(record.get(column).unwrap_or_default().to_owned())
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(name: &str, text: &str) -> Result<Vec<String>> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        load(&PromptSpec::File(path))
    }

    #[test]
    fn every_format_reads() {
        let want = vec!["a red circle".to_owned(), "two \"big\" squares, blue".to_owned()];
        for (name, text) in [
            ("p.txt", "\u{feff}a red circle\r\n\r\ntwo \"big\" squares, blue\n"),
            (
                "p.jsonl",
                "{\"prompt\":\"a red circle\",\"id\":1}\n\n{\"prompt\":\"two \\\"big\\\" squares, blue\"}",
            ),
            ("p.csv", "id,Prompts\n1,a red circle\n2,\"two \"\"big\"\" squares, blue\"\n"),
            ("p.tsv", "Prompt\tCategory\na red circle\tx\ntwo \"big\" squares, blue\ty\n"),
        ] {
            assert_eq!(read(name, text).unwrap(), want, "{name}");
        }
    }

    #[test]
    fn errors_name_the_file_and_the_line() {
        assert!(read("p.txt", "\n \n").unwrap_err().to_string().contains("no prompt"));
        assert!(read("p.csv", "id,text\n1,a\n").unwrap_err().to_string().contains("id, text"));
        let e = read("p.jsonl", "{\"prompt\":\"a\"}\n{\"text\":\"b\"}\n").unwrap_err().to_string();
        assert!(e.contains("p.jsonl") && e.contains("line 2"), "{e}");
    }

    #[test]
    fn a_number_asks_the_scene_world() {
        let spec: PromptSpec = "3".parse().unwrap();
        assert_eq!(spec, PromptSpec::Scenes(3));
        let scenes = |n: usize| Ok((0..n).map(|i| format!("scene {i}")).collect());
        assert_eq!(load_with(&spec, scenes).unwrap().len(), 3);
        assert!(load_with(&PromptSpec::Scenes(0), scenes).is_err());
    }
}
