//! Matrix products for the networks: operands are gathered where they lie
//! (rows of a matrix, its columns, the windows of an image), weights that do not
//! change are packed once, and what follows a product (bias, time shift,
//! residual) is done while its rows are in the cache.
//!
//! Every element is a sum over the inner index in an order that depends on the
//! inner size alone: values do not depend on the number of rows or threads.

use std::ops::Range;

mod micro;
mod scratch;
mod sources;
mod transpose;

pub use micro::{KC, LEFT_STRIDE, Left, MR, Micro, NR, Tile};
pub use scratch::{Number, with_scratch};
pub use sources::{Columns, FlippedTaps, Packed, Plain, Rows, Transposed, copy};
pub use transpose::Transpose;

use super::kernel::Real;
use super::simd::{Level, vectorised};
use super::threads::{self, Shared};

/// Columns of the right operand that are kept in the cache at once.
const NC: usize = 12 * NR;
/// Multiply-adds below which a product stays on one thread.
const SERIAL: usize = 1 << 17;

/// A left operand [m, k].
pub trait LeftSource<T>: Sync {
    const LAYOUT: Left;
    /// Writes the given rows and inner indices in the layout.
    fn fill(&self, level: Level, row: usize, rows: usize, inner: Range<usize>, to: &mut [T]);
}

/// A right operand [k, n].
pub trait RightSource<T>: Sync {
    /// The packed form, when it exists already.
    fn packed(&self) -> Option<&Packed<T>> {
        None
    }

    /// Writes columns `panel · NR ..` of the given inner indices as [depth, NR], zeros
    /// beyond the last column.
    fn pack(&self, level: Level, panel: usize, inner: Range<usize>, to: &mut [T]);
}

/// What is added to a finished row of a product.
#[derive(Clone, Copy, Debug)]
pub struct Finish<'a, T> {
    /// [n], to every row.
    pub bias: Option<&'a [T]>,
    /// [images, n] and the rows of an image: to every row its image's.
    pub shift: Option<(&'a [T], usize)>,
    /// [m, n]
    pub residual: Option<&'a [T]>,
}

impl<T> Default for Finish<'_, T> {
    fn default() -> Self {
        Self { bias: None, shift: None, residual: None }
    }
}

impl<T: Real> Finish<'_, T> {
    fn is_nothing(&self) -> bool {
        self.bias.is_none() && self.shift.is_none() && self.residual.is_none()
    }

    /// Finishes columns `column ..` of one row of a product of `n` columns.
    pub fn row(&self, level: Level, row: usize, column: usize, n: usize, c: &mut [T]) {
        let columns = column..column + c.len();
        if let Some(bias) = self.bias {
            add(level, c, &bias[columns.clone()]);
        }
        if let Some((shift, rows)) = self.shift {
            add(level, c, &shift[row / rows * n..][columns.clone()]);
        }
        if let Some(residual) = self.residual {
            add(level, c, &residual[row * n..][columns]);
        }
    }
}

vectorised! {
    /// `to += from`
    pub fn add<T: Real>(to: &mut [T], from: &[T]) {
        to.iter_mut().zip(from).for_each(|(to, from)| *to += *from);
    }
}

/// Splits `count` blocks into `parts` ranges.
fn part(count: usize, parts: usize, i: usize) -> Range<usize> {
    count * i / parts..count * (i + 1) / parts
}

/// Length of the pieces in which an inner size is taken.
pub fn inner_block(k: usize) -> usize {
    k.div_ceil(k.div_ceil(KC).max(1)).max(1)
}

/// `c` [m, n] = or += `left` [m, k] · `right` [k, n], then `finish`.
pub fn product<T: Real, L: LeftSource<T>, R: RightSource<T>>(
    (m, n, k): (usize, usize, usize),
    left: &L,
    right: &R,
    c: &mut [T],
    accumulate: bool,
    finish: &Finish<T>,
) {
    let level = Level::current();
    assert_eq!(c.len(), m * n, "output of a product");
    if m == 0 || n == 0 {
        return;
    }
    if k == 0 {
        if !accumulate {
            c.fill(T::ZERO);
        }
        c.chunks_mut(n).enumerate().for_each(|(i, row)| finish.row(level, i, 0, n, row));
        return;
    }
    let (blocks, panels) = (m.div_ceil(MR), n.div_ceil(NR));
    let threads = if m * n * k <= SERIAL { 1 } else { threads::count() };
    // A right operand that must be packed is packed once a column range; else rows are split.
    let (row_parts, column_parts) = if right.packed().is_some() || panels < threads {
        let rows = blocks.min(2 * threads);
        (rows, threads.div_ceil(rows).min(panels))
    } else {
        let columns = panels.min(threads);
        (threads.div_ceil(columns).min(blocks), columns)
    };
    let output = Shared::of(c);
    let task = |i: usize| {
        let rows = part(blocks, row_parts, i % row_parts);
        let columns = part(panels, column_parts, i / row_parts);
        let rows = rows.start * MR..(rows.end * MR).min(m);
        let job = Job { level, n, k, left, right, output, accumulate, finish };
        job.run(rows, columns);
    };
    threads::each(row_parts * column_parts, threads > 1, task);
}

struct Job<'a, T, L, R> {
    level: Level,
    n: usize,
    k: usize,
    left: &'a L,
    right: &'a R,
    output: Shared<T>,
    accumulate: bool,
    finish: &'a Finish<'a, T>,
}

impl<T: Real, L: LeftSource<T>, R: RightSource<T>> Job<'_, T, L, R> {
    /// These rows and panels of columns of the output.
    fn run(&self, rows: Range<usize>, panels: Range<usize>) {
        let depth = inner_block(self.k);
        let pieces = || {
            let starts = (0..self.k).step_by(depth);
            starts.map(|start| start..(start + depth).min(self.k))
        };
        let groups =
            panels.clone().step_by(NC / NR).map(|first| first..(first + NC / NR).min(panels.end));
        let blocks = || rows.clone().step_by(MR).map(|first| first..(first + MR).min(rows.end));
        let left = MR * LEFT_STRIDE;
        if let Some(packed) = self.right.packed() {
            with_scratch::<T, _>(left, |left| {
                for group in groups {
                    for block in blocks() {
                        for inner in pieces() {
                            let packed = |panel| packed.rows(panel, &inner);
                            self.tiles(left, &block, &group, &inner, packed);
                        }
                    }
                }
            });
            return;
        }
        with_scratch::<T, _>(left + depth * NC, |scratch| {
            let (left, right) = scratch.split_at_mut(left);
            for group in groups {
                for inner in pieces() {
                    let length = inner.len() * NR;
                    for (panel, to) in group.clone().zip(right.chunks_mut(length)) {
                        self.right.pack(self.level, panel, inner.clone(), to);
                    }
                    let packed = |panel| &right[(panel - group.start) * length..][..length];
                    blocks().for_each(|block| self.tiles(left, &block, &group, &inner, packed));
                }
            }
        });
    }

    /// At most [`MR`] rows of the given panels of columns, from one piece of the inner size.
    fn tiles<'p>(
        &self,
        left: &mut [T],
        rows: &Range<usize>,
        panels: &Range<usize>,
        inner: &Range<usize>,
        packed: impl Fn(usize) -> &'p [T],
    ) where
        T: 'p,
    {
        self.left.fill(self.level, rows.start, rows.len(), inner.clone(), left);
        for panel in panels.clone() {
            let column = panel * NR;
            let tile = Tile {
                rows: rows.len(),
                columns: NR.min(self.n - column),
                depth: inner.len(),
                left: left.as_ptr(),
                panel: packed(panel).as_ptr(),
                c: self.output.at(rows.start * self.n + column),
                c_stride: self.n,
                accumulate: self.accumulate || inner.start > 0,
            };
            // SAFETY: `left` was filled for these rows and inner indices, `packed` gives slices
            // of depth · NR, and the output's rows and columns belong to this task alone.
            unsafe { T::tile(self.level, &tile, L::LAYOUT) };
        }
        if inner.end == self.k && !self.finish.is_nothing() {
            let column = panels.start * NR;
            let columns = (panels.end * NR).min(self.n) - column;
            for row in rows.clone() {
                let c = self.output.at(row * self.n + column);
                // SAFETY: these columns of this row were written above, by this task.
                let c = unsafe { std::slice::from_raw_parts_mut(c, columns) };
                self.finish.row(self.level, row, column, self.n, c);
            }
        }
    }
}
