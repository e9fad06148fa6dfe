//! Sets of captioned images, in the layouts in which people keep them.
//!
//! A set is indexed when it is opened and an image is decoded when it is asked for. A broken row
//! keeps its place and fails when it is asked for, so that whoever reads the set counts it.

mod decode;
mod fingerprint;
mod folder;
mod list;
mod parquet_set;
mod rendered;
mod source;
mod tar_set;

use std::path::{Path, PathBuf};

use image::RgbImage;

pub use source::ImageSource;

use super::table::{self, extension};
use crate::{Error, Result};

/// A caption and its image, upright and over white where it was transparent.
#[derive(Clone, Debug, PartialEq)]
pub struct Example {
    /// As [`ImageTextSet::name`].
    pub name: String,
    pub caption: String,
    pub image: RgbImage,
}

pub trait ImageTextSet: Send + Sync {
    /// What it is and how large, for people.
    fn summary(&self) -> String;

    /// Rows, with those that are broken.
    fn len(&self) -> usize;

    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Where the row lies within the set.
    fn name(&self, index: usize) -> String;

    /// # Errors
    /// When the row is broken: no such file, no image that can be decoded, no caption.
    fn example(&self, index: usize) -> Result<Example>;

    /// Changes when a row, or a file's name, length or time of change does; it does not depend
    /// on where the set lies.
    fn fingerprint(&self) -> &str;
}

/// Opens a set. Scenes are rendered at `resolution` × `resolution` pixels.
///
/// # Errors
/// When nothing is there, or it has none of the layouts, or an index cannot be read.
pub fn open(source: &ImageSource, resolution: u32) -> Result<Box<dyn ImageTextSet>> {
    let (path, image, caption) = match source {
        ImageSource::Scenes { split, count, seed } => {
            let set = rendered::Scenes::new(*split, *count, *seed, resolution)?;
            return Ok(Box::new(set));
        }
        ImageSource::Path { path, image, caption } => (path, image, caption),
    };
    let set: Box<dyn ImageTextSet> = match layout(path)? {
        Layout::List(file) => Box::new(list::List::open(&file, image, caption)?),
        Layout::Tar(files) => Box::new(tar_set::Shards::open(path, files, image, caption)?),
        Layout::Parquet(files) => Box::new(parquet_set::Tables::open(path, files, image, caption)?),
        Layout::Images => Box::new(folder::SideCars::open(path, image, caption)?),
    };
    if set.is_empty() {
        return Err(Error::file(path, "holds no images"));
    }
    Ok(set)
}

/// How the images of a path are kept.
enum Layout {
    /// A table of files and captions.
    List(PathBuf),
    Tar(Vec<PathBuf>),
    Parquet(Vec<PathBuf>),
    /// Images with a text file beside each.
    Images,
}

fn layout(path: &Path) -> Result<Layout> {
    if path.is_dir() {
        for name in ["metadata.jsonl", "metadata.csv"] {
            let file = path.join(name);
            if file.is_file() {
                return Ok(Layout::List(file));
            }
        }
        let tars = files_named(path, "tar")?;
        if !tars.is_empty() {
            return Ok(Layout::Tar(tars));
        }
        let tables = files_named(path, "parquet")?;
        return Ok(if tables.is_empty() { Layout::Images } else { Layout::Parquet(tables) });
    }
    match extension(path).as_str() {
        "tar" => Ok(Layout::Tar(vec![path.to_path_buf()])),
        "parquet" => Ok(Layout::Parquet(vec![path.to_path_buf()])),
        _ if table::is_table(path) => Ok(Layout::List(path.to_path_buf())),
        _ => {
            let message = "expected a folder, or a file of .tar, .parquet, .jsonl, .csv or .tsv";
            Err(Error::file(path, message))
        }
    }
}

/// The files of a folder with this extension, sorted.
fn files_named(folder: &Path, wanted: &str) -> Result<Vec<PathBuf>> {
    let mut files = entries(folder)?;
    files.retain(|file| extension(file) == wanted && file.is_file());
    Ok(files)
}

/// What a folder holds, sorted, without what is hidden.
fn entries(folder: &Path) -> Result<Vec<PathBuf>> {
    let failed = |e: std::io::Error| Error::file(folder, e);
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        if !entry.file_name().to_string_lossy().starts_with('.') {
            paths.push(entry.path());
        }
    }
    paths.sort();
    Ok(paths)
}

/// A file's name, or its path below `root`, with `/` between folders.
fn below(root: &Path, file: &Path) -> String {
    let rest = file.strip_prefix(root).ok().filter(|r| !r.as_os_str().is_empty());
    let rest = rest.or_else(|| file.file_name().map(Path::new)).unwrap_or(file);
    rest.to_string_lossy().replace('\\', "/")
}

/// For layouts that have no columns to choose from.
fn no_column(path: &Path, key: &str, given: &Option<String>) -> Result<()> {
    let Some(name) = given else { return Ok(()) };
    Err(Error::file(path, format!("has no columns of that kind: {key}={name} cannot be followed")))
}
