//! Estimates of the clean image on the way (Tweedie's formula), evenly spaced in what is spent:
//! so those of several methods lie at the same cost.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use candle_core::{Device, Tensor};

use super::request::Preview;
use crate::Result;
use crate::diffusion::denoiser::{Conditioning, Denoiser};
use crate::diffusion::meter::MeteredDecoder;
use crate::diffusion::schedule::NoiseSchedule;
use crate::rewards::MeteredVerifier;

/// Most previews of an image.
pub const MOST: u32 = 16;

/// How many previews an image whose plan has `f` forwards can have, `each` an evaluation: so many
/// that no evaluation of one sample is asked for two.
pub fn most(f: u64, each: u64) -> u64 {
    (f / each.max(1)).saturating_sub(1)
}

/// What has been spent where an estimate is taken: k/(n + 1) of `f`, for k from 1 to n.
fn places(f: u64, n: u32) -> VecDeque<u64> {
    let n = u128::from(n);
    (1..=n).map(|k| u64::try_from(u128::from(f) * k / (n + 1)).unwrap_or(u64::MAX)).collect()
}

/// An estimate that was taken.
struct Estimate {
    spent: u64,
    t: f64,
    /// [1, C, h, w].
    latent: Tensor,
}

struct State {
    spent: u64,
    places: VecDeque<u64>,
    found: Vec<Estimate>,
}

/// A denoiser whose predictions are looked at.
pub struct Watched<'a> {
    inner: &'a dyn Denoiser,
    schedule: &'a NoiseSchedule,
    state: Mutex<State>,
}

impl<'a> Watched<'a> {
    /// Takes `n` estimates while `f` forwards are spent.
    pub fn new(inner: &'a dyn Denoiser, schedule: &'a NoiseSchedule, f: u64, n: u32) -> Self {
        let state = State { spent: 0, places: places(f, n), found: Vec::new() };
        Self { inner, schedule, state: Mutex::new(state) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Each change is complete before anything can panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Denoiser for Watched<'_> {
    fn device(&self) -> &Device {
        self.inner.device()
    }

    fn latent_shape(&self, width: u32, height: u32) -> Result<(usize, usize, usize)> {
        self.inner.latent_shape(width, height)
    }

    fn predict(&self, x: &Tensor, t: &Tensor, cond: &[&Conditioning]) -> Result<Tensor> {
        let prediction = self.inner.predict(x, t, cond)?;
        let mut state = self.state();
        state.spent += cond.iter().map(|c| c.forwards_per_eval()).sum::<u64>();
        let spent = state.spent;
        let passed = state.places.iter().take_while(|place| **place <= spent).count();
        // A call of many samples may pass several places: a sample for each.
        for row in 0..passed.min(cond.len()) {
            let t = f64::from(t.get(row)?.to_scalar::<f32>()?);
            let (x, prediction) = (x.narrow(0, row, 1)?, prediction.narrow(0, row, 1)?);
            let (latent, _) = self.schedule.x0_eps(&x, &prediction, &[t])?;
            state.found.push(Estimate { spent, t, latent });
        }
        state.places.drain(..passed);
        Ok(prediction)
    }
}

/// Makes images of estimates.
pub struct Previewer<'a> {
    pub watched: &'a Watched<'a>,
    /// Costs a Y an estimate.
    pub decoder: MeteredDecoder<'a>,
    /// Scores them for the record.
    pub verifier: MeteredVerifier<'a>,
    pub prompt: &'a str,
    pub image: u32,
    /// F of the image's plan.
    pub planned: u64,
}

impl Previewer<'_> {
    /// Those that were taken since the last call.
    ///
    /// # Errors
    /// The decoder's and the rewards'.
    pub fn take(&self) -> Result<Vec<Preview>> {
        let found = std::mem::take(&mut self.watched.state().found);
        let each = found.into_iter().map(|Estimate { spent, t, latent }| {
            let images = self.decoder.decode(&latent)?;
            let scores = self.verifier.observe(&images, self.prompt, &[])?;
            let first = |scores: Vec<f64>| scores.first().copied().filter(|s| s.is_finite());
            let scores = scores.into_iter().map(|(name, s)| (name, first(s))).collect();
            let image = self.image;
            let preview = |pixels| Preview { image, f: spent, of: self.planned, t, scores, pixels };
            Ok(images.into_iter().next().map(preview))
        });
        Ok(each.collect::<Result<Vec<_>>>()?.into_iter().flatten().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diffusion::config::{PredictionType, SchedulerConfig, TimestepSpacing};
    use crate::diffusion::cost::Budget;
    use crate::diffusion::gmm::{GaussianMixture, GmmModel};
    use crate::diffusion::guidance::Guided;
    use crate::diffusion::meter::{Meter, MeteredDenoiser};
    use crate::diffusion::noise::NoiseKey;
    use crate::diffusion::solver::{SolverKind, SolverSpec};
    use crate::diffusion::trajectory::{Row, State as Batch, Trajectory};
    use crate::util::CancelToken;

    /// All images are nearly the same one: so is every estimate, with whatever solver.
    #[test]
    fn estimates_are_those_of_the_closed_form() -> Result<()> {
        let schedule = NoiseSchedule::sdxl()?;
        let mean = vec![0.5, -1.0, 0.25, 1.5];
        let mixture = GaussianMixture::single(mean.clone(), 1e-4);
        let model = Guided(GmmModel::new(vec![mixture], (1, 2, 2), &schedule)?);
        let cond = Conditioning::plain(GmmModel::text(0)?);
        let (meter, cancel) = (Meter::new(Budget::default()), CancelToken::default());
        for kind in SolverKind::ALL {
            let spec = SolverSpec::ode(kind, &schedule);
            let f = kind.evaluations(8) as u64 * 2;
            let watched = Watched::new(&model, &schedule, f, 3);
            let solver = spec.build(&schedule, 8)?;
            let trajectory = Trajectory {
                solver: solver.as_ref(),
                denoiser: MeteredDenoiser::new(&watched, &meter),
                micro_batch: 2,
                cancel: &cancel,
            };
            let row = |candidate| Row { key: NoiseKey::new(1), candidate, cond: &cond };
            let rows = [row(0), row(1)];
            let noise = trajectory.initial_noise(&rows, (1, 2, 2))?;
            let start = Batch::start(solver.as_ref(), &noise)?;
            trajectory.run(start, solver.steps(), &rows, &mut |_| Ok(()))?;
            let found = std::mem::take(&mut watched.state().found);
            assert_eq!(found.len(), 3, "{kind:?}");
            assert!(found.windows(2).all(|pair| pair[0].t > pair[1].t), "{kind:?}");
            for estimate in found {
                for (x, m) in estimate.latent.flatten_all()?.to_vec1::<f32>()?.iter().zip(&mean) {
                    assert!((f64::from(*x) - m).abs() < 1e-2, "{kind:?} at {}: {x}", estimate.t);
                }
            }
        }
        Ok(())
    }

    /// Whatever a solver's coordinates are: an estimate is the solver's own at that evaluation.
    #[test]
    fn estimates_are_those_of_the_solvers() -> Result<()> {
        let sdxl = SchedulerConfig::sdxl();
        let predicts = |prediction_type| SchedulerConfig { prediction_type, ..sdxl.clone() };
        let spacing = Some(TimestepSpacing::Linspace);
        for config in [
            sdxl.clone(),
            SchedulerConfig { use_karras_sigmas: true, ..sdxl.clone() },
            SchedulerConfig { timestep_spacing: spacing, ..sdxl.clone() },
            predicts(PredictionType::VPrediction),
            predicts(PredictionType::Sample),
        ] {
            let schedule = NoiseSchedule::new(&config)?;
            let mixture = GaussianMixture {
                weights: vec![1.0, 2.0],
                means: vec![vec![0.5, -1.0, 0.25, 1.5], vec![-0.5, 0.75, 1.0, -1.0]],
                stds: vec![0.4, 0.7],
            };
            let model = Guided(GmmModel::new(vec![mixture], (1, 2, 2), &schedule)?);
            let cond = Conditioning::plain(GmmModel::text(0)?);
            let (meter, cancel) = (Meter::new(Budget::default()), CancelToken::default());
            for kind in SolverKind::ALL {
                let f = kind.evaluations(8) as u64;
                // At each evaluation but the last.
                let watched = Watched::new(&model, &schedule, f, most(f, 1) as u32);
                let solver = SolverSpec::ode(kind, &schedule).build(&schedule, 8)?;
                let trajectory = Trajectory {
                    solver: solver.as_ref(),
                    denoiser: MeteredDenoiser::new(&watched, &meter),
                    micro_batch: 1,
                    cancel: &cancel,
                };
                let rows = [Row { key: NoiseKey::new(1), candidate: 0, cond: &cond }];
                let noise = trajectory.initial_noise(&rows, (1, 2, 2))?;
                let start = Batch::start(solver.as_ref(), &noise)?;
                let mut own = Vec::new();
                trajectory.run(start, solver.steps(), &rows, &mut |step| {
                    own.push(step.x0.clone());
                    Ok(())
                })?;
                let found = std::mem::take(&mut watched.state().found);
                assert_eq!(found.len() as u64, f - 1);
                // Heun evaluates a second time where a step leads to.
                let each = if kind == SolverKind::Heun { 2 } else { 1 };
                for (estimate, own) in found.iter().step_by(each).zip(&own) {
                    let apart = (&estimate.latent - own)?.abs()?.max_all()?.to_scalar::<f32>()?;
                    // The timesteps of Karras' levels are rounded for DPM-Solver++.
                    let rounded = kind == SolverKind::DpmPp2m && config.use_karras_sigmas;
                    let most = if rounded { 2e-3 } else { 1e-4 };
                    assert!(apart < most, "{kind:?} at {}: {apart} in {config:?}", estimate.t);
                }
            }
        }
        Ok(())
    }

    #[test]
    fn places_are_even_and_never_two_in_one_evaluation() {
        assert_eq!(places(100, 4), [20, 40, 60, 80]);
        assert_eq!(places(u64::MAX, 1), [u64::MAX / 2]);
        for (steps, each) in [(1, 1), (2, 1), (2, 2), (7, 2), (50, 2), (9, 1)] {
            let f = steps * each;
            for n in 0..=most(f, each) as u32 {
                let places = places(f, n);
                let calls: Vec<u64> = places.iter().map(|place| place.div_ceil(each)).collect();
                assert!(calls.windows(2).all(|pair| pair[0] < pair[1]), "{f} {n}: {places:?}");
                assert!(places.iter().all(|place| (1..f).contains(place)), "{f} {n}: {places:?}");
            }
        }
    }
}
