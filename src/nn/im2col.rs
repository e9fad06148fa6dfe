//! Unfolding an image into the columns of a matrix, and back.

use std::ops::Range;

use rayon::prelude::*;

use super::kernel::Real;

/// Elements of the column matrix that are unfolded at once: a large image's
/// whole matrix would take gigabytes.
const COLUMN_ELEMENTS: usize = 1 << 22;

/// The geometry of one convolution on one image.
#[derive(Clone, Copy, Debug)]
pub struct Window {
    pub channels: usize,
    pub height: usize,
    pub width: usize,
    pub kernel: (usize, usize),
    pub stride: usize,
    pub padding: usize,
}

impl Window {
    pub fn out_height(&self) -> usize {
        (self.height + 2 * self.padding - self.kernel.0) / self.stride + 1
    }

    pub fn out_width(&self) -> usize {
        (self.width + 2 * self.padding - self.kernel.1) / self.stride + 1
    }

    /// Rows of the column matrix.
    pub fn rows(&self) -> usize {
        self.channels * self.kernel.0 * self.kernel.1
    }

    /// Columns of the column matrix: output positions.
    pub fn positions(&self) -> usize {
        self.out_height() * self.out_width()
    }

    /// Channel and kernel position of a row of the column matrix.
    fn tap(&self, row: usize) -> (usize, usize, usize) {
        let (c, k) = (row / (self.kernel.0 * self.kernel.1), row % (self.kernel.0 * self.kernel.1));
        (c, k / self.kernel.1, k % self.kernel.1)
    }

    /// The output's rows in bands of which each unfolds into a matrix of bounded size.
    pub fn bands(&self) -> impl Iterator<Item = Range<usize>> {
        let height = self.out_height();
        let rows = COLUMN_ELEMENTS / (self.rows() * self.out_width()).max(1);
        let band = if self.is_identity() { height } else { rows.clamp(1, height) };
        (0..height).step_by(band.max(1)).map(move |from| from..(from + band).min(height))
    }

    /// A 1×1 convolution's columns are the image itself.
    pub fn is_identity(&self) -> bool {
        self.kernel == (1, 1) && self.stride == 1 && self.padding == 0
    }

    /// Output columns [from, to) whose input column `o·stride + k − padding` exists.
    fn valid(&self, k: usize, size: usize, out: usize) -> (usize, usize) {
        let from = self.padding.saturating_sub(k).div_ceil(self.stride);
        let to = (size + self.padding).saturating_sub(k).div_ceil(self.stride);
        (from.min(out), to.min(out))
    }
}

/// Rows `band` of the output: `image` [C, H, W] → `columns` [C·kh·kw, |band|·Wo], zero
/// outside the image.
pub fn im2col<T: Real>(
    w: &Window,
    image: &[T],
    band: &Range<usize>,
    columns: &mut [T],
    parallel: bool,
) {
    let length = band.len() * w.out_width();
    let fill = |(row, out): (usize, &mut [T])| fill_row(w, image, band, row, out);
    if parallel {
        columns.par_chunks_exact_mut(length).enumerate().for_each(fill);
    } else {
        columns.chunks_exact_mut(length).enumerate().for_each(fill);
    }
}

fn fill_row<T: Real>(w: &Window, image: &[T], band: &Range<usize>, row: usize, out: &mut [T]) {
    let ow = w.out_width();
    let (c, ky, kx) = w.tap(row);
    let plane = &image[c * w.height * w.width..][..w.height * w.width];
    let (x_from, x_to) = w.valid(kx, w.width, ow);
    let (y_from, y_to) = w.valid(ky, w.height, w.out_height());
    for (y, line) in band.clone().zip(out.chunks_exact_mut(ow)) {
        if y < y_from || y >= y_to || x_from >= x_to {
            line.fill(T::ZERO);
            continue;
        }
        let source = &plane[(y * w.stride + ky - w.padding) * w.width..][..w.width];
        line[..x_from].fill(T::ZERO);
        line[x_to..].fill(T::ZERO);
        let first = x_from * w.stride + kx - w.padding;
        if w.stride == 1 {
            line[x_from..x_to].copy_from_slice(&source[first..first + x_to - x_from]);
        } else {
            let taken = source[first..].iter().step_by(w.stride);
            line[x_from..x_to].iter_mut().zip(taken).for_each(|(to, from)| *to = *from);
        }
    }
}

/// The adjoint of [`im2col`]: adds every column entry back to its pixel.
pub fn col2im<T: Real>(w: &Window, columns: &[T], band: &Range<usize>, image: &mut [T]) {
    let ow = w.out_width();
    for (row, from) in columns.chunks_exact(band.len() * ow).enumerate() {
        let (c, ky, kx) = w.tap(row);
        let plane = &mut image[c * w.height * w.width..][..w.height * w.width];
        let (x_from, x_to) = w.valid(kx, w.width, ow);
        let (y_from, y_to) = w.valid(ky, w.height, w.out_height());
        if x_from >= x_to {
            continue;
        }
        for (y, line) in band.clone().zip(from.chunks_exact(ow)) {
            if y < y_from || y >= y_to {
                continue;
            }
            let first =
                (y * w.stride + ky - w.padding) * w.width + x_from * w.stride + kx - w.padding;
            let into = plane[first..].iter_mut().step_by(w.stride);
            into.zip(&line[x_from..x_to]).for_each(|(to, add)| *to += *add);
        }
    }
}
