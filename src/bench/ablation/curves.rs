//! Validations of the runs against updates, F and time: `curves.csv`, `curves.svg` and
//! `curves.png`.

use std::collections::{BTreeMap, BTreeSet};

use super::plan::{Cell, Job, Plan};
use crate::Result;
use crate::bench::plot::{self, Axis, Curve, Panel, Point};
use crate::bench::report::csv_bytes;
use crate::bench::stats::mean;
use crate::bench::validations::{self, PREFIX, Validation};
use crate::train::settings::Method;
use crate::util::write_atomic;

/// The validations of a cell's runs, by seed.
struct Followed<'a> {
    cell: &'a Cell,
    seeds: Vec<(u64, Vec<Validation>)>,
}

/// Writes what the runs have recorded; nothing where they have no validations.
///
/// # Errors
/// When a file cannot be read or written.
pub fn write(plan: &Plan) -> Result<()> {
    let followed = plan.cells.iter().map(|cell| follow(plan, cell)).collect::<Result<Vec<_>>>()?;
    let seen = || followed.iter().flat_map(|f| &f.seeds).flat_map(|(_, seen)| seen);
    let names: BTreeSet<&String> = seen().flat_map(|seen| seen.values.keys()).collect();
    if names.is_empty() {
        return Ok(());
    }
    write_atomic(&plan.out.join("curves.csv"), &csv(&followed, &names)?)?;
    let Some(metric) = metric(plan, &names) else { return Ok(()) };
    let title = format!("{}: {PREFIX}{metric}, range of seeds", plan.method.name());
    let panels = panels(&followed, &metric);
    plot::svg(&plan.out.join("curves.svg"), &title, &panels)?;
    plot::png(&plan.out.join("curves.png"), &title, &panels)
}

/// What is drawn: the loss of SFT where it is followed, else the reward that is trained on.
fn metric(plan: &Plan, names: &BTreeSet<&String>) -> Option<String> {
    let loss = (plan.method == Method::Sft).then_some("loss");
    let trained = plan.base.rewards.iter().map(|r| r.split(':').next().unwrap_or(r));
    let mut wanted = loss.into_iter().chain(trained).map(str::to_owned);
    wanted.find(|name| names.contains(name))
}

fn follow<'a>(plan: &Plan, cell: &'a Cell) -> Result<Followed<'a>> {
    let mut seeds = Vec::new();
    let longest = cell.training.iter().filter_map(|t| Some((t, t.lengths.last()?.updates)));
    for (training, updates) in longest {
        for &seed in &plan.seeds {
            let job = Job { cell, training, seed, updates };
            seeds.push((seed, validations::of_run(&plan.run_folder(&job)?)?));
        }
    }
    Ok(Followed { cell, seeds })
}

fn csv(followed: &[Followed], names: &BTreeSet<&String>) -> Result<Vec<u8>> {
    let own = ["cell", "seed"].into_iter().chain(validations::COLUMNS).map(str::to_owned);
    let header: Vec<String> = own.chain(names.iter().map(|n| (*n).clone())).collect();
    let rows = followed.iter().flat_map(|followed| {
        followed.seeds.iter().flat_map(move |(seed, seen)| {
            seen.iter().map(move |seen| {
                let first = [followed.cell.name.clone(), seed.to_string()];
                seen.row(first, names.iter().copied())
            })
        })
    });
    csv_bytes(&header, rows)
}

/// The metric against updates, F and seconds: means over seeds with their range.
fn panels(followed: &[Followed], metric: &str) -> Vec<Panel> {
    type Along = fn(&Validation) -> f64;
    let axes: [(&str, Along); 3] = [
        ("updates", |seen| seen.step as f64),
        ("U-Net forwards (F)", |seen| seen.f),
        ("seconds in networks and rewards", |seen| seen.seconds),
    ];
    let panel = |(label, along): (&str, Along)| {
        let curves = followed.iter().filter(|followed| !followed.seeds.is_empty());
        Panel {
            title: format!("against {label}"),
            x: Axis { label: label.into(), logarithmic: false },
            curves: curves.map(|followed| curve(followed, metric, along)).collect(),
        }
    };
    axes.into_iter().map(panel).collect()
}

/// At the steps that all seeds have, so that the curve is of the same runs from end to end.
fn curve(followed: &Followed, metric: &str, along: fn(&Validation) -> f64) -> Curve {
    let mut at: BTreeMap<u64, Vec<(f64, f64)>> = BTreeMap::new();
    for seen in followed.seeds.iter().flat_map(|(_, seen)| seen) {
        let value = seen.values.get(metric).map(|value| (along(seen), *value));
        at.entry(seen.step).or_default().extend(value);
    }
    at.retain(|_, values| values.len() == followed.seeds.len());
    let point = |values: Vec<(f64, f64)>| {
        let (along, values): (Vec<f64>, Vec<f64>) = values.into_iter().unzip();
        let low = values.iter().copied().fold(f64::INFINITY, f64::min);
        let high = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let interval = (values.len() > 1).then_some((low, high));
        Some(Point { x: mean(&along)?, mean: mean(&values)?, interval })
    };
    let points = at.into_values().filter_map(point).collect();
    Curve { label: followed.cell.name.clone(), points }
}
