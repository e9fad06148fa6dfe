//! Finds the objects in an image: where, which shape, which colour, which texture.

mod appearance;
mod raster;
mod segment;
mod template;

use image::RgbImage;
use serde::Serialize;

use super::vocabulary::{Colour, Shape, Texture};
use raster::Raster;
use segment::Region;
use template::Fit;

/// No image has more objects than this worth looking at; the largest are kept.
const MOST: usize = 12;
/// Softness of the choice between shapes, in units of overlap.
const SHAPE_SOFTNESS: f64 = 0.016;
/// A fit at least this good needs no attempt at parting the region.
const GOOD_FIT: f32 = 0.86;
/// Parts must fit at least this well, lest any blob be read as several shapes.
const GOOD_PARTS: f32 = 0.80;

/// One object found in an image. Positions are fractions of the width and the
/// height; the distributions are in the order of the words' `ALL`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Detection {
    /// Left, top, right, bottom.
    pub bbox: [f64; 4],
    pub centre: [f64; 2],
    /// As a fraction of the shorter side.
    pub radius: f64,
    pub shapes: [f64; 6],
    /// May sum to less than 1: the rest is "none of these colours".
    pub colours: [f64; 8],
    /// May sum to less than 1: the rest is "another pattern".
    pub textures: [f64; 3],
    /// Intersection over union with the best shape, in [0, 1].
    pub overlap: f64,
    /// That this is an object of the world at all.
    pub confidence: f64,
}

impl Detection {
    pub fn shape(&self, shape: Shape) -> f64 {
        self.shapes[shape as usize]
    }

    pub fn colour(&self, colour: Colour) -> f64 {
        self.colours[colour as usize]
    }

    pub fn texture(&self, texture: Texture) -> f64 {
        self.textures[texture as usize]
    }
}

/// Finds the objects of `image`, the largest first. Never fails: an image
/// without objects (or too small for any) gives an empty list.
pub fn detect(image: &RgbImage) -> Vec<Detection> {
    let Some(raster) = Raster::new(image) else { return Vec::new() };
    let mut regions = segment::regions(&raster);
    regions.sort_by_key(|r| std::cmp::Reverse(r.len()));
    regions.truncate(MOST);
    let mut finder = Finder { raster: &raster, owner: vec![0; raster.pixels.len()], labels: 0 };
    let objects: Vec<Object> = regions.into_iter().map(|r| finder.claim(r)).collect();
    let mut found: Vec<Object> = objects.into_iter().flat_map(|o| finder.part(o, 3)).collect();
    found.sort_by_key(|o| std::cmp::Reverse(o.region.len()));
    found.truncate(MOST);
    found.iter().map(|o| describe(&raster, o)).collect()
}

struct Object {
    region: Region,
    label: u32,
    fits: Vec<Fit>,
}

impl Object {
    fn best(&self) -> Fit {
        let mut best = self.fits[0];
        for fit in &self.fits[1..] {
            if fit.iou > best.iou {
                best = *fit;
            }
        }
        best
    }
}

struct Finder<'a> {
    raster: &'a Raster,
    /// For each pixel, the label of its object; 0 is the background.
    owner: Vec<u32>,
    labels: u32,
}

impl Finder<'_> {
    /// Marks the pixels of a region as its own. Shapes are fitted later, when
    /// all regions are known.
    fn claim(&mut self, region: Region) -> Object {
        self.labels += 1;
        region.iter().for_each(|&k| self.owner[k] = self.labels);
        Object { region, label: self.labels, fits: Vec::new() }
    }

    fn fit(&self, object: &mut Object) {
        let patch = segment::patch(self.raster, &object.region, &self.owner, object.label);
        object.fits = patch.fit();
    }

    /// Fits shapes; a region that no shape fits well is parted if its parts fit better.
    fn part(&mut self, mut object: Object, depth: u32) -> Vec<Object> {
        self.fit(&mut object);
        let whole = object.best().iou;
        if whole >= GOOD_FIT || depth == 0 {
            return vec![object];
        }
        let ways = [
            segment::split_by_colour(self.raster, &object.region),
            segment::split_by_place(self.raster, &object.region),
        ];
        for regions in ways.into_iter().flatten() {
            let claimed: Vec<Object> = regions.into_iter().map(|r| self.claim(r)).collect();
            let parts: Vec<Object> =
                claimed.into_iter().flat_map(|o| self.part(o, depth - 1)).collect();
            let pixels: usize = parts.iter().map(|p| p.region.len()).sum();
            let fit: f32 = parts.iter().map(|p| p.best().iou * p.region.len() as f32).sum::<f32>()
                / pixels.max(1) as f32;
            if fit > GOOD_PARTS.max(whole + 0.06) {
                return parts;
            }
            object.region.iter().for_each(|&k| self.owner[k] = object.label);
        }
        vec![object]
    }
}

fn describe(raster: &Raster, object: &Object) -> Detection {
    let best = object.best();
    let inside = appearance::interior(raster, &object.region, &best);
    let colours = appearance::colours(raster, &inside);
    let likeliest = (0..8).fold(0, |b, k| if colours[k] > colours[b] { k } else { b });
    let (w, h) = (raster.width, raster.height);
    let (mut x0, mut y0, mut x1, mut y1) = (w, h, 0, 0);
    for &k in &object.region {
        (x0, x1) = (x0.min(k % w), x1.max(k % w + 1));
        (y0, y1) = (y0.min(k / w), y1.max(k / w + 1));
    }
    let (w, h) = (w as f64, h as f64);
    Detection {
        bbox: [x0 as f64 / w, y0 as f64 / h, x1 as f64 / w, y1 as f64 / h],
        centre: [f64::from(best.x) / w, f64::from(best.y) / h],
        radius: f64::from(best.radius / raster.side()),
        shapes: shapes(&object.fits, best.iou),
        textures: appearance::textures(raster, &inside, likeliest),
        colours,
        overlap: f64::from(best.iou),
        confidence: confidence(raster, object, &inside, best),
    }
}

/// Softmax of the overlaps.
fn shapes(fits: &[Fit], best: f32) -> [f64; 6] {
    let mut p = [0.0; 6];
    for fit in fits {
        p[fit.shape] = (f64::from(fit.iou - best) / SHAPE_SOFTNESS).exp();
    }
    let total: f64 = p.iter().sum();
    p.map(|v| v / total)
}

/// An object of the world fits some shape, stands out, and is neither a speck
/// nor most of the image.
fn confidence(raster: &Raster, object: &Object, inside: &[usize], best: Fit) -> f64 {
    // The same error along the outline costs a small or thin shape more overlap.
    let even = 0.82 - 0.12 * f64::from(best.outline());
    let mut contrast: Vec<f32> = inside.iter().map(|&k| raster.contrast[k]).collect();
    let contrast = f64::from(raster::median(&mut contrast));
    let area = object.region.len() as f64 / f64::from(raster.side()).powi(2);
    logistic((f64::from(best.iou) - even) / 0.032)
        * logistic((contrast - 45.0) / 6.0)
        * logistic((area - 0.008) / 0.0012)
        * logistic((0.55 - area) / 0.03)
}

fn logistic(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// Gaussian elimination with pivoting; `None` if the system is singular.
fn solve<const N: usize>(mut a: [[f64; N]; N], mut b: [f64; N]) -> Option<[f64; N]> {
    for i in 0..N {
        let pivot = (i..N).max_by(|&p, &q| a[p][i].abs().total_cmp(&a[q][i].abs()))?;
        a.swap(i, pivot);
        b.swap(i, pivot);
        if a[i][i].abs() < 1e-12 {
            return None;
        }
        let row = a[i];
        for j in i + 1..N {
            let f = a[j][i] / row[i];
            a[j].iter_mut().zip(row).skip(i).for_each(|(cell, above)| *cell -= f * above);
            b[j] -= f * b[i];
        }
    }
    for i in (0..N).rev() {
        for k in i + 1..N {
            b[i] -= a[i][k] * b[k];
        }
        b[i] /= a[i][i];
    }
    b.iter().all(|v| v.is_finite()).then_some(b)
}
