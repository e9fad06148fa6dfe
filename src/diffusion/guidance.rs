//! Classifier-free guidance (Ho & Salimans 2022) and its rescaling (Lin et al. 2023, sec. 3.4).

use candle_core::{Device, Tensor};

use super::denoiser::{Conditioning, Denoiser, NoiseModel};
use super::schedule::column;
use crate::{Error, Result};

/// A `Denoiser` from a network: one batched forward per call, the unconditional rows
/// (of the samples that have guidance) first.
#[derive(Clone, Debug)]
pub struct Guided<M>(pub M);

impl<M: NoiseModel> Denoiser for Guided<M> {
    fn device(&self) -> &Device {
        self.0.device()
    }

    fn latent_shape(&self, width: u32, height: u32) -> Result<(usize, usize, usize)> {
        self.0.latent_shape(width, height)
    }

    fn predict(&self, x: &Tensor, t: &Tensor, cond: &[&Conditioning]) -> Result<Tensor> {
        let rows = x.dim(0)?;
        if cond.len() != rows {
            let message = format!("{} conditionings for a batch of {rows}", cond.len());
            return Err(Error::invalid("conditioning", message));
        }
        let guided: Vec<u32> =
            (0..rows as u32).filter(|i| cond[*i as usize].unconditional().is_some()).collect();
        if guided.is_empty() {
            let text: Vec<_> = cond.iter().map(|c| &c.positive).collect();
            return self.0.forward(x, t, &text);
        }
        let pick = Tensor::new(guided.as_slice(), x.device())?;
        let select = |tensor: &Tensor| tensor.index_select(&pick, 0);
        let text: Vec<_> = cond
            .iter()
            .filter_map(|c| c.unconditional())
            .chain(cond.iter().map(|c| &c.positive))
            .collect();
        let both_x = Tensor::cat(&[&select(x)?, x], 0)?;
        let both_t = Tensor::cat(&[&select(t)?, t], 0)?;
        let out = self.0.forward(&both_x, &both_t, &text)?;
        let uncond = out.narrow(0, 0, guided.len())?;
        let positive = out.narrow(0, guided.len(), rows)?;
        let chosen: Vec<_> = guided.iter().map(|i| cond[*i as usize]).collect();
        let mixed = combine(&uncond, &select(&positive)?, &chosen)?;
        if guided.len() == rows {
            return Ok(mixed);
        }
        let mut next = 0..guided.len() as u32;
        let order: Vec<u32> = (0..rows as u32)
            .map(|i| match guided.contains(&i) {
                true => next.next().unwrap_or_default(),
                false => guided.len() as u32 + i,
            })
            .collect();
        let order = Tensor::new(order.as_slice(), x.device())?;
        Ok(Tensor::cat(&[&mixed, &positive], 0)?.index_select(&order, 0)?)
    }
}

/// uncond + w (cond - uncond), rescaled by `guidance_rescale`, each row with its own values.
/// All [B, ...].
///
/// # Errors
/// When shapes disagree.
pub fn combine(uncond: &Tensor, cond: &Tensor, settings: &[&Conditioning]) -> Result<Tensor> {
    let scales: Vec<f64> = settings.iter().map(|c| c.guidance_scale).collect();
    let guided = (uncond + (cond - uncond)?.broadcast_mul(&column(&scales, cond)?)?)?;
    if settings.iter().all(|c| c.guidance_rescale == 0.0) {
        return Ok(guided);
    }
    let phi: Vec<f64> = settings.iter().map(|c| c.guidance_rescale).collect();
    let keep: Vec<f64> = phi.iter().map(|p| 1.0 - p).collect();
    let ratio = row_std(cond)?.div(&row_std(&guided)?)?;
    let factor = ((ratio * column(&phi, cond)?)? + column(&keep, cond)?)?;
    // A row without rescaling stays bitwise what it is alone: its factor is 0 * ratio + 1.
    Ok(guided.broadcast_mul(&factor)?)
}

/// Unbiased standard deviation over all but the first dimension, [B, 1, ...].
fn row_std(x: &Tensor) -> Result<Tensor> {
    let mut shape = vec![1; x.rank()];
    shape[0] = x.dim(0)?;
    Ok(x.flatten_from(1)?.var(1)?.sqrt()?.reshape(shape)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diffusion::denoiser::TextCond;

    /// Output = the text's pooled value times the input plus the timestep.
    struct Linear(Device);

    impl NoiseModel for Linear {
        fn device(&self) -> &Device {
            &self.0
        }

        fn latent_shape(&self, width: u32, height: u32) -> Result<(usize, usize, usize)> {
            Ok((1, height as usize, width as usize))
        }

        fn forward(&self, x: &Tensor, t: &Tensor, text: &[&TextCond]) -> Result<Tensor> {
            let pooled = text.iter().map(|t| t.pooled.clone()).collect::<Vec<_>>();
            let pooled = Tensor::stack(&pooled, 0)?.reshape((text.len(), 1, 1, 1))?;
            Ok(x.broadcast_mul(&pooled)?.broadcast_add(&t.reshape((text.len(), 1, 1, 1))?)?)
        }
    }

    fn text(value: f32) -> Result<TextCond> {
        let context = Tensor::zeros((1, 1), candle_core::DType::F32, &Device::Cpu)?;
        Ok(TextCond { context, pooled: Tensor::new(&[value], &Device::Cpu)?, time_ids: [0.0; 6] })
    }

    fn cond(w: f64, rescale: f64) -> Result<Conditioning> {
        Ok(Conditioning {
            positive: text(2.0)?,
            negative: Some(text(0.5)?),
            guidance_scale: w,
            guidance_rescale: rescale,
        })
    }

    #[test]
    fn rows_of_a_mixed_batch_equal_their_single_runs() -> Result<()> {
        let model = Guided(Linear(Device::Cpu));
        let conds =
            [cond(5.0, 0.0)?, cond(1.0, 0.0)?, cond(7.5, 0.7)?, Conditioning::plain(text(3.0)?)];
        let x = Tensor::arange(0f32, 24.0, &Device::Cpu)?.reshape((4, 1, 2, 3))?;
        let t = Tensor::new(&[981f32, 1.0, 500.0, 20.0], &Device::Cpu)?;
        let all = model.predict(&x, &t, &conds.iter().collect::<Vec<_>>())?;
        for (i, c) in conds.iter().enumerate() {
            let one = model.predict(&x.narrow(0, i, 1)?, &t.narrow(0, i, 1)?, &[c])?;
            let values = |t: Tensor| t.flatten_all()?.to_vec1::<f32>();
            assert_eq!(values(one)?, values(all.narrow(0, i, 1)?)?, "row {i}");
        }
        let first = all.get(0)?.flatten_all()?.to_vec1::<f32>()?;
        // 0.5 x + 5 (2 - 0.5) x + t = 8 x + t
        assert_eq!(first, [981.0, 989.0, 997.0, 1005.0, 1013.0, 1021.0]);
        assert_eq!(conds.iter().map(Conditioning::forwards_per_eval).sum::<u64>(), 6);
        Ok(())
    }

    #[test]
    fn full_rescaling_restores_the_conditional_deviation() -> Result<()> {
        let x = Tensor::new(&[[1f32, 2.0, 4.0]], &Device::Cpu)?;
        let (uncond, positive) = (x.affine(0.5, 0.0)?, x.affine(2.0, 0.0)?);
        let guided = combine(&uncond, &positive, &[&cond(5.0, 1.0)?])?;
        let std = |t: &Tensor| row_std(t)?.flatten_all()?.to_vec1::<f32>().map_err(Error::from);
        assert!((std(&guided)?[0] - std(&positive)?[0]).abs() < 1e-6);
        assert!((std(&x)?[0] - 1.527_525_3).abs() < 1e-6, "unbiased, as torch.std");
        Ok(())
    }
}
