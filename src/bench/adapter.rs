//! The adapter that is measured: rank 16 on every attention.

use std::collections::BTreeMap;

use candle_core::{DType, Var};

use crate::Result;
use crate::nn::LowRank;
use crate::sdxl::Weights;
use crate::sdxl::lora::LoraMap;

const RANK: usize = 16;
/// The projections of every attention.
pub(super) const TARGETS: [&str; 4] = ["to_q", "to_k", "to_v", "to_out.0"];

/// A random adapter of these weights, and its factors as variables by name.
///
/// # Errors
/// When memory runs out.
pub fn random_adapter(weights: &Weights, dtype: DType) -> Result<(LoraMap, BTreeMap<String, Var>)> {
    let (mut vars, mut modules) = (BTreeMap::new(), BTreeMap::new());
    for (name, tensor) in weights.tensors() {
        let Some(module) = name.strip_suffix(".weight") else { continue };
        if !TARGETS.iter().any(|target| module.ends_with(&format!(".{target}"))) {
            continue;
        }
        let ((output, input), device) = (tensor.dims2()?, tensor.device());
        let mut random = |part: &str, shape: (usize, usize)| -> Result<_> {
            let values = Var::randn(0_f32, 0.02, shape, device)?.to_dtype(dtype)?;
            let var = Var::from_tensor(&values)?;
            let tensor = var.as_tensor().clone();
            vars.insert(format!("{module}.{part}"), var);
            Ok(tensor)
        };
        let (down, up) = (random("down", (RANK, input))?, random("up", (output, RANK))?);
        modules.insert(module.to_owned(), LowRank { down, up, scale: 1.0 });
    }
    Ok((LoraMap::new(modules), vars))
}
