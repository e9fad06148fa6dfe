//! A table of image files and captions: Hugging Face's `imagefolder` (`metadata.jsonl` or
//! `metadata.csv` beside the images) and JSON lines with paths (JourneyDB).

use std::path::{Path, PathBuf};

use super::decode::decode;
use super::fingerprint::Fingerprint;
use super::{Example, ImageTextSet};
use crate::data::table::{self, Column, Row};
use crate::{Error, Result};

/// What the column with the image's path is called.
const FILE: [&str; 6] = ["file_name", "img_path", "image_path", "image", "path", "file"];
/// JourneyDB's paths begin in this folder beside the table.
const IMAGES: &str = "imgs";

/// A row's name, and its file and caption or what is wrong.
type Entry = (String, Result<(PathBuf, String), String>);

pub(super) struct List {
    table: PathBuf,
    rows: Vec<Entry>,
    fingerprint: String,
}

impl List {
    pub fn open(table: &Path, image: &Option<String>, caption: &Option<String>) -> Result<Self> {
        let folder = table.parent().unwrap_or(Path::new(""));
        let file = Column { given: image.as_deref(), usual: &FILE };
        let mut fingerprint = Fingerprint::new("list");
        let mut rows = Vec::new();
        for Row { name, cells } in table::read(table, [file, Column::caption(caption)])? {
            let entry = match cells {
                Ok([file, caption]) => {
                    let path = find(folder, &file);
                    fingerprint = fingerprint.text(&file).text(&caption).file(&path);
                    (file, Ok((path, caption)))
                }
                Err(reason) => {
                    fingerprint = fingerprint.text(&name).text(&reason);
                    (name, Err(reason))
                }
            };
            rows.push(entry);
        }
        Ok(Self { table: table.to_path_buf(), rows, fingerprint: fingerprint.finish() })
    }
}

fn find(folder: &Path, file: &str) -> PathBuf {
    let beside = folder.join(file);
    let below = folder.join(IMAGES).join(file);
    if !beside.is_file() && below.is_file() { below } else { beside }
}

impl ImageTextSet for List {
    fn summary(&self) -> String {
        format!("{} rows of {}", self.rows.len(), self.table.display())
    }

    fn len(&self) -> usize {
        self.rows.len()
    }

    fn name(&self, index: usize) -> String {
        self.rows[index].0.clone()
    }

    fn example(&self, index: usize) -> Result<Example> {
        let (name, row) = &self.rows[index];
        let (path, caption) = row.as_ref().map_err(|reason| Error::file(&self.table, reason))?;
        read(name, path, caption)
    }

    fn fingerprint(&self) -> &str {
        &self.fingerprint
    }
}

/// An example whose image is a file.
pub(super) fn read(name: &str, path: &Path, caption: &str) -> Result<Example> {
    let bytes = std::fs::read(path).map_err(|e| Error::file(path, e))?;
    let image = decode(&bytes).map_err(|e| Error::file(path, e))?;
    Ok(Example { name: name.to_owned(), caption: caption.to_owned(), image })
}
