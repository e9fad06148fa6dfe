//! Checkpoints from one layout to the other, in the precision that is wanted.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::DType;

use super::folder::{ModelFolder, OpenOptions};
use crate::nn::device::Placement;
use crate::{Error, Result};

/// What a checkpoint can be written as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// One `.safetensors` file in Stability's names, for ComfyUI and the A1111 family.
    Single,
    /// A folder as diffusers writes it.
    Diffusers,
}

/// Most bytes of one weight file of a folder, as in diffusers.
const SHARD_BYTES: usize = 10_000_000_000;

/// Writes the checkpoint at `model`, with the VAE beside it where there is one
/// ([`ModelFolder::vae_of`]), to `out`; numbers become `dtype` in one rounding. The weights are in
/// memory in that type meanwhile.
///
/// # Errors
/// When the checkpoint cannot be read, or `out` not be written or not be found again.
pub fn export(model: &Path, out: &Path, layout: Layout, dtype: DType) -> Result<()> {
    let single = layout == Layout::Single;
    if single != out.extension().is_some_and(|e| e == "safetensors") {
        let expected = if single { "a file name that ends in" } else { "a folder, not a file" };
        let message = format!("expected {expected} .safetensors, got '{}'", out.display());
        return Err(Error::invalid("out", message));
    }
    let options = OpenOptions { vae: ModelFolder::vae_of(model) };
    let placement = Placement { weights: dtype, ..Placement::cpu(DType::F32) };
    let opened = ModelFolder::open_with(model, &placement, &options)?;
    match layout {
        Layout::Single => opened.save_single_file(out, dtype, &BTreeMap::new()),
        Layout::Diffusers => opened.save(out, dtype, SHARD_BYTES),
    }
}
