//! Activations, what is added to outputs, and sums over rows.

use candle_core::cuda_backend::CudaDevice;
use candle_core::{DType, Result, Tensor};

use super::launch::{Arg, Extent, int, launch, long, of_type, pieces};
use super::memory::{Fresh, address, address_or_null, device};
use crate::nn::activation::Activation;
use crate::nn::autograd::attach_storage;

const FILE: &str = "elementwise";

/// The kernels' number of an activation.
fn kind(activation: Activation) -> Arg {
    Arg::Int(match activation {
        Activation::Silu => 0,
        Activation::Gelu => 1,
        Activation::QuickGelu => 2,
    })
}

pub fn activation(of: Activation, x: &Tensor) -> Result<Tensor> {
    let x = x.contiguous()?;
    let y = Fresh::like(&x)?;
    let n = x.elem_count();
    let name = of_type("activation", x.dtype())?;
    let args = [Arg::Pointer(address(&x)?), Arg::Pointer(y.address), long(n)?, kind(of)];
    launch(device(&x)?, FILE, &name, Extent::flat(n, x.dtype()), &args)?;
    let kept = x.detach();
    attach_storage(y.into_storage(), x.shape(), &[&x], move |dy| {
        let dx = Fresh::like(&kept)?;
        let name = of_type("activation_backward", kept.dtype())?;
        let args = [
            Arg::Pointer(address(&kept)?),
            Arg::Pointer(address(dy)?),
            Arg::Pointer(dx.address),
            long(n)?,
            kind(of),
        ];
        launch(device(&kept)?, FILE, &name, Extent::flat(n, kept.dtype()), &args)?;
        Ok(vec![dx.into_tensor(kept.shape())])
    })
}

/// `value · gelu(gate)` of [..., 2 width] = (value, gate) → [..., width].
pub fn geglu(x: &Tensor, width: usize) -> Result<Tensor> {
    let x = x.contiguous()?;
    let rows = x.elem_count() / (2 * width).max(1);
    let y = Fresh::new(device(&x)?, x.dtype(), rows * width)?;
    let name = of_type("geglu", x.dtype())?;
    let args = [Arg::Pointer(address(&x)?), Arg::Pointer(y.address), long(rows)?, int(width)?];
    launch(device(&x)?, FILE, &name, Extent::flat(rows * width, x.dtype()), &args)?;
    let mut shape = x.dims().to_vec();
    if let Some(last) = shape.last_mut() {
        *last = width;
    }
    let kept = x.detach();
    attach_storage(y.into_storage(), shape, &[&x], move |dy| {
        let dx = Fresh::like(&kept)?;
        let name = of_type("geglu_backward", kept.dtype())?;
        let args = [
            Arg::Pointer(address(&kept)?),
            Arg::Pointer(address(dy)?),
            Arg::Pointer(dx.address),
            long(rows)?,
            int(width)?,
        ];
        launch(device(&kept)?, FILE, &name, Extent::flat(rows * width, kept.dtype()), &args)?;
        Ok(vec![dx.into_tensor(kept.shape())])
    })
}

/// Adds a bias [channels], a shift [images, channels] and a residual to `y`, of the type and
/// on the device of `like`, in one pass.
pub fn finish(
    y: u64,
    like: &Tensor,
    (rows, channels): (usize, usize),
    (bias, shift, residual): (Option<&Tensor>, Option<&Tensor>, Option<&Tensor>),
) -> Result<()> {
    if bias.is_none() && shift.is_none() && residual.is_none() {
        return Ok(());
    }
    let images = shift.map_or(Ok(1), |s| s.dim(0))?;
    let args = [
        Arg::Pointer(y),
        Arg::Pointer(address_or_null(bias)?),
        Arg::Pointer(address_or_null(shift)?),
        Arg::Pointer(address_or_null(residual)?),
        long(rows)?,
        int(channels)?,
        long(rows / images.max(1))?,
    ];
    let name = of_type("finish", like.dtype())?;
    launch(device(like)?, FILE, &name, Extent::flat(rows * channels, like.dtype()), &args)
}

/// Sums over the rows of every image of `x` [images, rows, channels]: [images, channels].
pub fn column_sums(x: &Tensor, images: usize, channels: usize) -> Result<Tensor> {
    let rows = x.elem_count() / (images * channels).max(1);
    let pieces = pieces(rows);
    let partial = Fresh::new(device(x)?, DType::F32, images * pieces * channels)?;
    let args = [
        Arg::Pointer(address(x)?),
        Arg::Pointer(partial.address),
        long(rows)?,
        int(channels)?,
        int(pieces)?,
    ];
    let extent = Extent::tiled(channels, pieces, images, x.dtype());
    launch(device(x)?, FILE, &of_type("column_sums", x.dtype())?, extent, &args)?;
    finish_sums(device(x)?, &partial, (images, pieces, channels), x.dtype())
}

/// Adds partial sums [images, pieces, channels], in order: [images, channels] of `dtype`.
pub fn finish_sums(
    device: &CudaDevice,
    partial: &Fresh,
    (images, pieces, channels): (usize, usize, usize),
    dtype: DType,
) -> Result<Tensor> {
    let sums = Fresh::new(device, dtype, images * channels)?;
    let args =
        [Arg::Pointer(partial.address), Arg::Pointer(sums.address), int(pieces)?, int(channels)?];
    let extent = Extent::new((channels.div_ceil(32), images, 1));
    launch(device, FILE, &of_type("column_sums_finish", dtype)?, extent, &args)?;
    Ok(sums.into_tensor((images, channels)))
}
