//! Adapter files from one naming to another.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device};

use super::lora::{Adapters, LoraFormat};
use super::lora_names::{AdapterNames, Network};
use super::lora_write::COMPUTED;
use super::plan::{Matrix, Networks, Sample, Trace, clip_text, default_size, unet};
use super::tensor_file::read_metadata;
use crate::nn::LowRank;
use crate::{Error, Result};

/// Writes the adapter in `files` of the checkpoint at `model`, in any naming that is read, to
/// `out` with matrices in `dtype`. Of several files, checkpoints of one run, the matrices are
/// averaged. The adapter's effect is multiplied by `scale`. Of the checkpoint only configurations are read. What the header of the last file
/// says of training, title and so on goes along; what follows from the tensors is made anew.
///
/// # Errors
/// As [`Adapters::read`] and [`Adapters::write`]; when a module of the checkpoint has another size
/// than the adapter's; when files differ in modules, ranks or scales; when there is none; and
/// when `out` is no `.safetensors` file.
pub fn convert(
    model: &Path,
    files: &[PathBuf],
    out: &Path,
    scale: f64,
    format: LoraFormat,
    dtype: DType,
) -> Result<()> {
    if out.extension().is_none_or(|e| e != "safetensors") {
        let message = format!("expected a name that ends in .safetensors, got '{}'", out.display());
        return Err(Error::invalid("out", message));
    }
    if !scale.is_finite() {
        return Err(Error::invalid("scale", format!("expected a number, got {scale}")));
    }
    let networks = Networks::at(model)?;
    let [unet, first, second] = matrices(&networks)?;
    let modules = [&unet, &first, &second].map(|known| known.keys().cloned().collect());
    let names = AdapterNames::new(&networks.unet, modules);
    let (last, earlier) =
        files.split_last().ok_or_else(|| Error::invalid("adapter", "missing: give a file"))?;
    let read = |file: &PathBuf| Adapters::read(file, &names, DType::F32, &Device::Cpu);
    let mut adapters = read(last)?;
    for (done, file) in earlier.iter().enumerate() {
        let weight = 1.0 / (done + 2) as f64;
        adapters = adapters.toward(&read(file)?, weight).map_err(|e| match e {
            Error::Weights(message) => Error::file(file, message),
            other => other,
        })?;
    }
    for (network, known) in Network::ALL.into_iter().zip([unet, first, second]) {
        for (module, adapter) in adapters.network(network).iter() {
            if let Some(misfit) = known.get(module).and_then(|matrix| misfit(adapter, matrix)) {
                let message = format!("adapter of {}, {module}: {misfit}", network.component());
                return Err(Error::file(last, message));
            }
        }
    }
    if scale != 1.0 {
        adapters = adapters.scaled(scale)?;
    }
    let mut metadata = read_metadata(last)?;
    metadata.retain(|key, _| !COMPUTED.contains(&key.as_str()));
    adapters.write(out, &names, format, dtype, &metadata)
}

/// The matrices of the U-Net and the two towers by module.
fn matrices(networks: &Networks) -> Result<[BTreeMap<String, Matrix>; 3]> {
    let (width, height) = default_size(&networks.unet, &networks.vae);
    let (height, width) = networks.latent(height, width)?;
    let sample = Sample { batch: 1, height, width, tokens: networks.tokens() };
    let of =
        |trace: Trace| trace.ops.into_iter().filter_map(|op| Some((op.name, op.matrix?))).collect();
    let [first, second] = networks.text.each_ref().map(|config| of(clip_text(config, 1)));
    Ok([of(unet(&networks.unet, sample)?), first, second])
}

/// What is wrong where the adapter is of another size than the module's matrix.
fn misfit(adapter: &LowRank, matrix: &Matrix) -> Option<String> {
    let (down, up) = (adapter.down.dims(), adapter.up.dims());
    let inner = down.iter().skip(1).product::<usize>() as u64;
    let outer = up.first().copied().unwrap_or(0) as u64;
    let Matrix { inner: expected_inner, outer: expected_outer, .. } = *matrix;
    ((inner, outer) != (expected_inner, expected_outer)).then(|| {
        format!(
            "down {down:?} and up {up:?} map {inner} values to {outer}, expected {expected_inner} \
             to {expected_outer}"
        )
    })
}
