//! The computation behind `ds-bench parity`: every component of a checkpoint on
//! given inputs. docs/parity.md lists the tensors.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use candle_core::{DType, Tensor};

use crate::diffusion::config::SchedulerConfig;
use crate::diffusion::denoiser::{Conditioning, Denoiser, TextCond};
use crate::diffusion::guidance::Guided;
use crate::diffusion::schedule::NoiseSchedule;
use crate::diffusion::sdxl_model::SdxlModel;
use crate::diffusion::solver::{Eval, History, SolverSpec};
use crate::nn::device::Placement;
use crate::sdxl::ModelFolder;
use crate::sdxl::weights::{read_safetensors, write_safetensors};
use crate::{Error, Result};

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
}

/// Runs `model` on `inputs` and writes every output to `out`.
///
/// # Errors
/// Names the file or tensor at fault.
pub fn run(
    model: &Path,
    inputs: &Path,
    out: &Path,
    (steps, guidance): (usize, f64),
    placement: &Placement,
) -> Result<()> {
    let folder = ModelFolder::open(model, placement)?;
    let given = Inputs { file: inputs, tensors: read_safetensors(inputs, folder.device())? };
    let latents = given.get("latents", 4, DType::F32)?;
    let timesteps = given.get("timesteps", 1, DType::F32)?;
    let time_ids = given.get("time_ids", 2, DType::F32)?;
    let image = given.get("image", 4, DType::F32)?;
    let (ids, ids_2) = (given.ids("input_ids")?, given.ids("input_ids_2")?);
    let batch = latents.dim(0)?;
    for (name, rows) in [
        ("timesteps", timesteps.dim(0)?),
        ("time_ids", time_ids.dim(0)?),
        ("input_ids", ids.len()),
        ("input_ids_2", ids_2.len()),
    ] {
        if rows != batch {
            return Err(Error::file(inputs, format!("'{name}': {rows} rows for {batch} latents")));
        }
    }
    let (length, length_2) = (ids.first().map_or(0, Vec::len), ids_2.first().map_or(0, Vec::len));
    if length != length_2 {
        let message = format!("'input_ids_2': rows of {length_2} tokens, 'input_ids' has {length}");
        return Err(Error::file(inputs, message));
    }
    if time_ids.dim(1)? != 6 {
        return Err(Error::file(inputs, "'time_ids': expected 6 values a row"));
    }
    let text = folder.encode_ids(&ids, &ids_2)?;
    let mut results = BTreeMap::new();
    let noise =
        folder.unet.forward(&latents, &timesteps, &text.context, &text.pooled, &time_ids)?;
    results.insert("noise_pred".to_owned(), noise);
    results.insert("decoded".to_owned(), folder.vae.decode(&latents)?);
    results.insert("encoded_mean".to_owned(), folder.vae.encode(&image)?.mean);
    results.insert("hidden_states".to_owned(), text.context.clone());
    results.insert("pooled".to_owned(), text.pooled.clone());
    let scheduler: SchedulerConfig = folder.scheduler()?;
    scheduler.validate()?;
    let conds = (0..batch)
        .map(|b| {
            let sizes = time_ids.get(b)?.to_vec1::<f32>()?;
            let sizes: [f32; 6] = sizes
                .try_into()
                .map_err(|_| Error::file(inputs, "'time_ids': expected 6 values a row"))?;
            let positive = TextCond {
                context: text.context.get(b)?.contiguous()?,
                pooled: text.pooled.get(b)?.contiguous()?,
                time_ids: sizes,
            };
            let negative = TextCond {
                context: positive.context.zeros_like()?,
                pooled: positive.pooled.zeros_like()?,
                time_ids: sizes,
            };
            let negative = Some(negative);
            Ok(Conditioning { positive, negative, guidance_scale: guidance, guidance_rescale: 0.0 })
        })
        .collect::<Result<Vec<_>>>()?;
    let network = Guided(SdxlModel::new(std::sync::Arc::new(folder)));
    results.insert(
        "trajectory".to_owned(),
        trajectory(&network, &scheduler, steps, &latents, &conds)?,
    );
    write_safetensors(out, &results, None)
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
