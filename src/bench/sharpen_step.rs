//! `ds-bench sharpen-step`: one step's inputs, choices and gradients, for comparison with any
//! other implementation. docs/parity.md lists the tensors.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use serde_json::json;

use super::placement::PlacementArgs;
use super::sharpen_workload::{Part, Steps, UPDATE};
use crate::diffusion::meter::Meter;
use crate::nn::device::Placement;
use crate::sdxl::weights::write_safetensors;
use crate::train::settings::{Method, Trained};
use crate::train::sharpen::{Group, starts, stride};
use crate::train::texts;
use crate::{Error, Result};

/// Write what one training step of Diffusion-Sharpening takes, chooses and finds.
///
/// The steps are those that `speed` measures as sharpen_sft_lora and sharpen_rlhf_lora, up to the
/// gradients; docs/parity.md lists the tensors. The checkpoint needs a scene CLIP.
#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    /// Checkpoint: a folder in the diffusers layout.
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    /// Folder for sft.safetensors and rlhf.safetensors; made if it is not there.
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Size of the latents, where it is not to be the model's own.
    #[arg(long, num_args = 2, value_names = ["H", "W"])]
    pub latent: Option<Vec<usize>>,
    #[command(flatten)]
    pub placement: PlacementArgs,
}

/// Runs the command.
///
/// # Errors
/// When the checkpoint cannot be used, or a file not written.
pub fn run(args: &Args) -> Result<()> {
    let latent = match args.latent.as_deref() {
        Some(&[height, width]) => Some((height, width)),
        _ => None,
    };
    let placement = args.placement.placement()?;
    std::fs::create_dir_all(&args.out).map_err(|e| Error::file(&args.out, e))?;
    for method in [Method::Sft, Method::Rlhf] {
        let out = args.out.join(format!("{}.safetensors", method.name()));
        write(&args.model, method, latent, &placement, &out)?;
    }
    Ok(())
}

/// Writes a step of `method`.
///
/// # Errors
/// As for [`run`], or where a group has no preference.
pub fn write(
    model: &Path,
    method: Method,
    latent: Option<(usize, usize)>,
    placement: &Placement,
    out: &Path,
) -> Result<()> {
    let mut steps = Steps::open(model, (method, Trained::Lora), latent, placement)?;
    let before = steps.trainable.copies()?;
    let (report, groups) = steps.learn(Part::Whole, &Meter::default())?;
    let report = report.ok_or_else(|| Error::invalid("step", "nothing was learnt"))?;
    let picks: Option<Vec<_>> = report.picks.iter().copied().collect();
    let picks = picks.ok_or_else(|| Error::invalid("scores", "a group has no preference"))?;
    let settings = &steps.settings;
    let (count, n) = (groups.len(), settings.n);

    let mut tensors = BTreeMap::new();
    let mut keep = |name: &str, tensor: Tensor| tensors.insert(name.to_owned(), tensor);
    let starts = starts(&steps.schedule, settings, UPDATE, count)?;
    let (clean, renoise) = steps.sharpening().latents(&groups, &starts)?;
    let by_group = |rows: &Tensor| {
        let mut shape = vec![count, n];
        shape.extend(&rows.dims()[1..]);
        rows.reshape(shape)
    };
    keep("clean", by_group(&clean)?);
    keep("renoise", by_group(&renoise)?);
    let noise: Option<Vec<&Tensor>> = groups.iter().map(|group| group.noise.as_ref()).collect();
    if let Some(noise) = noise {
        keep("noise", Tensor::stack(&noise, 0)?);
    }
    let texts: Vec<_> = groups.iter().map(|Group { text, .. }| text).collect();
    let [context, pooled, sizes] = texts::rows(&texts)?;
    keep("context", context.to_dtype(DType::F32)?);
    keep("pooled", pooled.to_dtype(DType::F32)?);
    keep("time_ids", sizes);
    let integers = |values: Vec<i64>| Tensor::new(values, &Device::Cpu);
    keep("timesteps", integers(starts.iter().map(|start| start.t as i64).collect())?);
    keep("best", integers(picks.iter().map(|pick| pick.best as i64).collect())?);
    keep("worst", integers(picks.iter().map(|pick| pick.worst as i64).collect())?);
    keep("scores", Tensor::from_vec(report.scores.concat(), (count, n), &Device::Cpu)?);
    for (name, value) in before {
        let gradient = steps.gradients.get(&name)?;
        let gradient = gradient.ok_or_else(|| Error::invalid(&name, "has no gradient"))?;
        keep(&format!("adapter.{name}"), value);
        keep(&format!("gradient.{name}"), gradient);
    }

    let plan = |part: Part| {
        let cost = steps.planned(part)?;
        let counts = json!({
            "forwards": cost.forwards(), "backward": cost.backward, "images": cost.images,
        });
        Ok::<_, Error>(counts)
    };
    let step = json!({
        "method": method.name(),
        "prompts": steps.prompts,
        "loss": report.means.get("loss"),
        "m": settings.m,
        "stride": stride(&steps.schedule, settings),
        "rollout_steps": settings.rollout_steps,
        "beta": settings.beta,
        "micro": settings.micro,
        "decode_batch": settings.decode_batch,
        "clip": settings.clip,
        "lr": settings.lr,
        "planned": {
            "whole": plan(Part::Whole)?,
            "rollouts": plan(Part::Rollouts)?,
            "replay": plan(Part::Replay)?,
        },
    });
    let metadata = HashMap::from([("step".to_owned(), step.to_string())]);
    write_safetensors(out, &tensors, Some(metadata))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sdxl::weights::read_safetensors;

    #[test]
    fn a_step_is_written_with_what_it_takes_to_repeat_it() {
        let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny");
        let folder = tempfile::tempdir().unwrap();
        let placement = Placement::cpu(DType::F32);
        for method in [Method::Sft, Method::Rlhf] {
            let file = folder.path().join(method.name());
            write(&model, method, Some((8, 8)), &placement, &file).unwrap();
            let tensors = read_safetensors(&file, &Device::Cpu).unwrap();
            let shape = |name: &str| tensors[name].dims().to_vec();
            assert_eq!(shape("clean"), [4, 3, 4, 8, 8]);
            assert_eq!(shape("renoise"), shape("clean"));
            assert_eq!(tensors.contains_key("noise"), method == Method::Rlhf);
            assert_eq!((shape("context"), shape("time_ids")), (vec![4, 24, 192], vec![4, 6]));
            assert_eq!((shape("pooled"), shape("timesteps")), (vec![4, 128], vec![4]));
            let scores = tensors["scores"].to_vec2::<f64>().unwrap();
            let of = |name: &str| tensors[name].to_vec1::<i64>().unwrap();
            for ((scores, best), worst) in scores.iter().zip(of("best")).zip(of("worst")) {
                assert!(scores.iter().all(|s| *s <= scores[best as usize]));
                assert!(scores.iter().all(|s| *s >= scores[worst as usize]));
            }
            let adapter = tensors.keys().filter(|name| name.starts_with("adapter."));
            let mut matrices = 0;
            for name in adapter {
                let gradient = &tensors[&name.replace("adapter.", "gradient.")];
                assert_eq!(gradient.dims(), tensors[name].dims());
                let norm = gradient.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap();
                assert!(norm.is_finite() && norm > 0.0, "{name}");
                matrices += 1;
            }
            assert!(matrices > 0 && matrices % 2 == 0);
        }
    }
}
