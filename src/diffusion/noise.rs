//! Keyed noise: every random number is a function of (seed, purpose, step, candidate), so
//! results do not depend on batch size or on who else is being served.

use candle_core::{Device, Shape, Tensor};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};

use crate::Result;

/// What a draw is for. The numbers are part of the keys: never change or reuse one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Purpose {
    /// The initial latent of a trajectory; candidate 0 is the plain image's.
    InitialLatent = 0,
    /// A stochastic solver step.
    SolverNoise = 1,
    /// Going back to a higher noise level.
    Renoise = 2,
    /// Proposals of a search: neighbours, children, mutations.
    SearchProposal = 3,
    /// Which candidates survive or breed.
    Resample = 4,
    /// A search's own schedule of decisions, such as the guided steps.
    SearchSchedule = 5,
    /// Noise, timesteps and dropout of training.
    Training = 6,
    /// Sampling from a data set or a closed-form model.
    Data = 7,
}

/// All randomness of one image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoiseKey {
    pub seed: u64,
}

impl NoiseKey {
    pub fn new(seed: u64) -> Self {
        Self { seed }
    }

    /// ChaCha8 keyed by the little-endian bytes of the four numbers.
    pub fn rng(&self, purpose: Purpose, step: u64, candidate: u64) -> ChaCha8Rng {
        let mut key = [0u8; 32];
        let words = [self.seed, purpose as u64, step, candidate];
        for (bytes, word) in key.chunks_exact_mut(8).zip(words) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        ChaCha8Rng::from_seed(key)
    }

    /// Unit normals, f32, in row-major order of `shape`.
    ///
    /// # Errors
    /// When the device is out of memory.
    pub fn normal(
        &self,
        purpose: Purpose,
        step: u64,
        candidate: u64,
        shape: impl Into<Shape>,
        device: &Device,
    ) -> Result<Tensor> {
        let shape = shape.into();
        let rng = self.rng(purpose, step, candidate);
        let values: Vec<f32> = StandardNormal.sample_iter(rng).take(shape.elem_count()).collect();
        Ok(Tensor::from_vec(values, shape, &Device::Cpu)?.to_device(device)?)
    }

    /// One row per candidate: [candidates, ...shape].
    ///
    /// # Errors
    /// When the device is out of memory.
    pub fn normal_rows(
        &self,
        purpose: Purpose,
        step: u64,
        candidates: &[u64],
        shape: impl Into<Shape>,
        device: &Device,
    ) -> Result<Tensor> {
        let shape = shape.into();
        let rows = candidates
            .iter()
            .map(|candidate| self.normal(purpose, step, *candidate, shape.clone(), &Device::Cpu))
            .collect::<Result<Vec<_>>>()?;
        Ok(Tensor::stack(&rows, 0)?.to_device(device)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pins the generator: a change here changes every image of every seed.
    #[test]
    fn the_first_values() -> Result<()> {
        let key = NoiseKey::new(42);
        let initial = key.normal(Purpose::InitialLatent, 0, 0, 4, &Device::Cpu)?;
        assert_eq!(
            initial.to_vec1::<f32>()?,
            [-0.45162824, -0.9632314, -0.0069180094, -0.21241046]
        );
        let step = key.normal(Purpose::SolverNoise, 3, 2, 4, &Device::Cpu)?;
        assert_eq!(step.to_vec1::<f32>()?, [-1.417963, -0.21596348, 0.15847623, 0.8247855]);
        Ok(())
    }

    #[test]
    fn every_part_of_the_key_matters_and_the_batch_does_not() -> Result<()> {
        let draw = |seed, purpose, step, candidate| -> Result<Vec<f32>> {
            let key = NoiseKey::new(seed);
            Ok(key
                .normal(purpose, step, candidate, (2, 3), &Device::Cpu)?
                .flatten_all()?
                .to_vec1()?)
        };
        let base = draw(1, Purpose::SolverNoise, 2, 3)?;
        for other in [
            draw(2, Purpose::SolverNoise, 2, 3)?,
            draw(1, Purpose::Renoise, 2, 3)?,
            draw(1, Purpose::SolverNoise, 3, 3)?,
            draw(1, Purpose::SolverNoise, 2, 2)?,
        ] {
            assert_ne!(base, other);
        }
        let key = NoiseKey::new(1);
        let rows = key.normal_rows(Purpose::SolverNoise, 2, &[9, 3], (2, 3), &Device::Cpu)?;
        assert_eq!(rows.get(1)?.flatten_all()?.to_vec1::<f32>()?, base);
        Ok(())
    }
}
