//! Products with weights, over rows or over the windows of images: values and gradients
//! on slices.

use std::borrow::Cow;

use super::gemm::{
    Columns, Finish, FlippedTaps, NR, Packed, Plain, RightSource, Rows, Transposed, add, product,
};
use super::kernel::{PARALLEL_FROM, Real, uninitialised};
use super::simd::{Level, vectorised};
use super::threads;
use super::window::{Patches, Window};
use super::winograd::{self, Filters};

/// A weight in the form that is fastest to use again and again.
#[derive(Clone, Debug)]
pub enum Prepared<T> {
    Panels(Packed<T>),
    Filters(Filters<T>),
}

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

    /// The weight as [outer, (tap, channel)]; checkpoints have (channel, tap).
    fn ordered<'a, T: Real>(&self, weight: &'a [T]) -> Cow<'a, [T]> {
        let Some(window) = self.window.filter(|w| w.taps() > 1) else {
            return Cow::Borrowed(weight);
        };
        let mut ordered = uninitialised(weight.len());
        threads::chunks(&mut ordered, self.inner, weight.len() >= PARALLEL_FROM, |i, to| {
            interleave(Level::current(), &weight[i * self.inner..], window.taps(), to);
        });
        Cow::Owned(ordered)
    }

    /// Whether the transformed product of [`winograd`] takes the place of the plain one.
    fn transformed(&self) -> Option<&Window> {
        self.window.as_ref().filter(|window| winograd::applies(window, self.outer))
    }

    /// The weight in the form that [`Map::forward`] is fastest with.
    pub fn pack<T: Real>(&self, weight: &[T]) -> Prepared<T> {
        match self.transformed() {
            Some(window) => Prepared::Filters(self.filters(window, weight)),
            None => {
                let ordered = self.ordered(weight);
                Prepared::Panels(Packed::new(&self.right(&ordered), self.inner, self.outer))
            }
        }
    }

    /// The weight in the form that [`Map::input_gradient`] is fastest with.
    pub fn pack_adjoint<T: Real>(&self, weight: &[T]) -> Prepared<T> {
        let plain = Plain { data: weight, stride: self.inner, columns: self.inner };
        let Some(window) = &self.window else {
            return Prepared::Panels(Packed::new(&plain, self.outer, self.inner));
        };
        match window.adjoint(self.outer) {
            Some(adjoint) if winograd::applies(&adjoint, window.channels) => {
                Prepared::Filters(self.adjoint_filters(window, weight))
            }
            Some(_) => {
                let ordered = self.ordered(weight);
                let right = self.flipped(window, &ordered);
                let inner = self.outer * window.taps();
                Prepared::Panels(Packed::new(&right, inner, window.channels))
            }
            None => {
                let ordered = self.ordered(weight);
                let right = Plain { data: &ordered[..], ..plain };
                Prepared::Panels(Packed::new(&right, self.outer, self.inner))
            }
        }
    }

    /// The right operand of the input gradient of a convolution of stride 1.
    fn flipped<'a, T: Real>(&self, window: &Window, ordered: &'a [T]) -> FlippedTaps<'a, T> {
        let (taps, channels) = (window.taps(), window.channels);
        FlippedTaps { data: ordered, outer: self.outer, taps, channels }
    }

    /// Whether a packed weight has the form that these images need.
    pub fn takes<T: Real>(&self, packed: &Prepared<T>) -> bool {
        matches!(packed, Prepared::Filters(_)) == self.transformed().is_some()
    }

    /// About the bytes of [`Map::pack`]'s and [`Map::pack_adjoint`]'s results.
    pub fn packed_bytes<T: Real>(&self) -> usize {
        match self.transformed() {
            Some(window) => Filters::<T>::bytes(window.channels, self.outer),
            None => self.outer.next_multiple_of(NR) * self.inner * size_of::<T>(),
        }
    }

    fn right<'a, T: Real>(&self, ordered: &'a [T]) -> Transposed<'a, T> {
        Transposed { data: ordered, stride: self.inner, columns: self.outer }
    }

    /// The forward pass's filters.
    fn filters<T: Real>(&self, window: &Window, weight: &[T]) -> Filters<T> {
        let (level, outer) = (Level::current(), self.outer);
        Filters::new(window.channels, outer, false, |panel, channels, to| {
            let from = &weight[panel * NR * self.inner + channels.start * 9..];
            T::transpose(level, from, self.inner, (outer - panel * NR).min(NR), to);
        })
    }

    /// The filters that take output gradients to input gradients.
    fn adjoint_filters<T: Real>(&self, window: &Window, weight: &[T]) -> Filters<T> {
        let (level, channels) = (Level::current(), window.channels);
        Filters::new(self.outer, channels, true, |panel, outer, to| {
            for (o, to) in outer.zip(to.chunks_exact_mut(9 * NR)) {
                let from = &weight[o * self.inner + panel * NR * 9..];
                T::transpose(level, from, 9, (channels - panel * NR).min(NR), to);
            }
        })
    }

    /// `y` [rows, outer] = or += W ∗ `x`, then `finish`. `weight` is not looked at where there is
    /// a packed one that [`Map::takes`].
    pub fn forward<T: Real>(
        &self,
        x: &[T],
        weight: &[T],
        packed: Option<&Prepared<T>>,
        y: &mut [T],
        accumulate: bool,
        finish: &Finish<T>,
    ) {
        if let Some(window) = self.transformed() {
            let made;
            let filters = match packed {
                Some(Prepared::Filters(filters)) => filters,
                _ => {
                    made = self.filters(window, weight);
                    &made
                }
            };
            winograd::convolve(window, self.outer, x, filters, y, accumulate, finish);
            return;
        }
        match packed {
            Some(Prepared::Panels(packed)) => self.times(x, packed, y, accumulate, finish),
            _ => self.times(x, &self.right(&self.ordered(weight)), y, accumulate, finish),
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

    /// `dx` = or += the gradient of the input, given that of the output; `packed` from
    /// [`Map::pack_adjoint`].
    pub fn input_gradient<T: Real>(
        &self,
        dy: &[T],
        weight: &[T],
        packed: Option<&Prepared<T>>,
        dx: &mut [T],
        accumulate: bool,
    ) {
        let Some(window) = &self.window else {
            let right = Plain { data: weight, stride: self.inner, columns: self.inner };
            self.times_adjoint(dy, packed, &right, dx, accumulate);
            return;
        };
        let direct = window.enlarged == (window.height, window.width);
        let pixels = window.batch * window.enlarged.0 * window.enlarged.1;
        let adjoint = window.adjoint(self.outer);
        if let Some(adjoint) = adjoint.filter(|_| direct) {
            self.unfold(window, &adjoint, dy, weight, packed, dx, accumulate);
            return;
        }
        let mut columns = Vec::new();
        let mut enlarged = match &adjoint {
            Some(_) => uninitialised(pixels * window.channels),
            None => {
                columns = uninitialised(self.rows * self.inner);
                let right = self.ordered(weight);
                let right = Plain { data: &right[..], stride: self.inner, columns: self.inner };
                self.times_adjoint(dy, packed, &right, &mut columns, false);
                vec![T::ZERO; if direct { 0 } else { pixels * window.channels }]
            }
        };
        if !accumulate {
            dx.fill(T::ZERO);
        }
        match &adjoint {
            Some(adjoint) => {
                self.unfold(window, adjoint, dy, weight, packed, &mut enlarged, false);
            }
            None if direct => window.scatter(&columns, dx),
            None => window.scatter(&columns, &mut enlarged),
        }
        if !direct {
            window.shrink(&enlarged, dx);
        }
    }

    /// `dx` [rows, inner] = or += dy · W.
    fn times_adjoint<T: Real>(
        &self,
        dy: &[T],
        packed: Option<&Prepared<T>>,
        right: &impl RightSource<T>,
        dx: &mut [T],
        accumulate: bool,
    ) {
        let (left, nothing) = (Rows { data: dy, stride: self.outer }, Finish::default());
        let sizes = (self.rows, self.inner, self.outer);
        match packed {
            Some(Prepared::Panels(packed)) => {
                product(sizes, &left, packed, dx, accumulate, &nothing);
            }
            _ => product(sizes, &left, right, dx, accumulate, &nothing),
        }
    }

    /// The gradient of the (enlarged) input of a convolution of stride 1.
    #[allow(clippy::too_many_arguments)]
    fn unfold<T: Real>(
        &self,
        window: &Window,
        adjoint: &Window,
        dy: &[T],
        weight: &[T],
        packed: Option<&Prepared<T>>,
        dx: &mut [T],
        accumulate: bool,
    ) {
        let (channels, nothing) = (window.channels, Finish::default());
        if winograd::applies(adjoint, channels) {
            let made;
            let filters = match packed {
                Some(Prepared::Filters(filters)) => filters,
                _ => {
                    made = self.adjoint_filters(window, weight);
                    &made
                }
            };
            winograd::convolve(adjoint, channels, dy, filters, dx, accumulate, &nothing);
            return;
        }
        let left = Patches { window: adjoint, images: dy };
        let sizes = (adjoint.positions(), channels, adjoint.depth());
        match packed {
            Some(Prepared::Panels(packed)) => {
                product(sizes, &left, packed, dx, accumulate, &nothing);
            }
            _ => {
                let ordered = self.ordered(weight);
                let right = self.flipped(window, &ordered);
                product(sizes, &left, &right, dx, accumulate, &nothing);
            }
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
        if let Some(window) = self.transformed() {
            dw = winograd::weight_gradient(window, self.outer, x, dy);
        } else {
            product(sizes, &left, &Patches { window, images: x }, &mut dw, false, &nothing);
        }
        let (taps, channels) = (window.taps(), window.channels);
        if taps > 1 {
            threads::chunks(&mut dw, self.inner, true, |_, row| {
                let unordered = row.to_vec();
                interleave(Level::current(), &unordered, channels, row);
            });
        }
        dw
    }
}

vectorised! {
    /// The transpose of `from` [to.len() / width, width].
    fn interleave<T: Real>(from: &[T], width: usize, to: &mut [T]) {
        let rows = to.len() / width;
        for (i, to) in to.chunks_exact_mut(rows).enumerate() {
            for (to, from) in to.iter_mut().zip(from[i..].iter().step_by(width)) {
                *to = *from;
            }
        }
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
    let piece = CHUNK * n.max(1);
    let parts = threads::map(rows.len().div_ceil(piece), rows.len() >= PARALLEL_FROM, |i| {
        sum(&rows[i * piece..rows.len().min((i + 1) * piece)])
    });
    let mut parts = parts.into_iter();
    let mut total = parts.next().unwrap_or_else(|| vec![T::ZERO; n]);
    parts.for_each(|part| add(level, &mut total, &part));
    total
}
