//! 2-D convolution as one matrix product per image.

use std::ops::Range;

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

/// A matrix inside a slice, for [`product`].
#[derive(Clone, Copy)]
struct Matrix<'a, T> {
    data: &'a [T],
    row_stride: usize,
    column_stride: usize,
}

impl<'a, T> Matrix<'a, T> {
    /// Row-major, `row_stride` elements from row to row.
    fn new(data: &'a [T], row_stride: usize) -> Self {
        Self { data, row_stride, column_stride: 1 }
    }

    fn transposed(self) -> Self {
        Self { row_stride: self.column_stride, column_stride: self.row_stride, ..self }
    }

    fn holds(&self, rows: usize, columns: usize) -> bool {
        (rows - 1) * self.row_stride + (columns - 1) * self.column_stride < self.data.len()
    }
}

/// `dst` [m, n] (rows `dst_stride` apart) = or += `a` [m, k] · `b` [k, n].
fn product<T: Real>(
    (dst, dst_stride): (&mut [T], usize),
    (m, n, k): (usize, usize, usize),
    a: Matrix<T>,
    b: Matrix<T>,
    accumulate: bool,
    parallelism: Parallelism,
) {
    if m == 0 || n == 0 || k == 0 {
        return;
    }
    assert!(n <= dst_stride && (m - 1) * dst_stride + n <= dst.len());
    assert!(a.holds(m, k) && b.holds(k, n));
    // SAFETY: the asserts above bound the largest offset that any (row, column) index below
    // (m, n), (m, k), (k, n) reaches in its slice; rows of `dst` do not overlap, and `dst` is
    // borrowed mutably, so it aliases neither operand.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            dst.as_mut_ptr(),
            1,
            dst_stride as isize,
            accumulate,
            a.data.as_ptr(),
            a.column_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.column_stride as isize,
            b.row_stride as isize,
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

/// The columns of a band, in `buffer` or (1×1) in the image itself.
fn columns<'a, T: Real>(
    window: &Window,
    image: &'a [T],
    band: &Range<usize>,
    buffer: &'a mut Vec<T>,
    parallelism: Parallelism,
) -> &'a [T] {
    if window.is_identity() {
        return image;
    }
    buffer.resize(window.rows() * band.len() * window.out_width(), T::ZERO);
    im2col(window, image, band, buffer, matches!(parallelism, Parallelism::Rayon(_)));
    buffer
}

fn forward<T: Real>(window: &Window, x: &[T], w: &[T], batch: usize, out: usize) -> Vec<T> {
    let (rows, positions, ow) = (window.rows(), window.positions(), window.out_width());
    let input = window.channels * window.height * window.width;
    let mut y = vec![T::ZERO; batch * out * positions];
    over_images(&mut y, out * positions, |i, y, buffer, parallelism| {
        for band in window.bands() {
            let n = band.len() * ow;
            let col = columns(window, &x[i * input..(i + 1) * input], &band, buffer, parallelism);
            let dst = (&mut y[band.start * ow..], positions);
            product(
                dst,
                (out, n, rows),
                Matrix::new(w, rows),
                Matrix::new(col, n),
                false,
                parallelism,
            );
        }
    });
    y
}

fn input_gradient<T: Real>(window: &Window, dy: &[T], w: &[T], batch: usize, out: usize) -> Vec<T> {
    let (rows, positions, ow) = (window.rows(), window.positions(), window.out_width());
    let input = window.channels * window.height * window.width;
    let mut dx = vec![T::ZERO; batch * input];
    over_images(&mut dx, input, |i, dx, buffer, parallelism| {
        let dy = &dy[i * out * positions..(i + 1) * out * positions];
        let wt = Matrix::new(w, rows).transposed();
        for band in window.bands() {
            let n = band.len() * ow;
            let dy = Matrix::new(&dy[band.start * ow..], positions);
            if window.is_identity() {
                product((dx, positions), (rows, n, out), wt, dy, false, parallelism);
            } else {
                buffer.resize(rows * n, T::ZERO);
                product((buffer, n), (rows, n, out), wt, dy, false, parallelism);
                col2im(window, buffer, &band, dx);
            }
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
    let (rows, positions, ow) = (window.rows(), window.positions(), window.out_width());
    let input = window.channels * window.height * window.width;
    let mut dw = vec![T::ZERO; out * rows];
    let (mut buffer, threads) = (Vec::new(), Parallelism::Rayon(0));
    for i in 0..batch {
        let dy = &dy[i * out * positions..(i + 1) * out * positions];
        for band in window.bands() {
            let n = band.len() * ow;
            let first = i == 0 && band.start == 0;
            let dy = Matrix::new(&dy[band.start * ow..], positions);
            let col = columns(window, &x[i * input..(i + 1) * input], &band, &mut buffer, threads);
            let colt = Matrix::new(col, n).transposed();
            product((&mut dw, rows), (out, rows, n), dy, colt, !first, threads);
        }
    }
    dw
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Var};

    /// An image so large that it is unfolded in several bands gives candle's own answer.
    #[test]
    fn bands_agree_with_one_product() -> Result<()> {
        let x = Var::randn(0.0_f32, 1.0, (1, 40, 130, 120), &Device::Cpu)?;
        let w = Var::randn(0.0_f32, 0.1, (8, 40, 3, 3), &Device::Cpu)?;
        for (stride, padding) in [(1, 1), (2, 0)] {
            let window = Conv { stride, padding }.window(x.shape(), w.shape())?.2;
            assert!(stride == 2 || window.bands().count() > 1);
            let ours = conv2d(&x, &w, stride, padding)?;
            let theirs = x.conv2d(&w, padding, stride, 1, 1)?;
            let difference = (&ours - &theirs)?.abs()?.max_all()?.to_scalar::<f32>()?;
            assert!(difference < 1e-4, "forward differs by {difference}");
            let seed = ours.cos()?.detach();
            let (ours, theirs) = ((ours * &seed)?.sum_all()?, (theirs * &seed)?.sum_all()?);
            let (ours, theirs) = (ours.backward()?, theirs.backward()?);
            for var in [&x, &w] {
                let (Some(a), Some(b)) = (ours.get(var), theirs.get(var)) else {
                    candle_core::bail!("a gradient is missing")
                };
                let scale = b.abs()?.max_all()?.to_scalar::<f32>()?;
                let difference = (a - b)?.abs()?.max_all()?.to_scalar::<f32>()?;
                assert!(difference < 1e-4 * scale, "gradients differ by {difference} of {scale}");
            }
        }
        Ok(())
    }
}
