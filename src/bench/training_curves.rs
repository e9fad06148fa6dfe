//! `ds-bench training-curves`: what the images of fixed prompts are worth while a run trains
//! (Figure 6 of the paper, whose band is the deviation between images).

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use super::plot::{self, Axis, Curve, Panel, Point};
use super::report::csv_bytes;
use super::validations::{self, PREFIX, Validation};
use crate::train::metrics::FILE;
use crate::util::write_atomic;
use crate::{Error, Result};

/// Draw the rewards of training runs' validation images against updates: their mean with its
/// 95 % interval, and their deviation.
#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    /// Folders written by `ds-train`; a curve is named by its folder.
    #[arg(required = true, value_name = "DIR")]
    pub runs: Vec<PathBuf>,
    /// Folder for curves.csv, curves.svg and curves.png.
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
}

struct Run {
    name: String,
    validations: Vec<Validation>,
}

/// Runs the command.
///
/// # Errors
/// When a folder has no validation with a reward, or a file cannot be read or written.
pub fn run(args: &Args) -> Result<()> {
    let runs = args.runs.iter().map(|dir| read(dir)).collect::<Result<Vec<_>>>()?;
    let rewards: BTreeSet<String> = runs.iter().flat_map(|run| rewards(&run.validations)).collect();
    std::fs::create_dir_all(&args.out).map_err(|e| Error::file(&args.out, e))?;
    write_atomic(&args.out.join("curves.csv"), &csv(&runs, &rewards)?)?;
    let means = rewards.iter().map(|reward| panel(&runs, reward, "mean", mean));
    let spreads = rewards.iter().map(|reward| panel(&runs, reward, "deviation", deviation));
    let panels: Vec<Panel> = means.chain(spreads).collect();
    let title = "Images of fixed prompts while training";
    plot::svg(&args.out.join("curves.svg"), title, &panels)?;
    plot::png(&args.out.join("curves.png"), title, &panels)
}

fn read(dir: &Path) -> Result<Run> {
    let validations = validations::of_run(dir)?;
    if rewards(&validations).next().is_none() {
        let message = format!(
            "no validation with a reward here ({PREFIX}NAME and {PREFIX}NAME_deviation); train \
             with --validate-every"
        );
        return Err(Error::file(dir.join(FILE), message));
    }
    let whole = dir.canonicalize().map_err(|e| Error::file(dir, e))?;
    let name = whole.file_name().map(|name| name.to_string_lossy().into_owned());
    Ok(Run { name: name.unwrap_or_default(), validations })
}

/// The rewards that have been measured: those with a deviation.
fn rewards(validations: &[Validation]) -> impl Iterator<Item = String> {
    let names = validations.iter().flat_map(|seen| seen.values.keys());
    names.filter_map(|name| Some(name.strip_suffix("_deviation")?.to_owned()))
}

fn mean(seen: &Validation, reward: &str) -> Option<Point> {
    let mean = *seen.values.get(reward)?;
    let error = seen.values.get(&format!("{reward}_error"));
    let interval = error.map(|error| (mean - 1.96 * error, mean + 1.96 * error));
    Some(Point { x: seen.step as f64, mean, interval })
}

fn deviation(seen: &Validation, reward: &str) -> Option<Point> {
    let mean = *seen.values.get(&format!("{reward}_deviation"))?;
    Some(Point { x: seen.step as f64, mean, interval: None })
}

type Measure = fn(&Validation, &str) -> Option<Point>;

fn panel(runs: &[Run], reward: &str, what: &str, measure: Measure) -> Panel {
    let curve = |run: &Run| Curve {
        label: run.name.clone(),
        points: run.validations.iter().filter_map(|seen| measure(seen, reward)).collect(),
    };
    Panel {
        title: format!("{reward}: {what}"),
        x: Axis { label: "updates".into(), logarithmic: false },
        curves: runs.iter().map(curve).collect(),
    }
}

fn csv(runs: &[Run], rewards: &BTreeSet<String>) -> Result<Vec<u8>> {
    let columns = rewards.iter().flat_map(|reward| {
        [reward.clone(), format!("{reward}_error"), format!("{reward}_deviation")]
    });
    let columns: Vec<String> = columns.collect();
    let own = ["run"].into_iter().chain(validations::COLUMNS).map(str::to_owned);
    let header: Vec<String> = own.chain(columns.iter().cloned()).collect();
    let rows = runs
        .iter()
        .flat_map(|run| run.validations.iter().map(|seen| seen.row([run.name.clone()], &columns)));
    csv_bytes(&header, rows)
}
