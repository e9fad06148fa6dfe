//! Noise levels as in EDM: x = x0 + sigma n, at any sigma (Karras et al. 2022).

use candle_core::Tensor;

use super::env::SearchEnv;
use crate::Result;
use crate::diffusion::euler::{input_scale, x0_at};

/// A denoised state: [B, C, h, w] each.
#[derive(Clone, Debug)]
pub struct Denoised {
    /// D(x, sigma), the clean-image estimate.
    pub x0: Tensor,
    /// (x - D) / sigma, the predicted noise.
    pub noise: Tensor,
}

/// Evaluates states `x` [B, C, h, w] at noise level `sigma` above 0: one evaluation a row. Below
/// the schedule's least level the network sees timestep 0.
///
/// # Errors
/// `Error::Budget` before running, `Error::Cancelled`, the model's.
pub fn denoise(env: &SearchEnv, x: &Tensor, sigma: f64) -> Result<Denoised> {
    let t = env.schedule.t_of_sigma(sigma);
    let output = env.evaluate(&x.affine(input_scale(sigma), 0.0)?, t)?;
    let x0 = x0_at(env.schedule.prediction_type(), sigma, x, &output)?;
    let noise = ((x - &x0)? / sigma)?;
    Ok(Denoised { x0, noise })
}

/// x + a y.
pub fn plus(x: &Tensor, a: f64, y: &Tensor) -> Result<Tensor> {
    Ok((x + y.affine(a, 0.0)?)?)
}

/// The probability-flow ODE by Euler's method through `sigmas`, which descend; the last may be 0.
///
/// # Errors
/// As [`denoise`].
pub fn euler(env: &SearchEnv, x: Tensor, sigmas: &[f64]) -> Result<Tensor> {
    let mut x = x;
    for pair in sigmas.windows(2) {
        let at = denoise(env, &x, pair[0])?;
        x = if pair[1] == 0.0 { at.x0 } else { plus(&x, pair[1] - pair[0], &at.noise)? };
    }
    Ok(x)
}

/// The probability-flow ODE by Heun's method through `sigmas`, which descend to above 0: two
/// evaluations an interval.
///
/// # Errors
/// As [`denoise`].
pub fn heun(env: &SearchEnv, x: Tensor, sigmas: &[f64]) -> Result<Tensor> {
    let mut x = x;
    for pair in sigmas.windows(2) {
        let step = pair[1] - pair[0];
        let here = denoise(env, &x, pair[0])?.noise;
        let there = denoise(env, &plus(&x, step, &here)?, pair[1])?.noise;
        x = plus(&x, 0.5 * step, &(here + there)?)?;
    }
    Ok(x)
}
