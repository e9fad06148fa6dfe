//! The pieces of work whose speed is measured, on any checkpoint:
//! `tools/bench_torch.py` does the same under the same names.

use std::path::Path;
use std::sync::Arc;

use candle_core::{Device, Tensor};

use super::adapter::random_adapter;
use crate::diffusion::config::SchedulerConfig;
use crate::diffusion::cost::Budget;
use crate::diffusion::denoiser::{Conditioning, NoiseModel, TextCond};
use crate::diffusion::guidance::Guided;
use crate::diffusion::meter::{Meter, MeteredDenoiser};
use crate::diffusion::noise::{NoiseKey, Purpose};
use crate::diffusion::schedule::NoiseSchedule;
use crate::diffusion::sdxl_model::{SdxlModel, time_ids};
use crate::diffusion::solver::{Solver, SolverSpec, evaluations};
use crate::diffusion::trajectory::{Row, State, Trajectory};
use crate::nn::device::Placement;
use crate::sdxl::ModelFolder;
use crate::sdxl::config::UNetConfig;
use crate::sdxl::folder::EncodedText;
use crate::util::CancelToken;
use crate::{Error, Result};

/// Guidance of the measured images; with 50 steps it is the paper's evaluation setting.
const GUIDANCE: f64 = 5.0;
/// The timestep of the single U-Net forwards.
const TIMESTEP: f32 = 500.0;
/// Tokens of the measured prompt between its start and its end token.
const WORDS: usize = 9;
const KEY: NoiseKey = NoiseKey { seed: 0 };

/// One measured piece of work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Piece {
    /// One U-Net forward of that batch, without guidance.
    UnetForward(usize),
    /// That many latents to image tensors.
    VaeDecode(usize),
    /// One prompt's token ids through both towers.
    TextEncode,
    /// Text encoding, guided steps of the checkpoint's scheduler with the zero null prompt,
    /// VAE decode.
    Images { steps: usize, batch: usize },
    /// The U-Net with a new adapter on every attention, its factors already in place.
    AdapterSwitch,
    /// The checkpoint from its files, which the system has in memory after the first run.
    Load,
}

impl Piece {
    /// Every piece with the name it is reported under, in order of measurement.
    pub const ALL: [(&'static str, Self); 14] = [
        ("unet_forward_b1", Self::UnetForward(1)),
        ("unet_forward_b2", Self::UnetForward(2)),
        ("unet_forward_b4", Self::UnetForward(4)),
        ("unet_forward_b8", Self::UnetForward(8)),
        ("vae_decode_b1", Self::VaeDecode(1)),
        ("text_encode", Self::TextEncode),
        ("image_50_steps", Self::Images { steps: 50, batch: 1 }),
        ("unet_forward_b12", Self::UnetForward(12)),
        ("unet_forward_b16", Self::UnetForward(16)),
        ("vae_decode_b8", Self::VaeDecode(8)),
        ("vae_decode_b12", Self::VaeDecode(12)),
        ("images_20_steps_b8", Self::Images { steps: 20, batch: 8 }),
        ("adapter_switch", Self::AdapterSwitch),
        ("load", Self::Load),
    ];
    /// The first so many of them are measured where none is named.
    pub const USUAL: usize = 7;
}

/// The arguments of a U-Net forward.
pub struct Inputs {
    pub x: Tensor,
    pub t: Tensor,
    pub context: Tensor,
    pub pooled: Tensor,
    pub sizes: Tensor,
}

/// Does a piece of work once and gives its result.
pub type Work<'a> = Box<dyn FnMut() -> Result<Tensor> + 'a>;

/// A checkpoint with fixed inputs, ready to be measured. In f32, without gradients.
pub struct Workload {
    model: Guided<SdxlModel>,
    placement: Placement,
    scheduler: SchedulerConfig,
    schedule: NoiseSchedule,
    /// One row for each tower.
    ids: [Vec<u32>; 2],
    /// Channels, height and width of the latents.
    latent: (usize, usize, usize),
}

impl Workload {
    /// Opens the checkpoint `path`; `latent` is (height, width) of the latents where it
    /// should not be the model's own.
    ///
    /// # Errors
    /// Names the file that is missing or unusable.
    pub fn open(
        path: &Path,
        latent: Option<(usize, usize)>,
        placement: &Placement,
    ) -> Result<Self> {
        let folder = ModelFolder::open(path, placement)?;
        let scheduler: SchedulerConfig = folder.scheduler()?;
        scheduler.validate().map_err(|e| Error::file(path, format!("scheduler: {e}")))?;
        let schedule = NoiseSchedule::new(&scheduler)?;
        let ids = prompt_ids(&folder)?;
        let (width, height) = pixels(&folder, latent);
        let model = Guided(SdxlModel::new(Arc::new(folder)));
        let latent = model.0.latent_shape(width, height)?;
        Ok(Self { model, placement: placement.clone(), scheduler, schedule, ids, latent })
    }

    /// Height and width of the latents.
    pub fn latent(&self) -> (usize, usize) {
        (self.latent.1, self.latent.2)
    }

    /// Tokens of the prompt, padding included.
    pub fn tokens(&self) -> usize {
        self.ids[0].len()
    }

    /// U-Net forwards of one sample in a piece of work.
    ///
    /// # Errors
    /// When the scheduler does not offer the piece's steps.
    pub fn forwards(&self, piece: Piece) -> Result<u64> {
        Ok(match piece {
            Piece::UnetForward(batch) => batch as u64,
            Piece::VaeDecode(_) | Piece::TextEncode | Piece::AdapterSwitch | Piece::Load => 0,
            Piece::Images { steps, batch } => {
                (2 * batch * evaluations(self.solver(steps)?.as_ref(), 0, steps)) as u64
            }
        })
    }

    fn solver(&self, steps: usize) -> Result<Arc<dyn Solver>> {
        let kind = self.scheduler.default_solver();
        SolverSpec::ode(kind, &self.schedule).build(&self.schedule, steps)
    }

    /// Sets up everything that is not part of `piece` and returns the piece itself.
    ///
    /// # Errors
    /// The networks'.
    pub fn prepare(&self, piece: Piece) -> Result<Work<'_>> {
        let folder = self.model.0.folder();
        match piece {
            Piece::UnetForward(batch) => {
                let Inputs { x, t, context, pooled, sizes } = self.inputs(batch)?;
                Ok(Box::new(move || folder.unet.forward(&x, &t, &context, &pooled, &sizes)))
            }
            Piece::VaeDecode(batch) => {
                let z = self.latents(batch)?;
                Ok(Box::new(move || folder.vae.decode(&z)))
            }
            Piece::TextEncode => Ok(Box::new(|| Ok(self.text()?.context))),
            Piece::Images { steps, batch } => {
                let (noise, solver) = (self.latents(batch)?, self.solver(steps)?);
                let run =
                    move || self.images(&noise, solver.as_ref(), &Meter::new(Budget::default()));
                Ok(Box::new(run))
            }
            Piece::AdapterSwitch => {
                let weights = &folder.unet_weights;
                let (lora, _) = random_adapter(weights, weights.computed())?;
                Ok(Box::new(move || {
                    folder.unet_with(&lora)?;
                    let (_, factors) = lora.iter().next().ok_or_else(no_weights)?;
                    Ok(factors.down.clone())
                }))
            }
            Piece::Load => Ok(Box::new(|| {
                let loaded = ModelFolder::open(&folder.path, &self.placement)?;
                let tensors = loaded.unet_weights.tensors();
                tensors.values().next().cloned().ok_or_else(no_weights)
            })),
        }
    }

    /// What a U-Net forward of that batch takes.
    ///
    /// # Errors
    /// The text towers'.
    pub fn inputs(&self, batch: usize) -> Result<Inputs> {
        let text = self.text()?;
        Ok(Inputs {
            x: self.latents(batch)?,
            t: Tensor::full(TIMESTEP, batch, self.device())?,
            context: text.context.repeat((batch, 1, 1))?,
            pooled: text.pooled.repeat((batch, 1))?,
            sizes: Tensor::new(&[self.time_ids()], self.device())?.repeat((batch, 1))?,
        })
    }

    fn device(&self) -> &Device {
        self.model.0.folder().device()
    }

    pub fn unet_config(&self) -> UNetConfig {
        self.model.0.folder().unet_config.clone()
    }

    /// Images in [0, 1] from unit noise, all of one prompt, as a server would make them, short
    /// of 8 bits.
    fn images(&self, noise: &Tensor, solver: &dyn Solver, meter: &Meter) -> Result<Tensor> {
        let text = self.text()?;
        let positive = TextCond {
            context: text.context.get(0)?.contiguous()?,
            pooled: text.pooled.get(0)?.contiguous()?,
            time_ids: self.time_ids(),
        };
        let negative = TextCond {
            context: positive.context.zeros_like()?,
            pooled: positive.pooled.zeros_like()?,
            time_ids: positive.time_ids,
        };
        let cond = Conditioning {
            positive,
            negative: Some(negative),
            guidance_scale: GUIDANCE,
            guidance_rescale: 0.0,
        };
        let cancel = CancelToken::default();
        let denoiser = MeteredDenoiser::new(&self.model, meter);
        let batch = noise.dim(0)?;
        let trajectory = Trajectory { solver, denoiser, micro_batch: batch, cancel: &cancel };
        let row = |candidate| Row { key: KEY, candidate, cond: &cond };
        let rows: Vec<Row> = (0..batch as u64).map(row).collect();
        let start = State::start(solver, noise)?;
        let end = trajectory.run(start, solver.steps(), &rows, &mut |_| Ok(()))?;
        let decoded = self.model.0.folder().vae.decode(&end.x)?;
        Ok(decoded.affine(0.5, 0.5)?.clamp(0f32, 1f32)?)
    }

    fn text(&self) -> Result<EncodedText> {
        let row = |i: usize| std::slice::from_ref(&self.ids[i]);
        self.model.0.folder().encode_ids(row(0), row(1))
    }

    fn time_ids(&self) -> [f32; 6] {
        let factor = self.model.0.folder().vae.config().factor();
        let (height, width) = self.latent();
        time_ids((factor * width) as u32, (factor * height) as u32)
    }

    /// Unit noise of that batch.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn latents(&self, batch: usize) -> Result<Tensor> {
        let rows: Vec<u64> = (0..batch as u64).collect();
        KEY.normal_rows(Purpose::InitialLatent, 0, &rows, self.latent, self.device())
    }
}

/// Width and height of the images whose latents have this (height, width), or the model's own.
pub fn pixels(folder: &ModelFolder, latent: Option<(usize, usize)>) -> (u32, u32) {
    let factor = folder.vae.config().factor();
    match latent {
        Some((height, width)) => ((factor * width) as u32, (factor * height) as u32),
        None => folder.default_size(),
    }
}

fn no_weights() -> Error {
    Error::Weights("the U-Net has no weights, or no attention".to_owned())
}

/// Start, a few words, end, then each tower's own padding, as long as prompts are for this
/// checkpoint. Token ids, so that tokenisation is not measured.
fn prompt_ids(folder: &ModelFolder) -> Result<[Vec<u32>; 2]> {
    let towers = [folder.text_1.config(), folder.text_2.config()];
    let least =
        |of: fn(&crate::sdxl::config::ClipTextConfig) -> usize| of(towers[0]).min(of(towers[1]));
    let mut length = least(|c| c.max_position_embeddings);
    if folder.path.join("tokenizer").is_dir() {
        length = length.min(folder.tokenizers()?[0].max_length());
    }
    let vocabulary = least(|c| c.vocab_size);
    if vocabulary < 8 || length < 3 {
        let message = format!("{vocabulary} tokens and prompts of {length} are too few to measure");
        return Err(Error::file(&folder.path, message));
    }
    let (start, end) = (vocabulary as u32 - 2, vocabulary as u32 - 1);
    let words = WORDS.min(length - 2);
    let word = |i: usize| 3 + (i * 37 % (vocabulary - 5)) as u32;
    let mut row: Vec<u32> = std::iter::once(start).chain((0..words).map(word)).collect();
    row.push(end);
    Ok([end, 0].map(|padding| {
        let mut padded = row.clone();
        padded.resize(length, padding);
        padded
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn workload(latent: Option<(usize, usize)>) -> Workload {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let folder = root.join("tests/fixtures/parity/ddim_tiny");
        Workload::open(&folder, latent, &Placement::cpu(candle_core::DType::F32)).unwrap()
    }

    #[test]
    fn every_piece_gives_what_its_name_says() {
        for (latent, side) in [(None, (8, 8)), (Some((4, 6)), (4, 6))] {
            let w = workload(latent);
            assert_eq!(w.latent(), side);
            let factor = w.model.0.folder().vae.config().factor();
            let pixels = |batch| vec![batch, 3, factor * side.0, factor * side.1];
            for (name, piece) in Piece::ALL {
                let got = w.prepare(piece).unwrap()().unwrap();
                let (shape, f) = match piece {
                    Piece::UnetForward(b) => (vec![b, 4, side.0, side.1], b as u64),
                    Piece::VaeDecode(b) => (pixels(b), 0),
                    Piece::TextEncode => (vec![1, w.tokens(), 26], 0),
                    Piece::Images { steps, batch } => (pixels(batch), (2 * steps * batch) as u64),
                    Piece::AdapterSwitch | Piece::Load => (got.dims().to_vec(), 0),
                };
                let forwards = w.forwards(piece).unwrap();
                assert_eq!((got.dims(), forwards), (shape.as_slice(), f), "{name}");
                let sum = got.abs().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap();
                assert!(sum.is_finite() && sum > 0.0, "{name}");
            }
        }
    }

    #[test]
    fn images_cost_what_is_said() {
        let w = workload(None);
        let (meter, solver) = (Meter::new(Budget::default()), w.solver(3).unwrap());
        w.images(&w.latents(2).unwrap(), solver.as_ref(), &meter).unwrap();
        let piece = Piece::Images { steps: 3, batch: 2 };
        assert_eq!(meter.spent().f, w.forwards(piece).unwrap());
    }
}
