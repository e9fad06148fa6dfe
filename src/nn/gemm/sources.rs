//! Where the operands of a product come from.

use std::ops::Range;

use super::micro::{LEFT_STRIDE, Left, MR, NR};
use super::{LeftSource, RightSource};
use crate::nn::kernel::Real;
use crate::nn::simd::{Level, vectorised};

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
        copy_rows(level, &self.data[row * self.stride + inner.start..], self.stride, rows, inner.len(), to);
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

/// A right operand with strides, whose inner index is (tap, position): element
/// ((tap, p), j) at `tap_offset(tap) + p · inner_stride + j · column_stride`.
#[derive(Clone, Copy, Debug)]
pub struct Strided<'a, T> {
    pub data: &'a [T],
    pub columns: usize,
    /// Positions of a tap.
    pub inner: usize,
    pub inner_stride: usize,
    pub column_stride: usize,
    /// Offset of a tap is `tap · tap_stride`, or of the last tap less that.
    pub taps: usize,
    pub tap_stride: usize,
    pub flipped: bool,
}

impl<'a, T> Strided<'a, T> {
    /// The transpose of a row-major matrix [columns, inner].
    pub fn transposed(data: &'a [T], columns: usize, inner: usize) -> Self {
        Self {
            data,
            columns,
            inner,
            inner_stride: 1,
            column_stride: inner,
            taps: 1,
            tap_stride: 0,
            flipped: false,
        }
    }
}

vectorised! {
    fn gather<T: Real>(from: &[T], inner_stride: usize, column_stride: usize, columns: usize, to: &mut [T]) {
        const BLOCK: usize = 16;
        // Blocks of inner indices, so that the lines of all columns stay in the cache.
        for (b, to) in to.chunks_mut(BLOCK * NR).enumerate() {
            let depth = to.len() / NR;
            for j in 0..NR {
                if j < columns {
                    let from = &from[j * column_stride + b * BLOCK * inner_stride..];
                    for p in 0..depth {
                        to[p * NR + j] = from[p * inner_stride];
                    }
                } else {
                    for p in 0..depth {
                        to[p * NR + j] = T::ZERO;
                    }
                }
            }
        }
    }
}

impl<T: Real> RightSource<T> for Strided<'_, T> {
    fn pack(&self, level: Level, panel: usize, inner: Range<usize>, to: &mut [T]) {
        let (column, mut at) = (panel * NR, inner.start);
        let mut to = to;
        while at < inner.end {
            let (tap, p) = (at / self.inner, at % self.inner);
            let depth = (self.inner - p).min(inner.end - at);
            let tap = if self.flipped { self.taps - 1 - tap } else { tap };
            let offset = tap * self.tap_stride + p * self.inner_stride + column * self.column_stride;
            let (now, rest) = to.split_at_mut(depth * NR);
            let columns = (self.columns - column).min(NR);
            gather(level, &self.data[offset..], self.inner_stride, self.column_stride, columns, now);
            (to, at) = (rest, at + depth);
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
        use rayon::prelude::*;
        let level = Level::current();
        let mut data = vec![T::ZERO; columns.div_ceil(NR) * inner * NR];
        if inner > 0 {
            data.par_chunks_mut(inner * NR)
                .enumerate()
                .for_each(|(panel, to)| source.pack(level, panel, 0..inner, to));
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

    pub fn bytes(&self) -> usize {
        self.data.len() * size_of::<T>()
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
