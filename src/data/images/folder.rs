//! Images with a text file of the same name beside each (kohya's layout), in any subfolder.

use std::path::{Path, PathBuf};

use super::fingerprint::Fingerprint;
use super::{Example, ImageTextSet, below, entries, list, no_column};
use crate::data::table::{self, extension};
use crate::{Error, Result};

/// Of the files that are taken for images.
pub(super) const IMAGE: [&str; 4] = ["jpg", "jpeg", "png", "webp"];
/// Of the files with captions, the first that there is.
const CAPTION: [&str; 2] = ["txt", "caption"];

pub(super) struct SideCars {
    root: PathBuf,
    images: Vec<PathBuf>,
    fingerprint: String,
}

impl SideCars {
    pub fn open(root: &Path, image: &Option<String>, caption: &Option<String>) -> Result<Self> {
        no_column(root, "image", image)?;
        no_column(root, "caption", caption)?;
        let mut images = Vec::new();
        collect(root, &mut images)?;
        let mut fingerprint = Fingerprint::new("side-car");
        for image in &images {
            fingerprint = fingerprint.text(&below(root, image)).file(image).file(&side_car(image));
        }
        Ok(Self { root: root.to_path_buf(), images, fingerprint: fingerprint.finish() })
    }
}

fn collect(folder: &Path, images: &mut Vec<PathBuf>) -> Result<()> {
    for path in entries(folder)? {
        if path.is_dir() {
            collect(&path, images)?;
        } else if IMAGE.contains(&extension(&path).as_str()) {
            images.push(path);
        }
    }
    Ok(())
}

fn side_car(image: &Path) -> PathBuf {
    let [first, second] = CAPTION.map(|extension| image.with_extension(extension));
    if !first.is_file() && second.is_file() { second } else { first }
}

impl ImageTextSet for SideCars {
    fn summary(&self) -> String {
        format!("{} images with text files in {}", self.images.len(), self.root.display())
    }

    fn len(&self) -> usize {
        self.images.len()
    }

    fn name(&self, index: usize) -> String {
        below(&self.root, &self.images[index])
    }

    fn example(&self, index: usize) -> Result<Example> {
        let image = &self.images[index];
        let file = side_car(image);
        let bytes = table::bytes(&file)?;
        let caption = table::text(&bytes).map_err(|e| Error::file(&file, e))?;
        list::read(&self.name(index), image, caption)
    }

    fn fingerprint(&self) -> &str {
        &self.fingerprint
    }
}
