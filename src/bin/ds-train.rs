//! `ds-train`: training data and training runs.

use std::path::PathBuf;

use clap::{Parser, Subcommand, ValueEnum};
use diffusion_sharpening::data::scenes::{Split, evaluate, export};

#[global_allocator]
static GLOBAL: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Fine-tuning, and the data for it.
#[derive(Parser)]
#[command(name = "ds-train", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Render scene-world images with captions into OUT (safetensors) and OUT with .jsonl.
    ExportScenes {
        /// Where to write `images` u8 [N, H, W, 3].
        #[arg(long)]
        out: PathBuf,
        #[arg(long, value_enum, default_value = "train")]
        split: SplitArg,
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
}

#[derive(Clone, Copy, ValueEnum)]
enum SplitArg {
    Train,
    Validation,
    Test,
}

fn main() -> anyhow::Result<()> {
    match Cli::parse().command {
        Command::ExportScenes { out, split, count, size, seed } => {
            let split = match split {
                SplitArg::Train => Split::Train,
                SplitArg::Validation => Split::Validation,
                SplitArg::Test => Split::Test,
            };
            export::export(&out, split, seed, count, size)?;
            println!("{count} scenes of {size} px in {}", out.display());
        }
        Command::Judge { images, captions, out } => {
            println!("{}", evaluate::judge_files(&images, &captions, out.as_deref())?);
        }
    }
    Ok(())
}
