//! Adapter files from one naming to another.

use std::path::Path;

use candle_core::{DType, Device};

use super::lora::{Adapters, LoraFormat};
use super::lora_names::AdapterNames;
use super::lora_write::COMPUTED;
use super::plan::{Networks, Sample, Trace, clip_text, default_size, unet};
use super::tensor_file::read_metadata;
use crate::{Error, Result};

/// Writes the adapter `file` of the checkpoint at `model`, in any naming that is read, to `out`
/// with matrices in `dtype`. Of the checkpoint only configurations are read. What the header says
/// of training, title and so on goes along; what follows from the tensors is made anew.
///
/// # Errors
/// As [`Adapters::read`] and [`Adapters::write`]; and when `out` is no `.safetensors` file.
pub fn convert(
    model: &Path,
    file: &Path,
    out: &Path,
    format: LoraFormat,
    dtype: DType,
) -> Result<()> {
    if out.extension().is_none_or(|e| e != "safetensors") {
        let message = format!("expected a name that ends in .safetensors, got '{}'", out.display());
        return Err(Error::invalid("out", message));
    }
    let names = names(&Networks::at(model)?)?;
    let adapters = Adapters::read(file, &names, DType::F32, &Device::Cpu)?;
    let mut metadata = read_metadata(file)?;
    metadata.retain(|key, _| !COMPUTED.contains(&key.as_str()));
    adapters.write(out, &names, format, dtype, &metadata)
}

/// What adapter files call the modules of these networks.
fn names(networks: &Networks) -> Result<AdapterNames> {
    let (width, height) = default_size(&networks.unet, &networks.vae);
    let (height, width) = networks.latent(height, width)?;
    let sample = Sample { batch: 1, height, width, tokens: networks.tokens() };
    let modules = |trace: Trace| {
        trace.ops.into_iter().filter(|op| op.matrix.is_some()).map(|op| op.name).collect()
    };
    let [first, second] = networks.text.each_ref().map(|config| modules(clip_text(config, 1)));
    let unet = modules(unet(&networks.unet, sample)?);
    Ok(AdapterNames::new(&networks.unet, [unet, first, second]))
}
