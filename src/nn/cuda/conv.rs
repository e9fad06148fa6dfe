//! Convolutions of channels-last images: by cuDNN where the crate is built with it, or as
//! products of column matrices, made in pieces of bounded size.

use candle_core::cuda_backend::CudaDevice;
use candle_core::{DType, Result, Tensor, bail};

use super::gemm::{Matrix, gemm};
use super::launch::{Arg, Extent, int, launch, long, of_type};
use super::memory::{Fresh, address, device};
use crate::nn::window::Window;

const FILE: &str = "image";
/// Bytes of a column matrix, at most (but at least an image's in the input gradient).
const COLUMNS: usize = 256 << 20;

/// A convolution without bias; weights are [outer, kh, kw, channels].
#[derive(Clone, Copy, Debug)]
pub struct Conv<'a> {
    pub device: &'a CudaDevice,
    pub dtype: DType,
    /// Its image is not enlarged, see [`nearest`].
    pub window: Window,
    pub outer: usize,
}

impl Conv<'_> {
    /// y [B, Ho, Wo, outer] from x [B, H, W, channels].
    pub fn forward(&self, x: u64, weight: u64, y: u64) -> Result<()> {
        #[cfg(feature = "cudnn")]
        if super::cudnn::takes(&self.window) {
            return super::cudnn::forward(self, x, weight, y);
        }
        let depth = self.window.depth();
        let weight = Matrix::new(weight, depth).t();
        self.in_pieces(x, |first, rows, columns| {
            let y = Matrix::new(self.offset(y, first * self.outer), self.outer);
            let columns = Matrix::new(columns, depth);
            let sizes = (rows, self.outer, depth);
            gemm(self.device, self.dtype, sizes, (columns, weight, y), (1.0, 0.0))
        })
    }

    /// dx [B, H, W, channels] from dy [B, Ho, Wo, outer].
    pub fn input_gradient(&self, dy: u64, weight: u64, dx: u64) -> Result<()> {
        #[cfg(feature = "cudnn")]
        if super::cudnn::takes(&self.window) {
            return super::cudnn::input_gradient(self, dy, weight, dx);
        }
        let w = &self.window;
        let (depth, rows) = (w.depth(), w.out.0 * w.out.1);
        let columns = Fresh::new(self.device, self.dtype, rows * depth)?;
        let weight = Matrix::new(weight, depth);
        let one = Window { batch: 1, ..*w };
        let image = w.height * w.width * w.channels;
        for b in 0..w.batch {
            let dy = Matrix::new(self.offset(dy, b * rows * self.outer), self.outer);
            let to = Matrix::new(columns.address, depth);
            let sizes = (rows, depth, self.outer);
            gemm(self.device, self.dtype, sizes, (dy, weight, to), (1.0, 0.0))?;
            let mut args =
                vec![Arg::Pointer(columns.address), Arg::Pointer(self.offset(dx, b * image))];
            args.extend(parameters(&one)?);
            let name = of_type("col2im", self.dtype)?;
            launch(self.device, FILE, &name, Extent::flat(image, self.dtype), &args)?;
        }
        Ok(())
    }

    /// dw [outer, kh, kw, channels].
    pub fn weight_gradient(&self, x: u64, dy: u64, dw: u64) -> Result<()> {
        #[cfg(feature = "cudnn")]
        if super::cudnn::takes(&self.window) {
            return super::cudnn::weight_gradient(self, x, dy, dw);
        }
        let depth = self.window.depth();
        let dw = Matrix::new(dw, depth);
        self.in_pieces(x, |first, rows, columns| {
            let dy = Matrix::new(self.offset(dy, first * self.outer), self.outer).t();
            let columns = Matrix::new(columns, depth);
            let sizes = (self.outer, depth, rows);
            let beta = if first == 0 { 0.0 } else { 1.0 };
            gemm(self.device, self.dtype, sizes, (dy, columns, dw), (1.0, beta))
        })
    }

    /// Runs `each(first row, rows, column matrix)` over the output's rows in order.
    fn in_pieces(&self, x: u64, each: impl Fn(usize, usize, u64) -> Result<()>) -> Result<()> {
        let (rows, depth) = (self.window.positions(), self.window.depth());
        let row = depth * self.dtype.size_in_bytes();
        let at_once = (COLUMNS / row.max(1)).clamp(1, rows.max(1));
        let columns = Fresh::new(self.device, self.dtype, at_once * depth)?;
        for first in (0..rows).step_by(at_once) {
            let count = at_once.min(rows - first);
            let mut args = vec![Arg::Pointer(x), Arg::Pointer(columns.address)];
            args.extend(parameters(&self.window)?);
            args.extend([long(first)?, long(count)?]);
            let name = of_type("im2col", self.dtype)?;
            launch(self.device, FILE, &name, Extent::flat(count * depth, self.dtype), &args)?;
            each(first, count, columns.address)?;
        }
        Ok(())
    }

    fn offset(&self, address: u64, elements: usize) -> u64 {
        address + (elements * self.dtype.size_in_bytes()) as u64
    }
}

fn parameters(w: &Window) -> Result<Vec<Arg>> {
    let numbers = [
        w.batch, w.height, w.width, w.channels, w.kernel.0, w.kernel.1, w.stride, w.padding,
        w.out.0, w.out.1,
    ];
    numbers.into_iter().map(int).collect()
}

/// `x` [B, h, w, C] enlarged to the window's size, or as it is.
pub fn nearest(x: &Tensor, window: &Window) -> Result<Tensor> {
    let (from, to) = ((window.height, window.width), window.enlarged);
    if from == to {
        return Ok(x.clone());
    }
    let y = Fresh::new(device(x)?, x.dtype(), window.batch * to.0 * to.1 * window.channels)?;
    resample(x, y.address, "nearest", window)?;
    Ok(y.into_tensor((window.batch, to.0, to.1, window.channels)))
}

/// The gradient of [`nearest`]'s input.
pub fn nearest_gradient(dy: Tensor, window: &Window) -> Result<Tensor> {
    if (window.height, window.width) == window.enlarged {
        return Ok(dy);
    }
    let dx = Fresh::new(device(&dy)?, dy.dtype(), window.input())?;
    resample(&dy, dx.address, "nearest_backward", window)?;
    Ok(dx.into_tensor((window.batch, window.height, window.width, window.channels)))
}

fn resample(from: &Tensor, to: u64, name: &str, w: &Window) -> Result<()> {
    let mut args = vec![Arg::Pointer(address(from)?), Arg::Pointer(to)];
    let sizes = [w.batch, w.height, w.width, w.channels, w.enlarged.0, w.enlarged.1];
    args.extend(sizes.into_iter().map(int).collect::<Result<Vec<_>>>()?);
    let written = match name {
        "nearest" => w.batch * w.enlarged.0 * w.enlarged.1 * w.channels,
        "nearest_backward" => w.input(),
        other => bail!("no resampling kernel '{other}'"),
    };
    let name = of_type(name, from.dtype())?;
    launch(device(from)?, "elementwise", &name, Extent::flat(written, from.dtype()), &args)
}
