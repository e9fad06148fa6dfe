//! Safetensors files written a tensor at a time, so that an export needs no second copy of a
//! checkpoint, and read for their metadata alone.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::io::{BufWriter, Read, Write};
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use safetensors::tensor::View;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use crate::util::write_atomic_with;
use crate::{Error, Result};

/// Longer headers are refused by the safetensors library.
const LONGEST_HEADER: u64 = 100_000_000;

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

/// The metadata of a safetensors file; empty where it has none.
///
/// # Errors
/// When the file cannot be read or has no safetensors header.
pub fn read_metadata(path: &Path) -> Result<BTreeMap<String, String>> {
    let failed = |e: std::io::Error| Error::file(path, e);
    let mut file = std::fs::File::open(path).map_err(failed)?;
    let mut length = [0; 8];
    file.read_exact(&mut length).map_err(failed)?;
    let length = u64::from_le_bytes(length);
    if length > LONGEST_HEADER {
        return Err(Error::file(
            path,
            format!("a header of {length} bytes is no safetensors file's"),
        ));
    }
    let mut text = vec![0; length as usize];
    file.read_exact(&mut text).map_err(failed)?;
    let header: Header = serde_json::from_slice(&text).map_err(|e| Error::file(path, e))?;
    Ok(header.metadata)
}

#[derive(serde::Deserialize)]
struct Header {
    #[serde(rename = "__metadata__", default)]
    metadata: BTreeMap<String, String>,
}
