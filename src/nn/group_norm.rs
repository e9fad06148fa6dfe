//! Group normalisation of channels-last images, optionally with SiLU: values and gradients on
//! slices. Sums run over channels in vectors and over positions in pieces of fixed size, so
//! results do not depend on threads or on the batch.

use super::kernel::{PARALLEL_FROM, Real, sigmoid, uninitialised};
use super::simd::{Level, vectorised};
use super::threads;

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

    /// What `each(piece, range of the image)` gives for every piece of an image's positions.
    fn over_pieces<R: Send>(
        &self,
        each: impl Fn(std::ops::Range<usize>) -> R + Sync + Send,
    ) -> Vec<R> {
        let length = PIECE * self.channels;
        threads::map(self.positions.div_ceil(PIECE), self.parallel(), |i| {
            each(i * length..self.image().min((i + 1) * length))
        })
    }

    /// One image's groups: every piece's channels about their own means, so that no outlier
    /// makes squares cancel, then all together (Chan, Golub and LeVeque 1983).
    fn statistics<T: Real>(&self, level: Level, image: &[T]) -> Vec<(f64, f64)> {
        let (c, width) = (self.channels, self.channels / self.groups);
        let pieces = self.over_pieces(|range| {
            let rows = &image[range];
            let mut sums = vec![T::ZERO; 3 * c];
            let (means, rest) = sums.split_at_mut(c);
            let (sums, squares) = rest.split_at_mut(c);
            moments(level, rows, means, sums, squares);
            let n = (rows.len() / c) as f64;
            let channel = |i: usize| {
                let (mean, sum) = (means[i].to_f64(), sums[i].to_f64());
                (n, mean + sum / n, (squares[i].to_f64() - sum * sum / n).max(0.0))
            };
            (0..c).map(channel).collect::<Vec<_>>()
        });
        (0..self.groups)
            .map(|g| {
                let (mut count, mut mean, mut deviation) = (0.0, 0.0, 0.0);
                let parts = pieces.iter().flat_map(|piece| &piece[g * width..(g + 1) * width]);
                for (n, part, squares) in parts {
                    let (total, difference) = (count + n, part - mean);
                    mean += difference * n / total;
                    deviation += squares + difference * difference * count * n / total;
                    count = total;
                }
                (mean, 1.0 / (deviation / count + self.eps).sqrt())
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
        threads::chunks(to, length, self.parallel(), |i, to| {
            let piece = i * length..i * length + to.len();
            each(to, &a[piece.clone()], &b[piece]);
        });
    }

    /// Per channel: what takes x to x̂·w + b.
    fn affine<T: Real>(&self, statistics: &[(f64, f64)], w: &[T], b: &[T]) -> Affine<T> {
        let width = self.channels / self.groups;
        let mut affine = Affine { centre: Vec::new(), factor: Vec::new(), summand: Vec::new() };
        for c in 0..self.channels {
            let (mean, scale) = statistics[c / width];
            let (centre, factor) = (T::from_f64(mean), w[c].to_f64() * scale);
            affine.centre.push(centre);
            affine.factor.push(T::from_f64(factor));
            affine.summand.push(T::from_f64(b[c].to_f64() + (centre.to_f64() - mean) * factor));
        }
        affine
    }
}

/// (x − centre) · factor + summand, per channel: a large mean costs no digits.
struct Affine<T> {
    centre: Vec<T>,
    factor: Vec<T>,
    summand: Vec<T>,
}

vectorised! {
    /// Means, then sums and squares of what is left.
    fn moments<T: Real>(rows: &[T], means: &mut [T], sums: &mut [T], squares: &mut [T]) {
        let c = means.len();
        let (sums, squares) = (&mut sums[..c], &mut squares[..c]);
        for row in rows.chunks_exact(c) {
            for i in 0..c {
                means[i] += row[i];
            }
        }
        let scale = T::from_f64(c as f64 / rows.len() as f64);
        means.iter_mut().for_each(|m| *m *= scale);
        for row in rows.chunks_exact(c) {
            for i in 0..c {
                let d = row[i] - means[i];
                sums[i] += d;
                squares[i] = d.times_plus::<FMA>(d, squares[i]);
            }
        }
    }
}

vectorised! {
    fn normalise<T: Real>(x: &[T], affine: &Affine<T>, silu: bool, y: &mut [T]) {
        let c = affine.factor.len();
        let (centre, summand) = (&affine.centre[..c], &affine.summand[..c]);
        let factor = &affine.factor[..c];
        for (y, x) in y.chunks_exact_mut(c).zip(x.chunks_exact(c)) {
            if silu {
                for i in 0..c {
                    let z = (x[i] - centre[i]).times_plus::<FMA>(factor[i], summand[i]);
                    y[i] = z * sigmoid::<FMA, T>(z);
                }
            } else {
                for i in 0..c {
                    y[i] = (x[i] - centre[i]).times_plus::<FMA>(factor[i], summand[i]);
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
        let affine = g.affine(&statistics, w, b);
        g.pieces(y, x, x, |y, x, _| normalise(level, x, &affine, g.silu, y));
        all.extend(statistics);
    }
    (y, Statistics(all))
}

vectorised! {
    /// dz = dy · silu'(z) with z the normalised x; dy itself without SiLU.
    fn activated<T: Real>(x: &[T], dy: &[T], affine: &Affine<T>, silu: bool, dz: &mut [T]) {
        if !silu {
            dz.copy_from_slice(dy);
            return;
        }
        let c = affine.factor.len();
        let (centre, summand) = (&affine.centre[..c], &affine.summand[..c]);
        let factor = &affine.factor[..c];
        let rows = x.chunks_exact(c).zip(dy.chunks_exact(c));
        for (dz, (x, dy)) in dz.chunks_exact_mut(c).zip(rows) {
            for i in 0..c {
                let z = (x[i] - centre[i]).times_plus::<FMA>(factor[i], summand[i]);
                let s = sigmoid::<FMA, T>(z);
                dz[i] = dy[i] * s * (T::ONE + z * (T::ONE - s));
            }
        }
    }
}

vectorised! {
    /// Adds Σ dz and Σ dz · (x − centre) over rows.
    fn products<T: Real>(
        x: &[T], dz: &[T], centre: &[T], sums: &mut [T], dots: &mut [T],
    ) {
        let c = centre.len();
        let (sums, dots) = (&mut sums[..c], &mut dots[..c]);
        for (dz, x) in dz.chunks_exact(c).zip(x.chunks_exact(c)) {
            for i in 0..c {
                sums[i] += dz[i];
                dots[i] = dz[i].times_plus::<FMA>(x[i] - centre[i], dots[i]);
            }
        }
    }
}

vectorised! {
    /// `dz = dz · a + (x − centre) · b + c`
    fn combine<T: Real>(x: &[T], centre: &[T], terms: &[Vec<T>; 3], dz: &mut [T]) {
        let n = centre.len();
        let [a, b, c] = terms.each_ref().map(|term| &term[..n]);
        for (dz, x) in dz.chunks_exact_mut(n).zip(x.chunks_exact(n)) {
            for i in 0..n {
                let x = (x[i] - centre[i]).times_plus::<FMA>(b[i], c[i]);
                dz[i] = dz[i].times_plus::<FMA>(a[i], x);
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
            let affine = g.affine(statistics, w, b);
            g.pieces(dx, x, dy, |dz, x, dy| activated(level, x, dy, &affine, g.silu, dz));
            let dz = &*dx;
            let pieces = g.over_pieces(|range| {
                let mut sums = vec![T::ZERO; 2 * c];
                let (ones, dots) = sums.split_at_mut(c);
                products(level, &x[range.clone()], &dz[range], &affine.centre, ones, dots);
                sums
            });
            let mut sums = vec![0.0; 2 * c];
            for piece in pieces {
                sums.iter_mut().zip(piece).for_each(|(sum, v)| *sum += v.to_f64());
            }
            let n = (g.positions * width) as f64;
            let mut terms = [const { Vec::new() }; 3];
            for (group, (mean, scale)) in statistics.iter().enumerate() {
                // What rounding the mean took from x − centre.
                let lost = T::from_f64(*mean).to_f64() - mean;
                let (mut sum, mut dot) = (0.0, 0.0);
                for i in group * width..(group + 1) * width {
                    let product = (sums[c + i] + lost * sums[i]) * scale;
                    sum += w[i].to_f64() * sums[i] / n;
                    dot += w[i].to_f64() * product / n;
                    dw[i] += product;
                    db[i] += sums[i];
                }
                let slope = -scale * scale * dot;
                for w in &w[group * width..(group + 1) * width] {
                    terms[0].push(T::from_f64(w.to_f64() * scale));
                    terms[1].push(T::from_f64(slope));
                    terms[2].push(T::from_f64(slope * lost - scale * sum));
                }
            }
            g.pieces(dx, x, x, |dz, x, _| combine(level, x, &affine.centre, &terms, dz));
        }
    }
    let numbers = |v: Vec<f64>| v.into_iter().map(T::from_f64).collect();
    (dx, numbers(dw), numbers(db))
}
