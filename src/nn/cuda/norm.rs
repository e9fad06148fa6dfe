//! Group and layer normalisation.

use candle_core::{DType, Result, Tensor};

use super::elementwise::finish_sums;
use super::launch::{Arg, Extent, int, launch, long, of_type, pieces};
use super::memory::{Fresh, address, device};
use crate::nn::autograd::{attach_storage, wanted};
use crate::nn::group_norm::Groups;

const FILE: &str = "norm";

/// A contiguous parameter of the input's type.
fn like(parameter: &Tensor, x: &Tensor) -> Result<Tensor> {
    parameter.to_dtype(x.dtype())?.contiguous()
}

fn pointers<const N: usize>(tensors: [&Tensor; N]) -> Result<Vec<Arg>> {
    tensors.into_iter().map(|t| Ok(Arg::Pointer(address(t)?))).collect()
}

/// [B, ..., C] normalised over groups of channels, with SiLU if `g.silu`.
pub fn group_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, g: Groups) -> Result<Tensor> {
    let (x, w, b) = (x.contiguous()?, like(weight, x)?, like(bias, x)?);
    let statistics = statistics(&x, g)?;
    let y = Fresh::like(&x)?;
    let mut args = pointers([&x, &w, &b, &statistics])?;
    args.push(Arg::Pointer(y.address));
    args.extend(shape(&g)?);
    run(&x, "group_norm_apply", &g, &args)?;
    let wants = [&x, &w, &b].map(wanted);
    let kept = [&x, &w, &b].map(Tensor::detach);
    attach_storage(y.into_storage(), x.shape(), &[&x, &w, &b], move |dy| {
        let gradients = group_norm_backward(&kept, &statistics, dy, g)?;
        let chosen = gradients.into_iter().zip(wants).filter(|(_, wanted)| *wanted);
        Ok(chosen.map(|(gradient, _)| gradient).collect())
    })
}

/// Launches a kernel whose blocks share out channels, pieces of positions and images.
fn run(x: &Tensor, name: &str, g: &Groups, args: &[Arg]) -> Result<()> {
    let extent = Extent::tiled(g.channels, pieces(g.positions), g.batch, x.dtype());
    launch(device(x)?, FILE, &of_type(name, x.dtype())?, extent, args)
}

/// positions, channels, groups, silu, pieces
fn shape(g: &Groups) -> Result<[Arg; 5]> {
    let silu = Arg::Int(i32::from(g.silu));
    Ok([int(g.positions)?, int(g.channels)?, int(g.groups)?, silu, int(pieces(g.positions))?])
}

/// [B · groups, 2] f32: means and reciprocal standard deviations.
fn statistics(x: &Tensor, g: Groups) -> Result<Tensor> {
    let (device, pieces) = (device(x)?, pieces(g.positions));
    let partial = Fresh::new(device, DType::F32, g.batch * pieces * 2 * g.channels)?;
    let args = [
        Arg::Pointer(address(x)?),
        Arg::Pointer(partial.address),
        int(g.positions)?,
        int(g.channels)?,
        int(pieces)?,
    ];
    run(x, "group_norm_moments", &g, &args)?;
    let statistics = Fresh::new(device, DType::F32, 2 * g.batch * g.groups)?;
    let args = [
        Arg::Pointer(partial.address),
        Arg::Pointer(statistics.address),
        int(g.positions)?,
        int(g.channels)?,
        int(g.groups)?,
        int(pieces)?,
        Arg::Float(g.eps as f32),
    ];
    launch(device, FILE, "group_norm_statistics", Extent::new((g.groups, g.batch, 1)), &args)?;
    Ok(statistics.into_tensor((g.batch * g.groups, 2)))
}

fn group_norm_backward(
    [x, w, b]: &[Tensor; 3],
    statistics: &Tensor,
    dy: &Tensor,
    g: Groups,
) -> Result<[Tensor; 3]> {
    let (device, pieces) = (device(x)?, pieces(g.positions));
    let partial = Fresh::new(device, DType::F32, g.batch * pieces * 2 * g.channels)?;
    let mut args = pointers([x, dy, w, b, statistics])?;
    args.push(Arg::Pointer(partial.address));
    args.extend(shape(&g)?);
    run(x, "group_norm_backward_sums", &g, &args)?;
    let sums = finish_sums(device, &partial, (g.batch, pieces, 2 * g.channels), DType::F32)?;
    // Two means a group.
    let means = Fresh::new(device, DType::F32, g.batch * g.groups * 2)?;
    let (dw, db) = (Fresh::like(w)?, Fresh::like(b)?);
    let mut args = pointers([&sums, w])?;
    args.extend([means.address, dw.address, db.address].map(Arg::Pointer));
    args.extend([int(g.batch)?, int(g.positions)?, int(g.channels)?, int(g.groups)?]);
    let extent = Extent::new((g.groups, 1, 1)).with_block(32);
    launch(device, FILE, &of_type("group_norm_backward_finish", x.dtype())?, extent, &args)?;
    let dx = Fresh::like(x)?;
    let mut args = pointers([x, dy, w, b, statistics])?;
    args.extend([means.address, dx.address].map(Arg::Pointer));
    args.extend(shape(&g)?);
    run(x, "group_norm_backward_apply", &g, &args)?;
    let (dw, db) = (dw.into_tensor(w.shape()), db.into_tensor(b.shape()));
    Ok([dx.into_tensor(x.shape()), dw, db])
}

/// Normalised over the last dimension.
pub fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    let (x, w, b) = (x.contiguous()?, like(weight, x)?, like(bias, x)?);
    let width = w.elem_count();
    let rows = x.elem_count() / width.max(1);
    let y = Fresh::like(&x)?;
    let mut args = pointers([&x, &w, &b])?;
    args.push(Arg::Pointer(y.address));
    args.extend([long(rows)?, int(width)?, Arg::Float(eps as f32)]);
    launch(device(&x)?, FILE, &of_type("layer_norm", x.dtype())?, eight_rows_each(rows), &args)?;
    let wants = [&x, &w, &b].map(wanted);
    let kept = [x.detach(), w.detach()];
    attach_storage(y.into_storage(), x.shape(), &[&x, &w, &b], move |dy| {
        layer_norm_backward(&kept, dy, (rows, width), eps, wants)
    })
}

fn eight_rows_each(rows: usize) -> Extent {
    Extent::new((rows.div_ceil(8).max(1), 1, 1))
}

fn layer_norm_backward(
    [x, w]: &[Tensor; 2],
    dy: &Tensor,
    (rows, width): (usize, usize),
    eps: f64,
    wants: [bool; 3],
) -> Result<Vec<Tensor>> {
    let (device, dx) = (device(x)?, Fresh::like(x)?);
    let parameters = wants[1] || wants[2];
    let statistics =
        if parameters { Some(Fresh::new(device, DType::F32, 2 * rows)?) } else { None };
    let statistics_at = Arg::Pointer(statistics.as_ref().map_or(0, |s| s.address));
    let mut args = pointers([x, w, dy])?;
    args.extend([Arg::Pointer(dx.address), statistics_at]);
    args.extend([long(rows)?, int(width)?, Arg::Float(eps as f32)]);
    let name = of_type("layer_norm_backward", x.dtype())?;
    launch(device, FILE, &name, eight_rows_each(rows), &args)?;
    let mut found = Vec::new();
    if wants[0] {
        found.push(dx.into_tensor(x.shape()));
    }
    if parameters {
        let pieces = pieces(rows);
        let partial = Fresh::new(device, DType::F32, pieces * 2 * width)?;
        let mut args = pointers([x, dy])?;
        args.extend([statistics_at, Arg::Pointer(partial.address)]);
        args.extend([long(rows)?, int(width)?, int(pieces)?]);
        let extent = Extent::tiled(width, pieces, 1, x.dtype());
        launch(device, FILE, &of_type("layer_norm_weights", x.dtype())?, extent, &args)?;
        let sums = finish_sums(device, &partial, (1, pieces, 2 * width), x.dtype())?;
        let sums = sums.reshape((2, width))?;
        for (row, _) in [0, 1].into_iter().zip(&wants[1..]).filter(|(_, wanted)| **wanted) {
            found.push(sums.get(row)?.copy()?);
        }
    }
    Ok(found)
}
