//! Attention in tiles (FlashAttention, arXiv 2205.14135; backward as in its algorithm 4):
//! a tile of scores lives in the cache between two products.

use std::ops::Range;

use super::gemm::{
    KC, LEFT_STRIDE, Left, MR, NR, Packed, Plain, Tile, Transposed, copy, with_scratch,
};
use super::kernel::{Real, sum_by, uninitialised};
use super::simd::{Level, vectorised};
use super::threads::{self, Shared};

/// Multiply-adds below which the work stays on one thread.
const SERIAL: usize = 1 << 17;
/// Queries that the backward pass takes at once.
const QUERIES: usize = 8 * MR;

/// Sizes: q [batch, targets, heads · size], k and v [batch, sources, heads · size].
#[derive(Clone, Copy, Debug)]
pub struct Heads {
    pub batch: usize,
    pub targets: usize,
    pub sources: usize,
    pub heads: usize,
    /// Width of a head.
    pub size: usize,
}

impl Heads {
    fn width(&self) -> usize {
        self.heads * self.size
    }

    fn work(&self) -> usize {
        self.batch * self.heads * self.targets * self.sources * self.size
    }

    fn scale<T: Real>(&self) -> T {
        T::from_f64(1.0 / (self.size as f64).sqrt())
    }

    /// Offset of the first value of a head in a tensor of `length` tokens.
    fn offset(&self, head: usize, length: usize) -> usize {
        head / self.heads * length * self.width() + head % self.heads * self.size
    }

    /// One head's [length, size] as a right operand.
    fn plain<T: Real>(&self, x: &[T], head: usize, length: usize) -> Packed<T> {
        let data = &x[self.offset(head, length)..];
        Packed::new(&Plain { data, stride: self.width(), columns: self.size }, length, self.size)
    }

    /// The transpose of one head's [length, size] as a right operand.
    fn transposed<T: Real>(&self, x: &[T], head: usize, length: usize) -> Packed<T> {
        let data = &x[self.offset(head, length)..];
        let source = Transposed { data, stride: self.width(), columns: length };
        Packed::new(&source, self.size, length)
    }

    /// Inner pieces of a head's width.
    fn pieces(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let size = self.size;
        (0..size).step_by(KC).map(move |from| from..(from + KC).min(size))
    }

    /// Values of [`MR`] rows of a head in pieces.
    fn left(&self) -> usize {
        self.size.div_ceil(KC) * MR * LEFT_STRIDE
    }
}

vectorised! {
    /// Rows of one head, times `scale`, as a left operand in pieces.
    fn load_rows<T: Real>(x: &[T], stride: usize, rows: usize, size: usize, scale: T, to: &mut [T]) {
        for (piece, to) in to.chunks_mut(MR * LEFT_STRIDE).enumerate() {
            let columns = piece * KC..size.min((piece + 1) * KC);
            for i in 0..rows {
                let to = &mut to[i * LEFT_STRIDE..][..columns.len()];
                copy(to, &x[i * stride..][columns.clone()]);
                to.iter_mut().for_each(|v| *v *= scale);
            }
        }
    }
}

/// `c` [rows, columns of `range`] = or += left [rows, inner] · panels [inner, range].
///
/// # Safety
/// `left` is laid out for `rows` and `inner`, and `c` reaches `rows` rows `c_stride` apart of
/// the range's columns, which nothing else touches.
#[allow(clippy::too_many_arguments)]
unsafe fn tiles<T: Real>(
    level: Level,
    (left, layout): (*const T, Left),
    rows: usize,
    panels: &Packed<T>,
    inner: &Range<usize>,
    range: &Range<usize>,
    (c, c_stride): (*mut T, usize),
    accumulate: bool,
) {
    for from in range.clone().step_by(NR) {
        let tile = Tile {
            rows,
            columns: NR.min(range.end - from),
            depth: inner.len(),
            left,
            panel: panels.rows(from / NR, inner).as_ptr(),
            c: c.wrapping_add(from - range.start),
            c_stride,
            accumulate,
        };
        // SAFETY: the caller's promise; ranges begin at a panel.
        unsafe { T::tile(level, &tile, layout) };
    }
}

vectorised! {
    /// Adds a row of the mask, where there is one, and gives the row's maximum.
    fn masked_max<T: Real>(scores: &mut [T], mask: Option<&[T]>) -> T {
        if let Some(mask) = mask {
            scores.iter_mut().zip(mask).for_each(|(s, m)| *s += *m);
        }
        max_of(scores)
    }
}

#[inline(always)]
fn max_of<T: Real>(values: &[T]) -> T {
    const LANES: usize = 16;
    let larger = |a: T, b: T| if b > a { b } else { a };
    let mut lanes = [values[0]; LANES];
    let chunks = values.chunks_exact(LANES);
    let rest = chunks.remainder().iter().fold(values[0], |m, v| larger(m, *v));
    for chunk in chunks {
        for i in 0..LANES {
            lanes[i] = larger(lanes[i], chunk[i]);
        }
    }
    lanes.into_iter().fold(rest, larger)
}

vectorised! {
    /// Scores to e^(score − max); gives their sum.
    fn exponentials<T: Real>(scores: &mut [T], max: T) -> T {
        scores.iter_mut().for_each(|s| *s = (*s - max).exponential::<FMA>());
        sum_by(scores, |v| v)
    }
}

vectorised! {
    fn multiply<T: Real>(values: &mut [T], factor: T) {
        values.iter_mut().for_each(|v| *v *= factor);
    }
}

/// The output, and for every (image, head, query) the logarithm of its sum of exponentials.
pub fn forward<T: Real>(
    h: &Heads,
    q: &[T],
    k: &[T],
    v: &[T],
    mask: Option<&[T]>,
) -> (Vec<T>, Vec<T>) {
    let level = Level::current();
    let heads = h.batch * h.heads;
    let (mut out, mut normalisers) = (uninitialised(q.len()), uninitialised(heads * h.targets));
    if h.sources == 0 {
        out.fill(T::ZERO);
        normalisers.fill(T::ZERO);
        return (out, normalisers);
    }
    let (o, n) = (Shared::of(&mut out), Shared::of(&mut normalisers));
    let blocks = h.targets.div_ceil(MR);
    let one = |head: usize, blocks: Range<usize>, kt: &Packed<T>, v: &Packed<T>| {
        let block = Block { h, level, head, kt, v, mask };
        for b in blocks {
            let rows = b * MR..((b + 1) * MR).min(h.targets);
            block.run(q, rows, o, n);
        }
    };
    let packs = |head: usize| (h.transposed(k, head, h.sources), h.plain(v, head, h.sources));
    let parallel = h.work() > SERIAL;
    // One large head still keeps all threads busy.
    let parts = if parallel && heads < threads::count() { blocks.div_ceil(8) } else { 1 };
    threads::each(heads, parallel, |head| {
        let (kt, v) = packs(head);
        threads::each(parts, parallel, |p| {
            one(head, blocks * p / parts..blocks * (p + 1) / parts, &kt, &v);
        });
    });
    (out, normalisers)
}

struct Block<'a, T> {
    h: &'a Heads,
    level: Level,
    head: usize,
    kt: &'a Packed<T>,
    v: &'a Packed<T>,
    mask: Option<&'a [T]>,
}

impl<T: Real> Block<'_, T> {
    /// At most [`MR`] queries of one head.
    fn run(&self, q: &[T], rows: Range<usize>, out: Shared<T>, normalisers: Shared<T>) {
        let (h, level, size) = (self.h, self.level, self.h.size);
        let count = rows.len();
        let (left_length, o_stride) = (h.left(), size.next_multiple_of(NR));
        with_scratch::<T, _>(left_length + MR * LEFT_STRIDE + MR * o_stride, |scratch| {
            let (left, rest) = scratch.split_at_mut(left_length);
            let (scores, o) = rest.split_at_mut(MR * LEFT_STRIDE);
            let q = &q[h.offset(self.head, h.targets) + rows.start * h.width()..];
            load_rows(level, q, h.width(), count, size, h.scale(), left);
            let (mut maxima, mut sums) = ([T::ZERO; MR], [T::ZERO; MR]);
            for start in (0..h.sources).step_by(KC) {
                let keys = start..(start + KC).min(h.sources);
                for (i, piece) in h.pieces().enumerate() {
                    let from = (left[i * MR * LEFT_STRIDE..].as_ptr(), Left::Rows);
                    let to = (scores.as_mut_ptr(), LEFT_STRIDE);
                    // SAFETY: `left` holds the piece, `scores` LEFT_STRIDE >= KC columns a row.
                    unsafe { tiles(level, from, count, self.kt, &piece, &keys, to, i > 0) };
                }
                for i in 0..count {
                    let row = &mut scores[i * LEFT_STRIDE..][..keys.len()];
                    let mask = self.mask.map(|m| &m[(rows.start + i) * h.sources..][keys.clone()]);
                    let max = masked_max(level, row, mask);
                    let seen = start > 0 && sums[i] > T::ZERO;
                    if max.to_f64() == f64::NEG_INFINITY {
                        // Nothing of this tile is seen: e^-∞ is not quite 0 in the kernels.
                        row.fill(T::ZERO);
                        continue;
                    }
                    let max = if seen && maxima[i] > max { maxima[i] } else { max };
                    let sum = exponentials(level, row, max);
                    if seen {
                        let keep = (maxima[i] - max).exponential::<false>();
                        sums[i] = sums[i] * keep + sum;
                        multiply(level, &mut o[i * o_stride..][..size], keep);
                    } else {
                        sums[i] = sum;
                    }
                    maxima[i] = max;
                }
                let from = (scores.as_ptr(), Left::Rows);
                let to = (o.as_mut_ptr(), o_stride);
                // SAFETY: `scores` holds the keys' columns, `o` `size` columns a row.
                unsafe { tiles(level, from, count, self.v, &keys, &(0..size), to, start > 0) };
            }
            for i in 0..count {
                let o = &mut o[i * o_stride..][..size];
                multiply(level, o, T::ONE / sums[i]);
                let at = h.offset(self.head, h.targets) + (rows.start + i) * h.width();
                // SAFETY: this task alone writes these rows of this head.
                unsafe {
                    std::ptr::copy_nonoverlapping(o.as_ptr(), out.at(at), size);
                    let normaliser = maxima[i].to_f64() + sums[i].to_f64().ln();
                    *normalisers.at(self.head * h.targets + rows.start + i) =
                        T::from_f64(normaliser);
                }
            }
        });
    }
}

/// What the forward pass left for the backward pass.
pub struct Saved<'a, T> {
    pub out: &'a [T],
    pub normalisers: &'a [T],
    pub mask: Option<&'a [T]>,
}

/// dq, dk, dv.
pub fn backward<T: Real>(
    h: &Heads,
    q: &[T],
    k: &[T],
    v: &[T],
    saved: &Saved<T>,
    dy: &[T],
) -> [Vec<T>; 3] {
    let mut gradients = [q.len(), k.len(), v.len()].map(uninitialised::<T>);
    if h.sources == 0 || h.targets == 0 {
        gradients.iter_mut().for_each(|g| g.fill(T::ZERO));
        return gradients;
    }
    let [dq, dk, dv] = gradients.each_mut().map(|g| Shared::of(g));
    let level = Level::current();
    let one = |head: usize| {
        let back = Back {
            h,
            level,
            head,
            q,
            dy,
            saved,
            kt: h.transposed(k, head, h.sources),
            vt: h.transposed(v, head, h.sources),
            k: h.plain(k, head, h.sources),
            queries: h.plain(q, head, h.targets),
            dys: h.plain(dy, head, h.targets),
        };
        back.run(dq, dk, dv);
    };
    threads::each(h.batch * h.heads, h.work() > SERIAL, one);
    gradients
}

/// One head's backward pass.
struct Back<'a, T> {
    h: &'a Heads,
    level: Level,
    head: usize,
    q: &'a [T],
    dy: &'a [T],
    saved: &'a Saved<'a, T>,
    kt: Packed<T>,
    vt: Packed<T>,
    k: Packed<T>,
    queries: Packed<T>,
    dys: Packed<T>,
}

vectorised! {
    /// p = e^(score − normaliser) in place of scores; ds = p · (dp − delta) · scale in place of dp.
    fn probabilities<T: Real>(scores: &mut [T], dp: &mut [T], normaliser: T, delta: T, scale: T) {
        for (s, d) in scores.iter_mut().zip(dp) {
            *s = (*s - normaliser).exponential::<FMA>();
            *d = *s * (*d - delta) * scale;
        }
    }
}

vectorised! {
    fn dot<T: Real>(a: &[T], b: &[T]) -> T {
        const LANES: usize = 16;
        let mut lanes = [T::ZERO; LANES];
        let (mut a, mut b) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
        for (a, b) in a.by_ref().zip(b.by_ref()) {
            for i in 0..LANES {
                lanes[i] += a[i] * b[i];
            }
        }
        let rest: T = a.remainder().iter().zip(b.remainder()).map(|(a, b)| *a * *b).sum();
        lanes.into_iter().sum::<T>() + rest
    }
}

impl<T: Real> Back<'_, T> {
    fn run(&self, dq: Shared<T>, dk: Shared<T>, dv: Shared<T>) {
        let (h, level, size) = (self.h, self.level, self.h.size);
        let (base, keys_base) = (h.offset(self.head, h.targets), h.offset(self.head, h.sources));
        let row = |x: &[T], i: usize| &x[base + i * h.width()..][..size] as *const [T];
        let deltas: Vec<T> = (0..h.targets)
            // SAFETY: the rows are slices of `out` and `dy`.
            .map(|i| unsafe { dot(level, &*row(self.saved.out, i), &*row(self.dy, i)) })
            .collect();
        let tile = QUERIES * LEFT_STRIDE;
        with_scratch::<T, _>(h.left() + 2 * tile, |scratch| {
            let (left, rest) = scratch.split_at_mut(h.left());
            let (scores, dp) = rest.split_at_mut(tile);
            for start in (0..h.sources).step_by(KC) {
                let keys = start..(start + KC).min(h.sources);
                for from in (0..h.targets).step_by(QUERIES) {
                    let queries = from..(from + QUERIES).min(h.targets);
                    self.scores(&queries, &keys, &deltas, left, scores, dp);
                    for i in queries.clone().step_by(MR) {
                        let count = MR.min(queries.end - i);
                        let ds = dp[(i - from) * LEFT_STRIDE..].as_ptr();
                        let to = (dq.at(base + i * h.width()), h.width());
                        // SAFETY: `dp` holds the keys' columns; this head's rows are this task's.
                        unsafe {
                            tiles(
                                level,
                                (ds, Left::Rows),
                                count,
                                &self.k,
                                &keys,
                                &(0..size),
                                to,
                                start > 0,
                            );
                        }
                    }
                    for i in keys.clone().step_by(MR) {
                        let count = MR.min(keys.end - i);
                        let at = keys_base + i * h.width();
                        let pairs = [(&*dp, &self.queries, dk), (&*scores, &self.dys, dv)];
                        for (tile, right, gradient) in pairs {
                            let left = (tile[i - start..].as_ptr(), Left::Transposed);
                            let to = (gradient.at(at), h.width());
                            // SAFETY: as above; the tile's rows are the queries.
                            unsafe {
                                tiles(
                                    level,
                                    left,
                                    count,
                                    right,
                                    &queries,
                                    &(0..size),
                                    to,
                                    from > 0,
                                );
                            }
                        }
                    }
                }
            }
        });
    }

    /// Probabilities and score gradients of a block of queries and keys.
    fn scores(
        &self,
        queries: &Range<usize>,
        keys: &Range<usize>,
        deltas: &[T],
        left: &mut [T],
        scores: &mut [T],
        dp: &mut [T],
    ) {
        let (h, level) = (self.h, self.level);
        for row in queries.clone().step_by(MR) {
            let count = MR.min(queries.end - row);
            let at = (row - queries.start) * LEFT_STRIDE;
            let products = [
                (self.q, h.scale(), &self.kt, &mut *scores),
                (self.dy, T::ONE, &self.vt, &mut *dp),
            ];
            for (x, scale, right, to) in products {
                let x = &x[h.offset(self.head, h.targets) + row * h.width()..];
                load_rows(level, x, h.width(), count, h.size, scale, left);
                for (i, piece) in h.pieces().enumerate() {
                    let from = (left[i * MR * LEFT_STRIDE..].as_ptr(), Left::Rows);
                    let to = (to[at..].as_mut_ptr(), LEFT_STRIDE);
                    // SAFETY: `left` holds the piece, `to` QUERIES rows of LEFT_STRIDE.
                    unsafe { tiles(level, from, count, right, &piece, keys, to, i > 0) };
                }
            }
            for i in row..row + count {
                let at = (i - queries.start) * LEFT_STRIDE;
                let (s, d) = (&mut scores[at..][..keys.len()], &mut dp[at..][..keys.len()]);
                if let Some(mask) = self.saved.mask {
                    masked_max(level, s, Some(&mask[i * h.sources..][keys.clone()]));
                }
                let normaliser = self.saved.normalisers[self.head * h.targets + i];
                probabilities(level, s, d, normaliser, deltas[i], h.scale());
            }
        }
    }
}
