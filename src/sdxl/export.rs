//! Checkpoints from one layout to the other, in the precision that is wanted.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::DType;

use super::folder::{ModelFolder, OpenOptions};
use super::merge::Addition;
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
/// ([`ModelFolder::vae_of`]) and with `adapters` added into its weights, to `out`; numbers become
/// `dtype` in one rounding. The weights are in memory meanwhile: in that type, or with adapters
/// in f32.
///
/// # Errors
/// When the checkpoint or an adapter cannot be read, an adapter does not fit, or `out` cannot be
/// written or would not be found again.
pub fn export(
    model: &Path,
    out: &Path,
    layout: Layout,
    dtype: DType,
    adapters: &[Addition],
) -> Result<()> {
    let single = layout == Layout::Single;
    if single != out.extension().is_some_and(|e| e == "safetensors") {
        let expected = if single { "a file name that ends in" } else { "a folder, not a file" };
        let message = format!("expected {expected} .safetensors, got '{}'", out.display());
        return Err(Error::invalid("out", message));
    }
    let options = OpenOptions { vae: ModelFolder::vae_of(model), adapters: adapters.to_vec() };
    let weights = if adapters.is_empty() { dtype } else { DType::F32 };
    let placement = Placement { weights, ..Placement::cpu(DType::F32) };
    let opened = ModelFolder::open_with(model, &placement, &options)?;
    match layout {
        Layout::Single => opened.save_single_file(out, dtype, &BTreeMap::new()),
        Layout::Diffusers => opened.save(out, dtype, SHARD_BYTES),
    }
}
