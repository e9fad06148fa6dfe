//! The pieces of training whose speed is measured: `tools/bench_torch_train.py` does the same
//! under the same names.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Var};

use super::adapter::random_adapter;
use super::workload::{Inputs, Work, Workload};
use crate::nn::Recompute;
use crate::nn::device::{Placement, computed};
use crate::sdxl::config::UNetConfig;
use crate::sdxl::{UNet, Weights};
use crate::train::optimizer::{AdamW, AdamWConfig, Gradients, Missing, Step};
use crate::{Error, Result};

const RATE: f64 = 1e-6;

/// One measured piece: forward and backward of mean((prediction − target)²), and with
/// `optimise` an AdamW step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Training {
    /// An adapter of rank 16 on every attention, else every parameter.
    pub lora: bool,
    pub batch: usize,
    pub optimise: bool,
    /// With gradient checkpoints.
    pub recompute: Recompute,
}

impl Training {
    pub const ALL: [(&'static str, Self); 10] = [
        ("unet_forward_backward_lora_b1", Self::gradients(true, 1)),
        ("unet_forward_backward_full_b1", Self::gradients(false, 1)),
        ("train_step_lora_b1", Self::gradients(true, 1).optimised()),
        ("train_step_full_b1", Self::gradients(false, 1).optimised()),
        ("unet_forward_backward_lora_b4", Self::gradients(true, 4)),
        ("unet_forward_backward_full_b4", Self::gradients(false, 4)),
        ("train_step_lora_b4", Self::gradients(true, 4).optimised()),
        ("train_step_full_b4", Self::gradients(false, 4).optimised()),
        ("train_step_lora_b4_recompute", Self::gradients(true, 4).optimised().recomputed()),
        ("train_step_full_b4_recompute", Self::gradients(false, 4).optimised().recomputed()),
    ];

    const fn gradients(lora: bool, batch: usize) -> Self {
        Self { lora, batch, optimise: false, recompute: Recompute::Off }
    }

    const fn optimised(self) -> Self {
        Self { optimise: true, ..self }
    }

    const fn recomputed(self) -> Self {
        Self { recompute: Recompute::Blocks, ..self }
    }

    /// Loads the checkpoint's U-Net alone and returns the piece.
    ///
    /// # Errors
    /// Names the file that is missing or unusable.
    pub fn prepare(
        self,
        path: &Path,
        workload: Workload,
        placement: &Placement,
    ) -> Result<Work<'static>> {
        let inputs = workload.inputs(self.batch)?;
        let target = workload.latents(self.batch)?;
        let config = workload.unet_config();
        // Its own copy of the weights would count as the training's memory.
        drop(workload);
        // Whatever is trained is f32; the network computes in the type that was asked for.
        let stored = if self.lora { placement.weights } else { DType::F32 };
        let weights = Weights::from_folder(&path.join("unet"), stored, &placement.device)?
            .computing_in(computed(placement.weights, &placement.device));
        let (vars, unet) = if self.lora {
            let (lora, vars) = random_adapter(&weights, DType::F32)?;
            (vars, weights.build(Some(&lora), |scope| UNet::load(scope, &config))?)
        } else {
            all(weights, &config)?
        };
        let unet = unet.with_recompute(self.recompute);
        let mut gradients = Gradients::new(&vars, Missing::Refuse)?;
        let optimizer = || AdamW::new(&vars, AdamWConfig::new(RATE));
        let mut optimizer = self.optimise.then(optimizer).transpose()?;
        Ok(Box::new(move || {
            let Inputs { x, t, context, pooled, sizes } = &inputs;
            let prediction = unet.forward(x, t, context, pooled, sizes)?.to_dtype(DType::F32)?;
            let loss = (prediction - &target)?.sqr()?.mean_all()?;
            gradients.backward(&loss, 1.0)?;
            match &mut optimizer {
                None => gradients.clear(),
                Some(optimizer) => {
                    if let Step::Skipped { norm } = optimizer.step(&mut gradients)? {
                        return Err(Error::invalid("gradients", format!("their norm is {norm}")));
                    }
                }
            }
            Ok(loss.detach())
        }))
    }
}

type Trained = (BTreeMap<String, Var>, UNet);

/// Every parameter a variable.
fn all(weights: Weights, config: &UNetConfig) -> Result<Trained> {
    let (mut vars, computed) = (BTreeMap::new(), weights.computed());
    for (name, tensor) in weights.into_tensors() {
        vars.insert(name, Var::from_tensor(&tensor)?);
    }
    let tensors = vars.iter().map(|(name, var)| (name.clone(), var.as_tensor().clone())).collect();
    let weights = Weights::new(tensors, "unet").computing_in(computed);
    let unet = weights.build(None, |scope| UNet::load(scope, config))?;
    Ok((vars, unet))
}
