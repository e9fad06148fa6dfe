//! Unfolding an image into the columns of a matrix, and back.

use super::kernel::Real;

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

/// `image` [C, H, W] → `columns` [C·kh·kw, Ho·Wo], zero outside the image.
pub fn im2col<T: Real>(w: &Window, image: &[T], columns: &mut [T]) {
    let (oh, ow) = (w.out_height(), w.out_width());
    for (row, out) in columns.chunks_exact_mut(oh * ow).enumerate() {
        let (c, k) = (row / (w.kernel.0 * w.kernel.1), row % (w.kernel.0 * w.kernel.1));
        let (ky, kx) = (k / w.kernel.1, k % w.kernel.1);
        let plane = &image[c * w.height * w.width..][..w.height * w.width];
        let (x_from, x_to) = w.valid(kx, w.width, ow);
        let (y_from, y_to) = w.valid(ky, w.height, oh);
        for (y, line) in out.chunks_exact_mut(ow).enumerate() {
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
}

/// The adjoint of [`im2col`]: adds every column entry back to its pixel.
pub fn col2im<T: Real>(w: &Window, columns: &[T], image: &mut [T]) {
    let (oh, ow) = (w.out_height(), w.out_width());
    for (row, from) in columns.chunks_exact(oh * ow).enumerate() {
        let (c, k) = (row / (w.kernel.0 * w.kernel.1), row % (w.kernel.0 * w.kernel.1));
        let (ky, kx) = (k / w.kernel.1, k % w.kernel.1);
        let plane = &mut image[c * w.height * w.width..][..w.height * w.width];
        let (x_from, x_to) = w.valid(kx, w.width, ow);
        let (y_from, y_to) = w.valid(ky, w.height, oh);
        if x_from >= x_to {
            continue;
        }
        for y in y_from..y_to {
            let first =
                (y * w.stride + ky - w.padding) * w.width + x_from * w.stride + kx - w.padding;
            let into = plane[first..].iter_mut().step_by(w.stride);
            into.zip(&from[y * ow + x_from..y * ow + x_to]).for_each(|(to, add)| *to += *add);
        }
    }
}
