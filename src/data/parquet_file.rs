//! Parquet files: single values of a column of bytes, and whole columns of text.

use std::collections::{HashMap, VecDeque};
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
/// Rows that are decoded at a time when single values are asked for, and how many such blocks
/// are kept: the next to be asked for are mostly their neighbours, and a page is much more.
const BLOCK: usize = 16;
const BLOCKS: usize = 4;

/// An open file, of which values are best read in about the order of its rows: the pages of a
/// row group can only be decoded from its beginning.
pub(super) struct ParquetFile {
    path: PathBuf,
    state: Mutex<State>,
    /// The columns' dotted names.
    columns: Vec<String>,
    /// The first row of every row group, and the number of rows.
    starts: Vec<usize>,
}

/// Used by one reader at a time: all share the file's position.
struct State {
    file: SerializedFileReader<File>,
    /// Where each column was read last.
    cursors: HashMap<usize, Cursor>,
    blocks: VecDeque<Block>,
}

/// A column within a row group.
struct Cursor {
    group: usize,
    /// The group's row that comes next.
    next: usize,
    /// The level at which a value is no null.
    defined: i16,
    values: ColumnReaderImpl<ByteArrayType>,
}

/// Values of a column from row `start` of a row group.
struct Block {
    column: usize,
    group: usize,
    start: usize,
    values: Vec<Option<ByteArray>>,
}

impl Cursor {
    fn skip_to(&mut self, row: usize) -> Result<(), ParquetError> {
        self.next += self.values.skip_records(row - self.next)?;
        Ok(())
    }

    /// The next values, at most `rows`; none at the group's end.
    fn read(&mut self, rows: usize) -> Result<Vec<Option<ByteArray>>, ParquetError> {
        let (mut levels, mut values) = (Vec::new(), Vec::new());
        let (read, ..) = self.values.read_records(rows, Some(&mut levels), None, &mut values)?;
        self.next += read;
        // A column that is never null has no levels.
        levels.resize(read, self.defined);
        let mut values = values.into_iter();
        let value = |level| if level == self.defined { values.next() } else { None };
        Ok(levels.into_iter().map(value).collect())
    }
}

impl ParquetFile {
    /// # Errors
    /// When the file cannot be read or is no parquet file.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(|e| Error::file(path, e))?;
        let file = SerializedFileReader::new(file).map_err(|e| Error::file(path, e))?;
        let metadata = file.metadata();
        let schema = metadata.file_metadata().schema_descr();
        let columns = schema.columns().iter().map(|c| c.path().string()).collect();
        let mut starts = vec![0];
        for group in metadata.row_groups() {
            starts.push(starts[starts.len() - 1] + group.num_rows().max(0) as usize);
        }
        let state = State { file, cursors: HashMap::new(), blocks: VecDeque::new() };
        Ok(Self { path: path.to_path_buf(), state: Mutex::new(state), columns, starts })
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

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn failed(&self, error: ParquetError) -> Error {
        Error::file(&self.path, error)
    }

    /// At the beginning of a row group.
    fn cursor(
        &self,
        file: &SerializedFileReader<File>,
        group: usize,
        column: usize,
    ) -> Result<Cursor> {
        let wrong = |what: &str| {
            let message = format!("column {} {what}", self.columns[column]);
            Error::file(&self.path, message)
        };
        let schema = file.metadata().file_metadata().schema_descr_ptr();
        let described = schema.column(column);
        if described.max_rep_level() > 0 {
            return Err(wrong("holds lists"));
        }
        let row_group = file.get_row_group(group).map_err(|e| self.failed(e))?;
        match row_group.get_column_reader(column).map_err(|e| self.failed(e))? {
            ColumnReader::ByteArrayColumnReader(values) => {
                Ok(Cursor { group, next: 0, defined: described.max_def_level(), values })
            }
            _ => Err(wrong("holds neither text nor bytes")),
        }
    }

    /// One value; `None` where the row has none.
    ///
    /// # Errors
    /// When the file cannot be read or the column holds something else.
    pub fn value(&self, column: usize, row: usize) -> Result<Option<Vec<u8>>> {
        let group = self.starts.partition_point(|s| *s <= row).saturating_sub(1);
        let row = row - self.starts[group];
        let mut state = self.lock();
        let State { file, cursors, blocks } = &mut *state;
        let place = (column, group, row / BLOCK * BLOCK);
        if !blocks.iter().any(|b| (b.column, b.group, b.start) == place) {
            // Put back only when it still is where it says.
            let held = cursors.remove(&column).filter(|c| c.group == group && c.next <= place.2);
            let mut cursor = held.map_or_else(|| self.cursor(file, group, column), Ok)?;
            cursor.skip_to(place.2).map_err(|e| self.failed(e))?;
            let values = cursor.read(BLOCK).map_err(|e| self.failed(e))?;
            cursors.insert(column, cursor);
            blocks.truncate(BLOCKS - 1);
            blocks.push_front(Block { column, group, start: place.2, values });
        }
        let block = blocks.iter().find(|b| (b.column, b.group, b.start) == place);
        let value = block.and_then(|block| block.values.get(row % BLOCK));
        let value = value.ok_or_else(|| Error::file(&self.path, "has fewer rows than it says"))?;
        Ok(value.as_ref().map(|v| v.data().to_vec()))
    }

    /// Every value of a column in turn.
    ///
    /// # Errors
    /// As [`Self::value`].
    pub fn each(&self, column: usize, mut each: impl FnMut(Option<&[u8]>)) -> Result<()> {
        let state = self.lock();
        for group in 0..self.starts.len() - 1 {
            let mut cursor = self.cursor(&state.file, group, column)?;
            loop {
                let values = cursor.read(BATCH).map_err(|e| self.failed(e))?;
                if values.is_empty() {
                    break;
                }
                values.iter().for_each(|value| each(value.as_ref().map(ByteArray::data)));
            }
        }
        Ok(())
    }
}
