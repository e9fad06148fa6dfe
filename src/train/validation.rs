//! What a model is worth: images of fixed prompts and seeds, and the loss on fixed noised images.

use std::collections::BTreeMap;

use candle_core::Tensor;
use image::RgbImage;

use super::evaluation::Evaluation;
use super::pass::{Sample, evaluate};
use super::score::{finite_mean, variance};
use super::setup::Setup;
use super::texts::Texts;
use crate::Result;
use crate::diffusion::denoiser::Conditioning;
use crate::diffusion::guidance::Guided;
use crate::diffusion::meter::{Meter, MeteredDenoiser};
use crate::diffusion::noise::{NoiseKey, Purpose};
use crate::diffusion::sdxl_model::SdxlModel;
use crate::util::CancelToken;

/// The prompts of a run's validations. Prompt i has the image of seed i.
pub struct Validation<'a> {
    pub setup: &'a Setup,
    pub prompts: Vec<String>,
}

/// An image-text pair whose loss is followed.
#[derive(Clone, Debug)]
pub struct Held {
    /// Clean latent, [C, h, w].
    pub clean: Tensor,
    pub text: crate::diffusion::denoiser::TextCond,
}

impl Validation<'_> {
    /// Every reward's mean, standard error and deviation over the prompts' images (`NAME`,
    /// `NAME_error`, `NAME_deviation`), and the first images.
    ///
    /// # Errors
    /// The models', `Error::Cancelled`.
    pub fn run(
        &self,
        model: &Guided<SdxlModel>,
        texts: &mut Texts,
        meter: &Meter,
        cancel: &CancelToken,
    ) -> Result<(BTreeMap<String, f64>, Vec<RgbImage>)> {
        let settings = &self.setup.settings;
        let (steps, guidance) = (settings.validation_steps, settings.validation_guidance);
        let evaluation = Evaluation { setup: self.setup, steps, guidance };
        let wanted: Vec<(&str, u64)> = self.prompts.iter().map(String::as_str).zip(0..).collect();
        let mut scores: BTreeMap<String, Vec<f64>> = BTreeMap::new();
        let mut kept = Vec::new();
        evaluation.run(model, texts, &wanted, meter, cancel, &mut |scored| {
            for (name, score) in scored.scores {
                scores.entry(name).or_default().push(score);
            }
            if kept.len() < settings.validation_images {
                kept.push(scored.image);
            }
        })?;
        let mut means = BTreeMap::new();
        for (name, scores) in scores {
            let finite = scores.iter().filter(|s| s.is_finite()).count() as f64;
            means.extend(finite_mean(&scores).map(|mean| (name.clone(), mean)));
            if let Some(variance) = variance(&scores) {
                means.insert(format!("{name}_error"), (variance / finite).sqrt());
                means.insert(format!("{name}_deviation"), variance.sqrt());
            }
        }
        Ok((means, kept))
    }

    /// The plain loss on these images at the middle of every tenth of the schedule, by tenth
    /// (`loss_t1` …) and in all (`loss`). Noise is fixed.
    ///
    /// # Errors
    /// The model's, `Error::Cancelled`.
    pub fn loss(
        &self,
        model: &Guided<SdxlModel>,
        held: &[Held],
        meter: &Meter,
        cancel: &CancelToken,
    ) -> Result<BTreeMap<String, f64>> {
        let denoiser = MeteredDenoiser::new(model, meter);
        let mut means = BTreeMap::new();
        let steps = self.setup.schedule.num_train_timesteps() as f64;
        for tenth in 0..10u64 {
            cancel.check()?;
            let t = ((tenth as f64 + 0.5) * steps / 10.0).floor();
            let sample = |(i, held): (usize, &Held)| {
                let clean = held.clean.unsqueeze(0)?;
                let (shape, device) = (clean.dims().to_vec(), clean.device());
                let key = NoiseKey::new(i as u64);
                let noise = key.normal(Purpose::Data, tenth, 0, shape, device)?;
                let x = self.setup.schedule.add_noise(&clean, &noise, &[t])?.get(0)?;
                let target = self.setup.schedule.target(&clean, &noise, &[t])?.get(0)?;
                Ok(Sample { x, t, target, cond: Conditioning::plain(held.text.clone()) })
            };
            let samples = held.iter().enumerate().map(sample).collect::<Result<Vec<_>>>()?;
            let losses = evaluate(&denoiser, &samples, self.setup.settings.rollout_batch)?.losses;
            let mean = losses.iter().sum::<f64>() / losses.len().max(1) as f64;
            means.insert(format!("loss_t{:02}", tenth + 1), mean);
        }
        let all = means.values().sum::<f64>() / means.len() as f64;
        means.insert("loss".into(), all);
        Ok(means)
    }
}

/// Pictures side by side, as many in a row as there are rows.
pub fn sheet(images: &[RgbImage]) -> Option<RgbImage> {
    let first = images.first()?;
    let (width, height) = first.dimensions();
    let columns = (images.len() as f64).sqrt().ceil() as u32;
    let rows = (images.len() as u32).div_ceil(columns);
    let mut sheet = RgbImage::new(columns * width, rows * height);
    for (i, image) in images.iter().enumerate() {
        let (x, y) = (i as u32 % columns * width, i as u32 / columns * height);
        image::imageops::replace(&mut sheet, image, i64::from(x), i64::from(y));
    }
    Some(sheet)
}
