//! Optimizer steps and gradient sums, in place.

use candle_core::{DType, Result, Tensor};

use super::launch::{Arg, Extent, launch, long, of_type};
use super::memory::{Fresh, address, device};
use crate::nn::adamw::Scalars;

const FILE: &str = "adamw";
/// Elements of one partial sum of squares.
const SQUARES: usize = 16_384;

/// One update of `p` and its moments; all f32, contiguous and of one length.
pub fn update(p: &Tensor, g: &Tensor, m: &Tensor, v: &Tensor, s: &Scalars) -> Result<()> {
    let mut args = vec![
        Arg::Pointer(address(p)?),
        Arg::Pointer(address(g)?),
        Arg::Pointer(address(m)?),
        Arg::Pointer(address(v)?),
        long(p.elem_count())?,
    ];
    let numbers = [s.scale, s.keep, s.rest1, s.beta2, s.rest2, s.step_size, s.root, s.eps];
    args.extend(numbers.map(Arg::Float));
    launch(device(p)?, FILE, "adamw_f32", Extent::flat(p.elem_count(), DType::F32), &args)
}

/// `sum` += `scale` · `gradient`, of one type and length.
pub fn add_scaled(sum: &Tensor, gradient: &Tensor, scale: f32) -> Result<()> {
    let n = sum.elem_count();
    let args = [
        Arg::Pointer(address(sum)?),
        Arg::Pointer(address(gradient)?),
        Arg::Float(scale),
        long(n)?,
    ];
    launch(
        device(sum)?,
        FILE,
        &of_type("add_scaled", sum.dtype())?,
        Extent::flat(n, sum.dtype()),
        &args,
    )
}

/// Σ v² of a contiguous tensor: in pieces, then those in order, all in f64.
pub fn squared_norm(x: &Tensor) -> Result<f64> {
    let n = x.elem_count();
    let pieces = n.div_ceil(SQUARES).max(1);
    let partial = Fresh::new(device(x)?, DType::F64, pieces)?;
    let args = [Arg::Pointer(address(x)?), Arg::Pointer(partial.address), long(n)?];
    let extent = Extent::new((pieces, 1, 1));
    launch(device(x)?, FILE, &of_type("sum_squares", x.dtype())?, extent, &args)?;
    Ok(partial.into_tensor(pieces).to_vec1::<f64>()?.into_iter().sum())
}
