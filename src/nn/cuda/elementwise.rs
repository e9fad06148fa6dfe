//! Activations, what is added to outputs, and sums over rows.

use candle_core::{Result, Tensor};

use super::launch::{Arg, Extent, blocks, int, launch, long, of_type};
use super::memory::{Fresh, address, address_or_null, device};
use crate::nn::activation::Activation;
use crate::nn::autograd::attach_storage;

const FILE: &str = "elementwise";
const BLOCK: u32 = 256;
/// Values that a block takes of a flat array: 8 a thread.
const PER_BLOCK: usize = 2048;
const MOST_BLOCKS: usize = 1 << 16;

fn flat(elements: usize) -> Extent {
    Extent::new((blocks(elements, PER_BLOCK, MOST_BLOCKS), 1, 1), BLOCK)
}

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
    launch(device(&x)?, FILE, &name, flat(n), &args)?;
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
        launch(device(&kept)?, FILE, &name, flat(n), &args)?;
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
    launch(device(&x)?, FILE, &name, flat(rows * width), &args)?;
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
        launch(device(&kept)?, FILE, &name, flat(rows * width), &args)?;
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
    launch(device(like)?, FILE, &name, flat(rows * channels), &args)
}

/// Sums over the rows of every image of `x` [images, rows, channels]: [images, channels].
pub fn column_sums(x: &Tensor, images: usize, channels: usize) -> Result<Tensor> {
    let rows = x.elem_count() / (images * channels).max(1);
    let pieces = rows.div_ceil(256).clamp(1, 64);
    let partial = Fresh::new(device(x)?, candle_core::DType::F32, images * pieces * channels)?;
    let columns = channels.div_ceil(32) as u32;
    let args = [
        Arg::Pointer(address(x)?),
        Arg::Pointer(partial.address),
        long(rows)?,
        int(channels)?,
        int(pieces)?,
    ];
    let extent = Extent::new((columns, pieces as u32, images as u32), BLOCK);
    launch(device(x)?, FILE, &of_type("column_sums", x.dtype())?, extent, &args)?;
    finish_sums(x, &partial, (images, pieces, channels))
}

/// Adds partial sums [images, pieces, channels], in order, into values of `like`'s type.
pub fn finish_sums(
    like: &Tensor,
    partial: &Fresh,
    (images, pieces, channels): (usize, usize, usize),
) -> Result<Tensor> {
    let sums = Fresh::new(device(like)?, like.dtype(), images * channels)?;
    let args =
        [Arg::Pointer(partial.address), Arg::Pointer(sums.address), int(pieces)?, int(channels)?];
    let extent = Extent::new((channels.div_ceil(BLOCK as usize) as u32, images as u32, 1), BLOCK);
    launch(device(like)?, FILE, &of_type("column_sums_finish", like.dtype())?, extent, &args)?;
    Ok(sums.into_tensor((images, channels)))
}
