//! Digests of what a network predicts, to find where two runs part.

use std::sync::{Mutex, PoisonError};

use candle_core::{DType, Device, Tensor};

use super::denoiser::{Conditioning, Denoiser};
use crate::Result;

/// Digests of predictions in the order in which they were made, a row each.
#[derive(Debug, Default)]
pub struct Digests(Mutex<Vec<u32>>);

impl Digests {
    fn add(&self, predictions: &Tensor) -> Result<()> {
        let rows = predictions.to_dtype(DType::F32)?.to_device(&Device::Cpu)?.flatten_from(1)?;
        let mut digests = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for row in rows.to_vec2::<f32>()? {
            let bytes = row.iter().flat_map(|value| value.to_le_bytes());
            digests.push(crc32c::crc32c(&bytes.collect::<Vec<_>>()));
        }
        Ok(())
    }

    /// Those so far, as eight hexadecimal digits each.
    #[must_use]
    pub fn take(&self) -> Vec<String> {
        let mut digests = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut *digests).into_iter().map(|digest| format!("{digest:08x}")).collect()
    }
}

/// A denoiser that keeps the digests of its predictions.
pub struct Recorded<'a> {
    inner: &'a dyn Denoiser,
    digests: &'a Digests,
}

impl<'a> Recorded<'a> {
    pub fn new(inner: &'a dyn Denoiser, digests: &'a Digests) -> Self {
        Self { inner, digests }
    }
}

impl Denoiser for Recorded<'_> {
    fn device(&self) -> &Device {
        self.inner.device()
    }

    fn latent_shape(&self, width: u32, height: u32) -> Result<(usize, usize, usize)> {
        self.inner.latent_shape(width, height)
    }

    fn predict(&self, x: &Tensor, t: &Tensor, cond: &[&Conditioning]) -> Result<Tensor> {
        let prediction = self.inner.predict(x, t, cond)?;
        self.digests.add(&prediction)?;
        Ok(prediction)
    }
}
