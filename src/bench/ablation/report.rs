//! An ablation's summary as files: `summary.md` and `summary.json`.

use std::fmt::Write as _;

use super::options::Equal;
use super::plan::{Plan, describe};
use super::summary::{Row, Score, Summary};
use crate::bench::report::interval;
use crate::bench::stats::REPLICATES;
use crate::util::write_atomic;
use crate::{Error, Result};

/// Writes both files, of what there is; none before the base is measured.
///
/// # Errors
/// When a file cannot be read or written.
pub fn write(plan: &Plan, command: &str) -> Result<()> {
    let Some(summary) = Summary::read(plan)? else { return Ok(()) };
    let path = plan.out.join("summary.json");
    let mut json = serde_json::to_string_pretty(&summary).map_err(|e| Error::file(&path, e))?;
    json.push('\n');
    write_atomic(&path, json.as_bytes())?;
    write_atomic(&plan.out.join("summary.md"), markdown(plan, &summary, command).as_bytes())
}

fn markdown(plan: &Plan, summary: &Summary, command: &str) -> String {
    let mut out = format!("# Ablation of {}\n\n", summary.method);
    let sampling = &plan.sampling;
    // Writing into a String cannot fail.
    let _ = writeln!(
        out,
        "Model `{}`, rewards {}, {} updates of {:.1} F each in the base. Measured on {} prompts \
         from {}, {} images each, {} steps, guidance scale {}. Made by:\n\n```sh\n{command}\n```\n",
        plan.base.model,
        list(&summary.rewards),
        plan.base.steps,
        plan.base_forwards,
        summary.prompts,
        sampling.prompts_source,
        sampling.image_seeds.len(),
        sampling.steps,
        sampling.guidance,
    );
    let _ = writeln!(
        out,
        "Δ is the mean difference from the model without training, on the same prompts and noise. \
         Δ base is the same from the cell that differs in nothing, with the same training seeds. \
         95% intervals resample prompts ({REPLICATES} times, percentiles), with all images and \
         training seeds of a prompt together: they say how far other prompts would change the \
         mean of these seeds. ± is the deviation between training seeds. F: U-Net forwards of the \
         training run, metered, with the plan's in brackets; V: images that were scored; backward: \
         samples that went backward; all are means over seeds.\n"
    );
    let rewards: Vec<&String> = summary.base.keys().collect();
    let before = summary.base.iter().map(|(name, e)| format!("`{name}` {}", interval(*e, false)));
    let _ = writeln!(out, "Without training: {}.", before.collect::<Vec<_>>().join(", "));
    for &equal in &plan.equal {
        let _ = writeln!(out, "\n## At equal {}\n", equal.name());
        let mut header: Vec<String> =
            ["Cell", "differs in", "updates", "F", "V", "backward", "seeds"]
                .map(str::to_owned)
                .into();
        for reward in &rewards {
            header.extend([format!("`{reward}`"), "Δ".into(), "±".into(), "Δ base".into()]);
        }
        let align: Vec<_> = (0..header.len()).map(|i| if i < 2 { "---" } else { "---:" }).collect();
        let _ = writeln!(out, "| {} |\n| {} |", header.join(" | "), align.join(" | "));
        let shown = |row: &&Row| !row.has_gradient() || row.equal.contains(&equal);
        for row in summary.rows.iter().filter(shown) {
            let _ = writeln!(out, "| {} |", cells(plan, row, &rewards).join(" | "));
        }
    }
    out.push_str(&missing(summary));
    out
}

fn list(rewards: &[String]) -> String {
    match rewards {
        [] => "none".into(),
        some => some.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", "),
    }
}

fn cells(plan: &Plan, row: &Row, rewards: &[&String]) -> Vec<String> {
    let differs = match describe(&row.differs) {
        nothing if nothing.is_empty() => "nothing: the base".into(),
        differs => format!("`{differs}`"),
    };
    let mut cells = vec![row.cell.clone(), differs];
    let Some(updates) = row.updates else {
        cells.push("no gradient".into());
        cells.resize(7 + 4 * rewards.len(), "–".into());
        return cells;
    };
    cells.push(updates.to_string());
    match row.spent {
        Some(spent) => cells.extend([
            format!("{:.0} ({:.0})", spent.f, spent.f_planned),
            format!("{:.0}", spent.v),
            format!("{:.0}", spent.backward),
        ]),
        None => cells.extend(["–"; 3].map(str::to_owned)),
    }
    cells.push(match (row.seeds.len(), plan.seeds.len()) {
        (done, all) if done == all => done.to_string(),
        (done, all) => format!("{done} of {all}"),
    });
    for reward in rewards {
        let score = row.scores.get(*reward);
        let Some(Score { mean, difference, from_base, seed_deviation, .. }) = score else {
            continue;
        };
        let deviation = seed_deviation.map_or("–".into(), |value| format!("{value:.4}"));
        let (difference, from_base) = (interval(*difference, true), interval(*from_base, true));
        cells.extend([interval(*mean, false), difference, deviation, from_base]);
    }
    cells
}

fn missing(summary: &Summary) -> String {
    let mut out = String::new();
    if summary.rows.iter().any(|row| !row.has_gradient()) {
        out.push_str(
            "\nNo gradient: with one trajectory the best and the worst are the same, the loss is a \
             constant, and the model would stay as it is.\n",
        );
    }
    for row in &summary.rows {
        for (reward, score) in row.scores.iter().filter(|(_, score)| score.missing > 0) {
            let (cell, count) = (&row.cell, score.missing);
            let updates = row.updates.unwrap_or_default();
            let _ = writeln!(
                out,
                "\n{cell} at {updates} updates: {count} images have no score by `{reward}`, and \
                 are left out."
            );
        }
    }
    out
}

/// The cells as text, and what they cost.
pub fn describe_plan(plan: &Plan) -> String {
    let mut out = format!("{:<32}{:>10}{:>12}{:>14}  equal\n", "cell", "updates", "F/update", "F");
    for cell in &plan.cells {
        let Some(training) = &cell.training else {
            let _ = writeln!(out, "{:<32}no gradient: nothing to run", cell.name);
            continue;
        };
        for length in &training.lengths {
            let each = training.cost.forwards();
            let equal: Vec<&str> = length.equal.iter().map(|equal: &Equal| equal.name()).collect();
            let all = each * length.updates as f64;
            let _ = writeln!(
                out,
                "{:<32}{:>10}{each:>12.1}{all:>14.0}  {}",
                cell.name,
                length.updates,
                equal.join(", ")
            );
        }
    }
    let jobs = plan.jobs();
    let images = plan.sampling.wanted().len() * (jobs.len() + 1);
    let _ = writeln!(
        out,
        "{} evaluations of {} seeds and 1 of the base: {images} images of {} steps; F of training \
         in all, beginnings in common counted once: {:.0}",
        jobs.len(),
        plan.seeds.len(),
        plan.sampling.steps,
        plan.forwards(),
    );
    out
}
