//! The computation behind `ds-bench parity`: every component of a checkpoint on
//! given inputs. docs/parity.md lists the tensors.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use serde::Serialize;

use super::process::{PeakMemory, cpu_seconds_since, cpu_time};
use crate::diffusion::config::SchedulerConfig;
use crate::diffusion::denoiser::{Conditioning, Denoiser, TextCond};
use crate::diffusion::guidance::Guided;
use crate::diffusion::schedule::NoiseSchedule;
use crate::diffusion::sdxl_model::SdxlModel;
use crate::diffusion::solver::{Eval, History, SolverSpec};
use crate::nn::device::Placement;
use crate::sdxl::ModelFolder;
use crate::sdxl::folder::EncodedText;
use crate::sdxl::weights::{read_safetensors, write_safetensors};
use crate::{Error, Result};

/// Values of a row of `time_ids`.
const SIZES: usize = 6;

/// The input tensors, checked.
struct Inputs<'a> {
    file: &'a Path,
    tensors: HashMap<String, Tensor>,
}

impl Inputs<'_> {
    fn get(&self, name: &str, rank: usize, dtype: DType) -> Result<Tensor> {
        let Some(tensor) = self.tensors.get(name) else {
            return Err(Error::file(self.file, format!("lacks the tensor '{name}'")));
        };
        if tensor.rank() != rank {
            let message =
                format!("'{name}': expected {rank} dimensions, got shape {:?}", tensor.dims());
            return Err(Error::file(self.file, message));
        }
        Ok(tensor.to_dtype(dtype)?)
    }

    fn ids(&self, name: &str) -> Result<Vec<Vec<u32>>> {
        let rows = self.get(name, 2, DType::I64)?.to_vec2::<i64>()?;
        let id = |v: i64| {
            u32::try_from(v)
                .map_err(|_| Error::file(self.file, format!("'{name}': {v} is no token id")))
        };
        rows.into_iter().map(|row| row.into_iter().map(id).collect()).collect()
    }

    fn rows(&self, name: &str, tensor: &Tensor, expected: usize) -> Result<()> {
        let rows = tensor.dim(0)?;
        if rows != expected {
            return Err(Error::file(self.file, format!("'{name}': {rows} rows for {expected}")));
        }
        Ok(())
    }

    /// Token ids of both towers.
    fn prompts(&self) -> Result<[Vec<Vec<u32>>; 2]> {
        let [ids, ids_2] = [self.ids("input_ids")?, self.ids("input_ids_2")?];
        let length = |ids: &[Vec<u32>]| ids.first().map_or(0, Vec::len);
        let sizes = |ids: &[Vec<u32>]| (ids.len(), length(ids));
        if sizes(&ids) != sizes(&ids_2) {
            let message = format!(
                "'input_ids_2': {} rows of {} tokens, 'input_ids' has {} rows of {}",
                ids_2.len(),
                length(&ids_2),
                ids.len(),
                length(&ids)
            );
            return Err(Error::file(self.file, message));
        }
        Ok([ids, ids_2])
    }

    /// Latents and sizes, of as many rows as the prompts.
    fn latents(&self, text: &EncodedText) -> Result<(Tensor, Tensor)> {
        let latents = self.get("latents", 4, DType::F32)?;
        let time_ids = self.get("time_ids", 2, DType::F32)?;
        let batch = latents.dim(0)?;
        self.rows("input_ids", &text.pooled, batch)?;
        self.rows("time_ids", &time_ids, batch)?;
        if time_ids.dim(1)? != SIZES {
            let message = format!("'time_ids': expected {SIZES} values a row");
            return Err(Error::file(self.file, message));
        }
        Ok((latents, time_ids))
    }
}

/// What can be computed, in the order in which it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum Output {
    HiddenStates,
    Pooled,
    NoisePred,
    Decoded,
    EncodedMean,
    Trajectory,
}

impl Output {
    /// Those that prompts are needed for.
    const OF_TEXT: [Self; 4] =
        [Self::HiddenStates, Self::Pooled, Self::NoisePred, Self::Trajectory];
}

/// What [`run`] computes.
#[derive(Clone, Debug)]
pub struct Options {
    /// Nothing for everything.
    pub only: Vec<Output>,
    /// Steps of `trajectory`; 0 for none.
    pub steps: usize,
    pub guidance: f64,
}

impl Options {
    fn wants(&self, output: Output) -> bool {
        (output != Output::Trajectory || self.steps > 0)
            && (self.only.is_empty() || self.only.contains(&output))
    }
}

/// One piece of the work, with what it took.
#[derive(Clone, Debug, Serialize)]
pub struct Stage {
    /// `load`, `text` or the output.
    pub stage: &'static str,
    pub seconds: f64,
    /// Of all threads; absent where the platform does not tell.
    pub cpu_seconds: Option<f64>,
    /// The process's most memory during it; absent where the platform does not tell.
    pub peak_rss_bytes: Option<u64>,
}

/// Runs the pieces one after another and measures each.
struct Stages<'a>(&'a mut dyn FnMut(&Stage));

impl Stages<'_> {
    fn run<T>(
        &mut self,
        stage: &'static str,
        device: &Device,
        work: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        let (start, cpu, peak) = (Instant::now(), cpu_time(), PeakMemory::start());
        let made = work()?;
        // A GPU is still at work when the call returns.
        device.synchronize()?;
        (self.0)(&Stage {
            stage,
            seconds: start.elapsed().as_secs_f64(),
            cpu_seconds: cpu_seconds_since(cpu),
            peak_rss_bytes: peak.bytes(),
        });
        Ok(made)
    }
}

/// Runs `model` on `inputs` and writes every output asked for to `out`; `report` gets each piece
/// of the work when it is done.
///
/// # Errors
/// Names the file or tensor at fault.
pub fn run(
    model: &Path,
    inputs: &Path,
    out: &Path,
    options: &Options,
    placement: &Placement,
    report: &mut dyn FnMut(&Stage),
) -> Result<()> {
    if options.steps == 0 && options.only.contains(&Output::Trajectory) {
        return Err(Error::invalid("steps", "a trajectory has at least 1 step"));
    }
    let device = &placement.device;
    let mut stages = Stages(report);
    let folder = stages.run("load", device, || ModelFolder::open(model, placement))?;
    let given = Inputs { file: inputs, tensors: read_safetensors(inputs, device)? };
    let mut results = BTreeMap::new();
    let mut keep = |name: &str, tensor: &Tensor| results.insert(name.to_owned(), tensor.clone());
    let text = match Output::OF_TEXT.iter().any(|output| options.wants(*output)) {
        true => {
            let [ids, ids_2] = given.prompts()?;
            Some(stages.run("text", device, || folder.encode_ids(&ids, &ids_2))?)
        }
        false => None,
    };
    for (output, name) in [(Output::HiddenStates, "hidden_states"), (Output::Pooled, "pooled")] {
        if let Some(text) = text.as_ref().filter(|_| options.wants(output)) {
            keep(name, if output == Output::Pooled { &text.pooled } else { &text.context });
        }
    }
    if let Some(text) = text.as_ref().filter(|_| options.wants(Output::NoisePred)) {
        let (latents, time_ids) = given.latents(text)?;
        let timesteps = given.get("timesteps", 1, DType::F32)?;
        given.rows("timesteps", &timesteps, latents.dim(0)?)?;
        let noise = stages.run("noise_pred", device, || {
            folder.unet.forward(&latents, &timesteps, &text.context, &text.pooled, &time_ids)
        })?;
        keep("noise_pred", &noise);
    }
    if options.wants(Output::Decoded) {
        let latents = given.get("latents", 4, DType::F32)?;
        keep("decoded", &stages.run("decoded", device, || folder.vae.decode(&latents))?);
    }
    if options.wants(Output::EncodedMean) {
        let image = given.get("image", 4, DType::F32)?;
        let encoded = stages.run("encoded_mean", device, || folder.vae.encode(&image))?;
        keep("encoded_mean", &encoded.mean);
    }
    if let Some(text) = text.as_ref().filter(|_| options.wants(Output::Trajectory)) {
        let (latents, time_ids) = given.latents(text)?;
        let scheduler: SchedulerConfig = folder.scheduler()?;
        scheduler.validate()?;
        let conds = conditionings(text, &time_ids, options.guidance)?;
        let network = Guided(SdxlModel::new(std::sync::Arc::new(folder)));
        let states = stages.run("trajectory", device, || {
            trajectory(&network, &scheduler, options.steps, &latents, &conds)
        })?;
        keep("trajectory", &states);
    }
    write_safetensors(out, &results, None)
}

/// The prompts of a trajectory, each with zeros as its null prompt.
fn conditionings(
    text: &EncodedText,
    time_ids: &Tensor,
    guidance_scale: f64,
) -> Result<Vec<Conditioning>> {
    let each = |(b, sizes): (usize, Vec<f32>)| {
        let mut own = [0.0; SIZES];
        own.copy_from_slice(&sizes);
        let positive = TextCond {
            context: text.context.get(b)?.contiguous()?,
            pooled: text.pooled.get(b)?.contiguous()?,
            time_ids: own,
        };
        let negative = TextCond {
            context: positive.context.zeros_like()?,
            pooled: positive.pooled.zeros_like()?,
            time_ids: own,
        };
        let negative = Some(negative);
        Ok(Conditioning { positive, negative, guidance_scale, guidance_rescale: 0.0 })
    };
    time_ids.to_vec2::<f32>()?.into_iter().enumerate().map(each).collect()
}

/// The latents after each step of the checkpoint's scheduler, [S, B, C, h, w].
/// As in diffusers' pipelines, `latents` is unit noise that the scheduler's
/// initial sigma multiplies.
fn trajectory(
    network: &dyn Denoiser,
    config: &SchedulerConfig,
    steps: usize,
    latents: &Tensor,
    conds: &[Conditioning],
) -> Result<Tensor> {
    let schedule = NoiseSchedule::new(config)?;
    let solver = SolverSpec::ode(config.default_solver(), &schedule).build(&schedule, steps)?;
    let conds: Vec<&Conditioning> = conds.iter().collect();
    let mut x = latents.affine(solver.init_noise_sigma(), 0.0)?;
    let mut history = History::default();
    let mut states = Vec::with_capacity(steps);
    for step in 0..steps {
        let mut model = |x: &Tensor, eval: &Eval| {
            let t = Tensor::full(eval.t as f32, conds.len(), x.device())?;
            network.predict(x, &t, &conds)
        };
        x = solver.advance(step, &x, &mut history, &mut model, None)?.x;
        states.push(x.clone());
    }
    Ok(Tensor::stack(&states, 0)?)
}
