//! The colour and the texture of an object whose outline is known.

use std::f32::consts::TAU;

use super::super::vocabulary::{Colour, TEXTURE_CELLS};
use super::raster::{Raster, Rgb};
use super::template::Fit;

/// Spread of a colour around its two tones, in RGB levels.
const SPREAD: f32 = 18.0;
/// No pixel counts as farther from a colour than this.
const FARTHEST: f32 = 85.0;
/// Mean distance at which "none of the eight" becomes as likely as a colour.
const NO_COLOUR: f32 = 58.0;

/// Modulation (as a share of the step between the tones) that makes a texture.
const TEXTURED: f32 = 0.10;
/// Angle between the vertical and the horizontal modulation that parts stripes from dots.
const DOT_ANGLE: f32 = 0.42;

fn tones(colour: Colour) -> [Rgb; 2] {
    [colour.rgb(), colour.second_tone()].map(|t| t.map(f32::from))
}

/// Squared distance of `p` to the segment between a colour's two tones.
fn squared_distance(p: Rgb, [fill, second]: &[Rgb; 2]) -> f32 {
    let axis: Rgb = std::array::from_fn(|c| second[c] - fill[c]);
    let from: Rgb = std::array::from_fn(|c| p[c] - fill[c]);
    let t = (dot(from, axis) / dot(axis, axis)).clamp(0.0, 1.0);
    let rest: Rgb = std::array::from_fn(|c| from[c] - t * axis[c]);
    dot(rest, rest)
}

fn dot(a: Rgb, b: Rgb) -> f32 {
    a[0] * b[0] + a[1] * b[1] + a[2] * b[2]
}

/// Index of the colour whose tones are nearest.
pub(super) fn nearest_colour(p: Rgb) -> usize {
    let mut best = (f32::INFINITY, 0);
    for (k, &colour) in Colour::ALL.iter().enumerate() {
        let d = squared_distance(p, &tones(colour));
        if d < best.0 {
            best = (d, k);
        }
    }
    best.1
}

/// Pixels well inside the outline, free of the background.
pub(super) fn interior(raster: &Raster, region: &[usize], fit: &Fit) -> Vec<usize> {
    let depth =
        |k: usize| -fit.distance((k % raster.width) as f32 + 0.5, (k / raster.width) as f32 + 0.5);
    for least in [1.3, 0.7, 0.0] {
        let inside: Vec<usize> = region.iter().copied().filter(|&k| depth(k) >= least).collect();
        if inside.len() >= 24 || inside.len() * 3 >= region.len() {
            return inside;
        }
    }
    region.to_vec()
}

/// How likely each colour of `Colour::ALL` is; what is missing to 1 is "none of them".
pub(super) fn colours(raster: &Raster, inside: &[usize]) -> [f64; 8] {
    let palette: [[Rgb; 2]; 8] = std::array::from_fn(|k| tones(Colour::ALL[k]));
    let mut energy = [0.0_f32; 8];
    for &k in inside {
        for (e, tones) in energy.iter_mut().zip(&palette) {
            *e += squared_distance(raster.pixels[k], tones).min(FARTHEST * FARTHEST);
        }
    }
    let n = inside.len().max(1) as f32;
    let energy = energy.map(|e| e / n);
    let least = energy.iter().copied().fold(NO_COLOUR * NO_COLOUR, f32::min);
    let weight = |e: f32| f64::from((least - e) / (2.0 * SPREAD * SPREAD)).exp();
    let total: f64 = energy.iter().map(|&e| weight(e)).sum::<f64>() + weight(NO_COLOUR * NO_COLOUR);
    energy.map(|e| weight(e) / total)
}

/// How likely plain, striped and dotted are; what is missing to 1 is another
/// pattern (upright stripes). `colour` indexes `Colour::ALL`.
pub(super) fn textures(raster: &Raster, inside: &[usize], colour: usize) -> [f64; 3] {
    let (down, across) = modulation(raster, inside, colour);
    let strength = down.hypot(across);
    let textured = super::logistic(f64::from((strength - TEXTURED) / 0.02));
    let angle = across.atan2(down);
    let dotted = super::logistic(f64::from((angle - DOT_ANGLE) / 0.06));
    let upright = super::logistic(f64::from((angle - 1.2) / 0.06));
    [1.0 - textured, textured * (1.0 - dotted), textured * dotted * (1.0 - upright)]
}

/// Amplitudes of the texture's frequency along y and along x, in units of the
/// step between the colour's tones, by least squares over the inside.
fn modulation(raster: &Raster, inside: &[usize], colour: usize) -> (f32, f32) {
    const TERMS: usize = 7;
    let period = raster.side() / TEXTURE_CELLS as f32;
    if period < 1.9 || inside.len() < 2 * TERMS {
        return (0.0, 0.0);
    }
    let [fill, second] = tones(Colour::ALL[colour]);
    let axis: Rgb = std::array::from_fn(|c| second[c] - fill[c]);
    let scale = 1.0 / dot(axis, axis);
    let (mut normal, mut right) = ([[0.0_f64; TERMS]; TERMS], [0.0_f64; TERMS]);
    let n = inside.len() as f32;
    let sum = inside.iter().fold((0.0, 0.0), |s, &k| {
        (s.0 + (k % raster.width) as f32, s.1 + (k / raster.width) as f32)
    });
    let middle = (sum.0 / n, sum.1 / n);
    for &k in inside {
        let (x, y) = ((k % raster.width) as f32 - middle.0, (k / raster.width) as f32 - middle.1);
        let p = raster.raw[k];
        let tone = dot(std::array::from_fn(|c| p[c] - fill[c]), axis) * scale;
        let (sin_y, cos_y) = (TAU * y / period).sin_cos();
        let (sin_x, cos_x) = (TAU * x / period).sin_cos();
        let basis = [1.0, x / period, y / period, cos_y, sin_y, cos_x, sin_x].map(f64::from);
        for ((row, r), b) in normal.iter_mut().zip(&mut right).zip(basis) {
            row.iter_mut().zip(basis).for_each(|(cell, other)| *cell += b * other);
            *r += b * f64::from(tone.clamp(-0.5, 1.5));
        }
    }
    for (i, row) in normal.iter_mut().enumerate() {
        row[i] += 0.02 * f64::from(n);
    }
    let Some(w) = super::solve(normal, right) else { return (0.0, 0.0) };
    // A pixel averages over its width, which weakens a short period.
    let half = std::f32::consts::PI / period;
    let blur = half.sin() / half;
    let amplitude = |a: f64, b: f64| a.hypot(b) as f32 / blur.max(0.3);
    (amplitude(w[3], w[4]), amplitude(w[5], w[6]))
}
