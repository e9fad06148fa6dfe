//! Parquet files: single values of a column of bytes, and whole columns of text.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use parquet::column::reader::{ColumnReader, ColumnReaderImpl};
use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader, SerializedFileReader};

use super::table::Column;
use crate::{Error, Result};

/// Rows that are decoded at a time when a whole column is read.
const BATCH: usize = 1024;

/// An open file; beside the page that is being decoded it takes no memory.
pub(super) struct ParquetFile {
    path: PathBuf,
    /// One reader at a time: they share the file's position.
    reader: Mutex<SerializedFileReader<File>>,
    /// The columns' dotted names.
    columns: Vec<String>,
    /// The first row of every row group, and the number of rows.
    starts: Vec<usize>,
}

impl ParquetFile {
    /// # Errors
    /// When the file cannot be read or is no parquet file.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(|e| Error::file(path, e))?;
        let reader = SerializedFileReader::new(file).map_err(|e| Error::file(path, e))?;
        let metadata = reader.metadata();
        let schema = metadata.file_metadata().schema_descr();
        let columns = schema.columns().iter().map(|c| c.path().string()).collect();
        let mut starts = vec![0];
        for group in metadata.row_groups() {
            starts.push(starts[starts.len() - 1] + group.num_rows().max(0) as usize);
        }
        Ok(Self { path: path.to_path_buf(), reader: Mutex::new(reader), columns, starts })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn rows(&self) -> usize {
        self.starts[self.starts.len() - 1]
    }

    /// The first of these columns that there is. Names are those of [`Column`], with or without
    /// one of `suffixes`.
    ///
    /// # Errors
    /// When there is none, or it holds no bytes.
    pub fn column(&self, column: Column, suffixes: &[&str]) -> Result<usize> {
        let with = |name: &str| suffixes.iter().map(|s| format!("{name}{s}")).collect::<Vec<_>>();
        let names: Vec<String> = column.names().into_iter().flat_map(with).collect();
        let position = |n: &String| self.columns.iter().position(|c| c.eq_ignore_ascii_case(n));
        let found = names.iter().find_map(position);
        found.ok_or_else(|| Error::file(&self.path, column.missing(&self.columns)))
    }

    fn lock(&self) -> MutexGuard<'_, SerializedFileReader<File>> {
        self.reader.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn failed(&self, error: ParquetError) -> Error {
        Error::file(&self.path, error)
    }

    /// A reader of a column in one row group, and the level at which its values are defined.
    fn values(
        &self,
        file: &SerializedFileReader<File>,
        group: usize,
        column: usize,
    ) -> Result<(ColumnReaderImpl<ByteArrayType>, i16)> {
        let wrong =
            |what: &str| Error::file(&self.path, format!("{} {what}", self.columns[column]));
        let schema = file.metadata().file_metadata().schema_descr_ptr();
        let described = schema.column(column);
        if described.max_rep_level() > 0 {
            return Err(wrong("holds lists"));
        }
        let group = file.get_row_group(group).map_err(|e| self.failed(e))?;
        match group.get_column_reader(column).map_err(|e| self.failed(e))? {
            ColumnReader::ByteArrayColumnReader(reader) => Ok((reader, described.max_def_level())),
            _ => Err(wrong("holds neither text nor bytes")),
        }
    }

    /// One value; `None` where the row has none.
    ///
    /// # Errors
    /// When the file cannot be read or the column holds something else.
    pub fn value(&self, column: usize, row: usize) -> Result<Option<Vec<u8>>> {
        let group = self.starts.partition_point(|s| *s <= row).saturating_sub(1);
        let file = self.lock();
        let (mut reader, _) = self.values(&file, group, column)?;
        let before = row - self.starts[group];
        let skipped = reader.skip_records(before).map_err(|e| self.failed(e))?;
        let (mut levels, mut values) = (Vec::new(), Vec::new());
        let read = reader.read_records(1, Some(&mut levels), None, &mut values);
        let (records, ..) = read.map_err(|e| self.failed(e))?;
        if (skipped, records) != (before, 1) {
            return Err(Error::file(&self.path, format!("has no row {row}")));
        }
        Ok(values.pop().map(|v: ByteArray| v.data().to_vec()))
    }

    /// Every value of a column in turn.
    ///
    /// # Errors
    /// As [`Self::value`].
    pub fn each(&self, column: usize, mut each: impl FnMut(Option<&[u8]>)) -> Result<()> {
        let file = self.lock();
        for group in 0..self.starts.len() - 1 {
            let (mut reader, defined) = self.values(&file, group, column)?;
            loop {
                let (mut levels, mut values) = (Vec::new(), Vec::new());
                let read = reader.read_records(BATCH, Some(&mut levels), None, &mut values);
                let (records, ..) = read.map_err(|e| self.failed(e))?;
                if records == 0 {
                    break;
                }
                // A column that is never null has no levels.
                levels.resize(records, defined);
                let mut values = values.iter();
                for level in levels {
                    let value = if level == defined { values.next() } else { None };
                    each(value.map(ByteArray::data));
                }
            }
        }
        Ok(())
    }
}
