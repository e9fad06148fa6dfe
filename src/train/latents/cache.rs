//! Latents on disk, in a folder of their own for everything that they depend on.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::encode::{Encoded, Record, encode};
use super::transform::Transform;
use crate::data::images::ImageTextSet;
use crate::data::{Skipped, complaint};
use crate::sdxl::folder::ModelFolder;
use crate::sdxl::tensor_file::{Entry, TensorFile, write};
use crate::util::{CancelToken, write_atomic};
use crate::{Error, Result};

/// Raised whenever the files or the views that are drawn change.
const FORMAT: u32 = 1;
/// A shard holds about this much, and at most so many examples.
const SHARD_BYTES: usize = 64 << 20;
const SHARD_EXAMPLES: usize = 128;
/// Rows that may be broken in any set, and the share of them that may be in a large one.
const BROKEN: usize = 10;
const BROKEN_SHARE: usize = 20;
/// Shards that are held open.
const OPEN: usize = 128;

/// What latents depend on beside the set and the VAE.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CacheKey {
    pub transform: Transform,
    /// Views of each example, at least 1: with random crops or flips more than one makes sense.
    pub variants: u32,
    /// Of crops and flips.
    pub seed: u64,
}

/// One view of one example.
#[derive(Clone, Debug)]
pub struct LatentExample {
    /// Of the example within its set.
    pub name: String,
    pub caption: String,
    /// Of the posterior over latents as the U-Net takes them, [C, h, w] f32 on the CPU.
    pub mean: Tensor,
    /// Likewise.
    pub std: Tensor,
    /// SDXL's size conditioning, as `View::time_ids`.
    pub time_ids: [f32; 6],
    pub flipped: bool,
}

/// What a shard's metadata say, as JSON under [`CONTENTS`].
#[derive(Serialize, Deserialize)]
struct Contents {
    fingerprint: String,
    records: Vec<Record>,
    skipped: Vec<Skipped>,
}

const CONTENTS: &str = "contents";

/// The latents of a set. Its items are the views of the examples that could be used: an epoch
/// over them sees every variant.
pub struct LatentCache {
    dir: PathBuf,
    /// The shard and the record of each item.
    items: Vec<(usize, Record)>,
    skipped: Vec<Skipped>,
    open: Mutex<HashMap<usize, Arc<TensorFile>>>,
}

impl LatentCache {
    /// Encodes what `dir` does not hold yet and indexes the rest. Shards are written whole or
    /// not at all, so that the next call goes on where this one was stopped, to the same bytes.
    /// `progress` is told of the rows that are done and of all.
    ///
    /// # Errors
    /// When more than 10 rows and more than a twentieth of all are broken, or none is usable;
    /// when the transform does not fit the VAE; `Error::Cancelled`; and when the VAE or a file
    /// of the cache fails.
    pub fn open(
        set: &dyn ImageTextSet,
        model: &ModelFolder,
        key: &CacheKey,
        dir: &Path,
        cancel: &CancelToken,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Self> {
        let config = model.vae.config();
        key.transform.check(config.factor() as u32)?;
        if key.variants == 0 {
            return Err(Error::invalid("variants", "at least one view of an image is needed"));
        }
        let (fingerprint, written) = fingerprint(set, model, key)?;
        let dir = dir.join(&fingerprint[..16]);
        write_atomic(&dir.join("key.json"), written.as_bytes())?;
        let side = key.transform.resolution as usize / config.factor();
        let bytes = 2 * 4 * config.latent_channels * side * side * key.variants as usize;
        let each = (SHARD_BYTES / bytes.max(1)).clamp(1, SHARD_EXAMPLES);
        let (mut items, mut skipped) = (Vec::new(), Vec::new());
        for (shard, start) in (0..set.len()).step_by(each).enumerate() {
            let (path, end) = (shard_path(&dir, shard), set.len().min(start + each));
            let contents = match held(&path, &fingerprint)? {
                Some(contents) => contents,
                None => {
                    let mut done = |row| progress(row, set.len());
                    let (vae, device) = (&model.vae, model.device());
                    let encoded = encode(set, vae, device, key, start..end, cancel, &mut done)?;
                    write_shard(&path, &fingerprint, encoded)?
                }
            };
            progress(end, set.len());
            items.extend(contents.records.into_iter().map(|record| (shard, record)));
            skipped.extend(contents.skipped);
            if skipped.len() > BROKEN.max(set.len() / BROKEN_SHARE) {
                return Err(Error::invalid("images", complaint(&skipped, set.len())));
            }
        }
        if items.is_empty() {
            return Err(Error::invalid("images", complaint(&skipped, set.len())));
        }
        Ok(Self { dir, items, skipped, open: Mutex::default() })
    }

    /// Views of examples.
    pub fn len(&self) -> usize {
        self.items.len()
    }

    /// Never: a cache without items is not opened.
    pub fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    /// The folder with this cache's files.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Height and width in pixels of what item `i` was encoded from.
    pub fn bucket(&self, i: usize) -> (u32, u32) {
        let [.., height, width] = self.items[i].1.time_ids;
        (height as u32, width as u32)
    }

    /// [`Self::bucket`] of every item.
    pub fn buckets(&self) -> impl Iterator<Item = (u32, u32)> {
        (0..self.len()).map(|i| self.bucket(i))
    }

    /// Rows of the set that could not be used.
    pub fn skipped(&self) -> &[Skipped] {
        &self.skipped
    }

    /// Captions in the order of the items.
    pub fn captions(&self) -> impl Iterator<Item = &str> {
        self.items.iter().map(|(_, record)| record.caption.as_str())
    }

    /// Item `i`, read from its shard.
    ///
    /// # Errors
    /// When the shard cannot be read.
    pub fn get(&self, i: usize) -> Result<LatentExample> {
        let (shard, record) = &self.items[i];
        let file = self.shard(*shard)?;
        let [mean, std] = record.tensors().map(|name| file.read(&name, &Device::Cpu));
        let Record { name, caption, time_ids, flipped, .. } = record.clone();
        Ok(LatentExample { name, caption, mean: mean?, std: std?, time_ids, flipped })
    }

    fn shard(&self, shard: usize) -> Result<Arc<TensorFile>> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(file) = open.get(&shard) {
            return Ok(file.clone());
        }
        if open.len() >= OPEN {
            open.clear();
        }
        let file = Arc::new(TensorFile::open(&shard_path(&self.dir, shard))?);
        open.insert(shard, file.clone());
        Ok(file)
    }
}

fn shard_path(dir: &Path, shard: usize) -> PathBuf {
    dir.join(format!("shard-{shard:05}.safetensors"))
}

/// The hash of all that the latents depend on, and its parts for people.
fn fingerprint(
    set: &dyn ImageTextSet,
    model: &ModelFolder,
    key: &CacheKey,
) -> Result<(String, String)> {
    let config = model.vae.config();
    let parts = serde_json::json!({
        "format": FORMAT,
        "set": set.fingerprint(),
        "vae_sha256": model.vae_sha256()?,
        "vae_dtype": model.vae.computed().as_str(),
        "scaling_factor": config.scaling_factor,
        "shift_factor": config.shift_factor,
        "key": key,
    });
    let hash = Sha256::digest(parts.to_string());
    let hash: String = hash.iter().map(|b| format!("{b:02x}")).collect();
    let written = serde_json::json!({"fingerprint": hash, "images": set.summary(), "of": parts});
    Ok((hash, format!("{written:#}\n")))
}

/// What a shard holds; `None` where it is still to be made.
fn held(path: &Path, fingerprint: &str) -> Result<Option<Contents>> {
    if !path.exists() {
        return Ok(None);
    }
    let read = || -> Result<Contents> {
        let metadata = TensorFile::open(path)?.metadata();
        let text = metadata.get(CONTENTS).map_or("", String::as_str);
        serde_json::from_str(text).map_err(|e| Error::file(path, e))
    };
    match read() {
        Ok(contents) if contents.fingerprint == fingerprint => Ok(Some(contents)),
        Ok(_) => Err(Error::file(path, "belongs to another cache: remove its folder")),
        Err(e) => {
            tracing::warn!("a damaged shard is made anew: {e}");
            Ok(None)
        }
    }
}

fn write_shard(path: &Path, fingerprint: &str, encoded: Encoded) -> Result<Contents> {
    let Encoded { records, latents, skipped } = encoded;
    let contents = Contents { fingerprint: fingerprint.to_owned(), records, skipped };
    let text = serde_json::to_string(&contents).map_err(|e| Error::file(path, e))?;
    let both = contents.records.iter().zip(&latents);
    let entries = both.flat_map(|(record, latents)| {
        record.tensors().into_iter().zip(latents).map(|(name, tensor)| Entry::of(name, tensor))
    });
    write(path, entries.collect(), &BTreeMap::from([(CONTENTS.to_owned(), text)]))?;
    Ok(contents)
}
