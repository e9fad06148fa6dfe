//! `ds-train sft` and `ds-train rlhf`.

use std::path::PathBuf;

use super::configure::configure;
use super::dry_run::dry_run;
use super::flags::Flags;
use super::run::run;
use super::settings::Method;
use super::setup::Setup;
use crate::Result;
use crate::util::CancelToken;

/// Options of a training run; what is not given is the preset's, or the default (`ours`).
///
/// Options come from flags, then DS_TRAIN_… variables, then the file given with --config, then
/// the preset. The same command continues an interrupted run to the same bits.
#[derive(clap::Args, Clone, Debug, Default)]
pub struct Args {
    #[command(flatten)]
    pub flags: Flags,
    /// TOML file of options; its keys are the flags with underscores
    #[arg(long, env = "DS_TRAIN_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Where defaults come from: ours, paper or code-compat
    #[arg(long, env = "DS_TRAIN_PRESET", value_name = "NAME")]
    pub preset: Option<String>,
    /// Print what the run takes in memory and U-Net forwards; train nothing
    #[arg(long)]
    pub dry_run: bool,
    /// No progress
    #[arg(long, short)]
    pub quiet: bool,
}

/// Runs the command. False: it was interrupted, and its state is saved.
///
/// # Errors
/// Names the option or file at fault.
pub fn execute(method: Method, args: &Args, cancel: &CancelToken) -> Result<bool> {
    let settings = configure(method, args.preset.as_deref(), args.config.as_deref(), &args.flags)?;
    if args.dry_run {
        print!("{}", dry_run(method, &settings)?);
        return Ok(true);
    }
    let outcome = run(&Setup::open(method, settings)?, cancel, args.quiet)?;
    let (step, exported) = (outcome.step, outcome.exported.display());
    if outcome.finished {
        println!("{step} updates are done; {exported}");
    } else {
        println!("stopped after update {step}; the same command goes on; {exported}");
    }
    Ok(outcome.finished)
}
