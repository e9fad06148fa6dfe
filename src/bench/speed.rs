//! `ds-bench speed`: how long the pieces of an image and of training, and single operations,
//! take on this machine.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Instant;

use anyhow::Context;
use candle_core::Device;
use serde::Serialize;

use super::op_workload;
use super::placement::PlacementArgs;
use super::process::{PeakMemory, cpu_seconds_since, cpu_time};
use super::sharpen_workload::{self, Steps};
use super::stats::quantile;
use super::train_workload::Training;
use super::workload::{Piece, Work, Workload};
use crate::diffusion::cost::Budget;
use crate::diffusion::meter::Meter;
use crate::nn::device::{Placement, Usage};
use crate::{Error, Result};

/// What rayon and candle read their number of threads from, once, when they start.
const THREADS: &str = "RAYON_NUM_THREADS";
/// Fewest measured runs of a piece, however long they take.
const LEAST_RUNS: usize = 3;

/// Time the networks, a 50-step image, training steps or single operations.
///
/// On the CPU everything runs in f32; after one warm-up, the median over the runs is reported. Without
/// --only: U-Net forwards, one VAE decode, text encoding and 50-step image. --only also knows
/// larger batches (unet_forward_b16, images_20_steps_b8, …), adapter_switch, load, training (unet_forward_backward_lora_b1, train_step_full_b4, …),
/// steps of Diffusion-Sharpening (sharpen_sft_lora, sharpen_rlhf_lora, …; the checkpoint needs a
/// scene CLIP) and single operations
/// (op_conv3x3_320_64, op_conv3x3_320_64_train, …); a wrong name lists all. tools/bench_torch.py does the same work in PyTorch, under the same names, and
/// tools/compare_speed.py runs the two alternately (docs/performance.md).
#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    /// Checkpoint: a folder in the diffusers layout. Not needed for single operations alone.
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,
    /// Threads of the kernels.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    pub threads: u16,
    /// Measured runs of each piece.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    pub runs: u32,
    /// Soft limit for each piece: further runs begin only within it, after the first three
    /// (the first one for images and steps of sharpening where three would not fit).
    #[arg(long, default_value_t = 30.0)]
    pub seconds: f64,
    /// Size of the latents, where it is not to be the model's own.
    #[arg(long, num_args = 2, value_names = ["H", "W"])]
    pub latent: Option<Vec<usize>>,
    /// Names of the pieces to measure, separated by commas.
    #[arg(long, value_delimiter = ',', value_name = "NAME,…")]
    pub only: Vec<String>,
    /// One JSON object a line.
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub placement: PlacementArgs,
}

/// The measurement of one piece. `tools/bench_torch.py` prints the same keys.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    pub name: String,
    pub seconds_median: f64,
    pub seconds_min: f64,
    /// User and system time of all threads; absent where the platform does not tell.
    pub cpu_seconds_median: Option<f64>,
    pub runs: usize,
    pub threads: u16,
    /// Height and width of the latents; none for a single operation.
    pub latent: Option<[usize; 2]>,
    /// Tokens of the prompt, padding included.
    pub tokens: Option<usize>,
    /// U-Net forwards of one sample in one run.
    pub f: u64,
    /// Most memory that this process had since the piece was prepared; absent where the
    /// platform does not tell.
    pub peak_rss_bytes: Option<u64>,
    /// The same on a GPU: most memory of its tensors.
    pub peak_device_bytes: Option<u64>,
    /// Kernels of this crate that one run launches on a GPU; the libraries' are not counted.
    pub kernel_launches: Option<u64>,
}

/// Runs the command. The number of threads is fixed when a process starts, so where the
/// environment does not give it yet, the command starts itself again with it.
///
/// # Errors
/// When the checkpoint cannot be used, or a name is unknown.
pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let threads = args.threads.to_string();
    if std::env::var(THREADS).ok().as_deref() != Some(&threads) {
        let program = std::env::current_exe().context("cannot find this program's file")?;
        let status = Command::new(program)
            .args(std::env::args_os().skip(1))
            .env(THREADS, &threads)
            .status()
            .context("cannot start this program again")?;
        let code = status.code().and_then(|code| u8::try_from(code).ok());
        return Ok(code.map_or(ExitCode::FAILURE, ExitCode::from));
    }
    measure(args, &mut |row| {
        if args.json {
            println!("{}", serde_json::to_string(row)?);
        } else {
            println!("{}", in_words(row));
        }
        Ok(())
    })?;
    Ok(ExitCode::SUCCESS)
}

/// Measures every piece asked for, in the threads this process has, and reports each when
/// it is done.
///
/// # Errors
/// When the checkpoint cannot be used, a name is unknown, or the report fails.
pub fn measure(
    args: &Args,
    report: &mut dyn FnMut(&Row) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let known: Vec<String> = (Piece::ALL.map(|(name, _)| name.to_owned()).into_iter())
        .chain(Training::ALL.map(|(name, _)| name.to_owned()))
        .chain(sharpen_workload::Piece::ALL.map(|(name, _)| name.to_owned()))
        .chain(op_workload::names())
        .collect();
    if let Some(name) = args.only.iter().find(|name| !known.contains(name)) {
        let known = known.iter().map(String::as_str);
        return Err(Error::unknown("only", "piece", name, known).into());
    }
    let latent = match args.latent.as_deref() {
        Some(&[height, width]) => Some((height, width)),
        _ => None,
    };
    let placement = args.placement.placement()?;
    let open = || -> Result<Workload> {
        let path = args.model.as_deref();
        let path = path.ok_or_else(|| Error::invalid("model", "expected a folder"))?;
        Workload::open(path, latent, &placement)
    };
    let usual = &Piece::ALL[..Piece::USUAL];
    let wanted = |name: &String| match args.only.as_slice() {
        [] => usual.iter().any(|(usual, _)| usual == name),
        only => only.contains(name),
    };
    // Open from piece to piece; training has the memory for itself.
    let mut opened = None;
    for name in known.iter().filter(|name| wanted(name)) {
        if name.starts_with("op_") {
            let mut work = op_workload::prepare(name, &placement)?;
            report(&row(args, name, None, 0, &placement.device, &mut work)?)?;
            continue;
        }
        let workload = opened.take().map_or_else(open, Ok)?;
        let about = Some((workload.latent(), workload.tokens()));
        if let Some((_, training)) = Training::ALL.iter().find(|(training, _)| training == name) {
            let path = args.model.as_deref().unwrap_or(Path::new("."));
            let mut work = training.prepare(path, workload, &placement)?;
            let f = training.batch as u64;
            report(&row(args, name, about, f, &placement.device, &mut work)?)?;
        } else if let Some((_, piece)) =
            sharpen_workload::Piece::ALL.iter().find(|(piece, _)| piece == name)
        {
            drop(workload);
            let path = args.model.as_deref().unwrap_or(Path::new("."));
            let (f, mut work) = sharpened(path, *piece, latent, &placement)?;
            report(&row(args, name, about, f, &placement.device, &mut work)?)?;
        } else if let Some((_, piece)) = Piece::ALL.iter().find(|(piece, _)| piece == name) {
            let f = workload.forwards(*piece)?;
            let mut work = workload.prepare(*piece)?;
            report(&row(args, name, about, f, &placement.device, &mut work)?)?;
            drop(work);
            opened = Some(workload);
        }
    }
    Ok(())
}

/// A step of Diffusion-Sharpening, and its U-Net forwards.
fn sharpened(
    path: &Path,
    piece: sharpen_workload::Piece,
    latent: Option<(usize, usize)>,
    placement: &Placement,
) -> Result<(u64, Work<'static>)> {
    let sharpen_workload::Piece { method, trained, part } = piece;
    let mut steps = Steps::open(path, (method, trained), latent, placement)?;
    steps.prepare(part)?;
    let f = steps.planned(part)?.forwards() as u64;
    Ok((f, Box::new(move || steps.run(part, &Meter::new(Budget::default())))))
}

/// What a model's workload says of itself: height and width of the latents, and tokens.
type About = Option<((usize, usize), usize)>;

fn row(
    args: &Args,
    name: &str,
    about: About,
    f: u64,
    device: &Device,
    work: &mut Work,
) -> Result<Row> {
    let (peak, usage) = (PeakMemory::start(), Usage::start(device)?);
    let samples = sample(args, long(name), work)?;
    // The warm-up is one more.
    let launches = usage.launches().map(|all| all / (samples.len() as u64 + 1));
    let wall: Vec<f64> = samples.iter().map(|s| s.wall).collect();
    let cpu: Option<Vec<f64>> = samples.iter().map(|s| s.cpu).collect();
    Ok(Row {
        name: name.to_owned(),
        seconds_median: median(wall.clone()),
        seconds_min: wall.iter().copied().fold(f64::INFINITY, f64::min),
        cpu_seconds_median: cpu.map(median),
        runs: samples.len(),
        threads: args.threads,
        latent: about.map(|((height, width), _)| [height, width]),
        tokens: about.map(|(_, tokens)| tokens),
        f,
        peak_rss_bytes: peak.bytes(),
        peak_device_bytes: usage.peak()?,
        kernel_launches: launches,
    })
}

/// Whether one run may fill the time that there is.
fn long(name: &str) -> bool {
    name.starts_with("image") || name.starts_with("sharpen")
}

/// Seconds of one run.
struct Sample {
    wall: f64,
    cpu: Option<f64>,
}

fn sample(args: &Args, long: bool, work: &mut Work) -> Result<Vec<Sample>> {
    let mut once = || -> Result<Sample> {
        let (start, cpu) = (Instant::now(), cpu_time());
        // A GPU is still at work when the call returns.
        work()?.device().synchronize()?;
        Ok(Sample { wall: start.elapsed().as_secs_f64(), cpu: cpu_seconds_since(cpu) })
    };
    let warm_up = once()?.wall;
    let slow = long && warm_up > args.seconds / LEAST_RUNS as f64;
    let least = if slow { 1 } else { LEAST_RUNS };
    let began = Instant::now();
    let mut samples = Vec::new();
    while samples.len() < args.runs as usize
        && (samples.len() < least || began.elapsed().as_secs_f64() < args.seconds)
    {
        samples.push(once()?);
    }
    Ok(samples)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    quantile(&values, 0.5).unwrap_or(f64::NAN)
}

fn in_words(row: &Row) -> String {
    let milliseconds = |s: f64| format!("{:.3} ms", 1e3 * s);
    let cpu = row.cpu_seconds_median.map_or_else(|| "-".to_owned(), milliseconds);
    format!(
        "{:<29} median {:>12}  least {:>12}  processor {:>12}  {} runs",
        row.name,
        milliseconds(row.seconds_median),
        milliseconds(row.seconds_min),
        cpu,
        row.runs
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(only: &[&str]) -> Args {
        let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
        Args {
            model: Some(root.join("tests/fixtures/parity/ddim_tiny")),
            threads: 1,
            runs: 2,
            seconds: 30.0,
            latent: None,
            only: only.iter().map(ToString::to_string).collect(),
            json: true,
            placement: PlacementArgs::default(),
        }
    }

    fn rows_of(only: &[&str]) -> Vec<Row> {
        let mut rows = Vec::new();
        measure(&args(only), &mut |row| {
            rows.push(row.clone());
            Ok(())
        })
        .unwrap();
        rows
    }

    #[test]
    fn rows_carry_the_names_and_keys_of_the_pytorch_side() {
        let rows = rows_of(&[]);
        let names: Vec<_> = rows.iter().map(|r| r.name.as_str()).collect();
        assert_eq!(
            names,
            Piece::ALL[..Piece::USUAL].iter().map(|(name, _)| *name).collect::<Vec<_>>()
        );
        let (script, timing) = (
            include_str!("../../tools/bench_torch.py"),
            include_str!("../../tools/bench_timing.py"),
        );
        assert!(Piece::ALL.iter().all(|(name, _)| script.contains(&format!("\"{name}\""))));
        for row in &rows {
            assert!(
                row.runs == 2 && 0.0 < row.seconds_min && row.seconds_min <= row.seconds_median
            );
            assert!(row.cpu_seconds_median.is_none_or(|s| s > 0.0));
            let keys = serde_json::to_value(row).unwrap();
            for key in keys.as_object().unwrap().keys() {
                assert!(timing.contains(&format!("\"{key}\":")), "{key}");
            }
        }
        let train = include_str!("../../tools/bench_torch_train.py");
        assert!(Training::ALL.iter().all(|(name, _)| train.contains(&format!("\"{name}\""))));
        let sharpen = include_str!("../../tools/bench_torch_sharpen.py");
        let steps = sharpen_workload::Piece::ALL;
        assert!(steps.iter().all(|(name, _)| sharpen.contains(&format!("\"{name}\""))));
        let ops = include_str!("../../tools/bench_torch_ops.py");
        let plain = op_workload::names().filter(|name| !name.ends_with("_train"));
        assert!(plain.into_iter().all(|name| ops.contains(&format!("\"{name}\""))));
    }

    #[test]
    fn training_and_operations_are_measured_by_name() {
        let names =
            ["unet_forward_backward_lora_b1", "train_step_full_b1", "op_geglu_1024x5120_train"];
        let rows = rows_of(&names);
        assert_eq!(rows.iter().map(|r| r.name.as_str()).collect::<Vec<_>>(), names);
        assert_eq!(rows.iter().map(|r| r.f).collect::<Vec<_>>(), [1, 1, 0]);
        assert!(rows[0].latent.is_some() && rows[2].latent.is_none());
        assert!(rows.iter().all(|r| r.peak_rss_bytes.is_none_or(|b| b > 1 << 20)));
    }

    #[test]
    fn an_unknown_name_is_refused() {
        let error = measure(&args(&["unet_forward_b3"]), &mut |_| Ok(())).unwrap_err().to_string();
        assert!(error.contains("unet_forward_b3") && error.contains("text_encode"), "{error}");
    }
}
