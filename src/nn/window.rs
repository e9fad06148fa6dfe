//! The geometry of a convolution over channels-last images, and the operands that
//! it makes of them: no column matrix is ever stored.

use std::ops::Range;

use super::gemm::{LEFT_STRIDE, Left, LeftSource, NR, RightSource};
use super::kernel::Real;
use super::simd::{Level, vectorised};

/// Which pixels of an image [B, height, width, channels] each output pixel sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Window {
    pub batch: usize,
    pub height: usize,
    pub width: usize,
    pub channels: usize,
    /// Height and width that the image is enlarged to first, by nearest neighbours.
    pub enlarged: (usize, usize),
    pub kernel: (usize, usize),
    pub stride: usize,
    /// Zeros above and left of the image. Those below and right follow from the output's size.
    pub padding: usize,
    /// Output height and width.
    pub out: (usize, usize),
}

impl Window {
    /// Output pixels of the batch.
    pub fn positions(&self) -> usize {
        self.batch * self.out.0 * self.out.1
    }

    pub fn taps(&self) -> usize {
        self.kernel.0 * self.kernel.1
    }

    /// Values that one output pixel sees, in the order (tap, channel).
    pub fn depth(&self) -> usize {
        self.taps() * self.channels
    }

    /// Values of the images.
    pub fn input(&self) -> usize {
        self.batch * self.height * self.width * self.channels
    }

    fn is_enlarged(&self) -> bool {
        self.enlarged != (self.height, self.width)
    }

    /// Whether every output pixel sees the one input pixel at its place.
    pub fn is_pointwise(&self) -> bool {
        self.kernel == (1, 1)
            && self.stride == 1
            && self.padding == 0
            && self.out == (self.height, self.width)
            && !self.is_enlarged()
    }

    /// The window that takes output gradients [B, out, channels_out] to gradients of the
    /// (enlarged) input, with the taps flipped; for stride 1.
    pub fn adjoint(&self, channels_out: usize) -> Option<Self> {
        let (kh, kw) = self.kernel;
        if self.stride != 1 || kh != kw || self.padding >= kh {
            return None;
        }
        Some(Self {
            batch: self.batch,
            height: self.out.0,
            width: self.out.1,
            channels: channels_out,
            enlarged: self.out,
            kernel: self.kernel,
            stride: 1,
            padding: kh - 1 - self.padding,
            out: self.enlarged,
        })
    }

    /// The input row (or column) of an enlarged one, as PyTorch's `nearest`.
    #[inline(always)]
    fn nearest(at: usize, from: usize, to: usize) -> usize {
        if to == 2 * from {
            return at / 2;
        }
        let scale = from as f32 / to as f32;
        ((at as f32 * scale) as usize).min(from - 1)
    }

    /// The offset, in pixels, of a pixel of the enlarged image; none outside it.
    #[inline(always)]
    pub fn pixel(&self, image: usize, y: usize, x: usize) -> Option<usize> {
        if y >= self.enlarged.0 || x >= self.enlarged.1 {
            return None;
        }
        let row = Self::nearest(y, self.height, self.enlarged.0);
        let column = Self::nearest(x, self.width, self.enlarged.1);
        Some((image * self.height + row) * self.width + column)
    }

    /// Image, row and column of an output pixel.
    #[inline(always)]
    fn place(&self, position: usize) -> (usize, usize, usize) {
        let area = self.out.0 * self.out.1;
        let (image, rest) = (position / area, position % area);
        (image, rest / self.out.1, rest % self.out.1)
    }

    /// The output pixel after this one, without a division.
    #[inline(always)]
    fn after(&self, (image, y, x): (usize, usize, usize)) -> (usize, usize, usize) {
        if x + 1 < self.out.1 {
            (image, y, x + 1)
        } else if y + 1 < self.out.0 {
            (image, y + 1, 0)
        } else {
            (image + 1, 0, 0)
        }
    }

    /// Copies values `inner` of what output pixel (image, y, x) sees; zeros outside the image.
    #[inline(always)]
    fn gather<T: Real>(
        &self,
        images: &[T],
        (image, y, x): (usize, usize, usize),
        inner: &Range<usize>,
        to: &mut [T],
    ) {
        let line = self.kernel.1 * self.channels;
        let mut at = inner.start;
        let mut done = 0;
        while at < inner.end {
            let (ky, from) = (at / line, at % line);
            let until = line.min(from + inner.end - at);
            let to = &mut to[done..done + until - from];
            done += until - from;
            at += until - from;
            let row = y * self.stride + ky;
            if row < self.padding || row - self.padding >= self.enlarged.0 {
                to.fill(T::ZERO);
                continue;
            }
            let row = Self::nearest(row - self.padding, self.height, self.enlarged.0);
            let row = &images[(image * self.height + row) * self.width * self.channels..]
                [..self.width * self.channels];
            if self.is_enlarged() {
                self.gather_enlarged(row, x, from, to);
            } else {
                self.gather_line(row, x, from, until, to);
            }
        }
    }

    /// Taps of one kernel row: neighbours in memory, cut at the image's edges.
    #[inline(always)]
    fn gather_line<T: Real>(&self, row: &[T], x: usize, from: usize, until: usize, to: &mut [T]) {
        let c = self.channels;
        let start = x * self.stride;
        // Of the line of taps, [low, high) lies inside the image.
        let low = (self.padding.saturating_sub(start) * c).clamp(from, until);
        let high = ((self.width + self.padding).saturating_sub(start) * c).clamp(low, until);
        to[..low - from].fill(T::ZERO);
        if high > low {
            let first = start * c + low - self.padding * c;
            super::gemm::copy(&mut to[low - from..high - from], &row[first..first + high - low]);
        }
        to[high - from..].fill(T::ZERO);
    }

    #[inline(always)]
    fn gather_enlarged<T: Real>(&self, row: &[T], x: usize, from: usize, to: &mut [T]) {
        let c = self.channels;
        let (mut at, mut done) = (from, 0);
        while done < to.len() {
            let (kx, channel) = (at / c, at % c);
            let length = (c - channel).min(to.len() - done);
            let to = &mut to[done..done + length];
            let column = x * self.stride + kx;
            if column < self.padding || column - self.padding >= self.enlarged.1 {
                to.fill(T::ZERO);
            } else {
                let column = Self::nearest(column - self.padding, self.width, self.enlarged.1);
                super::gemm::copy(to, &row[column * c + channel..][..length]);
            }
            (at, done) = (at + length, done + length);
        }
    }

    /// Adds the gradient of enlarged images to that of the images.
    pub fn shrink<T: Real>(&self, enlarged: &[T], images: &mut [T]) {
        let (c, (eh, ew)) = (self.channels, self.enlarged);
        let level = Level::current();
        for image in 0..self.batch {
            for y in 0..eh {
                let into = image * self.height + Self::nearest(y, self.height, eh);
                for x in 0..ew {
                    let from = &enlarged[((image * eh + y) * ew + x) * c..][..c];
                    let at = (into * self.width + Self::nearest(x, self.width, ew)) * c;
                    super::gemm::add(level, &mut images[at..at + c], from);
                }
            }
        }
    }

    /// Adds columns [positions, depth] to the (enlarged) pixels that they were seen at.
    pub fn scatter<T: Real>(&self, columns: &[T], images: &mut [T]) {
        let (c, level) = (self.channels, Level::current());
        for (position, column) in columns.chunks_exact(self.depth()).enumerate() {
            let (image, y, x) = self.place(position);
            for (tap, from) in column.chunks_exact(c).enumerate() {
                let row = (y * self.stride + tap / self.kernel.1).wrapping_sub(self.padding);
                let column = (x * self.stride + tap % self.kernel.1).wrapping_sub(self.padding);
                if row < self.enlarged.0 && column < self.enlarged.1 {
                    let at = ((image * self.enlarged.0 + row) * self.enlarged.1 + column) * c;
                    super::gemm::add(level, &mut images[at..at + c], from);
                }
            }
        }
    }
}

/// What output pixels see, as rows [positions, depth].
#[derive(Clone, Copy, Debug)]
pub struct Patches<'a, T> {
    pub window: &'a Window,
    pub images: &'a [T],
}

vectorised! {
    fn patch_rows<T: Real>(
        window: &Window, images: &[T], first: usize, rows: usize, inner: Range<usize>, to: &mut [T],
    ) {
        let mut place = window.place(first);
        for i in 0..rows {
            window.gather(images, place, &inner, &mut to[i * LEFT_STRIDE..][..inner.len()]);
            place = window.after(place);
        }
    }
}

impl<T: Real> LeftSource<T> for Patches<'_, T> {
    const LAYOUT: Left = Left::Rows;
    fn fill(&self, level: Level, row: usize, rows: usize, inner: Range<usize>, to: &mut [T]) {
        patch_rows(level, self.window, self.images, row, rows, inner, to);
    }
}

vectorised! {
    fn patch_panel<T: Real>(
        window: &Window, images: &[T], column: usize, positions: Range<usize>, to: &mut [T],
    ) {
        let inner = column..(column + NR).min(window.depth());
        let mut place = window.place(positions.start);
        for to in to.chunks_exact_mut(NR) {
            window.gather(images, place, &inner, &mut to[..inner.len()]);
            to[inner.len()..].fill(T::ZERO);
            place = window.after(place);
        }
    }
}

/// The same [positions, depth] as a right operand.
impl<T: Real> RightSource<T> for Patches<'_, T> {
    fn pack(&self, level: Level, panel: usize, inner: Range<usize>, to: &mut [T]) {
        patch_panel(level, self.window, self.images, panel * NR, inner, to);
    }
}
