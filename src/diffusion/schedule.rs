//! The noise schedule in f64: abar, sigma and the conversions between what a
//! network predicts, x0 and epsilon.

use candle_core::Tensor;

use super::config::{BetaSchedule, PredictionType, SchedulerConfig};
use crate::{Error, Result};

/// abar below this has no finite sigma; diffusers' floor under zero terminal SNR.
const ABAR_FLOOR: f64 = 1.0 / 16_777_216.0;

/// A discrete variance-preserving schedule: x_t = sqrt(abar_t) x0 + sqrt(1-abar_t) eps,
/// t in 0..num_train_timesteps. Between integers log(sigma) is interpolated linearly.
#[derive(Clone, Debug, PartialEq)]
pub struct NoiseSchedule {
    config: SchedulerConfig,
    abar: Vec<f64>,
    log_sigma: Vec<f64>,
}

impl NoiseSchedule {
    /// # Errors
    /// `Error::Invalid` naming the key of the configuration that is unusable.
    pub fn new(config: &SchedulerConfig) -> Result<Self> {
        config.validate()?;
        let mut abar = Vec::with_capacity(config.num_train_timesteps);
        let mut product = 1.0;
        for beta in betas(config) {
            product *= 1.0 - beta;
            abar.push(product);
        }
        if config.rescale_betas_zero_snr {
            rescale_zero_snr(&mut abar);
        }
        let log_sigma = abar.iter().map(|a| 0.5 * ((1.0 - a) / a.max(ABAR_FLOOR)).ln());
        let log_sigma = log_sigma.collect();
        Ok(Self { config: config.clone(), abar, log_sigma })
    }

    /// The schedule of stable-diffusion-xl-base-1.0.
    ///
    /// # Errors
    /// None in practice: the configuration is fixed.
    pub fn sdxl() -> Result<Self> {
        Self::new(&SchedulerConfig::sdxl())
    }

    pub fn config(&self) -> &SchedulerConfig {
        &self.config
    }

    pub fn prediction_type(&self) -> PredictionType {
        self.config.prediction_type
    }

    pub fn num_train_timesteps(&self) -> usize {
        self.abar.len()
    }

    /// abar at timestep `t`, clamped to the schedule's range.
    pub fn abar(&self, t: f64) -> f64 {
        let t = t.clamp(0.0, (self.abar.len() - 1) as f64);
        if t.fract() == 0.0 {
            return self.abar[t as usize];
        }
        1.0 / (1.0 + self.sigma(t).powi(2))
    }

    /// abar after DDIM's last step: 1 under `set_alpha_to_one`, else abar_0.
    pub fn final_abar(&self) -> f64 {
        if self.config.set_alpha_to_one { 1.0 } else { self.abar[0] }
    }

    /// abar at an integer timestep `p`; `final_abar` where `p` is negative (DDIM's rule).
    pub fn abar_or_final(&self, p: f64) -> f64 {
        if p < 0.0 { self.final_abar() } else { self.abar(p) }
    }

    /// sigma = sqrt((1-abar)/abar) at a possibly fractional timestep, clamped to the range.
    pub fn sigma(&self, t: f64) -> f64 {
        let last = self.log_sigma.len() - 1;
        let t = t.clamp(0.0, last as f64);
        let low = (t.floor() as usize).min(last - 1);
        let w = t - low as f64;
        ((1.0 - w) * self.log_sigma[low] + w * self.log_sigma[low + 1]).exp()
    }

    /// sigma between timesteps by linear interpolation of sigma itself: diffusers'
    /// rule for Euler's and Heun's linspace grids.
    pub(super) fn sigma_linear(&self, t: f64) -> f64 {
        let last = self.log_sigma.len() - 1;
        let t = t.clamp(0.0, last as f64);
        let low = (t.floor() as usize).min(last - 1);
        let w = t - low as f64;
        (1.0 - w) * self.log_sigma[low].exp() + w * self.log_sigma[low + 1].exp()
    }

    /// The timestep of a noise level, by interpolation in log(sigma); clamped to the range.
    pub fn t_of_sigma(&self, sigma: f64) -> f64 {
        let log = sigma.max(1e-10).ln();
        let above = self.log_sigma.partition_point(|s| *s <= log);
        let low = above.saturating_sub(1).min(self.log_sigma.len() - 2);
        let (a, b) = (self.log_sigma[low], self.log_sigma[low + 1]);
        low as f64 + ((log - a) / (b - a)).clamp(0.0, 1.0)
    }

    /// abar/(1-abar).
    pub fn snr(&self, t: f64) -> f64 {
        let abar = self.abar(t);
        abar / (1.0 - abar)
    }

    /// x_t = sqrt(abar_t) x0 + sqrt(1-abar_t) noise, with one timestep per sample.
    /// `x0`, `noise`: [B, ...]; `t`: B values.
    ///
    /// # Errors
    /// When shapes disagree.
    pub fn add_noise(&self, x0: &Tensor, noise: &Tensor, t: &[f64]) -> Result<Tensor> {
        let alpha = self.column(t, x0, |abar| abar.sqrt())?;
        let sigma = self.column(t, x0, |abar| (1.0 - abar).sqrt())?;
        Ok((x0.broadcast_mul(&alpha)? + noise.broadcast_mul(&sigma)?)?)
    }

    /// What the network is trained to predict: noise, v or x0. Shapes as `add_noise`.
    ///
    /// # Errors
    /// When shapes disagree.
    pub fn target(&self, x0: &Tensor, noise: &Tensor, t: &[f64]) -> Result<Tensor> {
        match self.prediction_type() {
            PredictionType::Epsilon => Ok(noise.clone()),
            PredictionType::Sample => Ok(x0.clone()),
            PredictionType::VPrediction => {
                let alpha = self.column(t, x0, |abar| abar.sqrt())?;
                let sigma = self.column(t, x0, |abar| (1.0 - abar).sqrt())?;
                Ok((noise.broadcast_mul(&alpha)? - x0.broadcast_mul(&sigma)?)?)
            }
        }
    }

    /// (x0, eps) from the network output at the VP latent `x`, one timestep per sample.
    /// Differentiable in `output`.
    ///
    /// # Errors
    /// When shapes disagree.
    pub fn x0_eps(&self, x: &Tensor, output: &Tensor, t: &[f64]) -> Result<(Tensor, Tensor)> {
        let abar: Vec<f64> = t.iter().map(|t| self.abar(*t)).collect();
        x0_eps_at(self.prediction_type(), x, output, &abar)
    }

    fn column(&self, t: &[f64], like: &Tensor, f: impl Fn(f64) -> f64) -> Result<Tensor> {
        column(&t.iter().map(|t| f(self.abar(*t))).collect::<Vec<_>>(), like)
    }
}

/// (x0, eps) from the network output at VP latents of noise level `abar`, one per sample.
pub(super) fn x0_eps_at(
    kind: PredictionType,
    x: &Tensor,
    output: &Tensor,
    abar: &[f64],
) -> Result<(Tensor, Tensor)> {
    let of = |pick: fn(Conversion) -> f64| {
        let values: Vec<f64> = abar.iter().map(|a| pick(Conversion::new(kind, *a))).collect();
        column(&values, x)
    };
    let x0 = match kind {
        PredictionType::Sample => output.clone(),
        _ => (x.broadcast_mul(&of(|c| c.x0_x)?)? + output.broadcast_mul(&of(|c| c.x0_out)?)?)?,
    };
    let eps = match kind {
        PredictionType::Epsilon => output.clone(),
        _ => (x.broadcast_mul(&of(|c| c.eps_x)?)? + output.broadcast_mul(&of(|c| c.eps_out)?)?)?,
    };
    Ok((x0, eps))
}

/// x0 = x0_x * x + x0_out * output and eps = eps_x * x + eps_out * output at a VP latent x.
#[derive(Clone, Copy, Debug)]
pub(super) struct Conversion {
    pub x0_x: f64,
    pub x0_out: f64,
    pub eps_x: f64,
    pub eps_out: f64,
}

impl Conversion {
    pub fn new(kind: PredictionType, abar: f64) -> Self {
        let (alpha, sigma) = (abar.sqrt(), (1.0 - abar).sqrt());
        match kind {
            PredictionType::Epsilon => {
                Self { x0_x: 1.0 / alpha, x0_out: -sigma / alpha, eps_x: 0.0, eps_out: 1.0 }
            }
            PredictionType::VPrediction => {
                Self { x0_x: alpha, x0_out: -sigma, eps_x: sigma, eps_out: alpha }
            }
            PredictionType::Sample => {
                Self { x0_x: 0.0, x0_out: 1.0, eps_x: 1.0 / sigma, eps_out: -alpha / sigma }
            }
        }
    }
}

/// One value per sample as a tensor that broadcasts over `like` [B, ...]: [B, 1, ...].
pub(super) fn column(values: &[f64], like: &Tensor) -> Result<Tensor> {
    let rows = like.dims().first().copied().unwrap_or_default();
    if rows != values.len() {
        let message = format!("{} timesteps for a batch of {rows}", values.len());
        return Err(Error::invalid("timesteps", message));
    }
    let mut shape = vec![1; like.rank()];
    shape[0] = rows;
    let values: Vec<f32> = values.iter().map(|v| *v as f32).collect();
    Ok(Tensor::from_vec(values, shape, like.device())?.to_dtype(like.dtype())?)
}

fn betas(config: &SchedulerConfig) -> Vec<f64> {
    if let Some(betas) = &config.trained_betas {
        return betas.clone();
    }
    let n = config.num_train_timesteps;
    let line = |from: f64, to: f64, i: usize| from + i as f64 / (n - 1) as f64 * (to - from);
    let cosine = |t: f64| ((t + 0.008) / 1.008 * std::f64::consts::FRAC_PI_2).cos().powi(2);
    let beta = |i: usize| match config.beta_schedule {
        BetaSchedule::Linear => line(config.beta_start, config.beta_end, i),
        BetaSchedule::ScaledLinear => {
            line(config.beta_start.sqrt(), config.beta_end.sqrt(), i).powi(2)
        }
        BetaSchedule::SquaredcosCapV2 => {
            let (from, to) = (i as f64 / n as f64, (i + 1) as f64 / n as f64);
            (1.0 - cosine(to) / cosine(from)).min(0.999)
        }
    };
    (0..n).map(beta).collect()
}

/// Shifts and scales sqrt(abar) so that the last timestep is pure noise
/// (Lin et al. 2023, algorithm 1).
fn rescale_zero_snr(abar: &mut [f64]) {
    let (Some(first), Some(last)) = (abar.first(), abar.last()) else { return };
    let (first, last) = (first.sqrt(), last.sqrt());
    for value in abar.iter_mut() {
        *value = ((value.sqrt() - last) * first / (first - last)).powi(2);
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    fn close(found: f64, expected: f64, relative: f64) {
        assert!((found / expected - 1.0).abs() < relative, "{found} is not {expected}");
    }

    #[test]
    fn the_published_vectors() -> Result<()> {
        let schedule = NoiseSchedule::sdxl()?;
        for (t, abar) in [
            (40.0, 0.9618859080),
            (200.0, 0.7536920452),
            (500.0, 0.2763326838),
            (600.0, 0.1607825705),
            (961.0, 0.0072817271),
            (999.0, 0.0046600985),
        ] {
            close(schedule.abar(t), abar, 1e-8);
        }
        close(schedule.abar(0.0), 0.99915, 1e-9);
        close(schedule.snr(0.0), 1175.47, 1e-5);
        close(schedule.snr(999.0), 0.0046819, 1e-4);
        let first = |bound: f64| (0..1000).find(|t| schedule.snr(f64::from(*t)) < bound);
        assert_eq!((first(5.0), first(1.0)), (Some(147), Some(354)));
        close(schedule.sigma(999.0), 14.6146, 1e-5);
        Ok(())
    }

    #[test]
    fn sigma_and_timestep_are_inverse() -> Result<()> {
        let schedule = NoiseSchedule::sdxl()?;
        for t in [0.0, 0.25, 1.0, 17.5, 500.0, 998.999, 999.0] {
            let back = schedule.t_of_sigma(schedule.sigma(t));
            assert!((back - t).abs() < 1e-9, "{t} came back as {back}");
            close(schedule.abar(t), 1.0 / (1.0 + schedule.sigma(t).powi(2)), 1e-12);
        }
        assert_eq!((schedule.t_of_sigma(1e9), schedule.t_of_sigma(0.0)), (999.0, 0.0));
        assert_eq!(schedule.abar(-3.0), schedule.abar(0.0));
        assert_eq!(schedule.abar(2000.0), schedule.abar(999.0));
        Ok(())
    }

    #[test]
    fn predictions_convert_into_each_other() -> Result<()> {
        let device = Device::Cpu;
        let x0 = Tensor::new(&[[0.3f32, -1.2], [0.7, 2.0]], &device)?;
        let noise = Tensor::new(&[[1.1f32, 0.4], [-0.5, 0.9]], &device)?;
        let t = [981.0, 21.0];
        for kind in [PredictionType::Epsilon, PredictionType::VPrediction, PredictionType::Sample] {
            let config = SchedulerConfig { prediction_type: kind, ..SchedulerConfig::sdxl() };
            let schedule = NoiseSchedule::new(&config)?;
            let x = schedule.add_noise(&x0, &noise, &t)?;
            let (a, b) = schedule.x0_eps(&x, &schedule.target(&x0, &noise, &t)?, &t)?;
            for (found, expected) in [(a, &x0), (b, &noise)] {
                let error = (found - expected)?.abs()?.max_all()?.to_scalar::<f32>()?;
                assert!(error < 1e-4, "{kind:?}: {error}");
            }
        }
        assert!(NoiseSchedule::sdxl()?.add_noise(&x0, &noise, &[1.0]).is_err());
        Ok(())
    }

    #[test]
    fn a_config_names_its_bad_key() -> Result<()> {
        let parse = |text: &str| serde_json::from_str::<SchedulerConfig>(text);
        let config = parse(
            r#"{"_class_name": "EulerDiscreteScheduler", "_diffusers_version": "0.19.0.dev0",
            "beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085,
            "clip_sample": false, "interpolation_type": "linear", "num_train_timesteps": 1000,
            "prediction_type": "epsilon", "sample_max_value": 1.0, "set_alpha_to_one": false,
            "skip_prk_steps": true, "steps_offset": 1, "timestep_spacing": "leading",
            "trained_betas": null, "use_karras_sigmas": false}"#,
        );
        let honoured = |c: SchedulerConfig| SchedulerConfig { rest: Default::default(), ..c };
        assert_eq!(config.ok().map(honoured), Some(SchedulerConfig::sdxl()));
        for (key, config) in [
            ("clip_sample", SchedulerConfig { clip_sample: true, ..SchedulerConfig::sdxl() }),
            ("beta_start", SchedulerConfig { beta_end: 1.5, ..SchedulerConfig::sdxl() }),
            ("solver_order", SchedulerConfig { solver_order: Some(3), ..SchedulerConfig::sdxl() }),
        ] {
            let message = NoiseSchedule::new(&config).map(|_| ()).unwrap_err().to_string();
            assert!(message.starts_with(key), "{message}");
        }
        Ok(())
    }
}
