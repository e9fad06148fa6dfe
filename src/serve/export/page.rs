//! The page of an export: readable without scripts.

use std::collections::{BTreeMap, BTreeSet};

use maud::{DOCTYPE, Markup, html};
use serde::Deserialize;
use serde_json::Value;

use super::folder::SUMS;
use super::{Arm, DATA, Export, SCRIPT, STYLE, ledger, path_of, words};
use crate::serve::answer::{Answer, AnswerImage};

/// Nothing but the folder's own files, whether they are on a disk or served.
const POLICY: &str = "default-src 'none'; img-src 'self' file:; style-src 'self' file:; \
     script-src 'self' file:";

/// An estimate on the way, as the trace has it.
#[derive(Deserialize)]
struct Frame {
    f: u64,
    of: u64,
    scores: BTreeMap<String, Option<f64>>,
    url: Option<String>,
}

#[derive(Deserialize)]
struct Claim {
    claim: String,
    holds: bool,
}

/// The whole document.
pub fn page(export: &Export) -> String {
    let comparison = &export.comparison;
    let contract = comparison.request.contract;
    let request = serde_json::to_string_pretty(&comparison.request).unwrap_or_default();
    let html = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta name="color-scheme" content="light dark";
                meta http-equiv="Content-Security-Policy" content=(POLICY);
                title { (comparison.prompt) }
                link rel="stylesheet" href=(STYLE.0);
                script src=(SCRIPT.0) defer {}
            }
            body {
                header {
                    h1 { q dir="auto" { (comparison.prompt) } }
                    p.lede { (subtitle(export)) }
                    p.lede { "Contract: " (words::contract(contract)) "." }
                }
                main {
                    div.scrub hidden {
                        label for="spent" { "U-Net forwards spent on an image" }
                        input #spent type="range" min="0" value="0";
                        output for="spent" {}
                    }
                    div.arms {
                        @for index in 0..export.arms.len() { (card(export, index)) }
                    }
                    section {
                        h2 #ledger { "Ledger" }
                        (ledger::table(&export.arms))
                    }
                    section {
                        h2 { "Scores" }
                        (scores(&export.arms))
                    }
                    section {
                        h2 { "Files" }
                        p {
                            a href=(DATA) { (DATA) } " has requests, every effective value, costs, scores and traces. "
                            a href=(SUMS) { (SUMS) } " has the checksums of all files: "
                            code { "sha256sum -c " (SUMS) }
                            " in this folder. A bundle makes its arm's images again: "
                            code { "ds-bench replay bundles/ID.tar --models models" } "."
                        }
                        details {
                            summary { "What was asked" }
                            pre { (request) }
                        }
                    }
                }
                footer.quiet {
                    "Made " (words::date(comparison.created_ms)) " by Diffusion-Sharpening " (env!("CARGO_PKG_VERSION"))
                    ": " code { (export.name) } "."
                }
            }
        }
    };
    html.into_string()
}

/// What all arms share.
fn subtitle(export: &Export) -> String {
    let mut parts = vec![match export.arms.len() {
        1 => "1 arm".to_owned(),
        count => format!("{count} arms"),
    }];
    if let Some(answer) = export.arms.iter().find_map(|arm| arm.answer.as_ref()) {
        let resolved = &answer.resolved;
        parts.push(format!("seed {}", resolved.seed));
        parts.push(format!("{} × {} px", resolved.width, resolved.height));
        let models: BTreeSet<_> = export
            .arms
            .iter()
            .filter_map(|arm| arm.answer.as_ref())
            .map(|answer| (answer.model.id.as_str(), answer.model.sha256.get(..12).unwrap_or("")))
            .collect();
        parts.extend(models.iter().map(|(id, hash)| format!("model {id} ({hash}…)")));
    }
    parts.join(" · ")
}

fn card(export: &Export, index: usize) -> Markup {
    let arm = &export.arms[index];
    html! {
        article.arm {
            header {
                span.letter aria-hidden="true" { (letter(index)) }
                div {
                    h2 dir="auto" { (arm.label()) }
                    @if let Some(record) = &arm.record {
                        p.settings { (words::settings(&record.resolved)) }
                    }
                }
            }
            @if let Some(reason) = arm.reason() {
                p.reason { (reason) }
            }
            @if let Some(answer) = &arm.answer {
                div.shots.several[answer.images.len() > 1] {
                    @for (i, image) in answer.images.iter().enumerate() {
                        (shot(export, arm, answer, i, image))
                    }
                }
            }
            @if let Some(path) = arm.bundle() {
                p.take { a href=(path) download { "Bundle" } }
            }
        }
    }
}

fn letter(index: usize) -> char {
    // A comparison has at most 16 arms.
    char::from(b'A' + u8::try_from(index % 26).unwrap_or(0))
}

/// An image with its scores, the estimates before it, and the judge's verdicts.
fn shot(export: &Export, arm: &Arm, answer: &Answer, index: usize, image: &AnswerImage) -> Markup {
    let prompt = &export.comparison.prompt;
    let (label, seed) = (arm.label(), image.seed);
    let mine = |entry: &&Value| entry["image"].as_u64().unwrap_or(0) == index as u64;
    let entries: Vec<&Value> = answer.trace.iter().filter(mine).collect();
    let frames = entries.iter().filter_map(|entry| Frame::deserialize(entry.get("preview")?).ok());
    let frames: Vec<Frame> = frames.collect();
    let claims = entries.iter().filter_map(|entry| entry["claims"].as_array()).flatten();
    let claims: Vec<Claim> = claims.filter_map(|claim| Claim::deserialize(claim).ok()).collect();
    html! {
        figure.shot data-of=[frames.first().map(|frame| frame.of)] {
            @if let Some(path) = image.url.as_deref().and_then(path_of) {
                img.whole src=(path) width=(answer.resolved.width) height=(answer.resolved.height)
                    alt=(format!("{prompt} ({label}, seed {seed})"));
            }
            figcaption { "seed " (seed) }
            div.said {
                dl {
                    @for (name, value) in &image.scores {
                        div {
                            dt { (name) }
                            dd.quiet[value.is_none()] {
                                (words::score(*value))
                                @if is_best(export, index, name, *value) { span.best { "best" } }
                            }
                        }
                    }
                }
                p.now {}
            }
            @if !frames.is_empty() {
                ol.frames tabindex="0" aria-label="Estimates on the way" {
                    @for frame in &frames { (estimate(frame)) }
                }
            }
            @if !claims.is_empty() {
                ul.claims {
                    @for claim in &claims {
                        li.no[!claim.holds] {
                            span.mark role="img" aria-label=(if claim.holds { "holds" } else { "does not hold" }) {
                                (if claim.holds { "✓" } else { "✗" })
                            }
                            (claim.claim)
                        }
                    }
                }
            }
        }
    }
}

fn estimate(frame: &Frame) -> Markup {
    let when = format!("{} F", words::grouped(frame.f));
    let scores: Vec<String> = frame
        .scores
        .iter()
        .map(|(name, value)| format!("{name} {}", words::score(*value)))
        .collect();
    html! {
        li data-f=(frame.f) {
            @if let Some(path) = frame.url.as_deref().and_then(path_of) {
                img src=(path)
                    alt=(format!("Estimate after {} of {} forwards", frame.f, frame.of));
            }
            b { (when) }
            @for score in &scores { span { (score) } }
        }
    }
}

/// Whether no other arm's image of this number scores more, and not all score the same.
fn is_best(export: &Export, index: usize, name: &str, value: Option<f64>) -> bool {
    let Some(value) = value else { return false };
    let images = export.arms.iter().filter_map(|arm| arm.answer.as_ref()?.images.get(index));
    let all: Vec<f64> = images.filter_map(|image| *image.scores.get(name)?).collect();
    all.iter().all(|other| *other <= value) && all.iter().any(|other| *other < value)
}

/// Mean scores of each arm's images, and how far they are from the first arm's.
fn scores(arms: &[Arm]) -> Markup {
    let answers: Vec<(&Arm, &Answer)> =
        arms.iter().filter_map(|arm| Some((arm, arm.answer.as_ref()?))).collect();
    let names: BTreeSet<&str> = answers
        .iter()
        .flat_map(|(_, answer)| &answer.images)
        .flat_map(|image| image.scores.keys().map(String::as_str))
        .collect();
    let first = answers.first().map(|(_, answer)| *answer);
    html! {
        @if answers.is_empty() {
            p { "No arm has completed." }
        } @else {
            div.scroll tabindex="0" role="region" aria-label="Scores" {
                table {
                    thead {
                        tr {
                            th scope="col" { "Arm" }
                            @for name in &names { th scope="col" { (name) } }
                        }
                    }
                    tbody {
                        @for (row, (arm, answer)) in answers.iter().enumerate() {
                            tr {
                                th scope="row" { (arm.label()) }
                                @for name in &names {
                                    @let own = mean(answer, name);
                                    @let base = first.filter(|_| row > 0).and_then(|first| mean(first, name));
                                    td {
                                        (words::score(own))
                                        @if let (Some(own), Some(base)) = (own, base) {
                                            " " span.quiet { (words::difference(own - base)) }
                                        }
                                    }
                                }
                            }
                        }
                    }
                }
            }
            p.quiet { "Means over an arm's images, and how far they are from the first arm's. One prompt is an example, not a measurement." }
        }
    }
}

/// Of the images that have this score.
fn mean(answer: &Answer, name: &str) -> Option<f64> {
    let known = answer.images.iter().filter_map(|image| *image.scores.get(name)?);
    let known: Vec<f64> = known.collect();
    (!known.is_empty()).then(|| known.iter().sum::<f64>() / known.len() as f64)
}
