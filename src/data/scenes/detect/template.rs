//! Fits the six shapes, in centre and radius, to a soft mask.

use std::sync::LazyLock;

use super::super::vocabulary::Shape;

/// Half the width of a template's distance field, in radii.
const EXTENT: f32 = 1.6;
/// Nodes of the distance field along an axis.
const NODES: usize = 65;
/// Samples an axis when tracing a shape's outline.
const TRACE: usize = 176;
/// How much steeper than a pixel's coverage an edge is taken, in the mask and in
/// the template alike, so that a little blur costs little.
pub(super) const GAIN: f32 = 1.6;
/// A shape whose first fit is this much worse than the best is not refined.
const BEHIND: f32 = 0.15;

/// One shape as a signed distance field (negative inside) in units of its radius.
pub(super) struct Template {
    distance: Vec<f32>,
    /// Area for radius 1.
    area: f32,
    /// Length of the outline for each unit of area, for radius 1.
    outline: f32,
    /// How far the centroid lies below the centre, for radius 1.
    centroid: f32,
}

/// The templates, in the order of `Shape::ALL`.
pub(super) static TEMPLATES: LazyLock<Vec<Template>> =
    LazyLock::new(|| Shape::ALL.iter().map(|&s| Template::new(s)).collect());

impl Template {
    fn new(shape: Shape) -> Self {
        let step = 2.2 / TRACE as f64;
        let at = |i: usize| -1.1 + (i as f64 + 0.5) * step;
        let inside = |i: usize, j: usize| shape.contains(at(i), at(j));
        let (mut edge, mut count, mut sum_y) = (Vec::new(), 0.0, 0.0);
        for j in 0..TRACE {
            for i in 0..TRACE {
                let here = inside(i, j);
                if here {
                    count += 1.0;
                    sum_y += at(j);
                }
                if i + 1 < TRACE && inside(i + 1, j) != here {
                    edge.push([(at(i) + step / 2.0) as f32, at(j) as f32]);
                }
                if j + 1 < TRACE && inside(i, j + 1) != here {
                    edge.push([at(i) as f32, (at(j) + step / 2.0) as f32]);
                }
            }
        }
        let node = |k: usize| -EXTENT + k as f32 * 2.0 * EXTENT / (NODES - 1) as f32;
        let distance = (0..NODES * NODES)
            .map(|k| {
                let (x, y) = (node(k % NODES), node(k / NODES));
                let d2 = edge
                    .iter()
                    .map(|e| (e[0] - x) * (e[0] - x) + (e[1] - y) * (e[1] - y))
                    .fold(f32::INFINITY, f32::min);
                let inside = shape.contains(f64::from(x), f64::from(y));
                if inside { -d2.sqrt() } else { d2.sqrt() }
            })
            .collect();
        let area = (count * step * step) as f32;
        // Counted on a grid, a line is on average 4/pi times its length.
        let length = edge.len() as f32 * step as f32 * std::f32::consts::FRAC_PI_4;
        Self {
            distance,
            area,
            outline: length / area.max(1e-3),
            centroid: (sum_y / f64::max(count, 1.0)) as f32,
        }
    }

    /// Signed distance at (x, y) in radii; beyond the field a large one.
    #[inline]
    fn at(&self, x: f32, y: f32) -> f32 {
        const SCALE: f32 = (NODES - 1) as f32 / (2.0 * EXTENT);
        let (u, v) = ((x + EXTENT) * SCALE, (y + EXTENT) * SCALE);
        let last = (NODES - 1) as f32;
        if !(u >= 0.0 && v >= 0.0 && u < last && v < last) {
            return EXTENT;
        }
        let (i, j) = (u as usize, v as usize);
        let (fu, fv) = (u - i as f32, v - j as f32);
        let k = j * NODES + i;
        let d = &self.distance;
        let top = d[k] + (d[k + 1] - d[k]) * fu;
        let bottom = d[k + NODES] + (d[k + NODES + 1] - d[k + NODES]) * fu;
        top + (bottom - top) * fv
    }
}

/// How much of each pixel of a window an object covers, in [0, 1].
pub(super) struct Patch {
    pub x0: usize,
    pub y0: usize,
    pub width: usize,
    pub alpha: Vec<f32>,
}

/// A shape laid over a patch; lengths in pixels of the image.
#[derive(Clone, Copy)]
pub(super) struct Fit {
    pub shape: usize,
    pub x: f32,
    pub y: f32,
    pub radius: f32,
    /// Soft intersection over union of the patch and the shape.
    pub iou: f32,
}

impl Fit {
    /// Pixels of outline for each pixel of area.
    pub(super) fn outline(&self) -> f32 {
        TEMPLATES[self.shape].outline / self.radius
    }

    /// Signed distance of a point of the image to the outline, in pixels.
    pub(super) fn distance(&self, x: f32, y: f32) -> f32 {
        let r = self.radius;
        TEMPLATES[self.shape].at((x - self.x) / r, (y - self.y) / r) * r
    }
}

impl Patch {
    fn iou(&self, fit: &Fit, stride: usize) -> f32 {
        let template = &TEMPLATES[fit.shape];
        let inverse = 1.0 / fit.radius;
        let slope = GAIN * fit.radius / stride as f32;
        let (mut both, mut either) = (0.0, 0.0);
        for (j, row) in self.alpha.chunks(self.width).enumerate().step_by(stride) {
            let y = ((self.y0 + j) as f32 + 0.5 - fit.y) * inverse;
            for i in (0..self.width).step_by(stride) {
                let x = ((self.x0 + i) as f32 + 0.5 - fit.x) * inverse;
                let cover = (0.5 - template.at(x, y) * slope).clamp(0.0, 1.0);
                both += cover.min(row[i]);
                either += cover.max(row[i]);
            }
        }
        if either > 0.0 { both / either } else { 0.0 }
    }

    /// The best fit of each shape, in the order of `Shape::ALL`. Shapes that
    /// start far behind keep the fit from their moments.
    pub(super) fn fit(&self) -> Vec<Fit> {
        let (mut area, mut mx, mut my) = (0.0_f32, 0.0, 0.0);
        for (k, &a) in self.alpha.iter().enumerate() {
            area += a;
            mx += a * ((self.x0 + k % self.width) as f32 + 0.5);
            my += a * ((self.y0 + k / self.width) as f32 + 0.5);
        }
        let area = area.max(1e-3);
        let (mx, my) = (mx / area, my / area);
        let stride = ((area.sqrt() / 16.0) as usize).max(1);
        let mut fits: Vec<Fit> = TEMPLATES
            .iter()
            .enumerate()
            .map(|(shape, t)| {
                let radius = (area / t.area).sqrt().max(0.5);
                let mut fit = Fit { shape, x: mx, y: my - t.centroid * radius, radius, iou: 0.0 };
                fit.iou = self.iou(&fit, stride);
                fit
            })
            .collect();
        let first = fits.iter().map(|f| f.iou).fold(0.0, f32::max);
        for fit in &mut fits {
            if fit.iou > first - BEHIND {
                *fit = self.refine(*fit, stride);
            }
        }
        fits
    }

    /// Coordinate descent in centre and radius.
    fn refine(&self, mut best: Fit, stride: usize) -> Fit {
        let mut step = (0.06 * best.radius).max(0.3);
        for _ in 0..3 {
            for _ in 0..2 {
                let before = best.iou;
                for axis in 0..3 {
                    for sign in [-1.0, 1.0] {
                        let mut next = best;
                        match axis {
                            0 => next.x += sign * step,
                            1 => next.y += sign * step,
                            _ => next.radius = (next.radius + sign * step).max(0.5),
                        }
                        next.iou = self.iou(&next, stride);
                        if next.iou > best.iou {
                            best = next;
                            break;
                        }
                    }
                }
                if best.iou <= before {
                    break;
                }
            }
            step *= 0.5;
        }
        best
    }
}
