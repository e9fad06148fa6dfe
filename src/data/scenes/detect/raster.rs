//! The image as numbers, its background, and what stands out from it.

use image::RgbImage;

/// Pixels on the shorter side above which an image is averaged down first.
const LARGE: usize = 256;

/// Noise above which the pixels are smoothed first.
const NOISY: f32 = 12.0;

pub(super) type Rgb = [f32; 3];

/// An image in linear memory with, for each pixel, how far it is from the background.
pub(super) struct Raster {
    pub width: usize,
    pub height: usize,
    /// The pixels, smoothed if there is much noise.
    pub pixels: Vec<Rgb>,
    /// The pixels as they are.
    pub raw: Vec<Rgb>,
    /// Euclidean distance from the background in RGB levels.
    pub contrast: Vec<f32>,
    /// Typical distance of a background pixel: the noise.
    pub noise: f32,
}

impl Raster {
    /// `None` if the image is too small to hold an object.
    pub(super) fn new(image: &RgbImage) -> Option<Self> {
        let (width, height, pixels) = load(image);
        if width.min(height) < 8 {
            return None;
        }
        let mut raster = Self {
            width,
            height,
            pixels: pixels.clone(),
            raw: pixels,
            contrast: vec![],
            noise: 0.0,
        };
        raster.measure();
        for _ in 0..2 {
            if raster.noise > NOISY {
                raster.smooth();
                raster.measure();
            }
        }
        Some(raster)
    }

    /// Estimates the background, and from it the contrast and the noise.
    fn measure(&mut self) {
        let background = Background::estimate(self.width, self.height, &self.pixels);
        let at = |k: usize| background.at(k % self.width, k / self.width);
        self.contrast = self.pixels.iter().enumerate().map(|(k, p)| distance(*p, at(k))).collect();
        self.noise = median(&mut self.contrast.clone());
    }

    /// Weighs each pixel 2:1 with its neighbours along both axes.
    fn smooth(&mut self) {
        let (w, h) = (self.width, self.height);
        let blend = |pixels: &[Rgb], k: usize, before: usize, after: usize| {
            let (a, m, b) = (pixels[before], pixels[k], pixels[after]);
            std::array::from_fn(|c| 0.25 * (a[c] + b[c]) + 0.5 * m[c])
        };
        let rows: Vec<Rgb> = (0..w * h)
            .map(|k| {
                let x = k % w;
                blend(&self.pixels, k, k - usize::from(x > 0), k + usize::from(x + 1 < w))
            })
            .collect();
        self.pixels = (0..w * h)
            .map(|k| {
                let y = k / w;
                blend(&rows, k, k - w * usize::from(y > 0), k + w * usize::from(y + 1 < h))
            })
            .collect();
    }

    pub(super) fn side(&self) -> f32 {
        self.width.min(self.height) as f32
    }
}

/// Copies the pixels, averaged over blocks if there are very many.
fn load(image: &RgbImage) -> (usize, usize, Vec<[f32; 3]>) {
    let (w, h) = (image.width() as usize, image.height() as usize);
    let block = (w.min(h) / (LARGE / 2)).max(1);
    let block = if w.min(h) < LARGE { 1 } else { block };
    let raw = image.as_raw();
    let (width, height) = (w / block, h / block);
    let mut pixels = Vec::with_capacity(width * height);
    let scale = 1.0 / (block * block) as f32;
    for y in 0..height {
        for x in 0..width {
            let mut sum = [0.0_f32; 3];
            for j in y * block..(y + 1) * block {
                for i in x * block..(x + 1) * block {
                    let at = (j * w + i) * 3;
                    (0..3).for_each(|c| sum[c] += f32::from(raw[at + c]));
                }
            }
            pixels.push(sum.map(|v| v * scale));
        }
    }
    (width, height, pixels)
}

pub(super) fn distance(a: [f32; 3], b: [f32; 3]) -> f32 {
    let d = [a[0] - b[0], a[1] - b[1], a[2] - b[2]];
    (d[0] * d[0] + d[1] * d[1] + d[2] * d[2]).sqrt()
}

pub(super) fn median(values: &mut [f32]) -> f32 {
    if values.is_empty() {
        return 0.0;
    }
    let middle = values.len() / 2;
    *values.select_nth_unstable_by(middle, f32::total_cmp).1
}

/// A colour that may change linearly down and across the image.
struct Background {
    /// For each channel: level in the middle, change a pixel in x and in y.
    plane: [[f32; 3]; 3],
    middle: (f32, f32),
}

impl Background {
    fn at(&self, x: usize, y: usize) -> [f32; 3] {
        let (dx, dy) = (x as f32 - self.middle.0, y as f32 - self.middle.1);
        self.plane.map(|p| p[0] + p[1] * dx + p[2] * dy)
    }

    /// Starts from the median of the border and fits a plane to ever more of
    /// the pixels that agree with it.
    fn estimate(width: usize, height: usize, pixels: &[[f32; 3]]) -> Self {
        let depth = (width.min(height) / 40).max(1);
        let border: Vec<usize> = (0..width * height)
            .filter(|k| {
                let (x, y) = (k % width, k / width);
                x < depth || y < depth || x + depth >= width || y + depth >= height
            })
            .collect();
        let level: [f32; 3] = std::array::from_fn(|c| {
            median(&mut border.iter().map(|&k| pixels[k][c]).collect::<Vec<_>>())
        });
        let middle = ((width - 1) as f32 / 2.0, (height - 1) as f32 / 2.0);
        let mut background = Self { plane: level.map(|l| [l, 0.0, 0.0]), middle };
        let all: Vec<usize> = (0..width * height).collect();
        for (among, tolerance) in [(&border, 45.0), (&border, 30.0), (&all, 24.0), (&all, 20.0)] {
            background.refit(width, pixels, among, tolerance);
        }
        background
    }

    /// Least squares over the pixels of `among` that are within `tolerance`.
    fn refit(&mut self, width: usize, pixels: &[[f32; 3]], among: &[usize], tolerance: f32) {
        let mut normal = [[0.0_f64; 3]; 3];
        let mut right = [[0.0_f64; 3]; 3];
        let mut used = 0;
        for &k in among {
            let (x, y) = (k % width, k / width);
            if distance(pixels[k], self.at(x, y)) > tolerance {
                continue;
            }
            used += 1;
            let basis =
                [1.0, f64::from(x as f32 - self.middle.0), f64::from(y as f32 - self.middle.1)];
            for i in 0..3 {
                (0..3).for_each(|j| normal[i][j] += basis[i] * basis[j]);
                (0..3).for_each(|c| right[c][i] += basis[i] * f64::from(pixels[k][c]));
            }
        }
        if used < 12 {
            return;
        }
        // A light pull to a flat background keeps the slopes tame.
        normal[1][1] += 1e-3 * normal[0][0];
        normal[2][2] += 1e-3 * normal[0][0];
        for (plane, right) in self.plane.iter_mut().zip(right) {
            if let Some(solution) = super::solve(normal, right) {
                *plane = solution.map(|v| v as f32);
            }
        }
    }
}
