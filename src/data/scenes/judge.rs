//! Reads an image and says which of a caption's claims hold.

use std::fmt;

use image::RgbImage;
use serde::{Deserialize, Serialize};

use super::detect::{Detection, detect};
use super::grammar::{Caption, ObjectSpec};
use super::matching::assign;
use super::vocabulary::{COUNTS, Relation};

/// What a claim is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ClaimKind {
    /// An object of this shape is there.
    Shape,
    Colour,
    Texture,
    Relation,
    Count,
}

impl ClaimKind {
    pub const ALL: &'static [ClaimKind] = &[
        ClaimKind::Shape,
        ClaimKind::Colour,
        ClaimKind::Texture,
        ClaimKind::Relation,
        ClaimKind::Count,
    ];

    pub fn word(self) -> &'static str {
        match self {
            ClaimKind::Shape => "shape",
            ClaimKind::Colour => "colour",
            ClaimKind::Texture => "texture",
            ClaimKind::Relation => "relation",
            ClaimKind::Count => "count",
        }
    }
}

/// One thing that a caption says.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct Claim {
    pub kind: ClaimKind,
    /// Which noun phrase of the caption it is about (for a relation: the first).
    pub object: usize,
    /// The claim as a sentence: "the circle is red".
    pub text: String,
}

impl fmt::Display for Claim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// Whether a claim holds.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Verdict {
    pub claim: Claim,
    /// `score >= 0.5`.
    pub holds: bool,
    /// In [0, 1]; falls gradually as the image gets worse.
    pub score: f64,
}

/// What the judge says of an image and a caption.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Judgement {
    pub verdicts: Vec<Verdict>,
    /// Mean of the verdicts' scores.
    pub score: f64,
    pub all_hold: bool,
}

/// Offset, as a fraction of the image, at which a relation is even; it also has
/// to be larger than the offset across it.
const RELATION_OFFSET: f64 = 0.08;
const RELATION_SOFTNESS: f64 = 0.025;

/// Judges `image` against `caption`.
pub fn judge(image: &RgbImage, caption: &Caption) -> Judgement {
    judge_detections(&detect(image), caption)
}

/// Judges objects that were found before, so that one image can be held
/// against many captions.
pub fn judge_detections(detections: &[Detection], caption: &Caption) -> Judgement {
    let groups = assign_objects(detections, caption);
    let mut verdicts = Vec::new();
    let mut push = |kind, object, text, score: f64| {
        let score = if score.is_finite() { score.clamp(0.0, 1.0) } else { 0.0 };
        let claim = Claim { kind, object, text };
        verdicts.push(Verdict { claim, holds: score >= 0.5, score });
    };
    for (i, (spec, group)) in caption.objects.iter().zip(&groups).enumerate() {
        let (the, are) = match spec.count {
            Some(n) if n != 1 => (format!("the {}s", spec.shape.word()), "are"),
            _ => (format!("the {}", spec.shape.word()), "is"),
        };
        let there = match spec.count {
            Some(n) if n != 1 => format!("there are {}s", spec.shape.word()),
            _ => format!("there is {}", ObjectSpec::new(spec.shape)),
        };
        push(ClaimKind::Shape, i, there, presence(group, spec));
        if let Some(colour) = spec.colour {
            let score = attribute(group, spec, |d| d.colour(colour));
            push(ClaimKind::Colour, i, format!("{the} {are} {}", colour.word()), score);
        }
        if let Some(texture) = spec.texture {
            let score = attribute(group, spec, |d| d.texture(texture));
            push(ClaimKind::Texture, i, format!("{the} {are} {}", texture.word()), score);
        }
        if let Some(n) = spec.count {
            let word = COUNTS.get(n.wrapping_sub(1) as usize).copied().unwrap_or("many");
            let plural = if n == 1 { "" } else { "s" };
            let colour = spec.colour.map_or(String::new(), |c| format!("{} ", c.word()));
            let text = format!("{word} {colour}{}{plural}", spec.shape.word());
            push(ClaimKind::Count, i, text, count(detections, spec, n as usize));
        }
    }
    if let (Some(relation), [first, second, ..]) = (caption.relation, &groups[..]) {
        let name = |spec: &ObjectSpec| match spec.colour {
            Some(colour) => format!("the {} {}", colour.word(), spec.shape.word()),
            None => format!("the {}", spec.shape.word()),
        };
        let (a, b) = (&caption.objects[0], &caption.objects[1]);
        let text = format!("{} is {} {}", name(a), relation.word(), name(b));
        let both = gate(presence(first, a)) * gate(presence(second, b));
        push(ClaimKind::Relation, 0, text, both * related(relation, first, second));
    }
    let score = mean(verdicts.iter().map(|v| v.score));
    let all_hold = verdicts.iter().all(|v| v.holds);
    Judgement { verdicts, score, all_hold }
}

/// The detections that stand for each noun phrase: those that make the sum of
/// the claims' scores largest, no detection used twice.
fn assign_objects<'a>(detections: &'a [Detection], caption: &Caption) -> Vec<Vec<&'a Detection>> {
    let specs = &caption.objects;
    if let (Some(relation), [a, b]) = (caption.relation, &specs[..])
        && a.instances() == 1
        && b.instances() == 1
        && detections.len() > 1
    {
        let mut best: Option<(f64, [&Detection; 2])> = None;
        for (i, d) in detections.iter().enumerate() {
            for (j, e) in detections.iter().enumerate() {
                if i == j {
                    continue;
                }
                let both = gate(exists(d, a)) * gate(exists(e, b));
                let total = fit(d, a) + fit(e, b) + both * related(relation, &[d], &[e]);
                if best.is_none_or(|(t, _)| total > t) {
                    best = Some((total, [d, e]));
                }
            }
        }
        return best.map_or(vec![vec![]; 2], |(_, [d, e])| vec![vec![d], vec![e]]);
    }
    let slots: Vec<usize> = specs
        .iter()
        .enumerate()
        .flat_map(|(i, o)| std::iter::repeat_n(i, o.instances() as usize))
        .collect();
    let chosen =
        assign(slots.len(), detections.len(), &|s, d| fit(&detections[d], &specs[slots[s]]));
    let mut groups = vec![Vec::new(); specs.len()];
    for (slot, detection) in chosen {
        groups[slots[slot]].push(&detections[detection]);
    }
    groups
}

/// That the detection is an object of the phrase's shape.
fn exists(d: &Detection, spec: &ObjectSpec) -> f64 {
    d.confidence * d.shape(spec.shape)
}

/// Attributes count fully once the object is more likely there than not.
fn gate(presence: f64) -> f64 {
    (2.0 * presence).min(1.0)
}

/// Sum of the scores of the phrase's own claims for one detection.
fn fit(d: &Detection, spec: &ObjectSpec) -> f64 {
    let exists = exists(d, spec);
    let colour = spec.colour.map_or(0.0, |c| d.colour(c));
    let texture = spec.texture.map_or(0.0, |t| d.texture(t));
    exists + gate(exists) * (colour + texture)
}

/// That some object of the group has the phrase's shape.
fn presence(group: &[&Detection], spec: &ObjectSpec) -> f64 {
    group.iter().map(|d| exists(d, spec)).fold(0.0, f64::max)
}

/// Mean of an attribute over the group, weighed by shape and gated by presence.
fn attribute(group: &[&Detection], spec: &ObjectSpec, of: impl Fn(&Detection) -> f64) -> f64 {
    let weights: f64 = group.iter().map(|d| exists(d, spec)).sum();
    if weights <= 0.0 {
        return 0.0;
    }
    let sum: f64 = group.iter().map(|d| exists(d, spec) * of(d)).sum();
    gate(presence(group, spec)) * sum / weights
}

/// The chance that exactly `n` of all detections match the phrase.
fn count(detections: &[Detection], spec: &ObjectSpec, n: usize) -> f64 {
    // chances[k]: that k of the detections so far match.
    let mut chances = vec![1.0];
    for d in detections {
        let p = exists(d, spec)
            * spec.colour.map_or(1.0, |c| d.colour(c))
            * spec.texture.map_or(1.0, |t| d.texture(t));
        // Doubts of several objects must not add up while each is likely enough.
        let (yes, no) = (p * p, (1.0 - p) * (1.0 - p));
        let p = yes / (yes + no);
        let mut next = vec![0.0; chances.len() + 1];
        for (k, c) in chances.iter().enumerate() {
            next[k] += c * (1.0 - p);
            next[k + 1] += c * p;
        }
        chances = next;
    }
    chances.get(n).copied().unwrap_or(0.0)
}

/// That the first group stands in `relation` to the second.
fn related(relation: Relation, first: &[&Detection], second: &[&Detection]) -> f64 {
    if first.is_empty() || second.is_empty() {
        return 0.0;
    }
    let centre = |group: &[&Detection], axis: usize| mean(group.iter().map(|d| d.centre[axis]));
    let (along, across) = relation
        .along_across(centre(first, 0) - centre(second, 0), centre(first, 1) - centre(second, 1));
    let margin = along - across.max(RELATION_OFFSET);
    1.0 / (1.0 + (-margin / RELATION_SOFTNESS).exp())
}

fn mean(values: impl ExactSizeIterator<Item = f64>) -> f64 {
    let n = values.len();
    if n == 0 { 0.0 } else { values.sum::<f64>() / n as f64 }
}
