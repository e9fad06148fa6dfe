//! From a caption to a scene: where each object stands, how large, in what colour.

use rand::Rng;

use super::grammar::{Caption, ObjectSpec};
use super::vocabulary::{Colour, Relation, Shape, Texture};

/// One object of a scene; lengths are fractions of the image's side.
#[derive(Clone, Debug, PartialEq)]
pub struct Placed {
    pub shape: Shape,
    pub colour: Colour,
    pub texture: Texture,
    pub x: f64,
    pub y: f64,
    pub radius: f64,
}

/// Everything that the renderer draws.
#[derive(Clone, Debug, PartialEq)]
pub struct Scene {
    /// sRGB at the top and at the bottom, blended between.
    pub background: [[f64; 3]; 2],
    pub objects: Vec<Placed>,
}

/// Mid-tones that every colour and both its tones stand out from.
const BACKGROUNDS: [[f64; 3]; 6] = [
    [148.0, 150.0, 154.0],
    [136.0, 150.0, 164.0],
    [162.0, 150.0, 136.0],
    [142.0, 158.0, 146.0],
    [160.0, 146.0, 156.0],
    [128.0, 132.0, 140.0],
];

const MARGIN: f64 = 0.03;
const GAP: f64 = 0.055;

impl Scene {
    /// Draws a scene that shows `caption`: what the caption leaves open is random.
    pub fn sample(caption: &Caption, rng: &mut impl Rng) -> Self {
        let base = BACKGROUNDS[rng.random_range(0..BACKGROUNDS.len())];
        let (shift, slope) = (rng.random_range(-6.0..6.0), rng.random_range(-7.0..7.0));
        let background = [base.map(|c| c + shift - slope), base.map(|c| c + shift + slope)];
        let specs: Vec<&ObjectSpec> = caption
            .objects
            .iter()
            .flat_map(|o| std::iter::repeat_n(o, o.instances() as usize))
            .collect();
        let places = place(specs.len(), caption.relation, rng);
        let objects = specs
            .iter()
            .zip(places)
            .map(|(spec, (x, y, radius))| Placed {
                shape: spec.shape,
                colour: spec.colour.unwrap_or_else(|| any(rng, Colour::ALL)),
                texture: spec.texture.unwrap_or(Texture::Plain),
                x,
                y,
                radius,
            })
            .collect();
        Self { background, objects }
    }
}

fn any<T: Copy>(rng: &mut impl Rng, of: &[T]) -> T {
    of[rng.random_range(0..of.len())]
}

/// Rejection sampling; radii shrink slowly if the image is too full.
fn place(n: usize, relation: Option<Relation>, rng: &mut impl Rng) -> Vec<(f64, f64, f64)> {
    let (low, high) = match n {
        1 => (0.2, 0.34),
        2 => (0.15, 0.215),
        3 => (0.135, 0.175),
        _ => (0.125, 0.155),
    };
    let mut shrink = 1.0;
    loop {
        for _ in 0..200 {
            let candidate: Vec<(f64, f64, f64)> = (0..n)
                .map(|_| {
                    let r = rng.random_range(low..high) * shrink;
                    let range = (r + MARGIN)..(1.0 - r - MARGIN);
                    (rng.random_range(range.clone()), rng.random_range(range), r)
                })
                .collect();
            if fits(&candidate, relation) {
                return candidate;
            }
        }
        shrink *= 0.96;
    }
}

fn fits(places: &[(f64, f64, f64)], relation: Option<Relation>) -> bool {
    for (i, a) in places.iter().enumerate() {
        for b in &places[i + 1..] {
            if (a.0 - b.0).hypot(a.1 - b.1) < a.2 + b.2 + GAP {
                return false;
            }
        }
    }
    match (relation, places) {
        (Some(relation), [a, b]) => {
            let (along, across) = relation.along_across(a.0 - b.0, a.1 - b.1);
            along > 0.3 && along > 1.5 * across
        }
        _ => true,
    }
}
