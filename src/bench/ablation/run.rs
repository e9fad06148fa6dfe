//! Runs what an ablation lacks: trains, samples, scores.

use std::fs::File;
use std::time::Duration;

use super::plan::{Job, Plan};
use super::scores::{Head, Line, Scores, Trained, sampling};
use crate::diffusion::cost::Budget;
use crate::diffusion::guidance::Guided;
use crate::diffusion::meter::Meter;
use crate::diffusion::sdxl_model::SdxlModel;
use crate::progress::{Every, Progress};
use crate::train::evaluation::Evaluation;
use crate::train::run::run as train;
use crate::train::settings::Settings;
use crate::train::setup::Setup;
use crate::train::texts::Texts;
use crate::util::{CancelToken, lock};
use crate::{Error, Result};

/// What a call of [`run`] did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Runs that were trained and measured now.
    pub ran: usize,
    /// Runs that the folder already held.
    pub kept: usize,
    /// Runs whose training diverged now; the tables are without them.
    pub diverged: usize,
    pub remaining: usize,
}

/// Computes what the folder lacks, until `cancel` is raised.
///
/// # Errors
/// When the folder holds other settings or is in use, and those of the training runs except that one
/// diverged.
pub fn run(plan: &Plan, cancel: &CancelToken, quiet: bool) -> Result<Tally> {
    std::fs::create_dir_all(&plan.out).map_err(|e| Error::file(&plan.out, e))?;
    let path = plan.out.join("lock");
    let _lock = lock(File::create(&path).map_err(|e| Error::file(&path, e))?, &path)?;
    let jobs = plan.jobs();
    let mut todo = Vec::new();
    for (i, job) in jobs.iter().enumerate() {
        if Scores::of(plan, Some(job))?.is_none() {
            todo.push((i, job));
        }
    }
    let kept = jobs.len() - todo.len();
    let mut tally = Tally { ran: 0, kept, diverged: 0, remaining: todo.len() };
    let say = |line: String| {
        if !quiet {
            eprintln!("{line}");
        }
    };
    if Scores::of(plan, None)?.is_none() {
        say("images of the base".into());
        match measure_base(plan, cancel, quiet) {
            Err(Error::Cancelled) => return Ok(tally),
            other => other?,
        }
    }
    for (i, job) in todo {
        let (number, of, name) = (i + 1, jobs.len(), &job.cell.name);
        say(format!("run {number} of {of}: {name}, seed {}, {} updates", job.seed, job.updates));
        match train_and_measure(plan, job, cancel, quiet) {
            Err(Error::Cancelled) => break,
            // That is what became of these settings; the others are still to be known.
            Err(Error::Diverged(what)) => {
                say(format!("{name}, seed {}: training diverged: {what}", job.seed));
                tally.diverged += 1;
            }
            Err(other) => return Err(other),
            Ok(()) => tally.ran += 1,
        }
        tally.remaining -= 1;
    }
    Ok(tally)
}

fn measure_base(plan: &Plan, cancel: &CancelToken, quiet: bool) -> Result<()> {
    // Asked for by every setup; nothing is written there.
    let out = Some(plan.out.display().to_string());
    let setup = Setup::open(plan.method, Settings { out, ..plan.base.clone() })?;
    let lines = measure(plan, &setup, &setup.base(), cancel, quiet)?;
    let head = Head { sampling: sampling(plan), run: None };
    Scores { head, lines }.write(&plan.base_scores())
}

fn train_and_measure(plan: &Plan, job: &Job, cancel: &CancelToken, quiet: bool) -> Result<()> {
    cancel.check()?;
    let settings = plan.settings(job, &plan.run_folder(job)?);
    let table = settings.table()?;
    let setup = Setup::open(plan.method, settings)?;
    let outcome = train(&setup, cancel, quiet)?;
    if !outcome.finished {
        return Err(Error::Cancelled);
    }
    let model = setup.exported(&outcome.exported)?;
    let lines = measure(plan, &setup, &model, cancel, quiet)?;
    let run = Trained {
        updates: outcome.step,
        settings: table,
        cost: outcome.cost,
        backward: outcome.backward,
    };
    let head = Head { sampling: sampling(plan), run: Some(run) };
    Scores { head, lines }.write(&plan.scores(job))
}

fn measure(
    plan: &Plan,
    setup: &Setup,
    model: &Guided<SdxlModel>,
    cancel: &CancelToken,
    quiet: bool,
) -> Result<Vec<Line>> {
    let wanted = plan.sampling.wanted();
    let pairs: Vec<(&str, u64)> = wanted.iter().map(|image| (image.prompt, image.seed)).collect();
    let mut texts = Texts::new(model.0.clone(), setup.size)?;
    let evaluation =
        Evaluation { setup, steps: plan.sampling.steps, guidance: plan.sampling.guidance };
    let every = Every::Time(Duration::from_secs(10));
    let mut shown = Progress::new("image", 0, wanted.len() as u64, every, quiet);
    let mut lines = Vec::with_capacity(wanted.len());
    let meter = Meter::new(Budget::default());
    evaluation.run(model, &mut texts, &pairs, &meter, cancel, &mut |scored| {
        lines.push(Line::new(&wanted[lines.len()], scored.scores));
        shown.show(lines.len() as u64, &format!("scoring {} images", wanted.len()));
    })?;
    shown.finish();
    Ok(lines)
}
