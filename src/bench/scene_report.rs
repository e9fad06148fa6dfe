//! `ds-bench scene-report`: a sweep's scores by category of the scene world.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::cell::{self, Cell};
use super::stats::Bootstrap;
use super::sweep::CELLS;
use crate::data::scenes::{Caption, Category};
use crate::{Error, Result};

/// Print a sweep's scores by category of the scene world, as Markdown, with 95 % intervals
/// bootstrapped over prompts.
#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    /// Folder written by `nfe-sweep`.
    #[arg(value_name = "DIR")]
    pub sweep: PathBuf,
    /// The reward to tabulate.
    #[arg(long, default_value = "judge")]
    pub reward: String,
}

/// Runs the command.
///
/// # Errors
/// When the folder holds no cells, or none with this reward on a scene caption.
pub fn run(args: &Args) -> Result<()> {
    let path = args.sweep.join(CELLS);
    let cells = cell::read(&path)?;
    let table = table(&cells, &args.reward);
    if table.is_empty() {
        let message =
            format!("no cell has the reward '{}' on a caption of the scene world", args.reward);
        return Err(Error::file(path, message));
    }
    print!("{table}");
    Ok(())
}

/// One row per method and budget, one column per category and one for all.
pub fn table(cells: &[Cell], reward: &str) -> String {
    type Row = BTreeMap<usize, (Category, Vec<f64>)>;
    let mut rows: BTreeMap<(String, u64), Row> = BTreeMap::new();
    for cell in cells {
        let Ok(caption) = Caption::parse(&cell.prompt) else { continue };
        let Some(Some(score)) = cell.scores.get(reward) else { continue };
        let row = rows.entry((cell.requested().to_owned(), cell.budget)).or_default();
        let values = row.entry(cell.prompt_index).or_insert((caption.category(), Vec::new()));
        values.1.push(*score);
    }
    if rows.is_empty() {
        return String::new();
    }
    let names: Vec<&str> = Category::ALL.iter().map(|c| c.word()).chain(["all"]).collect();
    let mut out = format!("{reward} | {}\n", names.join(" | "));
    out.push_str(&format!("--- |{}\n", " ---: |".repeat(names.len()).trim_end_matches('|')));
    for ((method, budget), row) in rows {
        let columns = Category::ALL.iter().map(Some).chain([None]).map(|category| {
            let of = |c: Category| category.is_none_or(|wanted| *wanted == c);
            let clusters: Vec<Vec<f64>> =
                row.values().filter(|(c, _)| of(*c)).map(|(_, values)| values.clone()).collect();
            match Bootstrap::new(clusters.len()).estimate(&clusters) {
                None => "–".to_owned(),
                Some(e) => match e.interval {
                    Some((low, high)) => format!("{:.3} [{low:.3}, {high:.3}]", e.mean),
                    None => format!("{:.3}", e.mean),
                },
            }
        });
        let columns: Vec<String> = columns.collect();
        out.push_str(&format!("{method} @ {budget} | {}\n", columns.join(" | ")));
    }
    out
}
