//! A step's noise out of several, by their values.

use candle_core::{Device, Tensor};
use serde_json::{Value, json};

use crate::search::params::{Params, name_of};
use crate::search::weights::{deviation, first_max, softmax};
use crate::{Error, Result};

/// How values become weights of noises.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Weighting {
    Tanh,
    Boltzmann,
    Linear,
}

impl Weighting {
    pub const OPTIONS: [(&'static str, Self); 3] =
        [("tanh", Self::Tanh), ("boltzmann", Self::Boltzmann), ("linear", Self::Linear)];

    pub fn name(self) -> &'static str {
        name_of(&Self::OPTIONS, &self)
    }
}

/// The scale of values in their weights.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Tau {
    /// The deviation of a step's values.
    Adaptive,
    /// That of the first step's, for good: as released.
    Frozen,
    Fixed(f64),
}

impl Tau {
    pub fn read(params: &Params) -> Result<Self> {
        let Some(value) = params.get("tau") else { return Ok(Self::Adaptive) };
        let number = value.as_f64().or_else(|| value.as_str()?.parse().ok());
        match (value.as_str(), number) {
            (Some("adaptive"), _) => Ok(Self::Adaptive),
            (Some("adaptive-frozen"), _) => Ok(Self::Frozen),
            (_, Some(tau)) if tau > 0.0 && tau.is_finite() => Ok(Self::Fixed(tau)),
            _ => {
                let message =
                    format!("{value} is not 'adaptive', 'adaptive-frozen' or a number above 0");
                Err(Error::invalid("method.tau", message))
            }
        }
    }

    pub fn value(self) -> Value {
        match self {
            Self::Adaptive => json!("adaptive"),
            Self::Frozen => json!("adaptive-frozen"),
            Self::Fixed(tau) => json!(tau),
        }
    }
}

/// Weights of the noises; 0 where scoring failed, 1 for all where nothing tells them apart.
pub(super) fn weights(
    values: &[f64],
    weighting: Weighting,
    tau: Tau,
    frozen: &mut Option<f64>,
) -> Vec<f64> {
    let known: Vec<f64> = values.iter().copied().filter(|v| v.is_finite()).collect();
    let spread = deviation(&known);
    let scale = known.iter().fold(0.0f64, |top, value| top.max(value.abs()));
    if spread <= 1e-12 * scale || known.len() < 2 {
        let failed = known.is_empty();
        return values.iter().map(|v| f64::from(u8::from(failed || v.is_finite()))).collect();
    }
    let tau = match tau {
        Tau::Adaptive => spread,
        Tau::Frozen => *frozen.get_or_insert(spread),
        Tau::Fixed(tau) => tau,
    };
    let mean = known.iter().sum::<f64>() / known.len() as f64;
    let (_, top) = first_max(values);
    match weighting {
        Weighting::Boltzmann => {
            softmax(&values.iter().map(|v| (v - top) / tau).collect::<Vec<_>>())
        }
        Weighting::Tanh => each(values, |v| ((v - mean) / tau).tanh()),
        Weighting::Linear => each(values, |v| v),
    }
}

/// `of` the values, 0 where scoring failed.
fn each(values: &[f64], of: impl Fn(f64) -> f64) -> Vec<f64> {
    values.iter().map(|v| if v.is_finite() { of(*v) } else { 0.0 }).collect()
}

/// The weighted sum of noises, as long as a typical one: sqrt(d). `best`: whose noise is taken
/// where the sum vanishes.
pub(super) fn synthesised(noise: &Tensor, weights: &[f64], best: usize) -> Result<Tensor> {
    let dims = noise.dims().to_vec();
    let rows = noise.flatten_from(1)?.to_vec2::<f32>()?;
    let d = rows[0].len();
    let mut sum = vec![0.0f64; d];
    for (row, weight) in rows.iter().zip(weights) {
        sum.iter_mut().zip(row).for_each(|(s, v)| *s += weight * f64::from(*v));
    }
    let norm = |v: &[f64]| v.iter().map(|v| v * v).sum::<f64>().sqrt();
    let typical = (d as f64).sqrt();
    let largest = weights.iter().fold(0.0f64, |top, weight| top.max(weight.abs()));
    if norm(&sum) <= 1e-6 * typical * largest {
        sum = rows[best].iter().map(|v| f64::from(*v)).collect();
    }
    let scale = typical / norm(&sum).max(f64::MIN_POSITIVE);
    let values: Vec<f32> = sum.into_iter().map(|v| (v * scale) as f32).collect();
    let shape = [&[1], &dims[1..]].concat();
    Ok(Tensor::from_vec(values, shape, &Device::Cpu)?.to_device(noise.device())?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diffusion::noise::{NoiseKey, Purpose};

    /// Mean component of the synthesised noise along a linear reward's direction, against the
    /// values of spec search 3.4 (d far above K).
    #[test]
    fn gains_along_a_linear_reward() -> Result<()> {
        let (d, trials) = (1024, 300);
        let key = NoiseKey::new(11);
        for (weighting, k, expected) in [
            (Weighting::Tanh, 2, 0.83),
            (Weighting::Tanh, 4, 1.53),
            (Weighting::Tanh, 16, 3.75),
            (Weighting::Boltzmann, 4, 0.90),
            (Weighting::Boltzmann, 16, 2.33),
        ] {
            let mut total = 0.0;
            for trial in 0..trials {
                let rows: Vec<u64> = (0..k).collect();
                let noise =
                    key.normal_rows(Purpose::Data, trial, &rows, (1, 1, d), &Device::Cpu)?;
                let along = noise.flatten_from(1)?.narrow(1, 0, 1)?.flatten_all()?;
                let values: Vec<f64> = along.to_vec1::<f32>()?.into_iter().map(f64::from).collect();
                let weights = weights(&values, weighting, Tau::Adaptive, &mut None);
                let z = synthesised(&noise, &weights, first_max(&values).0)?;
                let z = z.flatten_all()?.to_vec1::<f32>()?;
                let norm: f64 = z.iter().map(|v| f64::from(*v).powi(2)).sum();
                assert!((norm / d as f64 - 1.0).abs() < 1e-4);
                total += f64::from(z[0]) / trials as f64;
            }
            assert!(
                (total - expected).abs() < 0.17,
                "{weighting:?} {k}: {total} is not {expected}"
            );
        }
        Ok(())
    }

    #[test]
    fn weights_without_differences_and_with_failures() {
        let of = |values: &[f64]| weights(values, Weighting::Tanh, Tau::Adaptive, &mut None);
        let no = f64::NEG_INFINITY;
        assert_eq!(of(&[0.3; 4]), [1.0; 4]);
        assert_eq!(of(&[no; 4]), [1.0; 4]);
        assert_eq!(of(&[no, 2.0, no]), [0.0, 1.0, 0.0]);
        let (without, with) = (of(&[1.0, 2.0, 4.0]), of(&[1.0, no, 2.0, 4.0]));
        assert_eq!([with[0], with[2], with[3]], without[..]);
        assert_eq!(with[1], 0.0);
        // Frozen: the first step's deviation for good.
        let mut tau = None;
        for values in [[0.0, 2.0], [0.0, 200.0]] {
            weights(&values, Weighting::Tanh, Tau::Frozen, &mut tau);
            assert_eq!(tau, Some(2f64.sqrt()));
        }
    }
}
