//! Scales that were multiplied into up matrices when a file was written, so that reading it
//! gives them back.

use std::collections::BTreeMap;
use std::path::Path;

use super::lora::Adapters;
use super::lora_names::{AdapterNames, Network};
use crate::nn::LowRank;
use crate::{Error, Result};

/// In the header of our own files in diffusers' names.
pub(super) const KEY: &str = "diffusion-sharpening.scales";

/// Scales by diffusers' names of the modules.
#[derive(Debug, Default)]
pub(super) struct Folded(BTreeMap<String, f64>);

impl Folded {
    /// Those of `adapters` that can be divided out again and change anything.
    pub fn of(adapters: &Adapters, names: &AdapterNames) -> Self {
        let scale = |network| {
            let all = adapters.network(network).iter();
            all.map(move |(module, a)| (names.diffusers(network, module), a.scale))
        };
        let all = Network::ALL.into_iter().flat_map(scale);
        Self(all.filter(|(_, scale)| scale.is_normal() && *scale != 1.0).collect())
    }

    /// # Errors
    /// When the header's entry is no map of numbers.
    pub fn read(path: &Path, metadata: &BTreeMap<String, String>) -> Result<Self> {
        let Some(text) = metadata.get(KEY) else { return Ok(Self::default()) };
        let scales: BTreeMap<String, f64> =
            serde_json::from_str(text).map_err(|e| Error::file(path, format!("{KEY}: {e}")))?;
        match scales.iter().find(|(_, scale)| !scale.is_normal()) {
            Some((name, scale)) => Err(Error::file(path, format!("{KEY}: {name} has {scale}"))),
            None => Ok(Self(scales)),
        }
    }

    /// The header's entry; nothing where there is nothing to say.
    pub fn entry(&self) -> Option<(String, String)> {
        let text = serde_json::to_string(&self.0).ok().filter(|_| !self.0.is_empty());
        text.map(|text| (KEY.to_owned(), text))
    }

    /// The adapter with the scale outside of its up matrix: the same update, and to the bit what
    /// was written where the scale is a power of two.
    pub fn unfold(&self, name: &str, adapter: LowRank) -> Result<LowRank> {
        let Some(scale) = self.0.get(name) else { return Ok(adapter) };
        Ok(LowRank { up: (adapter.up / *scale)?, scale: adapter.scale * scale, ..adapter })
    }
}
