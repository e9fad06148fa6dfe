//! `ds-bench`: sweeps, statistics, parity and speed, on the engine or a server.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use diffusion_sharpening::bench::{
    ablation, nfe_sweep, parity_cmd, plan_cmd, reproduce, scene_report, sharpen_step, speed,
    sweep_merge, training_curves,
};
use diffusion_sharpening::nn::{memory, threads};
use diffusion_sharpening::util::{CancelToken, INTERRUPTED};

#[global_allocator]
static GLOBAL: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Backward passes and deep graphs recurse: far more stack than a thread's default.
const STACK: usize = 256 << 20;

/// Measure what search and sharpening buy, at exactly metered cost.
#[derive(Parser)]
#[command(version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Ablation(Box<ablation::Args>),
    NfeSweep(Box<nfe_sweep::Args>),
    SweepMerge(sweep_merge::Args),
    Parity(parity_cmd::Args),
    Plan(Box<plan_cmd::Args>),
    Replay(Box<reproduce::Args>),
    Speed(speed::Args),
    SceneReport(scene_report::Args),
    SharpenStep(sharpen_step::Args),
    TrainingCurves(training_curves::Args),
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
        Command::Ablation(args) => return ablate(&args),
        Command::NfeSweep(args) => return sweep(&args),
        Command::Speed(args) => return speed::run(&args),
        Command::Replay(args) => {
            let cancel = CancelToken::on_signal("stopping")?;
            let same = reproduce::run(&args, &cancel)?;
            return Ok(if same { ExitCode::SUCCESS } else { ExitCode::FAILURE });
        }
        Command::SweepMerge(args) => sweep_merge::run(&args)?,
        Command::Parity(args) => parity_cmd::run(&args)?,
        Command::Plan(args) => plan_cmd::run(&args)?,
        Command::SceneReport(args) => scene_report::run(&args)?,
        Command::SharpenStep(args) => sharpen_step::run(&args)?,
        Command::TrainingCurves(args) => training_curves::run(&args)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn command_line() -> String {
    nfe_sweep::shell_line(std::iter::once("ds-bench".to_owned()).chain(std::env::args().skip(1)))
}

fn ablate(args: &ablation::Args) -> anyhow::Result<ExitCode> {
    let cancel = CancelToken::on_signal("stopping, and saving what is done")?;
    let command = command_line();
    let Some((plan, tally)) = ablation::run(args, &command, &cancel)? else {
        return Ok(ExitCode::SUCCESS);
    };
    let summary = plan.out.join("summary.md");
    eprintln!(
        "{} runs now, {} were there already; see {}",
        tally.ran,
        tally.kept,
        summary.display()
    );
    if tally.remaining > 0 {
        eprintln!("{} runs are left; to continue: {command}", tally.remaining);
        return Ok(ExitCode::from(INTERRUPTED));
    }
    if tally.diverged > 0 {
        eprintln!("{} runs diverged, and are left out of the tables", tally.diverged);
        return Ok(ExitCode::FAILURE);
    }
    Ok(ExitCode::SUCCESS)
}

fn sweep(args: &nfe_sweep::Args) -> anyhow::Result<ExitCode> {
    let cancel = CancelToken::on_signal("stopping after what is running now")?;
    let command = command_line();
    let backend = args.backend()?;
    let Some(tally) = nfe_sweep::run(args, backend.as_ref(), &command, &cancel)? else {
        return Ok(ExitCode::SUCCESS);
    };
    let out = args.options()?.out.unwrap_or_default();
    eprintln!(
        "{} cells computed ({} of them could not run), {} were there already; see {}",
        tally.ran,
        tally.infeasible,
        tally.kept,
        out.join("summary.md").display()
    );
    if tally.remaining > 0 {
        eprintln!("{} cells are left; to resume: {command}", tally.remaining);
    }
    Ok(if tally.interrupted { ExitCode::from(INTERRUPTED) } else { ExitCode::SUCCESS })
}
