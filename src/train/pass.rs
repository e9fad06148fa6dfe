//! The loss at given states and its gradients.

use candle_core::{DType, Tensor};

use super::optimizer::Gradients;
use super::texts;
use crate::Result;
use crate::diffusion::cost::Units;
use crate::diffusion::denoiser::{Conditioning, TextCond};
use crate::diffusion::guidance::combine;
use crate::diffusion::meter::{Meter, MeteredDenoiser};
use crate::nn::threads;
use crate::sdxl::UNet;

/// A state at which a prediction is compared with a target.
#[derive(Clone, Debug)]
pub struct Sample {
    /// [C, h, w], f32.
    pub x: Tensor,
    pub t: f64,
    /// Of the network's prediction type, [C, h, w], f32.
    pub target: Tensor,
    /// What the prediction is made with; guided where it says so.
    pub cond: Conditioning,
}

/// Predictions [R, C, h, w] in f32 and their mean squared distances from the targets.
#[derive(Clone, Debug)]
pub struct Predicted {
    pub outputs: Tensor,
    pub losses: Vec<f64>,
}

/// What predictions are held to besides: weight_r times the mean squared distance from these.
#[derive(Clone, Debug)]
pub struct Anchor {
    /// [R, C, h, w], f32.
    pub outputs: Tensor,
    /// Of each row.
    pub weights: Vec<f64>,
}

/// mean over C, h, w of (outputs − targets)², [R].
pub fn squared_errors(outputs: &Tensor, targets: &Tensor) -> Result<Tensor> {
    Ok((outputs - targets)?.sqr()?.flatten_from(1)?.mean(1)?)
}

fn values(errors: &Tensor) -> Result<Vec<f64>> {
    Ok(errors.detach().to_vec1::<f32>()?.into_iter().map(f64::from).collect())
}

fn targets(samples: &[Sample]) -> Result<Tensor> {
    Ok(Tensor::stack(&samples.iter().map(|s| &s.target).collect::<Vec<_>>(), 0)?)
}

/// Predictions without gradients, `micro_batch` rows at a time.
///
/// # Errors
/// `Error::Budget` before an evaluation, the network's.
pub fn evaluate(
    denoiser: &MeteredDenoiser,
    samples: &[Sample],
    micro_batch: usize,
) -> Result<Predicted> {
    let (mut outputs, mut losses) = (Vec::new(), Vec::new());
    for part in samples.chunks(micro_batch.max(1)) {
        let conds: Vec<&Conditioning> = part.iter().map(|s| &s.cond).collect();
        let x = Tensor::stack(&part.iter().map(|s| &s.x).collect::<Vec<_>>(), 0)?;
        let t = Tensor::new(part.iter().map(|s| s.t as f32).collect::<Vec<_>>(), x.device())?;
        let output = denoiser.predict(&x, &t, &conds)?;
        losses.extend(values(&squared_errors(&output, &targets(part)?)?)?);
        outputs.push(output);
    }
    Ok(Predicted { outputs: Tensor::cat(&outputs, 0)?, losses })
}

/// The network under training, and where its gradients go.
pub struct Policy<'a> {
    pub unet: &'a UNet,
    pub gradients: &'a mut Gradients,
    pub meter: &'a Meter,
}

impl Policy<'_> {
    /// A prediction in f32, with a graph. `x` [R, C, h, w].
    ///
    /// # Errors
    /// `Error::Budget` before running, the network's.
    pub fn predict(&self, x: &Tensor, t: &[f64], text: &[&TextCond]) -> Result<Tensor> {
        self.meter.reserve(Units { f: text.len() as u64, ..Units::default() })?;
        let [context, pooled, sizes] = texts::rows(text)?;
        let t = Tensor::new(t.iter().map(|t| *t as f32).collect::<Vec<_>>(), x.device())?;
        Ok(self.unet.forward(x, &t, &context, &pooled, &sizes)?.to_dtype(DType::F32)?)
    }

    /// Adds the gradients of `scale · Σ_r factor_r · error_r`, where `errors` gives
    /// [R] squared errors with their graph and outputs, and `factors` is told the errors'
    /// values: those of any loss that is a function of them, if factors are its derivatives. An
    /// anchor's distances are added to the sum.
    ///
    /// # Errors
    /// The closures', and those of the backward pass.
    pub fn learn(
        &mut self,
        errors: impl FnOnce(&Self) -> Result<(Tensor, Tensor)> + Send,
        factors: impl FnOnce(&[f64]) -> Result<Vec<f64>> + Send,
        anchor: Option<&Anchor>,
        scale: f64,
    ) -> Result<Predicted>
    where
        Self: Send,
    {
        let meter = self.meter;
        meter.time("gradients", || {
            threads::within(|| {
                let (errors, outputs) = errors(self)?;
                let losses = values(&errors)?;
                let factors: Vec<f32> = factors(&losses)?.into_iter().map(|f| f as f32).collect();
                let factors = Tensor::new(factors, errors.device())?;
                let mut loss = (errors * factors)?.sum_all()?;
                if let Some(anchor) = anchor {
                    let weights: Vec<f32> = anchor.weights.iter().map(|w| *w as f32).collect();
                    let weights = Tensor::new(weights, outputs.device())?;
                    let apart = squared_errors(&outputs, &anchor.outputs)?;
                    loss = (loss + (apart * weights)?.sum_all()?)?;
                }
                self.gradients.backward(&loss, scale)?;
                Ok(Predicted { outputs: outputs.detach(), losses })
            })
        })
    }

    /// Squared errors [R] at given states, with their graph, and the predictions.
    ///
    /// # Errors
    /// As for [`Self::predict`].
    pub fn errors(&self, samples: &[Sample]) -> Result<(Tensor, Tensor)> {
        let x = Tensor::stack(&samples.iter().map(|s| &s.x).collect::<Vec<_>>(), 0)?;
        let t: Vec<f64> = samples.iter().map(|s| s.t).collect();
        let conds: Vec<&Conditioning> = samples.iter().map(|s| &s.cond).collect();
        let nulls: Vec<&TextCond> = conds.iter().filter_map(|c| c.unconditional()).collect();
        let positive = conds.iter().map(|c| &c.positive);
        let outputs = if nulls.is_empty() {
            self.predict(&x, &t, &positive.collect::<Vec<_>>())?
        } else {
            // Guidance is the same for all.
            let rows = samples.len();
            let text: Vec<&TextCond> = nulls.into_iter().chain(positive).collect();
            let both = self.predict(&Tensor::cat(&[&x, &x], 0)?, &t.repeat(2), &text)?;
            combine(&both.narrow(0, 0, rows)?, &both.narrow(0, rows, rows)?, &conds)?
        };
        Ok((squared_errors(&outputs, &targets(samples)?)?, outputs))
    }
}
