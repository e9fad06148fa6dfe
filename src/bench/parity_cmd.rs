//! `ds-bench parity`: one checkpoint's outputs on given inputs, for comparison
//! with any reference implementation.

use std::path::PathBuf;

use super::parity::{self, Options, Output, Stage};
use super::placement::PlacementArgs;
use crate::Result;

/// Run a checkpoint on given latents, tokens and images and write every output.
///
/// The inputs and outputs are safetensors files; docs/parity.md lists the tensors. Each piece of
/// the work is printed with its seconds and the process's most memory meanwhile, a JSON object a
/// line.
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
    /// Compute these outputs only, separated by commas; inputs of others may be absent.
    #[arg(long, value_enum, value_delimiter = ',', value_name = "OUTPUT,…")]
    pub only: Vec<Output>,
    /// Steps of the checkpoint's scheduler in `trajectory`; 0 for no trajectory.
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
    let options = Options { only: args.only.clone(), steps: args.steps, guidance: args.guidance };
    let mut print = |stage: &Stage| println!("{}", serde_json::json!(stage));
    parity::run(&args.model, &args.inputs, &args.out, &options, &placement, &mut print)
}
