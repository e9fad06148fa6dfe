//! Group normalisation of channels-last images, optionally with SiLU: values and gradients on
//! slices. Sums run over channels in vectors and over positions in pieces of fixed size, so
//! results do not depend on threads or on the batch.

use rayon::prelude::*;

use super::kernel::{PARALLEL_FROM, Real, sigmoid, uninitialised};
use super::simd::{Level, vectorised};

/// Positions that one task takes, and after which sums go over to f64.
const PIECE: usize = 128;

/// What is normalised: [batch, positions, channels].
#[derive(Clone, Copy, Debug)]
pub struct Groups {
    pub batch: usize,
    pub positions: usize,
    pub channels: usize,
    pub groups: usize,
    pub eps: f64,
    pub silu: bool,
}

/// Mean and reciprocal standard deviation of every group of every image.
pub struct Statistics(Vec<(f64, f64)>);

impl Groups {
    fn image(&self) -> usize {
        self.positions * self.channels
    }

    fn parallel(&self) -> bool {
        self.batch * self.image() >= PARALLEL_FROM
    }

    /// Sums of every channel over an image's positions: `each` adds a piece's sums of two
    /// kinds to its arguments.
    fn sums<T: Real>(&self, each: impl Fn(usize, &mut [T], &mut [T]) + Sync) -> [Vec<f64>; 2] {
        let piece = |i: usize| {
            let mut sums = [vec![T::ZERO; self.channels], vec![T::ZERO; self.channels]];
            let [a, b] = &mut sums;
            each(i, a, b);
            sums
        };
        let pieces = self.positions.div_ceil(PIECE);
        let all: Vec<[Vec<T>; 2]> = if self.parallel() {
            (0..pieces).into_par_iter().map(piece).collect()
        } else {
            (0..pieces).map(piece).collect()
        };
        let mut total = [vec![0.0; self.channels], vec![0.0; self.channels]];
        for piece in all {
            for (total, piece) in total.iter_mut().zip(piece) {
                total.iter_mut().zip(piece).for_each(|(t, p)| *t += p.to_f64());
            }
        }
        total
    }

    /// One image's groups. Around each channel's first value, so that squares do not cancel.
    fn statistics<T: Real>(&self, level: Level, image: &[T]) -> Vec<(f64, f64)> {
        let (c, n) = (self.channels, self.positions as f64);
        let pilot = &image[..c];
        let [sums, squares] = self.sums(|i, sums, squares| {
            let rows = &image[i * PIECE * c..self.image().min((i + 1) * PIECE * c)];
            moments(level, rows, pilot, sums, squares);
        });
        let width = c / self.groups;
        (0..self.groups)
            .map(|g| {
                let channels = g * width..(g + 1) * width;
                let at = |i: usize| pilot[i].to_f64();
                let means = channels.clone().map(|i| at(i) + sums[i] / n);
                let mean = means.sum::<f64>() / width as f64;
                let variances = channels.map(|i| {
                    let shift = at(i) - mean;
                    squares[i] / n + 2.0 * shift * sums[i] / n + shift * shift
                });
                let variance = variances.sum::<f64>().max(0.0) / width as f64;
                (mean, 1.0 / (variance + self.eps).sqrt())
            })
            .collect()
    }

    /// Runs `each(level, piece of to, pieces of a and b)` over an image.
    fn pieces<T: Real>(
        &self,
        to: &mut [T],
        a: &[T],
        b: &[T],
        each: impl Fn(&mut [T], &[T], &[T]) + Sync,
    ) {
        let length = PIECE * self.channels;
        if self.parallel() {
            to.par_chunks_mut(length)
                .zip(a.par_chunks(length).zip(b.par_chunks(length)))
                .for_each(|(to, (a, b))| each(to, a, b));
        } else {
            each(to, a, b);
        }
    }

    /// Per channel: factor and summand that take x to x̂·w + b.
    fn affine<T: Real>(&self, statistics: &[(f64, f64)], w: &[T], b: &[T]) -> (Vec<T>, Vec<T>) {
        let width = self.channels / self.groups;
        let each = |c: usize| {
            let (mean, scale) = statistics[c / width];
            let factor = w[c].to_f64() * scale;
            (T::from_f64(factor), T::from_f64(b[c].to_f64() - mean * factor))
        };
        (0..self.channels).map(each).unzip()
    }
}

vectorised! {
    fn moments<T: Real>(rows: &[T], pilot: &[T], sums: &mut [T], squares: &mut [T]) {
        let c = pilot.len();
        let (sums, squares) = (&mut sums[..c], &mut squares[..c]);
        for row in rows.chunks_exact(c) {
            for i in 0..c {
                let d = row[i] - pilot[i];
                sums[i] += d;
                squares[i] += d * d;
            }
        }
    }
}

vectorised! {
    fn normalise<T: Real>(x: &[T], factor: &[T], summand: &[T], silu: bool, y: &mut [T]) {
        let c = factor.len();
        let summand = &summand[..c];
        for (y, x) in y.chunks_exact_mut(c).zip(x.chunks_exact(c)) {
            if silu {
                for i in 0..c {
                    let z = x[i] * factor[i] + summand[i];
                    y[i] = z * sigmoid(z);
                }
            } else {
                for i in 0..c {
                    y[i] = x[i] * factor[i] + summand[i];
                }
            }
        }
    }
}

pub fn forward<T: Real>(g: &Groups, x: &[T], w: &[T], b: &[T]) -> (Vec<T>, Statistics) {
    let level = Level::current();
    let mut y = uninitialised(x.len());
    if x.is_empty() {
        return (y, Statistics(Vec::new()));
    }
    let mut all = Vec::with_capacity(g.batch * g.groups);
    for (y, x) in y.chunks_exact_mut(g.image()).zip(x.chunks_exact(g.image())) {
        let statistics = g.statistics(level, x);
        let (factor, summand) = g.affine(&statistics, w, b);
        g.pieces(y, x, x, |y, x, _| normalise(level, x, &factor, &summand, g.silu, y));
        all.extend(statistics);
    }
    (y, Statistics(all))
}

vectorised! {
    /// dz = dy · silu'(z) with z = x · factor + summand; dy itself without SiLU.
    fn activated<T: Real>(
        x: &[T], dy: &[T], factor: &[T], summand: &[T], silu: bool, dz: &mut [T],
    ) {
        if !silu {
            dz.copy_from_slice(dy);
            return;
        }
        let c = factor.len();
        let summand = &summand[..c];
        let rows = x.chunks_exact(c).zip(dy.chunks_exact(c));
        for (dz, (x, dy)) in dz.chunks_exact_mut(c).zip(rows) {
            for i in 0..c {
                let z = x[i] * factor[i] + summand[i];
                let s = sigmoid(z);
                dz[i] = dy[i] * s * (T::ONE + z * (T::ONE - s));
            }
        }
    }
}

vectorised! {
    /// Adds Σ dz and Σ dz · (x − pilot) over rows.
    fn products<T: Real>(
        x: &[T], dz: &[T], pilot: &[T], sums: &mut [T], dots: &mut [T],
    ) {
        let c = pilot.len();
        let (sums, dots) = (&mut sums[..c], &mut dots[..c]);
        for (dz, x) in dz.chunks_exact(c).zip(x.chunks_exact(c)) {
            for i in 0..c {
                sums[i] += dz[i];
                dots[i] += dz[i] * (x[i] - pilot[i]);
            }
        }
    }
}

vectorised! {
    /// `dz = dz · a + x · b + c`
    fn combine<T: Real>(x: &[T], a: &[T], b: &[T], c: &[T], dz: &mut [T]) {
        let n = a.len();
        let (b, c) = (&b[..n], &c[..n]);
        for (dz, x) in dz.chunks_exact_mut(n).zip(x.chunks_exact(n)) {
            for i in 0..n {
                dz[i] = dz[i] * a[i] + x[i] * b[i] + c[i];
            }
        }
    }
}

/// dx, dw, db. With z = x̂·w + b and y = z or silu(z):
/// dx = (w·dz − mean(w·dz) − x̂·mean(w·dz·x̂)) / σ over a group.
pub fn backward<T: Real>(
    g: &Groups,
    statistics: &Statistics,
    x: &[T],
    w: &[T],
    b: &[T],
    dy: &[T],
) -> (Vec<T>, Vec<T>, Vec<T>) {
    let level = Level::current();
    let (c, width) = (g.channels, g.channels / g.groups);
    let mut dx = uninitialised(x.len());
    let (mut dw, mut db) = (vec![0.0; c], vec![0.0; c]);
    if !x.is_empty() {
        let images = x.chunks_exact(g.image()).zip(dy.chunks_exact(g.image()));
        let images = images.zip(statistics.0.chunks_exact(g.groups));
        for (dx, ((x, dy), statistics)) in dx.chunks_exact_mut(g.image()).zip(images) {
            let (factor, summand) = g.affine(statistics, w, b);
            g.pieces(dx, x, dy, |dz, x, dy| {
                activated(level, x, dy, &factor, &summand, g.silu, dz);
            });
            // The groups' means, so that x̂ needs no difference of large sums.
            let pilot: Vec<T> = (0..c).map(|i| T::from_f64(statistics[i / width].0)).collect();
            let dz = &*dx;
            let [sums, dots] = g.sums(|i, sums, dots| {
                let piece = i * PIECE * c..g.image().min((i + 1) * PIECE * c);
                products(level, &x[piece.clone()], &dz[piece], &pilot, sums, dots);
            });
            let n = (g.positions * width) as f64;
            let mut terms = (Vec::with_capacity(c), Vec::with_capacity(c), Vec::with_capacity(c));
            for (group, (mean, scale)) in statistics.iter().enumerate() {
                let channels = group * width..(group + 1) * width;
                let (mut sum, mut dot) = (0.0, 0.0);
                for i in channels.clone() {
                    sum += w[i].to_f64() * sums[i] / n;
                    dot += w[i].to_f64() * dots[i] * scale / n;
                    dw[i] += dots[i] * scale;
                    db[i] += sums[i];
                }
                for i in channels {
                    terms.0.push(T::from_f64(w[i].to_f64() * scale));
                    terms.1.push(T::from_f64(-scale * scale * dot));
                    terms.2.push(T::from_f64(scale * (mean * scale * dot - sum)));
                }
            }
            g.pieces(dx, x, x, |dz, x, _| combine(level, x, &terms.0, &terms.1, &terms.2, dz));
        }
    }
    let numbers = |v: Vec<f64>| v.into_iter().map(T::from_f64).collect();
    (dx, numbers(dw), numbers(db))
}
