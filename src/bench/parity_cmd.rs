//! `ds-bench parity`: one checkpoint's outputs on given inputs, for comparison
//! with any reference implementation.

use std::path::PathBuf;

use super::parity;
use super::placement::PlacementArgs;
use crate::Result;

/// Run a checkpoint on given latents, tokens and images and write every output.
///
/// The inputs and outputs are safetensors files; docs/parity.md lists the tensors.
#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    /// Checkpoint: a folder in the diffusers layout, or one file in Stability's.
    #[arg(long, value_name = "MODEL")]
    pub model: PathBuf,
    /// Input tensors.
    #[arg(long, value_name = "FILE")]
    pub inputs: PathBuf,
    /// Where the output tensors go.
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
    /// Steps of the checkpoint's scheduler in `trajectory`.
    #[arg(long, default_value_t = 5)]
    pub steps: usize,
    /// Guidance scale in `trajectory`.
    #[arg(long, default_value_t = 5.0)]
    pub guidance: f64,
    #[command(flatten)]
    pub placement: PlacementArgs,
}

/// Runs the command.
///
/// # Errors
/// When the model or the inputs cannot be used, or the output not written.
pub fn run(args: &Args) -> Result<()> {
    let placement = args.placement.placement()?;
    parity::run(&args.model, &args.inputs, &args.out, (args.steps, args.guidance), &placement)
}
