//! The files that a sweep's folder is read by: tables and plots of its cells.

use std::collections::{BTreeSet, HashSet};
use std::fmt::Write as _;
use std::path::Path;

use super::cell::{self, Cell};
use super::contract::Contract;
use super::manifest::{self, Manifest};
use super::plot::{self, Axis, Curve, Panel, Point};
use super::replay;
use super::stats::{Estimate, REPLICATES};
use super::summary::{LATE, Row, Summary};
use super::sweep::CELLS;
use crate::util::write_atomic;
use crate::{Error, Result};

/// Reads the cells in `dir` and writes `cells.csv`, `summary.csv`,
/// `summary.md`, `nfe-sweep.svg` and `nfe-sweep.png` beside them.
///
/// # Errors
/// When the folder holds no sweep or a file cannot be read or written.
pub fn write(dir: &Path) -> Result<()> {
    let manifest = Manifest::read(dir)?
        .ok_or_else(|| Error::file(dir.join(manifest::FILE), "no sweep in this folder"))?;
    let fingerprint = manifest.config.fingerprint();
    let mut seen = HashSet::new();
    let mut cells = cell::read(&dir.join(CELLS))?;
    cells.retain(|c| manifest.config.owns(c, &fingerprint) && seen.insert(c.key()));
    let derived = replay::derive(&manifest.config, &cells);
    cells.extend(derived.into_iter().filter(|c| seen.insert(c.key())));
    cells.sort_by_cached_key(|c| {
        let method = manifest.config.methods.iter().position(|m| m == c.requested());
        (method, c.budget, c.prompt_index, c.seed)
    });
    let summary = Summary::build(&manifest, &cells);
    write_atomic(&dir.join("cells.csv"), &cells_csv(&cells, &summary.rewards)?)?;
    write_atomic(&dir.join("summary.csv"), &summary_csv(&summary)?)?;
    write_atomic(&dir.join("summary.md"), markdown(&manifest, &summary).as_bytes())?;
    let (title, panels) = (title(&manifest, &cells), panels(&manifest, &summary));
    plot::svg(&dir.join("nfe-sweep.svg"), &title, &panels)?;
    plot::png(&dir.join("nfe-sweep.png"), &title, &panels)
}

pub(super) fn csv_bytes(
    header: &[String],
    rows: impl Iterator<Item = Vec<String>>,
) -> Result<Vec<u8>> {
    let fail = |e: csv::Error| Error::invalid("csv", e.to_string());
    let mut writer = csv::Writer::from_writer(Vec::new());
    writer.write_record(header).map_err(fail)?;
    for row in rows {
        writer.write_record(&row).map_err(fail)?;
    }
    writer.into_inner().map_err(|e| Error::invalid("csv", e.to_string()))
}

fn cells_csv(cells: &[Cell], rewards: &[String]) -> Result<Vec<u8>> {
    let stages: BTreeSet<&String> = cells.iter().flat_map(|c| c.stages.keys()).collect();
    let mut header: Vec<String> =
        "method requested_method budget prompt_index prompt seed f v y seconds steps params infeasible"
            .split(' ')
            .map(str::to_owned)
            .collect();
    header.extend(rewards.iter().map(|r| format!("score_{r}")));
    header.extend(stages.iter().map(|s| format!("seconds_{s}")));
    csv_bytes(
        &header,
        cells.iter().map(|c| {
            let mut row = vec![
                c.method.clone(),
                c.requested_method.clone().unwrap_or_default(),
                c.budget.to_string(),
                c.prompt_index.to_string(),
                c.prompt.clone(),
                c.seed.to_string(),
                c.f.to_string(),
                c.v.to_string(),
                c.y.to_string(),
                c.seconds.to_string(),
                c.steps.to_string(),
                serde_json::Value::from(c.params.clone()).to_string(),
                c.infeasible.clone().unwrap_or_default(),
            ];
            row.extend(rewards.iter().map(|r| number(c.scores.get(r).copied().flatten())));
            row.extend(stages.iter().map(|s| number(c.stages.get(*s).copied())));
            row
        }),
    )
}

fn summary_csv(summary: &Summary) -> Result<Vec<u8>> {
    let mut header: Vec<String> =
        "method requested_method budget steps n prompts infeasible f v y seconds overhead"
            .split(' ')
            .map(str::to_owned)
            .collect();
    for reward in &summary.rewards {
        for column in
            ["mean", "low", "high", "n", "missing", "diff_mean", "diff_low", "diff_high", "diff_n"]
        {
            header.push(format!("{reward}_{column}"));
        }
    }
    let estimate = |e: Option<Estimate>| {
        let interval = e.and_then(|e| e.interval);
        [number(e.map(|e| e.mean)), number(interval.map(|i| i.0)), number(interval.map(|i| i.1))]
    };
    csv_bytes(
        &header,
        summary.rows.iter().map(|r| {
            let mut row = vec![
                r.method.clone(),
                r.requested_method.clone().unwrap_or_default(),
                r.budget.to_string(),
                r.steps.map(|s| s.to_string()).unwrap_or_default(),
                r.n.to_string(),
                r.prompts.to_string(),
                r.infeasible.to_string(),
                number(Some(r.f)),
                number(Some(r.v)),
                number(Some(r.y)),
                number(Some(r.seconds)),
                number(Some(r.overhead)),
            ];
            for score in &r.scores {
                row.extend(estimate(score.estimate));
                row.push(score.estimate.map_or(0, |e| e.n).to_string());
                row.push(score.missing.to_string());
                row.extend(estimate(score.difference));
                row.push(score.difference.map_or(0, |e| e.n).to_string());
            }
            row
        }),
    )
}

/// A number for a table, empty where there is none.
pub(super) fn number(value: Option<f64>) -> String {
    value.filter(|v| v.is_finite()).map(|v| v.to_string()).unwrap_or_default()
}

fn markdown(manifest: &Manifest, summary: &Summary) -> String {
    let config = &manifest.config;
    let mut out = String::from("# Quality against NFE\n\n");
    // Writing into a String cannot fail.
    let _ = writeln!(
        out,
        "Model `{}` (sha256 `{}`){}, guidance scale {}, searches at {} steps. {} prompts from \
         {}, {} seeds. Searched reward: `{}`; held-out reward: {}.\n",
        config.model.id,
        config.model.sha256.get(..12).unwrap_or(&config.model.sha256),
        config.adapter.as_ref().map(|a| format!(" with adapter `{a}`")).unwrap_or_default(),
        config.guidance_scale,
        config.steps,
        config.prompts.len(),
        manifest.prompts_source,
        config.seeds.len(),
        config.reward,
        config.held_out.as_ref().map_or("none".into(), |r| format!("`{r}`")),
    );
    if let Some(shard) = &config.shard {
        let _ = writeln!(out, "This folder is shard {shard} of the prompts.\n");
    }
    let _ = writeln!(out, "Made by:\n\n```sh\n{}\n```\n", manifest.command);
    let against = match summary.reference_budget {
        Some(budget) => format!(
            "Δ is the mean difference from `plain` at budget {} over the same prompts and \
             seeds.",
            config.contract.show(budget)
        ),
        None => "No `plain` row to take differences against.".to_owned(),
    };
    let _ = writeln!(
        out,
        "Means with 95% intervals, bootstrapped over prompts ({REPLICATES} resamples, all seeds of \
         a prompt together, the same prompts in every row). {against} F: U-Net forwards (NFE), V: \
         images scored, Y: VAE decodes, s: wall-clock seconds, all per image. Overhead: the share of \
         the seconds that was spent outside the networks and the rewards. Missing: images whose \
         score failed; they are left out.\n"
    );
    let late = config.contract == Contract::EqualLatency;
    if late {
        let _ = writeln!(
            out,
            "Budgets are times. A method has the forwards for which its measured seconds of a \
             forward, a score and a decode leave time. Late: images that took over {:.0}% longer \
             than their budget.\n",
            100.0 * LATE
        );
    }
    let shown = summary.searched + usize::from(config.held_out.is_some());
    let rewards: Vec<&String> = summary.rewards.iter().take(shown).collect();
    let mut header = vec!["Method".to_owned(), "Budget".into(), "Steps".into()];
    for reward in &rewards {
        header.extend([(*reward).clone(), "Δ".into()]);
    }
    header.extend(["F", "V", "Y", "s", "Overhead", "n", "Missing"].map(str::to_owned));
    header.extend(late.then(|| "Late".to_owned()));
    let _ = writeln!(out, "| {} |", header.join(" | "));
    let align: Vec<_> = (0..header.len()).map(|i| if i == 0 { "---" } else { "---:" }).collect();
    let _ = writeln!(out, "| {} |", align.join(" | "));
    for row in &summary.rows {
        let _ =
            writeln!(out, "| {} |", markdown_row(config.contract, row, rewards.len()).join(" | "));
    }
    let reasons: Vec<&Row> = summary.rows.iter().filter(|r| r.reason.is_some()).collect();
    if !reasons.is_empty() {
        let _ = writeln!(out, "\nNot run:\n");
        for row in reasons {
            let reason = row.reason.as_deref().unwrap_or_default();
            let _ = writeln!(
                out,
                "- `{}` at {}: {reason}",
                row.method,
                config.contract.show(row.budget)
            );
        }
    }
    out
}

fn markdown_row(contract: Contract, row: &Row, rewards: usize) -> Vec<String> {
    let method = match &row.requested_method {
        Some(requested) => {
            format!(
                "`{}` (stands in for `{requested}`, which this budget does not pay for)",
                row.method
            )
        }
        None => format!("`{}`", row.method),
    };
    let mut cells = vec![
        method,
        contract.show(row.budget),
        row.steps.map_or(String::new(), |steps| steps.to_string()),
    ];
    for score in row.scores.iter().take(rewards) {
        cells.push(interval(score.estimate, false));
        cells.push(if row.is_reference {
            "reference".into()
        } else {
            interval(score.difference, true)
        });
    }
    for (value, digits) in [(row.f, 1), (row.v, 1), (row.y, 1), (row.seconds, 2)] {
        cells.push(if value.is_finite() { format!("{value:.digits$}") } else { String::new() });
    }
    let overhead = row.overhead.is_finite().then(|| format!("{:.1}%", 100.0 * row.overhead));
    cells.push(overhead.unwrap_or_default());
    cells.push(row.n.to_string());
    let missing = row.scores.iter().take(rewards).map(|s| s.missing.to_string());
    cells.push(missing.collect::<Vec<_>>().join(", "));
    if contract == Contract::EqualLatency {
        cells.push(row.late.to_string());
    }
    cells
}

pub(super) fn interval(estimate: Option<Estimate>, signed: bool) -> String {
    let show = |v: f64| if signed { format!("{v:+.4}") } else { format!("{v:.4}") };
    match estimate {
        None => "–".into(),
        Some(Estimate { mean, interval: None, .. }) => show(mean),
        Some(Estimate { mean, interval: Some((low, high)), .. }) => {
            format!("{} [{}, {}]", show(mean), show(low), show(high))
        }
    }
}

fn title(manifest: &Manifest, cells: &[Cell]) -> String {
    let prompts = cells.iter().map(|c| c.prompt_index).collect::<BTreeSet<_>>().len();
    let seeds = cells.iter().map(|c| c.seed).collect::<BTreeSet<_>>().len();
    let config = &manifest.config;
    format!(
        "{}: {prompts} prompts, {seeds} seeds, guidance {}",
        config.model.id, config.guidance_scale
    )
}

/// One panel for the searched reward and one for the held-out one.
fn panels(manifest: &Manifest, summary: &Summary) -> Vec<Panel> {
    let config = &manifest.config;
    let searched = summary.rewards.iter().take(summary.searched).enumerate();
    let mut panels: Vec<(usize, String)> =
        searched.map(|(at, reward)| (at, format!("searched: {reward}"))).collect();
    if let Some(held_out) = &config.held_out {
        panels.push((summary.searched, format!("held out: {held_out}")));
    }
    panels
        .into_iter()
        .map(|(index, title)| {
            let curve = |method: &String| {
                let mut points: Vec<Point> = summary
                    .rows
                    .iter()
                    .filter(|r| r.method == *method && r.on_curve() && r.f > 0.0)
                    .filter_map(|r| {
                        let estimate = r.scores[index].estimate?;
                        let x = match config.contract {
                            Contract::EqualF => r.f,
                            Contract::EqualLatency => 1e3 * r.seconds,
                        };
                        Some(Point { x, mean: estimate.mean, interval: estimate.interval })
                    })
                    .collect();
                points.sort_by(|a, b| a.x.total_cmp(&b.x));
                Curve { label: method.clone(), points }
            };
            let label = match config.contract {
                Contract::EqualF => "U-Net forwards per image (NFE, logarithmic)",
                Contract::EqualLatency => "milliseconds per image (logarithmic)",
            };
            let x = Axis { label: label.into(), logarithmic: true };
            Panel { title, x, curves: config.methods.iter().map(curve).collect() }
        })
        .collect()
}
