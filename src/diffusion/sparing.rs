//! Fewer samples at a time where a device runs out of memory. Rows do not influence each other,
//! so results do not depend on it.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use candle_core::{Device, Tensor};
use image::RgbImage;

use super::denoiser::{Conditioning, Decoder, Denoiser};
use crate::{Error, Result};

/// How many rows go together: all, until there is no memory for so many; then half of them, and
/// so on. It never grows: who wants to try more again makes another.
#[derive(Debug)]
pub struct RowLimit {
    most: AtomicUsize,
    retries: AtomicUsize,
}

impl Default for RowLimit {
    fn default() -> Self {
        Self { most: AtomicUsize::new(usize::MAX), retries: AtomicUsize::new(0) }
    }
}

impl RowLimit {
    /// How often something was tried again with fewer rows.
    pub fn retries(&self) -> usize {
        self.retries.load(Ordering::Relaxed)
    }

    /// What `run` makes of all `rows`, piece by piece.
    fn each<T>(
        &self,
        what: &str,
        rows: usize,
        mut run: impl FnMut(Range<usize>) -> Result<T>,
    ) -> Result<Vec<T>> {
        let (mut parts, mut start) = (Vec::new(), 0);
        while start < rows {
            let size = self.most.load(Ordering::Relaxed).min(rows - start);
            match run(start..start + size) {
                Ok(part) => {
                    parts.push(part);
                    start += size;
                }
                Err(Error::OutOfMemory { .. }) if size > 1 => {
                    self.most.fetch_min(size / 2, Ordering::Relaxed);
                    let retries = self.retries.fetch_add(1, Ordering::Relaxed) + 1;
                    let next = size / 2;
                    tracing::warn!(what, rows = size, next, retries, "out of memory; trying fewer");
                }
                Err(error) => return Err(error),
            }
        }
        Ok(parts)
    }
}

fn piece(x: &Tensor, rows: &Range<usize>) -> Result<Tensor> {
    Ok(x.narrow(0, rows.start, rows.len())?.contiguous()?)
}

/// A denoiser within a limit.
pub struct SparingDenoiser<'a> {
    inner: &'a dyn Denoiser,
    limit: &'a RowLimit,
}

impl<'a> SparingDenoiser<'a> {
    pub fn new(inner: &'a dyn Denoiser, limit: &'a RowLimit) -> Self {
        Self { inner, limit }
    }
}

impl Denoiser for SparingDenoiser<'_> {
    fn device(&self) -> &Device {
        self.inner.device()
    }

    fn latent_shape(&self, width: u32, height: u32) -> Result<(usize, usize, usize)> {
        self.inner.latent_shape(width, height)
    }

    fn predict(&self, x: &Tensor, t: &Tensor, cond: &[&Conditioning]) -> Result<Tensor> {
        let (rows, _, height, width) = x.dims4()?;
        if cond.len() != rows {
            let message = format!("{} conditionings for a batch of {rows}", cond.len());
            return Err(Error::invalid("conditioning", message));
        }
        let run = |rows: Range<usize>| {
            self.inner.predict(&piece(x, &rows)?, &piece(t, &rows)?, &cond[rows])
        };
        let parts = self.limit.each("U-Net", rows, run).map_err(|error| {
            let doing =
                format!("in the U-Net, for one sample of {height} x {width} latent positions");
            error.during(doing, "make smaller images, or free memory of the device")
        })?;
        match parts.as_slice() {
            [all] => Ok(all.clone()),
            _ => Ok(Tensor::cat(&parts, 0)?),
        }
    }
}

/// A decoder within a limit.
pub struct SparingDecoder<'a> {
    inner: &'a dyn Decoder,
    limit: &'a RowLimit,
}

impl<'a> SparingDecoder<'a> {
    pub fn new(inner: &'a dyn Decoder, limit: &'a RowLimit) -> Self {
        Self { inner, limit }
    }
}

impl Decoder for SparingDecoder<'_> {
    fn decode(&self, latents: &Tensor) -> Result<Vec<RgbImage>> {
        let (rows, _, height, width) = latents.dims4()?;
        let run = |rows: Range<usize>| self.inner.decode(&piece(latents, &rows)?);
        let parts = self.limit.each("VAE", rows, run).map_err(|error| {
            let doing = format!("in the VAE, for one image of {height} x {width} latent positions");
            error.during(doing, "make smaller images, or free memory of the device")
        })?;
        Ok(parts.into_iter().flatten().collect())
    }
}
