//! Optimizer steps and gradient sums, in place.

use candle_core::{DType, Result, Tensor};

use super::launch::{Arg, Extent, blocks, launch, long, of_type};
use super::memory::{Fresh, address, device};
use crate::nn::adamw::Scalars;

const FILE: &str = "adamw";
const BLOCK: u32 = 256;

fn flat(elements: usize) -> Extent {
    Extent::new((blocks(elements, BLOCK as usize, 1 << 16), 1, 1), BLOCK)
}

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
    launch(device(p)?, FILE, "adamw_f32", flat(p.elem_count()), &args)
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
    launch(device(sum)?, FILE, &of_type("add_scaled", sum.dtype())?, flat(n), &args)
}

/// Σ v² of a contiguous tensor: blocks' sums in f32, then all of them in f64.
pub fn squared_norm(x: &Tensor) -> Result<f64> {
    let extent = Extent::new((blocks(x.elem_count(), 1 << 14, 1 << 16), 1, 1), BLOCK);
    let partial = Fresh::new(device(x)?, DType::F32, extent.grid.0 as usize)?;
    let args = [Arg::Pointer(address(x)?), Arg::Pointer(partial.address), long(x.elem_count())?];
    launch(device(x)?, FILE, &of_type("sum_squares", x.dtype())?, extent, &args)?;
    let sums = partial.into_tensor(extent.grid.0 as usize).to_vec1::<f32>()?;
    Ok(sums.into_iter().map(f64::from).sum())
}
