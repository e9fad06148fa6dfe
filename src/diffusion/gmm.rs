//! Diffusion of a Gaussian mixture, solved in closed form: the model that samplers are
//! tested on.

use candle_core::{Device, Tensor};
use rand::Rng;
use rand_distr::{Distribution, StandardNormal};

use super::config::PredictionType;
use super::denoiser::{NoiseModel, TextCond};
use super::schedule::NoiseSchedule;
use crate::{Error, Result};

/// p0 = sum_k pi_k N(m_k, s_k^2 I) in d dimensions.
#[derive(Clone, Debug, PartialEq)]
pub struct GaussianMixture {
    /// pi_k, positive; need not be normalised.
    pub weights: Vec<f64>,
    /// m_k, each of length d.
    pub means: Vec<Vec<f64>>,
    /// s_k.
    pub stds: Vec<f64>,
}

impl GaussianMixture {
    pub fn single(mean: Vec<f64>, std: f64) -> Self {
        Self { weights: vec![1.0], means: vec![mean], stds: vec![std] }
    }

    pub fn dim(&self) -> usize {
        self.means.first().map_or(0, Vec::len)
    }

    /// log(pi_k N(x; m_k, (s_k^2 + sigma^2) I)) for every k, weights normalised.
    fn log_terms(&self, x: &[f64], sigma: f64) -> Vec<f64> {
        let total: f64 = self.weights.iter().sum();
        let parts = self.weights.iter().zip(&self.means).zip(&self.stds);
        let term = |((weight, mean), std): ((&f64, &Vec<f64>), &f64)| {
            let variance = std * std + sigma * sigma;
            let distance: f64 = x.iter().zip(mean).map(|(x, m)| (x - m).powi(2)).sum();
            let norm = x.len() as f64 * (std::f64::consts::TAU * variance).ln();
            (weight / total).ln() - 0.5 * (distance / variance + norm)
        };
        parts.map(term).collect()
    }

    /// log p(x) after noise of level `sigma` in x = x0 + sigma n.
    pub fn log_density(&self, x: &[f64], sigma: f64) -> f64 {
        let terms = self.log_terms(x, sigma);
        let max = terms.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        max + terms.iter().map(|t| (t - max).exp()).sum::<f64>().ln()
    }

    /// E[x0 | x0 + sigma n = x] =
    /// sum_k gamma_k [m_k + s_k^2/(s_k^2+sigma^2) (x - m_k)].
    pub fn denoise(&self, x: &[f64], sigma: f64) -> Vec<f64> {
        let log_p = self.log_density(x, sigma);
        let mut out = vec![0.0; x.len()];
        for (k, term) in self.log_terms(x, sigma).into_iter().enumerate() {
            let gamma = (term - log_p).exp();
            let variance = self.stds[k] * self.stds[k];
            let kappa = variance / (variance + sigma * sigma);
            for (out, (x, m)) in out.iter_mut().zip(x.iter().zip(&self.means[k])) {
                *out += gamma * (m + kappa * (x - m));
            }
        }
        out
    }

    /// One draw from p0.
    pub fn sample(&self, rng: &mut impl Rng) -> Vec<f64> {
        let total: f64 = self.weights.iter().sum();
        let mut left = rng.random::<f64>() * total;
        let inside = |weight: &f64| {
            left -= weight;
            left < 0.0
        };
        let k = self.weights.iter().position(inside).unwrap_or(self.weights.len() - 1);
        let noise = |m: &f64| {
            let z: f64 = StandardNormal.sample(rng);
            m + self.stds[k] * z
        };
        self.means[k].iter().map(noise).collect()
    }

    /// p0 exp(lambda a.x), normalised: what a reward a.x ideally turns p0 into.
    pub fn tilt_linear(&self, a: &[f64], lambda: f64) -> Self {
        let norm: f64 = a.iter().map(|v| v * v).sum();
        let parts = self.weights.iter().zip(&self.means).zip(&self.stds);
        let log_weight = |((weight, mean), std): ((&f64, &Vec<f64>), &f64)| {
            let dot: f64 = a.iter().zip(mean).map(|(a, m)| a * m).sum();
            weight.ln() + lambda * dot + 0.5 * (lambda * std).powi(2) * norm
        };
        let log_weights: Vec<f64> = parts.map(log_weight).collect();
        let max = log_weights.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let shifted = |(mean, std): (&Vec<f64>, &f64)| {
            mean.iter().zip(a).map(|(m, a)| m + lambda * std * std * a).collect()
        };
        Self {
            weights: log_weights.iter().map(|w| (w - max).exp()).collect(),
            means: self.means.iter().zip(&self.stds).map(shifted).collect(),
            stds: self.stds.clone(),
        }
    }
}

/// Mixtures as a network. The text's `pooled[0]` chooses the mixture, so that guidance
/// between two of them can be tested.
#[derive(Clone, Debug)]
pub struct GmmModel {
    mixtures: Vec<GaussianMixture>,
    shape: (usize, usize, usize),
    schedule: NoiseSchedule,
}

impl GmmModel {
    /// Latents have `shape` (channels, height, width), whose product is the mixtures' d.
    ///
    /// # Errors
    /// `Error::Invalid` when dimensions disagree.
    pub fn new(
        mixtures: Vec<GaussianMixture>,
        shape: (usize, usize, usize),
        schedule: &NoiseSchedule,
    ) -> Result<Self> {
        let d = shape.0 * shape.1 * shape.2;
        let fits = |m: &GaussianMixture| {
            let k = m.weights.len();
            k > 0 && k == m.stds.len() && k == m.means.len() && m.means.iter().all(|m| m.len() == d)
        };
        if mixtures.is_empty() || !mixtures.iter().all(fits) {
            return Err(Error::invalid("mixture", format!("must have means of length {d}")));
        }
        Ok(Self { mixtures, shape, schedule: schedule.clone() })
    }

    /// The text that chooses mixture `index`.
    ///
    /// # Errors
    /// None on the CPU.
    pub fn text(index: usize) -> Result<TextCond> {
        let pooled = Tensor::new(&[index as f32], &Device::Cpu)?;
        Ok(TextCond { context: pooled.reshape((1, 1))?, pooled, time_ids: [0.0; 6] })
    }

    fn row(&self, x: &[f32], t: f64, text: &TextCond) -> Result<Vec<f32>> {
        let index = text.pooled.to_vec1::<f32>()?.first().copied().unwrap_or_default();
        let mixture = self.mixtures.get(index as usize).ok_or_else(|| {
            Error::invalid("text", format!("chooses mixture {index} of {}", self.mixtures.len()))
        })?;
        let sigma = self.schedule.sigma(t);
        let alpha = 1.0 / (1.0 + sigma * sigma).sqrt();
        let x: Vec<f64> = x.iter().map(|v| f64::from(*v) / alpha).collect();
        let x0 = mixture.denoise(&x, sigma);
        let output = x.iter().zip(&x0).map(|(x, x0)| {
            let eps = (x - x0) / sigma;
            match self.schedule.prediction_type() {
                PredictionType::Epsilon => eps,
                PredictionType::VPrediction => alpha * eps - sigma * alpha * x0,
                PredictionType::Sample => *x0,
            }
        });
        Ok(output.map(|v| v as f32).collect())
    }
}

impl NoiseModel for GmmModel {
    fn device(&self) -> &Device {
        &Device::Cpu
    }

    fn latent_shape(&self, _width: u32, _height: u32) -> Result<(usize, usize, usize)> {
        Ok(self.shape)
    }

    fn forward(&self, x: &Tensor, t: &Tensor, text: &[&TextCond]) -> Result<Tensor> {
        let rows = x.flatten_from(1)?.to_vec2::<f32>()?;
        let t = t.to_vec1::<f32>()?;
        let mut out = Vec::with_capacity(x.elem_count());
        for ((row, t), text) in rows.iter().zip(t).zip(text) {
            out.extend(self.row(row, f64::from(t), text)?);
        }
        Ok(Tensor::from_vec(out, x.shape(), &Device::Cpu)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mixture() -> GaussianMixture {
        GaussianMixture {
            weights: vec![1.0, 3.0],
            means: vec![vec![-2.0, 0.5], vec![1.0, 1.5]],
            stds: vec![0.4, 0.8],
        }
    }

    /// Tweedie: D(x) = x + sigma^2 grad log p(x).
    #[test]
    fn the_denoiser_is_the_score() {
        let (mixture, h) = (mixture(), 1e-5);
        for (x, sigma) in [([0.3, -0.7], 0.6), ([-2.0, 2.0], 3.0), ([8.0, 1.0], 0.05)] {
            let x0 = mixture.denoise(&x, sigma);
            for axis in 0..2 {
                let at = |offset: f64| {
                    let mut x = x;
                    x[axis] += offset;
                    mixture.log_density(&x, sigma)
                };
                let tweedie = x[axis] + sigma * sigma * (at(h) - at(-h)) / (2.0 * h);
                assert!((x0[axis] - tweedie).abs() < 1e-6, "{} is not {tweedie}", x0[axis]);
            }
        }
    }

    #[test]
    fn samples_and_tilts_have_the_stated_moments() {
        let mixture = mixture();
        let mut rng = crate::diffusion::noise::NoiseKey::new(3).rng(
            crate::diffusion::noise::Purpose::Data,
            0,
            0,
        );
        let (n, lambda, a) = (40_000, 0.3, [1.0, -0.5]);
        let (mut mean, mut tilted, mut total) = (0.0, 0.0, 0.0);
        for _ in 0..n {
            let x = mixture.sample(&mut rng);
            mean += x[0] / f64::from(n);
            let weight = (lambda * (a[0] * x[0] + a[1] * x[1])).exp();
            tilted += weight * x[0];
            total += weight;
        }
        assert!((mean - 0.25).abs() < 0.03, "{mean}");
        let ideal = mixture.tilt_linear(&a, lambda);
        let sum: f64 = ideal.weights.iter().sum();
        let expected: f64 =
            ideal.weights.iter().zip(&ideal.means).map(|(w, m)| w * m[0] / sum).sum();
        assert!((tilted / total - expected).abs() < 0.03, "{} is not {expected}", tilted / total);
    }
}
