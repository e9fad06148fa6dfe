//! Safetensors files written a tensor at a time, so that an export needs no second copy of a
//! checkpoint, and read a tensor at a time.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use candle_core::safetensors::Load;
use candle_core::{DType, Device, Tensor};
use safetensors::tensor::{Metadata, TensorView, View};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use crate::util::write_atomic_with;
use crate::{Error, Result};

/// Longer headers are refused by the safetensors library.
const LONGEST_HEADER: u64 = 100_000_000;
/// Of the header's length, at the beginning of a file.
const LENGTH_BYTES: u64 = 8;

/// A tensor to be written. Its values are made when its turn comes.
pub struct Entry<'a> {
    name: String,
    dtype: DType,
    shape: Vec<usize>,
    make: Box<dyn Fn() -> Result<Tensor> + 'a>,
}

impl<'a> Entry<'a> {
    /// `make` gives the values, in any dtype and on any device.
    pub fn new(
        name: impl Into<String>,
        dtype: DType,
        shape: impl Into<Vec<usize>>,
        make: impl Fn() -> Result<Tensor> + 'a,
    ) -> Self {
        Self { name: name.into(), dtype, shape: shape.into(), make: Box::new(make) }
    }

    /// A tensor as it is.
    pub fn of(name: impl Into<String>, tensor: &'a Tensor) -> Self {
        Self::new(name, tensor.dtype(), tensor.dims(), || Ok(tensor.clone()))
    }

    /// A tensor in `dtype` when it holds floats, else as it is.
    pub fn cast(name: impl Into<String>, tensor: &'a Tensor, dtype: DType) -> Self {
        let dtype = if tensor.dtype().is_float() { dtype } else { tensor.dtype() };
        Self::new(name, dtype, tensor.dims(), || Ok(tensor.clone()))
    }

    fn size(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.size_in_bytes()
    }

    /// The bytes in the file.
    fn with_bytes<T>(&self, use_them: impl FnOnce(&[u8]) -> Result<T>) -> Result<T> {
        let tensor = (self.make)()?.to_device(&Device::Cpu)?.to_dtype(self.dtype)?.contiguous()?;
        if tensor.dims() != self.shape {
            let message = format!("{}: {:?} became {:?}", self.name, self.shape, tensor.dims());
            return Err(Error::Weights(message));
        }
        let view = &tensor;
        let bytes: Cow<[u8]> = View::data(&view);
        use_them(&bytes)
    }
}

/// The safetensors name of a dtype.
fn dtype_name(dtype: DType) -> String {
    safetensors::Dtype::from(dtype).to_string()
}

/// The order in the file: wide values first, so that all are aligned, then by name.
fn in_order(mut entries: Vec<Entry>) -> Vec<Entry> {
    entries.sort_by(|a, b| {
        let width = |e: &Entry| e.dtype.size_in_bytes();
        width(b).cmp(&width(a)).then_with(|| a.name.cmp(&b.name))
    });
    entries
}

/// Writes a safetensors file, whole or not at all; equal calls write equal bytes.
///
/// # Errors
/// When the file cannot be written or a tensor cannot be made.
pub fn write(path: &Path, entries: Vec<Entry>, metadata: &BTreeMap<String, String>) -> Result<()> {
    let entries = in_order(entries);
    let mut header = Map::new();
    if !metadata.is_empty() {
        header.insert("__metadata__".into(), json!(metadata));
    }
    let mut at = 0;
    for entry in &entries {
        let end = at + entry.size();
        let place = json!({
            "dtype": dtype_name(entry.dtype), "shape": entry.shape, "data_offsets": [at, end],
        });
        if header.insert(entry.name.clone(), place).is_some() {
            return Err(Error::file(path, format!("two tensors are called '{}'", entry.name)));
        }
        at = end;
    }
    let mut text = Value::Object(header).to_string().into_bytes();
    text.resize(text.len().next_multiple_of(8), b' ');
    write_atomic_with(path, |file| {
        let failed = |e: std::io::Error| Error::file(path, e);
        let mut out = BufWriter::new(file);
        out.write_all(&(text.len() as u64).to_le_bytes()).map_err(failed)?;
        out.write_all(&text).map_err(failed)?;
        for entry in &entries {
            entry.with_bytes(|bytes| out.write_all(bytes).map_err(failed))?;
        }
        out.flush().map_err(failed)
    })
}

/// SHA-256, hex, of what follows the header in the file that [`write`] makes.
///
/// # Errors
/// When a tensor cannot be made.
pub fn data_sha256(entries: Vec<Entry>) -> Result<String> {
    let mut hash = Sha256::new();
    for entry in in_order(entries) {
        entry.with_bytes(|bytes| {
            hash.update(bytes);
            Ok(())
        })?;
    }
    Ok(hash.finalize().iter().map(|b| format!("{b:02x}")).collect())
}

/// A safetensors file that is open, of which tensors are read one at a time: beside them it takes
/// no memory, as a mapping would.
pub struct TensorFile {
    path: PathBuf,
    file: Mutex<File>,
    header: Metadata,
    /// Where the values begin.
    start: u64,
}

impl TensorFile {
    /// # Errors
    /// When the file cannot be read, or is not as long as its header says.
    pub fn open(path: &Path) -> Result<Self> {
        let failed = |e: std::io::Error| Error::file(path, e);
        let mut file = File::open(path).map_err(failed)?;
        let bytes = file.metadata().map_err(failed)?.len();
        let mut length = [0; LENGTH_BYTES as usize];
        file.read_exact(&mut length).map_err(failed)?;
        let length = u64::from_le_bytes(length);
        if length > LONGEST_HEADER {
            let message = format!("a header of {length} bytes is no safetensors file's");
            return Err(Error::file(path, message));
        }
        // Before memory is taken for it.
        if length > bytes.saturating_sub(LENGTH_BYTES) {
            return Err(Error::file(path, format!("ends within its header of {length} bytes")));
        }
        let mut text = vec![0; length as usize];
        file.read_exact(&mut text).map_err(failed)?;
        let header: Metadata = serde_json::from_slice(&text).map_err(|e| Error::file(path, e))?;
        let start = LENGTH_BYTES + length;
        let expected = start.checked_add(header.data_len() as u64);
        if expected != Some(bytes) {
            let expected = expected.unwrap_or(u64::MAX);
            let message = format!("has {bytes} bytes, its header says {expected}");
            return Err(Error::file(path, message));
        }
        Ok(Self { path: path.to_path_buf(), file: Mutex::new(file), header, start })
    }

    /// In the order in which they lie in the file.
    pub fn names(&self) -> Vec<String> {
        self.header.offset_keys()
    }

    pub fn shapes(&self) -> impl Iterator<Item = (String, Vec<usize>)> {
        self.header.tensors().into_iter().map(|(name, info)| (name, info.shape.clone()))
    }

    /// What else the header says; empty where that is nothing.
    pub fn metadata(&self) -> BTreeMap<String, String> {
        self.header.metadata().iter().flatten().map(|(k, v)| (k.clone(), v.clone())).collect()
    }

    /// A tensor in its own dtype.
    ///
    /// # Errors
    /// When there is none of this name, or it cannot be read.
    pub fn read(&self, name: &str, device: &Device) -> Result<Tensor> {
        let fail = |message: String| Error::file(&self.path, message);
        let info = self.header.info(name).ok_or_else(|| fail(format!("lacks '{name}'")))?;
        let (from, to) = info.data_offsets;
        let mut bytes = Vec::with_capacity(to - from);
        {
            let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
            let failed = |e: std::io::Error| fail(e.to_string());
            file.seek(SeekFrom::Start(self.start + from as u64)).map_err(failed)?;
            (&*file).take((to - from) as u64).read_to_end(&mut bytes).map_err(failed)?;
        }
        let view = TensorView::new(info.dtype, info.shape.clone(), &bytes);
        let view = view.map_err(|e| fail(format!("'{name}': {e}")))?;
        view.load(device).map_err(|e| Error::tensor_file(&self.path, e))
    }
}

/// The metadata of a safetensors file; empty where it has none.
///
/// # Errors
/// When the file cannot be read or has no safetensors header.
pub fn read_metadata(path: &Path) -> Result<BTreeMap<String, String>> {
    Ok(TensorFile::open(path)?.metadata())
}
