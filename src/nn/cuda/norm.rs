//! Group and layer normalisation.

use candle_core::{DType, Result, Tensor};

use super::elementwise::finish_sums;
use super::launch::{Arg, Extent, int, launch, long, of_type};
use super::memory::{Fresh, address, device};
use crate::nn::autograd::{attach_storage, wanted};
use crate::nn::group_norm::Groups;

const FILE: &str = "norm";
const BLOCK: u32 = 256;

/// A contiguous parameter of the input's type.
fn like(parameter: &Tensor, x: &Tensor) -> Result<Tensor> {
    parameter.to_dtype(x.dtype())?.contiguous()
}

/// Of gradients (input, weight, bias) those that are wanted.
fn chosen(gradients: [Tensor; 3], wants: [bool; 3]) -> Vec<Tensor> {
    gradients.into_iter().zip(wants).filter_map(|(g, wanted)| wanted.then_some(g)).collect()
}

/// Blocks that share an image's positions.
fn pieces(positions: usize) -> usize {
    positions.div_ceil(128).clamp(1, 64)
}

/// [B, ..., C] normalised over groups of channels, with SiLU if `g.silu`.
pub fn group_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, g: Groups) -> Result<Tensor> {
    let (x, w, b) = (x.contiguous()?, like(weight, x)?, like(bias, x)?);
    let statistics = statistics(&x, g)?;
    let y = Fresh::like(&x)?;
    let mut args = vec![
        Arg::Pointer(address(&x)?),
        Arg::Pointer(address(&w)?),
        Arg::Pointer(address(&b)?),
        Arg::Pointer(address(&statistics)?),
        Arg::Pointer(y.address),
    ];
    args.extend(shape(&g)?);
    launch(device(&x)?, FILE, &of_type("group_norm_apply", x.dtype())?, over(&g), &args)?;
    let wants = [&x, &w, &b].map(wanted);
    let kept = [&x, &w, &b].map(Tensor::detach);
    attach_storage(y.into_storage(), x.shape(), &[&x, &w, &b], move |dy| {
        Ok(chosen(group_norm_backward(&kept, &statistics, dy, g)?, wants))
    })
}

/// Grid of the kernels that take (piece, image) each.
fn over(g: &Groups) -> Extent {
    Extent::new((pieces(g.positions) as u32, g.batch as u32, 1), BLOCK)
}

fn shape(g: &Groups) -> Result<[Arg; 4]> {
    Ok([int(g.positions)?, int(g.channels)?, int(g.groups)?, Arg::Int(i32::from(g.silu))])
}

/// [B · groups, 2] f32: means and reciprocal standard deviations.
fn statistics(x: &Tensor, g: Groups) -> Result<Tensor> {
    let (all, pieces) = (g.batch * g.groups, pieces(g.positions));
    let partial = Fresh::new(device(x)?, DType::F32, 3 * all * pieces)?;
    let args = [
        Arg::Pointer(address(x)?),
        Arg::Pointer(partial.address),
        int(g.positions)?,
        int(g.channels)?,
        int(g.groups)?,
        int(pieces)?,
    ];
    launch(device(x)?, FILE, &of_type("group_norm_moments", x.dtype())?, over(&g), &args)?;
    let statistics = Fresh::new(device(x)?, DType::F32, 2 * all)?;
    let args = [
        Arg::Pointer(partial.address),
        Arg::Pointer(statistics.address),
        int(all)?,
        int(pieces)?,
        Arg::Float(g.eps as f32),
    ];
    let extent = Extent::new((all.div_ceil(BLOCK as usize) as u32, 1, 1), BLOCK);
    launch(device(x)?, FILE, "group_norm_statistics", extent, &args)?;
    Ok(statistics.into_tensor((all, 2)))
}

fn group_norm_backward(
    [x, w, b]: &[Tensor; 3],
    statistics: &Tensor,
    dy: &Tensor,
    g: Groups,
) -> Result<[Tensor; 3]> {
    let pieces = pieces(g.positions);
    let partial = Fresh::new(device(x)?, DType::F32, g.batch * pieces * 2 * g.channels)?;
    let mut args = vec![
        Arg::Pointer(address(x)?),
        Arg::Pointer(address(dy)?),
        Arg::Pointer(address(w)?),
        Arg::Pointer(address(b)?),
        Arg::Pointer(address(statistics)?),
        Arg::Pointer(partial.address),
    ];
    args.extend(shape(&g)?);
    args.push(int(pieces)?);
    launch(device(x)?, FILE, &of_type("group_norm_backward_sums", x.dtype())?, over(&g), &args)?;
    // Two means a group.
    let means = Fresh::new(device(x)?, DType::F32, g.batch * g.groups * 2)?;
    let (dw, db) = (Fresh::like(w)?, Fresh::like(b)?);
    let args = [
        Arg::Pointer(partial.address),
        Arg::Pointer(address(w)?),
        Arg::Pointer(means.address),
        Arg::Pointer(dw.address),
        Arg::Pointer(db.address),
        int(g.batch)?,
        int(g.positions)?,
        int(g.channels)?,
        int(g.groups)?,
        int(pieces)?,
    ];
    let extent = Extent::new((g.groups as u32, 1, 1), BLOCK);
    launch(device(x)?, FILE, &of_type("group_norm_backward_finish", x.dtype())?, extent, &args)?;
    let dx = Fresh::like(x)?;
    let mut args = vec![
        Arg::Pointer(address(x)?),
        Arg::Pointer(address(dy)?),
        Arg::Pointer(address(w)?),
        Arg::Pointer(address(b)?),
        Arg::Pointer(address(statistics)?),
        Arg::Pointer(means.address),
        Arg::Pointer(dx.address),
    ];
    args.extend(shape(&g)?);
    launch(device(x)?, FILE, &of_type("group_norm_backward_apply", x.dtype())?, over(&g), &args)?;
    let (dw, db) = (dw.into_tensor(w.shape()), db.into_tensor(b.shape()));
    Ok([dx.into_tensor(x.shape()), dw, db])
}

/// Normalised over the last dimension.
pub fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    let (x, w, b) = (x.contiguous()?, like(weight, x)?, like(bias, x)?);
    let width = w.elem_count();
    let rows = x.elem_count() / width.max(1);
    let y = Fresh::like(&x)?;
    let args = [
        Arg::Pointer(address(&x)?),
        Arg::Pointer(address(&w)?),
        Arg::Pointer(address(&b)?),
        Arg::Pointer(y.address),
        long(rows)?,
        int(width)?,
        Arg::Float(eps as f32),
    ];
    launch(device(&x)?, FILE, &of_type("layer_norm", x.dtype())?, a_warp_each(rows), &args)?;
    let wants = [&x, &w, &b].map(wanted);
    let kept = [x.detach(), w.detach()];
    attach_storage(y.into_storage(), x.shape(), &[&x, &w, &b], move |dy| {
        let [x, w] = &kept;
        let mut found = Vec::new();
        if wants[0] {
            let dx = Fresh::like(x)?;
            let args = [
                Arg::Pointer(address(x)?),
                Arg::Pointer(address(w)?),
                Arg::Pointer(address(dy)?),
                Arg::Pointer(dx.address),
                long(rows)?,
                int(width)?,
                Arg::Float(eps as f32),
            ];
            let name = of_type("layer_norm_backward", x.dtype())?;
            launch(device(x)?, FILE, &name, a_warp_each(rows), &args)?;
            found.push(dx.into_tensor(x.shape()));
        }
        if wants[1] || wants[2] {
            let sums = weight_sums(x, dy, (rows, width), eps)?;
            let each = [sums.get(0)?, sums.get(1)?].into_iter().zip(&wants[1..]);
            for (gradient, _) in each.filter(|(_, wanted)| **wanted) {
                found.push(gradient.contiguous()?.copy()?);
            }
        }
        Ok(found)
    })
}

/// A warp takes a row.
fn a_warp_each(rows: usize) -> Extent {
    let warps = BLOCK as usize / 32;
    Extent::new((rows.div_ceil(warps).clamp(1, 1 << 30) as u32, 1, 1), BLOCK)
}

/// [2, width]: gradients of weight and bias.
fn weight_sums(x: &Tensor, dy: &Tensor, (rows, width): (usize, usize), eps: f64) -> Result<Tensor> {
    let pieces = rows.div_ceil(64).clamp(1, 256);
    let partial = Fresh::new(device(x)?, DType::F32, pieces * 2 * width)?;
    let args = [
        Arg::Pointer(address(x)?),
        Arg::Pointer(address(dy)?),
        Arg::Pointer(partial.address),
        long(rows)?,
        int(width)?,
        Arg::Float(eps as f32),
        int(pieces)?,
    ];
    let extent = Extent::new((pieces as u32, 1, 1), BLOCK);
    launch(device(x)?, FILE, &of_type("layer_norm_weights", x.dtype())?, extent, &args)?;
    finish_sums(x, &partial, (1, pieces, 2 * width))?.reshape((2, width))
}
