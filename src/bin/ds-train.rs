//! `ds-train`: training data, training runs, and checkpoints in other layouts.

use std::path::PathBuf;
use std::process::ExitCode;

use candle_core::DType;
use clap::{Parser, Subcommand, ValueEnum};
use diffusion_sharpening::data::scenes::{self, Split, evaluate};
use diffusion_sharpening::nn::{memory, threads};
use diffusion_sharpening::sdxl::export::{Layout, export};
use diffusion_sharpening::sdxl::lora::LoraFormat;
use diffusion_sharpening::sdxl::lora_convert::convert;
use diffusion_sharpening::sdxl::merge::Addition;
use diffusion_sharpening::train::command;
use diffusion_sharpening::train::settings::Method;
use diffusion_sharpening::util::{CancelToken, INTERRUPTED};

#[global_allocator]
static GLOBAL: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Backward passes and deep graphs recurse: far more stack than a thread's default.
const STACK: usize = 256 << 20;

/// Fine-tuning, the data for it, and checkpoints for other programs.
#[derive(Parser)]
#[command(name = "ds-train", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Diffusion-Sharpening on images with captions: of several noised versions of an image
    /// learn from the one whose denoising scores best.
    Sft(Box<command::Args>),
    /// Diffusion-Sharpening on prompts: prefer the best of several denoising trajectories to
    /// the worst.
    Rlhf(Box<command::Args>),
    /// Render scene-world images with captions into OUT (safetensors) and OUT with .jsonl.
    ExportScenes {
        /// Where to write `images` u8 [N, H, W, 3].
        #[arg(long)]
        out: PathBuf,
        /// train, validation or test.
        #[arg(long, default_value_t = Split::Train)]
        split: Split,
        /// How many scenes.
        #[arg(long, default_value_t = 1000)]
        count: u64,
        /// Pixels a side.
        #[arg(long, default_value_t = 64)]
        size: u32,
        #[arg(long, default_value_t = 0)]
        seed: u64,
    },
    /// Judge images against their captions: which of the captions' claims hold.
    Judge {
        /// `images` u8 [N, H, W, 3] (safetensors).
        #[arg(long)]
        images: PathBuf,
        /// One JSON object a line with the caption as `text`.
        #[arg(long)]
        captions: PathBuf,
        /// Where to write every judgement (jsonl).
        #[arg(long)]
        out: Option<PathBuf>,
    },
    /// Write a checkpoint in one file (ComfyUI and others) or as a diffusers folder.
    ///
    /// Takes either layout; a VAE that ds-serve would use in its place goes along. The weights
    /// are in memory meanwhile, in the type that is written, or with adapters in f32.
    Export {
        /// Checkpoint: a folder in the diffusers layout, or one file in Stability's.
        #[arg(long, value_name = "MODEL")]
        model: PathBuf,
        /// The .safetensors file or the folder that is written.
        #[arg(long, value_name = "PATH")]
        out: PathBuf,
        #[arg(long, value_enum, default_value = "single")]
        format: LayoutArg,
        /// Type of all weights.
        #[arg(long, value_enum, default_value = "f16")]
        dtype: NumberArg,
        /// Adapter that is added into the weights, SCALE times (1); may be given again.
        #[arg(long = "adapter", value_name = "FILE[:SCALE]")]
        adapters: Vec<Addition>,
    },
    /// Write an adapter in the key names of other programs, stronger or weaker, or the mean of
    /// several.
    ///
    /// Takes every naming that ds-serve takes.
    ConvertAdapter {
        /// Checkpoint that the adapter is for, in either layout.
        #[arg(long, value_name = "MODEL")]
        model: PathBuf,
        /// Given several times, for checkpoints of one run, matrices are averaged.
        #[arg(long = "adapter", value_name = "FILE", required = true, num_args = 1..)]
        adapters: Vec<PathBuf>,
        /// The .safetensors file that is written.
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
        /// What the adapter's effect is multiplied by.
        #[arg(long, value_name = "X", default_value_t = 1.0, allow_negative_numbers = true)]
        scale: f64,
        #[arg(long, value_enum)]
        format: AdapterArg,
        /// Type of the matrices.
        #[arg(long, value_enum, default_value = "f32")]
        dtype: NumberArg,
    },
}

#[derive(Clone, Copy, ValueEnum)]
enum LayoutArg {
    Single,
    Diffusers,
}

#[derive(Clone, Copy, ValueEnum)]
enum AdapterArg {
    /// For ComfyUI, the A1111 family and diffusers.
    Kohya,
    /// For diffusers, PEFT and ComfyUI.
    Diffusers,
}

#[derive(Clone, Copy, ValueEnum)]
enum NumberArg {
    F16,
    Bf16,
    F32,
}

impl From<NumberArg> for DType {
    fn from(dtype: NumberArg) -> Self {
        match dtype {
            NumberArg::F16 => Self::F16,
            NumberArg::Bf16 => Self::BF16,
            NumberArg::F32 => Self::F32,
        }
    }
}

fn main() -> anyhow::Result<ExitCode> {
    let cli = Cli::parse();
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "warn".into()),
        )
        .init();
    memory::keep_freed();
    threads::start(0)?;
    let work = std::thread::Builder::new().stack_size(STACK).spawn(move || run(cli.command))?;
    match work.join() {
        Ok(outcome) => outcome,
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

fn run(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Sft(args) => return train(Method::Sft, &args),
        Command::Rlhf(args) => return train(Method::Rlhf, &args),
        Command::ExportScenes { out, split, count, size, seed } => {
            scenes::export::export(&out, split, seed, count, size)?;
            println!("{count} scenes of {size} px in {}", out.display());
        }
        Command::Judge { images, captions, out } => {
            println!("{}", evaluate::judge_files(&images, &captions, out.as_deref())?);
        }
        Command::Export { model, out, format, dtype, adapters } => {
            let layout = match format {
                LayoutArg::Single => Layout::Single,
                LayoutArg::Diffusers => Layout::Diffusers,
            };
            export(&model, &out, layout, dtype.into(), &adapters)?;
            println!("{} is written", out.display());
        }
        Command::ConvertAdapter { model, adapters, out, scale, format, dtype } => {
            let format = match format {
                AdapterArg::Kohya => LoraFormat::Kohya,
                AdapterArg::Diffusers => LoraFormat::Diffusers,
            };
            convert(&model, &adapters, &out, scale, format, dtype.into())?;
            println!("{} is written", out.display());
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn train(method: Method, args: &command::Args) -> anyhow::Result<ExitCode> {
    let cancel = CancelToken::on_signal("stopping, and saving what is done")?;
    let finished = command::execute(method, args, &cancel)?;
    Ok(if finished { ExitCode::SUCCESS } else { ExitCode::from(INTERRUPTED) })
}
