//! Named tensors: reading and writing safetensors, single or sharded, and
//! handing them to the networks so that everything missing, mis-shaped or
//! left over is reported at once.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;
use serde::Deserialize;
use sha2::{Digest, Sha256};

use super::config::read_json;
use super::lora::{LoraMap, misfits};
use super::single_file::FileNames;
use super::tensor_file::{self, Entry, TensorFile};
use crate::nn::conv::Padding;
use crate::nn::device::computed;
use crate::nn::{Conv2d, GroupNorm, LayerNorm, Linear, LowRank, threads};
use crate::util::write_atomic;
use crate::{Error, Result};

/// The tensors of one network.
#[derive(Clone, Debug)]
pub struct Weights {
    tensors: Arc<HashMap<String, Tensor>>,
    computed: Option<DType>,
    /// Where they came from, for messages.
    source: PathBuf,
    /// What they are called there, where that differs from our names.
    names: Option<Arc<FileNames>>,
}

#[derive(Deserialize)]
struct ShardIndex {
    weight_map: BTreeMap<String, String>,
}

impl Weights {
    pub fn new(tensors: HashMap<String, Tensor>, source: impl Into<PathBuf>) -> Self {
        Self { tensors: Arc::new(tensors), computed: None, source: source.into(), names: None }
    }

    /// The same weights for networks that compute in `dtype`: such as f32 weights in training,
    /// of which the layers use rounded copies.
    #[must_use]
    pub fn computing_in(self, dtype: DType) -> Self {
        Self { computed: Some(dtype), ..self }
    }

    /// Says in messages what the tensors are called in their file.
    pub fn named(self, names: FileNames) -> Self {
        Self { names: Some(Arc::new(names)), ..self }
    }

    fn shown(&self, name: &str) -> String {
        self.names.as_ref().map_or_else(|| name.to_owned(), |names| names.in_file(name))
    }

    /// Reads the weights of a component folder: `diffusion_pytorch_model` or
    /// `model`, plain or `.fp16`, one file or shards with an index.
    ///
    /// # Errors
    /// When no file is there, or one is unreadable.
    pub fn from_folder(folder: &Path, dtype: DType, device: &Device) -> Result<Self> {
        let mut tensors = HashMap::new();
        for file in &weight_files(folder)? {
            for (name, tensor) in load(file, dtype, device)? {
                if tensors.contains_key(&name) {
                    return Err(Error::file(file, format!("tensor '{name}' is in two shards")));
                }
                tensors.insert(name, tensor);
            }
        }
        Ok(Self::new(tensors, folder))
    }

    /// The type in which networks of these weights compute.
    pub fn computed(&self) -> DType {
        let stored = || self.tensors.values().find(|t| t.dtype().is_float());
        self.computed
            .or_else(|| stored().map(|t| computed(t.dtype(), t.device())))
            .unwrap_or(DType::F32)
    }

    pub fn tensors(&self) -> &HashMap<String, Tensor> {
        &self.tensors
    }

    /// The tensors by name; copies of the map where others share it.
    pub fn into_tensors(self) -> HashMap<String, Tensor> {
        Arc::try_unwrap(self.tensors).unwrap_or_else(|shared| (*shared).clone())
    }

    /// Puts what `make` makes of the tensor `name` in its place.
    pub(super) fn change(
        &mut self,
        name: &str,
        make: impl FnOnce(&Tensor) -> Result<Tensor>,
    ) -> Result<()> {
        let tensors = Arc::make_mut(&mut self.tensors);
        match tensors.get_mut(name) {
            Some(tensor) => *tensor = make(tensor)?,
            None => return Err(Error::Weights(format!("there is no tensor '{name}'"))),
        }
        Ok(())
    }

    /// Number of elements.
    pub fn parameters(&self) -> u64 {
        self.tensors.values().map(|t| t.elem_count() as u64).sum()
    }

    /// The modules that an adapter can sit on, in name order.
    pub fn modules(&self) -> Vec<String> {
        let matrices = self.tensors.iter().filter(|(_, t)| t.rank() >= 2);
        let mut names: Vec<String> =
            matrices.filter_map(|(k, _)| k.strip_suffix(".weight").map(str::to_owned)).collect();
        names.sort();
        names
    }

    /// Builds a network from these weights.
    ///
    /// # Errors
    /// Lists every tensor that is missing, has another shape, or was not asked for.
    pub fn build<T>(
        &self,
        lora: Option<&LoraMap>,
        make: impl FnOnce(&Scope) -> Result<T>,
    ) -> Result<T> {
        let report = Arc::new(Mutex::new(Report::default()));
        let scope = Scope {
            weights: self.clone(),
            prefix: String::new(),
            lora: lora.cloned().unwrap_or_default(),
            report: report.clone(),
        };
        // A configuration that cannot be built says why; nothing has asked for tensors then.
        let made = make(&scope)?;
        let report = report.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let lists = report.lists(self, lora);
        if lists.is_empty() {
            return Ok(made);
        }
        let summary = lists
            .iter()
            .map(|(what, names)| format!("{} {what}: {}", names.len(), names.join(", ")))
            .collect::<Vec<_>>()
            .join("; ");
        Err(Error::Weights(format!(
            "{}: weights do not fit the configuration: {summary}",
            self.source.display()
        )))
    }
}

/// Tensors that hold no weight and that some writers include.
pub(super) fn is_buffer(name: &str) -> bool {
    name.ends_with("position_ids")
}

#[derive(Debug, Default)]
struct Report {
    used: BTreeSet<String>,
    used_lora: BTreeSet<String>,
    missing: Vec<String>,
    misshaped: Vec<String>,
}

impl Report {
    fn lists(&self, weights: &Weights, lora: Option<&LoraMap>) -> Vec<(&'static str, Vec<String>)> {
        let unused = weights.tensors.keys().filter(|k| !self.used.contains(*k) && !is_buffer(k));
        let mut extra: Vec<String> = unused.map(|k| weights.shown(k)).collect();
        extra.sort();
        let mut unmatched: Vec<String> = lora
            .into_iter()
            .flat_map(LoraMap::names)
            .filter(|k| !self.used_lora.contains(*k))
            .map(str::to_owned)
            .collect();
        unmatched.sort();
        [
            ("missing", self.missing.clone()),
            ("of another shape", self.misshaped.clone()),
            ("not part of the network", extra),
            ("adapter modules without a layer", unmatched),
        ]
        .into_iter()
        .filter(|(_, names)| !names.is_empty())
        .collect()
    }
}

/// A position in the tree of tensor names, from which layers are made.
#[derive(Clone)]
pub struct Scope {
    weights: Weights,
    prefix: String,
    lora: LoraMap,
    report: Arc<Mutex<Report>>,
}

impl Scope {
    /// The type in which the network computes.
    pub fn computed(&self) -> DType {
        self.weights.computed()
    }

    /// Goes down to `name` (which may hold dots).
    pub fn at(&self, name: impl std::fmt::Display) -> Self {
        let prefix = if self.prefix.is_empty() {
            name.to_string()
        } else {
            format!("{}.{name}", self.prefix)
        };
        Self { prefix, ..self.clone() }
    }

    /// Marks a tensor that belongs to the file but not to the network's forward pass.
    pub fn ignore(&self, name: &str) {
        let mut report = self.report.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        report.used.insert(self.at(name).prefix);
    }

    /// Whether any tensor lies below this position's `name`.
    pub fn has(&self, name: &str) -> bool {
        let full = self.at(name).prefix;
        let below = format!("{full}.");
        self.weights.tensors.keys().any(|k| *k == full || k.starts_with(&below))
    }

    /// The tensor `name` of exactly this shape. What is wrong is noted for
    /// [`Weights::build`] and zeros are returned, so that all faults are found.
    pub fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let full = self.at(name).prefix;
        let mut report = self.report.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        report.used.insert(full.clone());
        let shown = || self.weights.shown(&full);
        match self.weights.tensors.get(&full) {
            Some(tensor) if tensor.dims() == shape => Ok(tensor.clone()),
            Some(tensor) => {
                let got = tensor.dims();
                report.misshaped.push(format!("{} (expected {shape:?}, got {got:?})", shown()));
                Ok(Tensor::zeros(shape, tensor.dtype(), tensor.device())?)
            }
            None => {
                report.missing.push(format!("{} {shape:?}", shown()));
                Ok(Tensor::zeros(shape, self.computed(), &Device::Cpu)?)
            }
        }
    }

    /// The adapter of a layer with this weight, [out, in] or [out, in, kh, kw].
    fn low_rank(&self, weight: &[usize]) -> Option<LowRank> {
        let found = self.lora.get(&self.prefix)?.clone();
        let mut report = self.report.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        report.used_lora.insert(self.prefix.clone());
        let named = |misfit| format!("adapter of {}, {misfit}", self.prefix);
        report.misshaped.extend(misfits(&found, weight).into_iter().map(named));
        Some(found)
    }

    pub fn linear(&self, input: usize, output: usize) -> Result<Linear> {
        let shape = [output, input];
        let (weight, bias) = (self.tensor("weight", &shape)?, self.tensor("bias", &[output])?);
        Ok(Linear::new(weight, Some(bias), self.low_rank(&shape)))
    }

    pub fn linear_no_bias(&self, input: usize, output: usize) -> Result<Linear> {
        let shape = [output, input];
        Ok(Linear::new(self.tensor("weight", &shape)?, None, self.low_rank(&shape)))
    }

    /// A square convolution.
    pub fn conv(
        &self,
        input: usize,
        output: usize,
        kernel: usize,
        stride: usize,
        padding: impl Into<Padding>,
    ) -> Result<Conv2d> {
        let shape = [output, input, kernel, kernel];
        let (weight, bias) = (self.tensor("weight", &shape)?, self.tensor("bias", &[output])?);
        Ok(Conv2d::new(weight, Some(bias), stride, padding, self.low_rank(&shape)))
    }

    pub fn group_norm(&self, groups: usize, channels: usize, eps: f64) -> Result<GroupNorm> {
        if groups == 0 || !channels.is_multiple_of(groups) {
            let message =
                format!("{}: {channels} channels do not split into {groups} groups", self.prefix);
            return Err(Error::invalid("norm_num_groups", message));
        }
        let (weight, bias) =
            (self.tensor("weight", &[channels])?, self.tensor("bias", &[channels])?);
        Ok(GroupNorm { groups, eps, weight, bias })
    }

    pub fn layer_norm(&self, width: usize, eps: f64) -> Result<LayerNorm> {
        Ok(LayerNorm {
            eps,
            weight: self.tensor("weight", &[width])?,
            bias: self.tensor("bias", &[width])?,
        })
    }
}

/// The files that hold a component's weights, in name order.
pub fn weight_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut tried = Vec::new();
    for stem in ["diffusion_pytorch_model", "model"] {
        for variant in ["", ".fp16"] {
            let single = folder.join(format!("{stem}{variant}.safetensors"));
            if single.is_file() {
                return Ok(vec![single]);
            }
            tried.push(format!("{stem}{variant}.safetensors"));
            for index in [
                format!("{stem}.safetensors.index{variant}.json"),
                format!("{stem}{variant}.safetensors.index.json"),
            ] {
                let path = folder.join(&index);
                if path.is_file() {
                    let index: ShardIndex = read_json(&path)?;
                    let names: BTreeSet<&String> = index.weight_map.values().collect();
                    return Ok(names.into_iter().map(|n| folder.join(n)).collect());
                }
            }
        }
    }
    Err(Error::file(
        folder,
        format!("no weights here: expected one of {} or a sharded index", tried.join(", ")),
    ))
}

/// Reads every tensor of a safetensors file in its own dtype.
pub fn read_safetensors(path: &Path, device: &Device) -> Result<HashMap<String, Tensor>> {
    let file = TensorFile::open(path)?;
    file.names()
        .into_iter()
        .map(|name| file.read(&name, device).map(|tensor| (name, tensor)))
        .collect()
}

/// Reads every tensor of a safetensors file as it is to lie on `device`: numbers as `dtype`,
/// and convolutions' weights on a GPU with their input channels last in memory.
pub fn load(path: &Path, dtype: DType, device: &Device) -> Result<HashMap<String, Tensor>> {
    let file = TensorFile::open(path)?;
    each(file.names(), device, |name| {
        let tensor = place(file.read(&name, device)?, dtype);
        Ok((name, tensor.map_err(|e| Error::tensor_file(path, e))?))
    })
}

/// Reads tensors with `read`, on the CPU in all threads: beside the results there are a tensor's
/// bytes for each thread at most.
pub(super) fn each<T: Send, C: FromIterator<T> + FromParallelIterator<T> + Send>(
    names: Vec<String>,
    device: &Device,
    read: impl Fn(String) -> Result<T> + Sync + Send,
) -> Result<C> {
    if device.is_cpu() {
        return threads::within(|| names.into_par_iter().map(read).collect());
    }
    names.into_iter().map(read).collect()
}

/// A tensor as it is to lie on its device, see [`load`].
pub(super) fn place(tensor: Tensor, dtype: DType) -> candle_core::Result<Tensor> {
    let tensor = if tensor.dtype().is_float() { tensor.to_dtype(dtype)? } else { tensor };
    if tensor.rank() != 4 || tensor.device().is_cpu() {
        return Ok(tensor);
    }
    // The same shape, in the order in which the GPU's convolutions read it.
    tensor.permute((0, 2, 3, 1))?.contiguous()?.permute((0, 3, 1, 2))
}

/// Writes tensors with string metadata, atomically.
pub fn write_safetensors(
    path: &Path,
    tensors: &BTreeMap<String, Tensor>,
    metadata: Option<HashMap<String, String>>,
) -> Result<()> {
    let entries: Vec<Entry> = tensors.iter().map(|(name, t)| Entry::of(name, t)).collect();
    tensor_file::write(path, entries, &metadata.unwrap_or_default().into_iter().collect())
}

/// Writes a component's weights as diffusers does: one file, or shards of at
/// most `shard_bytes` with an index. `stem` is `model` or `diffusion_pytorch_model`.
pub fn save_component(
    folder: &Path,
    stem: &str,
    tensors: &BTreeMap<String, Tensor>,
    shard_bytes: usize,
) -> Result<()> {
    let size = |t: &Tensor| t.elem_count() * t.dtype().size_in_bytes();
    let mut shards: Vec<BTreeMap<String, Tensor>> = vec![BTreeMap::new()];
    let (mut filled, mut total) = (0, 0);
    for (name, tensor) in tensors {
        if filled > 0 && filled + size(tensor) > shard_bytes {
            shards.push(BTreeMap::new());
            filled = 0;
        }
        filled += size(tensor);
        total += size(tensor);
        if let Some(shard) = shards.last_mut() {
            shard.insert(name.clone(), tensor.clone());
        }
    }
    let metadata = || Some(HashMap::from([("format".to_owned(), "pt".to_owned())]));
    if let [only] = shards.as_slice() {
        let file = format!("{stem}.safetensors");
        write_safetensors(&folder.join(&file), only, metadata())?;
        return remove_others(folder, stem, &[file]);
    }
    let (mut map, mut kept) =
        (serde_json::Map::new(), vec![format!("{stem}.safetensors.index.json")]);
    for (i, shard) in shards.iter().enumerate() {
        let file = format!("{stem}-{:05}-of-{:05}.safetensors", i + 1, shards.len());
        map.extend(shard.keys().map(|k| (k.clone(), file.clone().into())));
        write_safetensors(&folder.join(&file), shard, metadata())?;
        kept.push(file);
    }
    let index = serde_json::json!({"metadata": {"total_size": total}, "weight_map": map});
    write_atomic(&folder.join(&kept[0]), format!("{index:#}\n").as_bytes())?;
    remove_others(folder, stem, &kept)
}

/// Removes an earlier save's files: readers would take them for the current ones.
fn remove_others(folder: &Path, stem: &str, kept: &[String]) -> Result<()> {
    let shard = format!("{stem}-");
    for entry in std::fs::read_dir(folder).map_err(|e| Error::file(folder, e))? {
        let path = entry.map_err(|e| Error::file(folder, e))?.path();
        let Some(name) = path.file_name().and_then(|n| n.to_str()) else { continue };
        let ours = name == format!("{stem}.safetensors")
            || name == format!("{stem}.safetensors.index.json")
            || (name.starts_with(&shard)
                && name.contains("-of-")
                && name.ends_with(".safetensors"));
        if ours && !kept.iter().any(|k| k == name) {
            std::fs::remove_file(&path).map_err(|e| Error::file(&path, e))?;
        }
    }
    Ok(())
}

/// SHA-256 over files in the given order, hex.
pub fn sha256_of(files: &[PathBuf]) -> Result<String> {
    let mut hash = Sha256::new();
    for file in files {
        let mut reader = std::fs::File::open(file).map_err(|e| Error::file(file, e))?;
        std::io::copy(&mut reader, &mut hash).map_err(|e| Error::file(file, e))?;
    }
    Ok(hash.finalize().iter().map(|b| format!("{b:02x}")).collect())
}
