//! An exponential average of the trained weights.

use std::collections::BTreeMap;

use candle_core::{Tensor, Var};

use crate::{Error, Result};

/// Averages f32 variables as diffusers' `EMAModel` does: the decay of update `s` (from 1) is
/// min(decay, (1 + s) / (10 + s)).
#[derive(Debug)]
pub struct Ema {
    decay: f64,
    averages: BTreeMap<String, Var>,
}

impl Ema {
    /// # Errors
    /// When memory runs out.
    pub fn new(vars: &BTreeMap<String, Var>, decay: f64) -> Result<Self> {
        let copy =
            |(name, var): (&String, &Var)| Ok((name.clone(), Var::from_tensor(&var.copy()?)?));
        Ok(Self { decay, averages: vars.iter().map(copy).collect::<Result<_>>()? })
    }

    /// Takes in the weights after update `step`, from 1.
    ///
    /// # Errors
    /// When these are not the variables it was made from.
    pub fn update(&mut self, vars: &BTreeMap<String, Var>, step: u64) -> Result<()> {
        let s = step as f64;
        let decay = self.decay.min((1.0 + s) / (10.0 + s));
        for (name, average) in &self.averages {
            let var = vars.get(name).ok_or_else(|| Error::invalid(name, "is no variable"))?;
            let now = average.as_detached_tensor();
            let moved = (&now + ((var.as_detached_tensor() - &now)? * (1.0 - decay))?)?;
            average.set(&moved)?;
        }
        Ok(())
    }

    /// The averages by name.
    pub fn tensors(&self) -> BTreeMap<String, Tensor> {
        self.averages.iter().map(|(name, v)| (name.clone(), v.as_detached_tensor())).collect()
    }

    /// Continues from what [`Self::tensors`] gave.
    ///
    /// # Errors
    /// Names the first average that is missing or has another shape.
    pub fn load(&mut self, tensors: &BTreeMap<String, Tensor>) -> Result<()> {
        super::trainable::load(&self.averages, tensors)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn decays_as_published() -> Result<()> {
        let var = Var::new(&[0f32], &Device::Cpu)?;
        let vars = BTreeMap::from([("a".to_owned(), var.clone())]);
        let mut ema = Ema::new(&vars, 0.9999)?;
        var.set(&Tensor::new(&[1f32], &Device::Cpu)?)?;
        let mut expected = 0.0;
        for step in 1..=20u64 {
            ema.update(&vars, step)?;
            let decay = ((1 + step) as f64 / (10 + step) as f64).min(0.9999);
            expected += (1.0 - expected) * (1.0 - decay);
            let got = f64::from(ema.tensors()["a"].to_vec1::<f32>()?[0]);
            assert!((got - expected).abs() < 1e-6, "{step}: {got}, expected {expected}");
        }
        Ok(())
    }
}
