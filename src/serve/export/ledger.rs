//! What every arm was planned to spend, and spent.

use std::collections::{BTreeMap, BTreeSet};

use maud::{Markup, html};
use serde::Deserialize;

use super::{Arm, words};
use crate::diffusion::cost::Units;

/// In this order; others follow.
const STAGES: [&str; 6] = ["text", "unet", "vae_decode", "reward", "observed", "encode"];

/// One arm's line.
struct Line<'a> {
    arm: &'a Arm,
    planned: Option<Units>,
    spent: Option<Units>,
    seconds: BTreeMap<&'a str, f64>,
}

impl<'a> Line<'a> {
    fn of(arm: &'a Arm) -> Self {
        let cost = arm.answer.as_ref().map(|answer| &answer.cost);
        let seconds = cost.into_iter().flat_map(|cost| &cost.actual.seconds);
        Self {
            arm,
            planned: Units::deserialize(&arm.shown["planned"]).ok(),
            spent: cost.map(|cost| cost.actual.units),
            seconds: seconds.map(|(stage, seconds)| (stage.as_str(), *seconds)).collect(),
        }
    }
}

/// A name and how much it counts.
type Unit = (&'static str, fn(Units) -> u64);

/// A table of costs over all images of each arm, and their sums.
pub fn table(arms: &[Arm]) -> Markup {
    let lines: Vec<Line> = arms.iter().map(Line::of).collect();
    let sum = |of: fn(&Line) -> Option<Units>| {
        lines.iter().filter_map(of).fold(Units::default(), |sum, units| sum + units)
    };
    let (planned, spent) = (sum(|line| line.planned), sum(|line| line.spent));
    let mut units: Vec<Unit> = vec![("F", |u| u.f), ("V", |u| u.v), ("Y", |u| u.y)];
    if planned.l + spent.l > 0 {
        units.push(("L", |u| u.l));
    }
    let found: BTreeSet<&str> = lines.iter().flat_map(|l| l.seconds.keys().copied()).collect();
    let known = STAGES.into_iter().filter(|stage| found.contains(stage));
    let stages: Vec<&str> =
        known.chain(found.iter().copied().filter(|stage| !STAGES.contains(stage))).collect();
    let counts = |of: Option<Units>| {
        html! { @for (_, count) in &units { td { (of.map_or_else(|| "–".to_owned(), |u| words::grouped(count(u)))) } } }
    };
    html! {
        div.scroll tabindex="0" role="region" aria-labelledby="ledger" {
            table {
                thead {
                    tr {
                        th rowspan="2" scope="col" { "Arm" }
                        th.group colspan=(units.len()) scope="colgroup" { "Planned" }
                        th.group colspan=(units.len()) scope="colgroup" { "Spent" }
                        th.group rowspan="2" scope="col" { "Unused" }
                        th.group colspan=(stages.len() + 1) scope="colgroup" { "Seconds" }
                    }
                    tr {
                        @for _ in 0..2 { @for (name, _) in &units { th scope="col" { (name) } } }
                        @for stage in &stages { th scope="col" { (stage.replace('_', " ")) } }
                        th scope="col" { "in all" }
                    }
                }
                tbody {
                    @for line in &lines {
                        tr.off[line.spent.is_some() && line.spent != line.planned] {
                            th scope="row" { (line.arm.label()) }
                            (counts(line.planned))
                            (counts(line.spent))
                            td { (words::unused(&line.arm.shown["unused"])) }
                            @for stage in &stages { td { (seconds(line.seconds.get(stage).copied())) } }
                            td { (seconds(line.spent.map(|_| line.seconds.values().sum()))) }
                        }
                    }
                }
                tfoot {
                    tr {
                        th scope="row" { "Sum" }
                        (counts(Some(planned)))
                        (counts(Some(spent)))
                        td {}
                        @for stage in &stages {
                            td { (words::seconds(lines.iter().filter_map(|l| l.seconds.get(stage)).sum())) }
                        }
                        td { (words::seconds(lines.iter().flat_map(|l| l.seconds.values()).sum())) }
                    }
                }
            }
        }
        p.quiet {
            "F: U-Net forwards of one sample (a guided step counts 2). V: images scored. "
            "Y: images decoded. Over all images of an arm; what its contract allowed and it did not spend is unused."
        }
    }
}

fn seconds(value: Option<f64>) -> String {
    value.map_or_else(|| "–".to_owned(), words::seconds)
}
