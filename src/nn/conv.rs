//! 2-D convolution as one matrix product per image.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, WithDType};
use gemm::Parallelism;
use rayon::prelude::*;

use super::im2col::{Window, col2im, im2col};
use super::kernel::{Real, dispatch, fused, slice, with_slice};
use super::linear::LowRank;

/// A convolution with square stride and padding, optionally with a low-rank
/// adapter (a k×k convolution down to the rank, then a 1×1 one up).
#[derive(Clone, Debug)]
pub struct Conv2d {
    /// [out, in, kh, kw]
    pub weight: Tensor,
    /// [out]
    pub bias: Option<Tensor>,
    pub stride: usize,
    pub padding: usize,
    pub adapter: Option<LowRank>,
}

impl Conv2d {
    /// [B, in, H, W] → [B, out, Ho, Wo].
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut y = conv2d(x, &self.weight, self.stride, self.padding)?;
        if let Some(bias) = &self.bias {
            y = y.broadcast_add(&bias.reshape((1, (), 1, 1))?)?;
        }
        if let Some(adapter) = &self.adapter {
            let low = conv2d(x, &adapter.down, self.stride, self.padding)?;
            y = (y + (conv2d(&low, &adapter.up, 1, 0)? * adapter.scale)?)?;
        }
        Ok(y)
    }
}

/// `x` [B, C, H, W] ∗ `weight` [O, C, kh, kw].
pub fn conv2d(x: &Tensor, weight: &Tensor, stride: usize, padding: usize) -> Result<Tensor> {
    if fused(x) {
        x.contiguous()?.apply_op2(&weight.contiguous()?, Conv { stride, padding })
    } else {
        composed(x, &weight.contiguous()?, stride, padding)
    }
}

/// candle's convolution. Its backward takes the height's remainder under the
/// stride for the width's too, so where they differ the input is padded and
/// cut here to leave none.
fn composed(x: &Tensor, weight: &Tensor, stride: usize, padding: usize) -> Result<Tensor> {
    let (_, _, kh, kw) = weight.dims4()?;
    let rest = |size: usize, k: usize| (size + 2 * padding).saturating_sub(k) % stride;
    let (rows, columns) = (rest(x.dim(2)?, kh), rest(x.dim(3)?, kw));
    if rows == columns {
        return x.contiguous()?.conv2d(weight, padding, stride, 1, 1);
    }
    let x = x.pad_with_zeros(2, padding, padding)?.pad_with_zeros(3, padding, padding)?;
    let x = x.narrow(2, 0, x.dim(2)? - rows)?.narrow(3, 0, x.dim(3)? - columns)?;
    x.contiguous()?.conv2d(weight, 0, stride, 1, 1)
}

struct Conv {
    stride: usize,
    padding: usize,
}

impl Conv {
    fn window(&self, x: &Shape, w: &Shape) -> Result<(usize, usize, Window)> {
        let (batch, channels, height, width) = x.dims4()?;
        let (out, inner, kh, kw) = w.dims4()?;
        let (stride, padding) = (self.stride, self.padding);
        if inner != channels || height + 2 * padding < kh || width + 2 * padding < kw {
            candle_core::bail!("conv2d: input {x:?} does not fit weight {w:?}");
        }
        Ok((batch, out, Window { channels, height, width, kernel: (kh, kw), stride, padding }))
    }
}

impl CustomOp2 for Conv {
    fn name(&self) -> &'static str {
        "conv2d-im2col"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (batch, out, window) = self.window(l1.shape(), l2.shape())?;
        let shape = Shape::from((batch, out, window.out_height(), window.out_width()));
        let storage = dispatch!(s1.dtype(), T => {
            let (x, w) = (slice::<T>(s1, l1)?, slice::<T>(s2, l2)?);
            T::to_cpu_storage_owned(forward::<T>(&window, x, w, batch, out))
        });
        Ok((storage, shape))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        _res: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (batch, out, window) = self.window(x.shape(), w.shape())?;
        dispatch!(x.dtype(), T => with_slice::<T, _>(grad, |dy| {
            let dx = if x.track_op() {
                let dx = with_slice::<T, _>(w, |w| Ok(input_gradient::<T>(&window, dy, w, batch, out)))?;
                Some(Tensor::from_vec(dx, x.shape(), x.device())?)
            } else {
                None
            };
            let dw = if w.track_op() {
                let dw = with_slice::<T, _>(x, |x| Ok(weight_gradient::<T>(&window, dy, x, batch, out)))?;
                Some(Tensor::from_vec(dw, w.shape(), w.device())?)
            } else {
                None
            };
            Ok((dx, dw))
        }))
    }
}

/// A row-major matrix and its leading dimension order for [`product`].
#[derive(Clone, Copy)]
struct Matrix<'a, T> {
    data: &'a [T],
    row_stride: isize,
    column_stride: isize,
}

impl<'a, T> Matrix<'a, T> {
    fn new(data: &'a [T], columns: usize) -> Self {
        Self { data, row_stride: columns as isize, column_stride: 1 }
    }

    fn transposed(self) -> Self {
        Self { row_stride: self.column_stride, column_stride: self.row_stride, ..self }
    }
}

/// `dst` [m, n] (row-major) = or += `a` [m, k] · `b` [k, n].
fn product<T: Real>(
    dst: &mut [T],
    (m, n, k): (usize, usize, usize),
    a: Matrix<T>,
    b: Matrix<T>,
    accumulate: bool,
    parallelism: Parallelism,
) {
    assert!(dst.len() == m * n && a.data.len() == m * k && b.data.len() == k * n);
    // SAFETY: the three slices hold m·n, m·k and k·n elements (checked above) and every
    // (row, column) index below (m, k), (k, n), (m, n) with the strides of a dense row-major
    // matrix or of its transpose stays inside them; `dst` is borrowed mutably, so it does not alias.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            dst.as_mut_ptr(),
            1,
            n as isize,
            accumulate,
            a.data.as_ptr(),
            a.column_stride,
            a.row_stride,
            b.data.as_ptr(),
            b.column_stride,
            b.row_stride,
            T::ONE,
            T::ONE,
            false,
            false,
            false,
            parallelism,
        );
    }
}

/// Runs `each(image index, output image)` over a batch: images in parallel
/// when there are enough of them, else threads inside each product.
fn over_images<T: Real>(
    output: &mut [T],
    image: usize,
    each: impl Fn(usize, &mut [T], &mut Vec<T>, Parallelism) + Sync,
) {
    let batch = output.len() / image.max(1);
    if batch >= 2 * rayon::current_num_threads() {
        output
            .par_chunks_mut(image)
            .enumerate()
            .for_each_init(Vec::new, |buffer, (i, out)| each(i, out, buffer, Parallelism::None));
    } else {
        let mut buffer = Vec::new();
        for (i, out) in output.chunks_mut(image).enumerate() {
            each(i, out, &mut buffer, Parallelism::Rayon(0));
        }
    }
}

fn columns<'a, T: Real>(window: &Window, image: &'a [T], buffer: &'a mut Vec<T>) -> &'a [T] {
    if window.is_identity() {
        return image;
    }
    buffer.resize(window.rows() * window.positions(), T::ZERO);
    im2col(window, image, buffer);
    buffer
}

fn forward<T: Real>(window: &Window, x: &[T], w: &[T], batch: usize, out: usize) -> Vec<T> {
    let (rows, positions) = (window.rows(), window.positions());
    let input = window.channels * window.height * window.width;
    let mut y = vec![T::ZERO; batch * out * positions];
    over_images(&mut y, out * positions, |i, y, buffer, parallelism| {
        let col = columns(window, &x[i * input..(i + 1) * input], buffer);
        let size = (out, positions, rows);
        product(y, size, Matrix::new(w, rows), Matrix::new(col, positions), false, parallelism);
    });
    y
}

fn input_gradient<T: Real>(window: &Window, dy: &[T], w: &[T], batch: usize, out: usize) -> Vec<T> {
    let (rows, positions) = (window.rows(), window.positions());
    let input = window.channels * window.height * window.width;
    let mut dx = vec![T::ZERO; batch * input];
    over_images(&mut dx, input, |i, dx, buffer, parallelism| {
        let dy = Matrix::new(&dy[i * out * positions..(i + 1) * out * positions], positions);
        let size = (rows, positions, out);
        let wt = Matrix::new(w, rows).transposed();
        if window.is_identity() {
            product(dx, size, wt, dy, false, parallelism);
        } else {
            buffer.resize(rows * positions, T::ZERO);
            product(buffer, size, wt, dy, false, parallelism);
            col2im(window, buffer, dx);
        }
    });
    dx
}

fn weight_gradient<T: Real>(
    window: &Window,
    dy: &[T],
    x: &[T],
    batch: usize,
    out: usize,
) -> Vec<T> {
    let (rows, positions) = (window.rows(), window.positions());
    let input = window.channels * window.height * window.width;
    let mut dw = vec![T::ZERO; out * rows];
    let mut buffer = Vec::new();
    for i in 0..batch {
        let col = columns(window, &x[i * input..(i + 1) * input], &mut buffer);
        let dy = Matrix::new(&dy[i * out * positions..(i + 1) * out * positions], positions);
        let colt = Matrix::new(col, positions).transposed();
        product(&mut dw, (out, rows, positions), dy, colt, i > 0, Parallelism::Rayon(0));
    }
    dw
}
