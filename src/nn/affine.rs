//! Products with weights, over rows or over the windows of images: values and gradients
//! on slices.

use rayon::prelude::*;

use super::gemm::{
    Columns, Finish, Packed, Plain, RightSource, Rows, Strided, add, product,
};
use super::kernel::{Real, uninitialised};
use super::simd::Level;
use super::window::{Patches, TapColumns, Window};

/// `y = W ∗ x`: a product of rows [rows, inner] with a weight [outer, inner], or a convolution
/// of images with a weight [outer, channels, kh, kw].
#[derive(Clone, Copy, Debug)]
pub struct Map {
    pub rows: usize,
    pub inner: usize,
    pub outer: usize,
    /// `None` for plain rows.
    pub window: Option<Window>,
}

impl Map {
    pub fn rows(rows: usize, inner: usize, outer: usize) -> Self {
        Self { rows, inner, outer, window: None }
    }

    /// A pointwise convolution is a product of rows.
    pub fn images(window: Window, outer: usize) -> Self {
        let (rows, inner) = (window.positions(), window.depth());
        Self { rows, inner, outer, window: (!window.is_pointwise()).then_some(window) }
    }

    /// The same inputs with another number of outputs.
    pub fn with_outer(self, outer: usize) -> Self {
        Self { outer, ..self }
    }

    /// Values of the input.
    pub fn input(&self) -> usize {
        self.window.map_or(self.rows * self.inner, |w| w.input())
    }

    fn right<'a, T: Real>(&self, weight: &'a [T]) -> Strided<'a, T> {
        match &self.window {
            None => Strided::transposed(weight, self.outer, self.inner),
            Some(window) => Strided {
                data: weight,
                columns: self.outer,
                inner: window.channels,
                inner_stride: window.taps(),
                column_stride: self.inner,
                taps: window.taps(),
                tap_stride: 1,
                flipped: false,
            },
        }
    }

    /// The weight in the form that [`Map::forward`] is fastest with.
    pub fn pack<T: Real>(&self, weight: &[T]) -> Packed<T> {
        Packed::new(&self.right(weight), self.inner, self.outer)
    }

    /// `y` [rows, outer] = or += W ∗ `x`, then `finish`.
    pub fn forward<T: Real>(
        &self,
        x: &[T],
        weight: &[T],
        packed: Option<&Packed<T>>,
        y: &mut [T],
        accumulate: bool,
        finish: &Finish<T>,
    ) {
        match packed {
            Some(packed) => self.times(x, packed, y, accumulate, finish),
            None => self.times(x, &self.right(weight), y, accumulate, finish),
        }
    }

    fn times<T: Real>(
        &self,
        x: &[T],
        right: &impl RightSource<T>,
        y: &mut [T],
        accumulate: bool,
        finish: &Finish<T>,
    ) {
        let sizes = (self.rows, self.outer, self.inner);
        match &self.window {
            None => {
                let left = Rows { data: x, stride: self.inner };
                product(sizes, &left, right, y, accumulate, finish);
            }
            Some(window) => {
                product(sizes, &Patches { window, images: x }, right, y, accumulate, finish);
            }
        }
    }

    /// `dx` = or += the gradient of the input, given that of the output.
    pub fn input_gradient<T: Real>(&self, dy: &[T], weight: &[T], dx: &mut [T], accumulate: bool) {
        let nothing = Finish::default();
        let Some(window) = &self.window else {
            let left = Rows { data: dy, stride: self.outer };
            let right = Plain { data: weight, stride: self.inner, columns: self.inner };
            product((self.rows, self.inner, self.outer), &left, &right, dx, accumulate, &nothing);
            return;
        };
        let direct = window.enlarged == (window.height, window.width);
        let pixels = window.batch * window.enlarged.0 * window.enlarged.1;
        if let Some(adjoint) = window.adjoint(self.outer) {
            let right = Strided {
                data: weight,
                columns: window.channels,
                inner: self.outer,
                inner_stride: self.inner,
                column_stride: window.taps(),
                taps: window.taps(),
                tap_stride: 1,
                flipped: true,
            };
            let sizes = (pixels, window.channels, self.outer * window.taps());
            let left = Patches { window: &adjoint, images: dy };
            if direct {
                product(sizes, &left, &right, dx, accumulate, &nothing);
                return;
            }
            let mut enlarged = uninitialised(pixels * window.channels);
            product(sizes, &left, &right, &mut enlarged, false, &nothing);
            if !accumulate {
                dx.fill(T::ZERO);
            }
            window.shrink(&enlarged, dx);
            return;
        }
        let right =
            TapColumns { weight, channels: window.channels, taps: window.taps() };
        let mut columns = uninitialised(self.rows * self.inner);
        let left = Rows { data: dy, stride: self.outer };
        product((self.rows, self.inner, self.outer), &left, &right, &mut columns, false, &nothing);
        if !accumulate {
            dx.fill(T::ZERO);
        }
        if direct {
            window.scatter(&columns, dx);
        } else {
            let mut enlarged = vec![T::ZERO; pixels * window.channels];
            window.scatter(&columns, &mut enlarged);
            window.shrink(&enlarged, dx);
        }
    }

    /// The gradient of the weight, in the weight's layout.
    pub fn weight_gradient<T: Real>(&self, x: &[T], dy: &[T]) -> Vec<T> {
        let left = Columns { data: dy, stride: self.outer };
        let sizes = (self.outer, self.inner, self.rows);
        let nothing = Finish::default();
        let mut dw = uninitialised(self.outer * self.inner);
        let Some(window) = &self.window else {
            let right = Plain { data: x, stride: self.inner, columns: self.inner };
            product(sizes, &left, &right, &mut dw, false, &nothing);
            return dw;
        };
        product(sizes, &left, &Patches { window, images: x }, &mut dw, false, &nothing);
        let (taps, channels) = (window.taps(), window.channels);
        if taps > 1 {
            // From (tap, channel) to the weight's (channel, tap).
            dw.par_chunks_mut(self.inner).for_each_init(Vec::new, |copy, row| {
                copy.clear();
                copy.extend_from_slice(row);
                for (tap, from) in copy.chunks_exact(channels).enumerate() {
                    let to = row[tap..].iter_mut().step_by(taps);
                    to.zip(from).for_each(|(to, from)| *to = *from);
                }
            });
        }
        dw
    }
}

/// The sum of rows [rows, n], in an order that does not depend on threads.
pub fn column_sums<T: Real>(rows: &[T], n: usize) -> Vec<T> {
    const CHUNK: usize = 256;
    let level = Level::current();
    let sum = |rows: &[T]| {
        let mut sums = vec![T::ZERO; n];
        rows.chunks_exact(n).for_each(|row| add(level, &mut sums, row));
        sums
    };
    let parts: Vec<Vec<T>> = rows.par_chunks(CHUNK * n.max(1)).map(sum).collect();
    let mut parts = parts.into_iter();
    let mut total = parts.next().unwrap_or_else(|| vec![T::ZERO; n]);
    parts.for_each(|part| add(level, &mut total, &part));
    total
}
