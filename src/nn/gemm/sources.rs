//! Where the operands of a product come from.

use std::ops::Range;

use super::micro::{LEFT_STRIDE, Left, MR, NR};
use super::{LeftSource, RightSource};
use crate::nn::kernel::{PARALLEL_FROM, Real};
use crate::nn::simd::{Level, vectorised};
use crate::nn::threads;

/// Rows of a row-major matrix: element (i, k) at `i · stride + k`.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a, T> {
    pub data: &'a [T],
    pub stride: usize,
}

vectorised! {
    fn copy_rows<T: Real>(from: &[T], stride: usize, rows: usize, depth: usize, to: &mut [T]) {
        for i in 0..rows {
            copy(&mut to[i * LEFT_STRIDE..][..depth], &from[i * stride..][..depth]);
        }
    }
}

/// A short copy without a call.
#[inline(always)]
pub fn copy<T: Copy>(to: &mut [T], from: &[T]) {
    let (mut to, mut from) = (to.chunks_exact_mut(16), from.chunks_exact(16));
    for (to, from) in to.by_ref().zip(from.by_ref()) {
        to.copy_from_slice(from);
    }
    to.into_remainder().iter_mut().zip(from.remainder()).for_each(|(to, from)| *to = *from);
}

impl<T: Real> LeftSource<T> for Rows<'_, T> {
    const LAYOUT: Left = Left::Rows;
    fn fill(&self, level: Level, row: usize, rows: usize, inner: Range<usize>, to: &mut [T]) {
        copy_rows(
            level,
            &self.data[row * self.stride + inner.start..],
            self.stride,
            rows,
            inner.len(),
            to,
        );
    }
}

/// Columns of a row-major matrix, so its transpose: element (i, k) at `k · stride + i`.
#[derive(Clone, Copy, Debug)]
pub struct Columns<'a, T> {
    pub data: &'a [T],
    pub stride: usize,
}

vectorised! {
    fn copy_columns<T: Real>(from: &[T], stride: usize, rows: usize, to: &mut [T]) {
        if rows == MR {
            for (to, from) in to.chunks_exact_mut(MR).zip(from.chunks(stride)) {
                to.copy_from_slice(&from[..MR]);
            }
        } else {
            for (to, from) in to.chunks_exact_mut(MR).zip(from.chunks(stride)) {
                to[..rows].copy_from_slice(&from[..rows]);
            }
        }
    }
}

impl<T: Real> LeftSource<T> for Columns<'_, T> {
    const LAYOUT: Left = Left::Columns;
    fn fill(&self, level: Level, row: usize, rows: usize, inner: Range<usize>, to: &mut [T]) {
        let from = &self.data[inner.start * self.stride + row..];
        copy_columns(level, from, self.stride, rows, &mut to[..inner.len() * MR]);
    }
}

/// A row-major right operand: element (k, j) at `k · stride + j`.
#[derive(Clone, Copy, Debug)]
pub struct Plain<'a, T> {
    pub data: &'a [T],
    pub stride: usize,
    pub columns: usize,
}

vectorised! {
    fn copy_panel<T: Real>(from: &[T], stride: usize, columns: usize, to: &mut [T]) {
        for (to, from) in to.chunks_exact_mut(NR).zip(from.chunks(stride)) {
            if columns >= NR {
                to.copy_from_slice(&from[..NR]);
            } else {
                to[..columns].copy_from_slice(&from[..columns]);
                to[columns..].fill(T::ZERO);
            }
        }
    }
}

impl<T: Real> RightSource<T> for Plain<'_, T> {
    fn pack(&self, level: Level, panel: usize, inner: Range<usize>, to: &mut [T]) {
        let column = panel * NR;
        let from = &self.data[inner.start * self.stride + column..];
        copy_panel(level, from, self.stride, self.columns - column, to);
    }
}

/// The transpose of a row-major matrix: element (k, j) at `j · stride + k`.
#[derive(Clone, Copy, Debug)]
pub struct Transposed<'a, T> {
    pub data: &'a [T],
    pub stride: usize,
    pub columns: usize,
}

impl<T: Real> RightSource<T> for Transposed<'_, T> {
    fn pack(&self, level: Level, panel: usize, inner: Range<usize>, to: &mut [T]) {
        let column = panel * NR;
        let from = &self.data[column * self.stride + inner.start..];
        let columns = (self.columns - column).min(NR);
        T::transpose(level, from, self.stride, columns, to);
    }
}

/// Rows of a weight [outer, taps, channels] in the order (tap, outer), the taps backwards: the
/// right operand of a convolution's input gradient.
#[derive(Clone, Copy, Debug)]
pub struct FlippedTaps<'a, T> {
    pub data: &'a [T],
    pub outer: usize,
    pub taps: usize,
    pub channels: usize,
}

impl<T: Real> RightSource<T> for FlippedTaps<'_, T> {
    fn pack(&self, level: Level, panel: usize, inner: Range<usize>, to: &mut [T]) {
        let (column, stride) = (panel * NR, self.taps * self.channels);
        let (mut to, mut at) = (to, inner.start);
        while at < inner.end {
            let (tap, outer) = (self.taps - 1 - at / self.outer, at % self.outer);
            let rows = (self.outer - outer).min(inner.end - at);
            let from = &self.data[outer * stride + tap * self.channels + column..];
            let (now, rest) = to.split_at_mut(rows * NR);
            copy_panel(level, from, stride, self.channels - column, now);
            (to, at) = (rest, at + rows);
        }
    }
}

/// A right operand [inner, columns] in panels of [`NR`] columns.
#[derive(Clone, Debug)]
pub struct Packed<T> {
    data: Vec<T>,
    inner: usize,
}

impl<T: Real> Packed<T> {
    pub fn new(source: &impl RightSource<T>, inner: usize, columns: usize) -> Self {
        let level = Level::current();
        let mut data = vec![T::ZERO; columns.div_ceil(NR) * inner * NR];
        if inner > 0 {
            threads::chunks(
                &mut data,
                inner * NR,
                inner * columns >= PARALLEL_FROM,
                |panel, to| {
                    source.pack(level, panel, 0..inner, to);
                },
            );
        }
        Self { data, inner }
    }
}

impl<T> Packed<T> {
    /// The given inner indices of one panel, [depth, NR].
    #[inline]
    pub fn rows(&self, panel: usize, inner: &Range<usize>) -> &[T] {
        let from = (panel * self.inner + inner.start) * NR;
        &self.data[from..from + inner.len() * NR]
    }
}

impl<T: Real> RightSource<T> for Packed<T> {
    fn packed(&self) -> Option<&Packed<T>> {
        Some(self)
    }

    fn pack(&self, _: Level, panel: usize, inner: Range<usize>, to: &mut [T]) {
        to.copy_from_slice(self.rows(panel, &inner));
    }
}
