//! The cost meter, and the metered handles through which methods reach models.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use candle_core::{Device, Tensor};
use image::RgbImage;

use super::cost::{Budget, Cost, Units};
use super::denoiser::{Conditioning, Decoder, Denoiser};
use crate::{Error, Result};

/// What one image has spent, against what it may spend. Shared between threads.
#[derive(Debug, Default)]
pub struct Meter {
    budget: Budget,
    cost: Mutex<Cost>,
}

impl Meter {
    pub fn new(budget: Budget) -> Arc<Self> {
        Arc::new(Self { budget, cost: Mutex::default() })
    }

    fn lock(&self) -> MutexGuard<'_, Cost> {
        self.cost.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn budget(&self) -> Budget {
        self.budget
    }

    pub fn spent(&self) -> Units {
        self.lock().units
    }

    pub fn cost(&self) -> Cost {
        self.lock().clone()
    }

    /// Checks that `units` more would fit, without charging them.
    ///
    /// # Errors
    /// `Error::Budget` with the numbers.
    pub fn ensure(&self, units: Units) -> Result<()> {
        fits(&self.budget, self.spent() + units)
    }

    /// Charges `units` ahead of the work they stand for.
    ///
    /// # Errors
    /// `Error::Budget` with the numbers; nothing is charged and nothing may be run.
    pub fn reserve(&self, units: Units) -> Result<()> {
        let mut cost = self.lock();
        fits(&self.budget, cost.units + units)?;
        cost.units += units;
        Ok(())
    }

    /// Runs `work` and adds its seconds to `stage`.
    pub fn time<T>(&self, stage: &str, work: impl FnOnce() -> T) -> T {
        let start = Instant::now();
        let result = work();
        let seconds = start.elapsed().as_secs_f64();
        *self.lock().seconds.entry(stage.to_owned()).or_default() += seconds;
        result
    }
}

/// # Errors
/// `Error::Budget` naming each bound that `units` exceed.
pub fn fits(budget: &Budget, units: Units) -> Result<()> {
    let over = [("f", units.f, budget.f), ("v", units.v, budget.v), ("y", units.y, budget.y)]
        .into_iter()
        .filter_map(|(name, need, bound)| match bound {
            Some(bound) if need > bound => Some(format!("{name}: {need} needed, {bound} allowed")),
            _ => None,
        })
        .collect::<Vec<_>>();
    if over.is_empty() { Ok(()) } else { Err(Error::Budget(over.join("; "))) }
}

/// A denoiser that charges F before each call.
#[derive(Clone)]
pub struct MeteredDenoiser<'a> {
    inner: &'a dyn Denoiser,
    meter: &'a Meter,
}

impl<'a> MeteredDenoiser<'a> {
    pub fn new(inner: &'a dyn Denoiser, meter: &'a Meter) -> Self {
        Self { inner, meter }
    }

    pub fn meter(&self) -> &'a Meter {
        self.meter
    }

    pub fn device(&self) -> &'a Device {
        self.inner.device()
    }

    /// As `Denoiser::predict`; costs `forwards_per_eval` F per row.
    ///
    /// # Errors
    /// `Error::Budget` before running, or the network's.
    pub fn predict(&self, x: &Tensor, t: &Tensor, cond: &[&Conditioning]) -> Result<Tensor> {
        let f = cond.iter().map(|c| c.forwards_per_eval()).sum();
        self.meter.reserve(Units { f, ..Units::default() })?;
        self.meter.time("unet", || {
            let out = self.inner.predict(x, t, cond)?;
            out.device().synchronize()?;
            Ok(out)
        })
    }
}

/// A decoder that charges Y before each call.
#[derive(Clone)]
pub struct MeteredDecoder<'a> {
    inner: &'a dyn Decoder,
    meter: &'a Meter,
}

impl<'a> MeteredDecoder<'a> {
    pub fn new(inner: &'a dyn Decoder, meter: &'a Meter) -> Self {
        Self { inner, meter }
    }

    pub fn meter(&self) -> &'a Meter {
        self.meter
    }

    /// As `Decoder::decode`; costs one Y per row.
    ///
    /// # Errors
    /// `Error::Budget` before running, or the decoder's.
    pub fn decode(&self, latents: &Tensor) -> Result<Vec<RgbImage>> {
        let y = latents.dim(0)? as u64;
        self.meter.reserve(Units { y, ..Units::default() })?;
        self.meter.time("vae_decode", || self.inner.decode(latents))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refused_reservation_charges_nothing() -> Result<()> {
        let meter = Meter::new(Budget { f: Some(10), v: None, y: Some(1) });
        let units = |f, v, y| Units { f, v, y, l: 0 };
        meter.reserve(units(8, 1000, 1))?;
        let message = meter.reserve(units(3, 0, 1)).unwrap_err().to_string();
        assert_eq!(message, "budget: f: 11 needed, 10 allowed; y: 2 needed, 1 allowed");
        assert!(meter.ensure(units(2, 0, 0)).is_ok());
        assert_eq!(meter.spent(), units(8, 1000, 1));
        meter.reserve(units(2, 0, 0))
    }

    #[test]
    fn concurrent_reservations_never_overspend() {
        let meter = Meter::new(Budget { f: Some(100), v: None, y: None });
        let one = Units { f: 1, ..Units::default() };
        let granted: usize = std::thread::scope(|scope| {
            let worker = || (0..60).filter(|_| meter.reserve(one).is_ok()).count();
            let workers: Vec<_> = (0..4).map(|_| scope.spawn(worker)).collect();
            workers.into_iter().filter_map(|w| w.join().ok()).sum()
        });
        assert_eq!((granted, meter.spent().f), (100, 100));
    }
}
