//! `ds-bench plan`: memory and cost of a run, from `config.json` files alone.

use std::path::PathBuf;

use candle_core::DType;
use clap::ValueEnum;

use crate::sdxl::plan::{H100, MemoryPlan, Mode, Networks, Peak, Schedule, Setting};
use crate::{Error, Result};

/// Print what a run will take in memory and arithmetic, before anything is loaded.
///
/// Reads `config.json` files (or a single file's header) and no weights. With a budget, picks the micro-batch, and whether
/// blocks are computed anew, and fails if nothing fits. docs/memory.md explains every line.
#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    #[command(flatten)]
    source: Source,
    /// Pixels.
    #[arg(long, default_value_t = 1024, value_name = "PX")]
    width: usize,
    /// Pixels.
    #[arg(long, default_value_t = 1024, value_name = "PX")]
    height: usize,
    /// Prompts at a time.
    #[arg(long, default_value_t = 1, value_name = "N")]
    batch: usize,
    /// Type of the U-Net and the text towers; the VAE is always f32.
    #[arg(long, value_enum, default_value_t = Type::Bf16)]
    dtype: Type,
    #[arg(long, value_enum, default_value_t = Run::Infer)]
    mode: Run,
    /// Inference without guidance, which halves the U-Net's batch.
    #[arg(long)]
    no_guidance: bool,
    /// Rank of the adapters [lora; default: 16].
    #[arg(long, value_name = "R")]
    rank: Option<usize>,
    /// Endings of the names of the modules that get adapters, comma-separated
    /// [lora; default: to_q,to_k,to_v,to_out.0].
    #[arg(long, value_delimiter = ',', value_name = "LIST")]
    targets: Option<Vec<String>>,
    /// Full fine-tuning without a copy of the base U-Net to compare with, as SFT does.
    #[arg(long)]
    no_reference: bool,
    /// Trajectories of a prompt.
    #[arg(long, short, default_value_t = 1, value_name = "N")]
    n: usize,
    /// States of a trajectory that are trained on [lora, full; default: 1].
    #[arg(long, short, value_name = "M")]
    m: Option<usize>,
    /// Images that the VAE decodes at once [default: all at inference, 1 in training].
    #[arg(long, value_name = "N")]
    decode_batch: Option<usize>,
    /// Memory to fit into: sets the micro-batch and recomputation.
    #[arg(long, value_name = "GIB", conflicts_with_all = ["micro_batch", "recompute"])]
    budget_gib: Option<f64>,
    /// Samples in a U-Net pass, or whose graphs are alive at once [default: all].
    #[arg(long, value_name = "N")]
    micro_batch: Option<usize>,
    /// Compute every block anew in the backward pass.
    #[arg(long)]
    recompute: bool,
    /// Matrix arithmetic of the card, for the least times [default: an H100's 790].
    #[arg(long, value_name = "TFLOP/S")]
    tflops: Option<f64>,
    /// Memory bandwidth of the card, for the least times [default: an H100's 3.0].
    #[arg(long, value_name = "TB/S")]
    bandwidth: Option<f64>,
    /// Print JSON instead of a table.
    #[arg(long)]
    json: bool,
}

#[derive(clap::Args, Clone, Debug)]
#[group(required = true, multiple = false)]
struct Source {
    /// Checkpoint: a folder in the diffusers layout, or one file in Stability's.
    #[arg(long, value_name = "PATH")]
    model: Option<PathBuf>,
    /// The configuration of stable-diffusion-xl-base-1.0.
    #[arg(long)]
    sdxl: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Type {
    F32,
    Bf16,
    F16,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Run {
    Infer,
    Lora,
    Full,
}

impl Args {
    /// # Errors
    /// Names an option that the mode has no use for.
    fn mode(&self) -> Result<Mode> {
        let others = [
            ("no-guidance", self.no_guidance, Run::Infer),
            ("rank", self.rank.is_some(), Run::Lora),
            ("targets", self.targets.is_some(), Run::Lora),
            ("no-reference", self.no_reference, Run::Full),
        ];
        if let Some((field, ..)) = others.iter().find(|(_, given, of)| *given && *of != self.mode) {
            return Err(Error::invalid(*field, format!("means nothing in mode {:?}", self.mode)));
        }
        if self.m.is_some() && self.mode == Run::Infer {
            return Err(Error::invalid("m", "means nothing in mode Infer"));
        }
        Ok(match self.mode {
            Run::Infer => Mode::Infer { guided: !self.no_guidance },
            Run::Lora => Mode::Lora {
                rank: self.rank.unwrap_or(16),
                targets: self.targets.clone().unwrap_or_else(|| {
                    ["to_q", "to_k", "to_v", "to_out.0"].map(str::to_owned).to_vec()
                }),
            },
            Run::Full => Mode::Full { reference: !self.no_reference },
        })
    }

    fn peak(&self) -> Result<Peak> {
        let mut peak = H100;
        for (field, given, to) in [
            ("tflops", self.tflops, &mut peak.flops_per_second),
            ("bandwidth", self.bandwidth, &mut peak.bytes_per_second),
        ] {
            if let Some(given) = given {
                if !given.is_finite() || given <= 0.0 {
                    return Err(Error::invalid(field, "expected a positive number"));
                }
                *to = given * 1e12;
            }
        }
        Ok(peak)
    }

    /// # Errors
    /// Names the option or the configuration that is unusable, or what does not fit.
    fn plan(&self) -> Result<MemoryPlan> {
        let networks = match &self.source.model {
            Some(path) => Networks::at(path)?,
            None => Networks::sdxl()?,
        };
        let mode = self.mode()?;
        let images = self.batch * self.n;
        let setting = Setting {
            width: self.width,
            height: self.height,
            batch: self.batch,
            dtype: match self.dtype {
                Type::F32 => DType::F32,
                Type::Bf16 => DType::BF16,
                Type::F16 => DType::F16,
            },
            trajectories: self.n,
            steps: self.m.unwrap_or(1),
            decode_batch: self.decode_batch.unwrap_or(if mode.trains() { 1 } else { images }),
            mode,
        };
        let peak = self.peak()?;
        match self.budget_gib {
            Some(gib) if gib.is_finite() && gib > 0.0 => {
                MemoryPlan::fit(&networks, &setting, (gib * f64::from(1 << 30)) as u64, peak)
            }
            Some(_) => Err(Error::invalid("budget-gib", "expected a positive number")),
            None => {
                let micro_batch = self.micro_batch.unwrap_or(setting.samples());
                let schedule = Schedule { micro_batch, recompute: self.recompute };
                MemoryPlan::new(&networks, &setting, schedule, peak)
            }
        }
    }
}

/// Runs the command.
///
/// # Errors
/// As [`Args::plan`].
pub fn run(args: &Args) -> Result<()> {
    let plan = args.plan()?;
    if args.json {
        let text = serde_json::to_string_pretty(&plan)
            .map_err(|e| Error::invalid("plan", e.to_string()))?;
        println!("{text}");
    } else {
        print!("{plan}");
    }
    Ok(())
}
