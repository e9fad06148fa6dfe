//! `ds-bench ablation`: what each setting of training is worth, at equal updates and at equal
//! cost.

pub mod curves;
pub mod options;
pub mod plan;
pub mod report;
pub mod run;
pub mod scores;
pub mod summary;

use std::path::PathBuf;

use crate::Result;
use crate::util::CancelToken;
use options::{Assignment, Layer};
use plan::Plan;
use run::Tally;

/// Train the same model with settings that differ, and measure what each is worth.
///
/// Every cell of the file is trained with every seed, with as many updates as the base and
/// with as many U-Net forwards, and measured by all rewards on held-out prompts. Runs, scores,
/// tables (summary.md, summary.json) and curves are written to --out; the same command continues
/// what was interrupted. Options come from flags, then DS_BENCH_… variables, then the file, then the
/// defaults; docs/ablation.md describes the file.
#[derive(clap::Args, Clone, Debug, Default)]
pub struct Args {
    #[command(flatten)]
    pub layer: Layer,
    /// TOML file with the cells, and options whose keys are the flags with underscores
    #[arg(long, env = "DS_BENCH_CONFIG", value_name = "FILE")]
    pub config: PathBuf,
    /// A training setting of all cells, above those of the file; may be given again
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub settings: Vec<Assignment>,
    /// Print the cells with their updates and U-Net forwards; train nothing
    #[arg(long)]
    pub dry_run: bool,
    /// No progress
    #[arg(long, short)]
    pub quiet: bool,
}

impl Args {
    /// Reads the file and plans the cells.
    ///
    /// # Errors
    /// Names the option, setting or file that is unusable.
    pub fn plan(&self) -> Result<Plan> {
        let file = Layer::read(&self.config)?;
        Plan::new(self.layer.clone().over(file), &self.settings)
    }
}

/// Runs the command; `command` is recorded as what made the folder. Nothing with `--dry-run`.
///
/// # Errors
/// When an option is unusable, the folder holds another ablation, or a training run fails.
pub fn run(args: &Args, command: &str, cancel: &CancelToken) -> Result<Option<(Plan, Tally)>> {
    let plan = args.plan()?;
    if args.dry_run {
        print!("{}", report::describe_plan(&plan));
        return Ok(None);
    }
    let tally = run::run(&plan, cancel, args.quiet)?;
    report::write(&plan, command)?;
    curves::write(&plan)?;
    Ok(Some((plan, tally)))
}
