//! `ds-bench scene-report`: a sweep's scores by category of the scene world.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::PathBuf;

use super::cell::{self, Cell, CellKey};
use super::manifest::Manifest;
use super::stats::{Bootstrap, Estimate};
use super::summary::reference_cells;
use super::sweep::CELLS;
use super::thumbnail;
use crate::data::scenes::{Caption, Category};
use crate::{Error, Result};

/// Print a sweep's scores by category of the scene world, as Markdown, with 95 % intervals
/// bootstrapped over prompts: means, paired differences from plain sampling, and how far the
/// images of a prompt's seeds lie apart.
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
    let manifest = Manifest::read(&args.sweep)?;
    let reference = manifest.map(|m| reference_cells(&m, &cells)).unwrap_or_default();
    let report = report(&cells, &reference, &args.reward);
    if report.is_empty() {
        let message =
            format!("no cell has the reward '{}' on a caption of the scene world", args.reward);
        return Err(Error::file(path, message));
    }
    print!("{report}");
    Ok(())
}

/// What there is of every prompt, with its category, by method and budget.
type Rows<T = f64> = BTreeMap<(String, u64), BTreeMap<usize, (Category, Vec<T>)>>;

/// Adds what there is of a cell; not of one whose prompt is no scene's.
fn put<T>(rows: &mut Rows<T>, cell: &Cell, value: T) {
    let Ok(caption) = Caption::parse(&cell.prompt) else { return };
    let row = rows.entry((cell.requested().to_owned(), cell.budget)).or_default();
    let prompt = row.entry(cell.prompt_index);
    prompt.or_insert_with(|| (caption.category(), Vec::new())).1.push(value);
}

/// The tables of a sweep; differences are from the cells of `reference`. Empty without a score.
pub fn report(cells: &[Cell], reference: &[&Cell], reward: &str) -> String {
    let score = |cell: &Cell| cell.scores.get(reward).copied().flatten();
    let plain: HashMap<(usize, u64), f64> =
        reference.iter().filter_map(|c| Some(((c.prompt_index, c.seed), score(c)?))).collect();
    let own: HashSet<CellKey> = reference.iter().map(|c| c.key()).collect();
    let (mut means, mut differences) = (Rows::new(), Rows::new());
    for cell in cells {
        let Some(score) = score(cell) else { continue };
        put(&mut means, cell, score);
        if let Some(plain) = plain.get(&(cell.prompt_index, cell.seed))
            && !own.contains(&cell.key())
        {
            put(&mut differences, cell, score - plain);
        }
    }
    let distances = distances(cells);
    let mut out = String::new();
    for (title, rows, signed) in [
        (reward.to_owned(), &means, false),
        (format!("{reward}, difference"), &differences, true),
        ("distance between seeds".to_owned(), &distances, false),
    ] {
        if !rows.is_empty() {
            let gap = if out.is_empty() { "" } else { "\n" };
            out = format!("{out}{gap}{}", table(&title, rows, signed));
        }
    }
    out
}

/// Distances of the images of a prompt with different seeds, each pair of them.
fn distances(cells: &[Cell]) -> Rows {
    let mut thumbnails: Rows<&str> = Rows::new();
    for cell in cells {
        if let Some(thumbnail) = &cell.thumbnail {
            put(&mut thumbnails, cell, thumbnail);
        }
    }
    let mut rows = Rows::new();
    for (name, row) in thumbnails {
        for (prompt, (category, images)) in row {
            let pairs = (0..images.len()).flat_map(|a| (0..a).map(move |b| (a, b)));
            let apart = pairs.filter_map(|(a, b)| thumbnail::distance(images[a], images[b]));
            let apart: Vec<f64> = apart.collect();
            if !apart.is_empty() {
                rows.entry(name.clone()).or_default().insert(prompt, (category, apart));
            }
        }
    }
    rows
}

/// One row per method and budget, one column per category and one for all.
fn table(title: &str, rows: &Rows, signed: bool) -> String {
    let names: Vec<&str> = Category::ALL.iter().map(|c| c.word()).chain(["all"]).collect();
    let mut out = format!("| {title} | {} |\n", names.join(" | "));
    out.push_str(&format!("| --- |{}\n", " ---: |".repeat(names.len())));
    for ((method, budget), row) in rows {
        let columns = Category::ALL.iter().map(Some).chain([None]).map(|category| {
            let of = |c: Category| category.is_none_or(|wanted| *wanted == c);
            let clusters: Vec<Vec<f64>> =
                row.values().filter(|(c, _)| of(*c)).map(|(_, values)| values.clone()).collect();
            let estimate = Bootstrap::new(clusters.len()).estimate(&clusters);
            estimate.map_or_else(|| "–".to_owned(), |e| shown(&e, signed))
        });
        let columns: Vec<String> = columns.collect();
        out.push_str(&format!("| {method} @ {budget} | {} |\n", columns.join(" | ")));
    }
    out
}

fn shown(estimate: &Estimate, signed: bool) -> String {
    let number = |v: f64| if signed { format!("{v:+.3}") } else { format!("{v:.3}") };
    let mean = number(estimate.mean);
    match estimate.interval {
        Some((low, high)) => format!("{mean} [{}, {}]", number(low), number(high)),
        None => mean,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cell(method: &str, prompt: (usize, &str), seed: u64, judge: f64, grey: u8) -> Cell {
        let image = image::RgbImage::from_pixel(16, 16, image::Rgb([grey; 3]));
        Cell {
            method: method.into(),
            budget: 100,
            prompt: prompt.1.into(),
            prompt_index: prompt.0,
            seed,
            scores: BTreeMap::from([("judge".into(), Some(judge))]),
            thumbnail: Some(thumbnail::of(&image)),
            ..Cell::default()
        }
    }

    #[test]
    fn means_differences_and_distances_by_category() {
        let (color, number) = ((0, "a red circle and a blue square"), (1, "three red circles"));
        let mut cells = Vec::new();
        for (prompt, plain) in [(color, 0.5), (number, 0.25)] {
            for seed in [0, 1] {
                cells.push(cell("plain", prompt, seed, plain, 51 * seed as u8));
                cells.push(cell("plain@a", prompt, seed, plain + 0.25, 0));
            }
        }
        let reference: Vec<&Cell> = cells.iter().filter(|c| c.method == "plain").collect();
        let report = report(&cells, &reference, "judge");
        let row = |title: &str, name: &str| -> Vec<String> {
            let from = report.find(&format!("| {title} |")).unwrap();
            let line = report[from..].lines().find(|l| l.starts_with(&format!("| {name} @ 100")));
            let cells = line.unwrap().split('|').map(|c| c.trim().to_owned());
            cells.filter(|c| !c.is_empty()).skip(1).collect()
        };
        // color, shape, texture, spatial, numeracy, complex, all
        let plain = row("judge", "plain");
        assert_eq!((plain[0].as_str(), plain[4].as_str()), ("0.500", "0.250"));
        assert_eq!((plain[1].as_str(), plain[6].as_str()), ("–", "0.375 [0.250, 0.500]"));
        let gain = row("judge, difference", "plain@a");
        assert_eq!((gain[0].as_str(), gain[6].as_str()), ("+0.250", "+0.250 [+0.250, +0.250]"));
        assert_eq!(row("distance between seeds", "plain")[6], "0.200 [0.200, 0.200]");
        assert_eq!(row("distance between seeds", "plain@a")[6], "0.000 [0.000, 0.000]");
    }
}
