//! Parquet files that hold the images themselves, as Hugging Face writes them: a column `image`
//! of {bytes, path} and one of text (Pokemon-BLIP), or a column of plain bytes.

use std::path::{Path, PathBuf};

use super::decode::decode;
use super::fingerprint::Fingerprint;
use super::{Example, ImageTextSet, below};
use crate::data::parquet_file::ParquetFile;
use crate::data::table::{Column, text};
use crate::{Error, Result};

/// What the column with the image is called.
const IMAGE: [&str; 6] = ["image", "img", "jpg", "jpeg", "png", "webp"];

struct Table {
    file: ParquetFile,
    /// Columns of the image's bytes and of the caption.
    image: usize,
    caption: usize,
    /// The set's first row in this file.
    start: usize,
}

pub(super) struct Tables {
    root: PathBuf,
    tables: Vec<Table>,
    rows: usize,
    fingerprint: String,
}

impl Tables {
    pub fn open(
        root: &Path,
        files: Vec<PathBuf>,
        image: &Option<String>,
        caption: &Option<String>,
    ) -> Result<Self> {
        let (mut tables, mut rows) = (Vec::new(), 0);
        let mut fingerprint = Fingerprint::new("parquet");
        let wanted = Column { given: image.as_deref(), usual: &IMAGE };
        for path in files {
            fingerprint = fingerprint.text(&below(root, &path)).file(&path);
            let file = ParquetFile::open(&path)?;
            let image = file.column(wanted, &[".bytes", ""])?;
            let caption = file.column(Column::caption(caption), &[""])?;
            fingerprint = fingerprint.text(&format!("{image} {caption}"));
            let start = rows;
            rows += file.rows();
            tables.push(Table { file, image, caption, start });
        }
        let (root, fingerprint) = (root.to_path_buf(), fingerprint.finish());
        Ok(Self { root, tables, rows, fingerprint })
    }

    /// The table of a row of the set, and the row there.
    fn place(&self, index: usize) -> (&Table, usize) {
        let at = self.tables.partition_point(|t| t.start <= index).saturating_sub(1);
        (&self.tables[at], index - self.tables[at].start)
    }
}

impl ImageTextSet for Tables {
    fn summary(&self) -> String {
        let files = self.tables.len();
        format!("{} rows in {files} parquet files of {}", self.rows, self.root.display())
    }

    fn len(&self) -> usize {
        self.rows
    }

    fn name(&self, index: usize) -> String {
        let (table, row) = self.place(index);
        format!("{} row {row}", below(&self.root, table.file.path()))
    }

    fn example(&self, index: usize) -> Result<Example> {
        let (table, row) = self.place(index);
        let failed = |e: String| Error::file(table.file.path(), format!("row {row}: {e}"));
        let value = |column: usize, what: &str| {
            table.file.value(column, row)?.ok_or_else(|| failed(format!("has no {what}")))
        };
        let caption = value(table.caption, "caption")?;
        let caption = text(&caption).map_err(|e| failed(format!("the caption {e}")))?.to_owned();
        let image = decode(&value(table.image, "image")?).map_err(|e| failed(e.to_string()))?;
        Ok(Example { name: self.name(index), caption, image })
    }

    fn fingerprint(&self) -> &str {
        &self.fingerprint
    }
}
