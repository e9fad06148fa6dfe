//! FlashAttention (arXiv 2205.14135, 2307.08691): scores are never stored as a whole, neither
//! forward nor backward.

use candle_core::{DType, Result, Tensor};

use super::launch::{Arg, Extent, int, launch};
use super::memory::{Fresh, address, device};
use crate::nn::autograd::{attach_storage, wanted};
use crate::nn::flash::Heads;

/// Whether there are kernels for these heads.
pub fn attends(shape: &Heads) -> bool {
    matches!(shape.size, 32 | 64)
}

/// A kernel of one of the flash files.
struct Kernel<'a> {
    like: &'a Tensor,
    shape: Heads,
}

impl Kernel<'_> {
    fn is_f32(&self) -> bool {
        self.like.dtype() == DType::F32
    }

    fn run(&self, what: &str, extent: Extent, pointers: &[u64], numbers: &[Arg]) -> Result<()> {
        let file = match (self.is_f32(), what) {
            (true, _) => "flash_f32",
            (false, "forward") => "flash_forward",
            (false, _) => "flash_backward",
        };
        let name = super::launch::of_type(&format!("flash_{what}"), self.like.dtype())?;
        let name = format!("{name}_{}", self.shape.size);
        let mut args: Vec<Arg> = pointers.iter().map(|p| Arg::Pointer(*p)).collect();
        args.extend_from_slice(numbers);
        launch(device(self.like)?, file, &name, extent, &args)
    }
}

/// softmax(q kᵀ / √d) v for q [B, T, heads·d], k and v [B, S, heads·d].
pub fn attention(shape: Heads, qkv: [&Tensor; 3]) -> Result<Tensor> {
    let [q, k, v] = qkv.map(Tensor::contiguous);
    let inputs = [q?, k?, v?];
    let [q, k, v] = &inputs;
    let out = Fresh::like(q)?;
    let training = inputs.iter().any(wanted);
    let rows = shape.batch * shape.heads * shape.targets;
    let normalisers = if training { Some(Fresh::new(device(q)?, DType::F32, rows)?) } else { None };
    let pointers = [
        address(q)?,
        address(k)?,
        address(v)?,
        out.address,
        normalisers.as_ref().map_or(0, |n| n.address),
    ];
    let numbers = numbers(&shape)?;
    let kernel = Kernel { like: q, shape };
    kernel.run("forward", tiles(&kernel, "forward"), &pointers, &numbers)?;
    let Some(normalisers) = normalisers else {
        return Ok(out.into_tensor(q.shape()));
    };
    let normalisers = normalisers.into_tensor(rows);
    let wants = inputs.each_ref().map(wanted);
    let kept = inputs.each_ref().map(|t| t.detach());
    let storage = out.into_storage();
    let out = storage.try_clone(&candle_core::Layout::contiguous(q.shape()))?;
    let out = crate::nn::autograd::constant(out, q.shape());
    attach_storage(storage, q.shape(), &inputs.each_ref(), move |dy| {
        backward(shape, &kept, &out, &normalisers, dy, wants)
    })
}

fn backward(
    shape: Heads,
    [q, k, v]: &[Tensor; 3],
    out: &Tensor,
    normalisers: &Tensor,
    dy: &Tensor,
    wants: [bool; 3],
) -> Result<Vec<Tensor>> {
    let kernel = Kernel { like: q, shape };
    let delta = Fresh::new(device(q)?, DType::F32, normalisers.elem_count())?;
    let sizes = [int(shape.heads)?, int(shape.targets)?];
    let pointers = [address(out)?, address(dy)?, delta.address];
    kernel.run("delta", tiles(&kernel, "delta"), &pointers, &sizes)?;
    let given =
        [address(q)?, address(k)?, address(v)?, address(dy)?, address(normalisers)?, delta.address];
    let numbers = numbers(&shape)?;
    let mut found = Vec::new();
    if wants[0] {
        let dq = Fresh::like(q)?;
        let pointers: Vec<u64> = given.into_iter().chain([dq.address]).collect();
        kernel.run("backward_q", tiles(&kernel, "backward_q"), &pointers, &numbers)?;
        found.push(dq.into_tensor(q.shape()));
    }
    if wants[1] || wants[2] {
        let (dk, dv) = (Fresh::like(k)?, Fresh::like(v)?);
        let pointers: Vec<u64> = given.into_iter().chain([dk.address, dv.address]).collect();
        kernel.run("backward_kv", tiles(&kernel, "backward_kv"), &pointers, &numbers)?;
        let both = [dk.into_tensor(k.shape()), dv.into_tensor(v.shape())];
        found.extend(both.into_iter().zip(&wants[1..]).filter_map(|(g, w)| w.then_some(g)));
    }
    Ok(found)
}

/// The kernels' sizes, strides and scale.
fn numbers(shape: &Heads) -> Result<[Arg; 7]> {
    let stride = int(shape.heads * shape.size)?;
    let scale = Arg::Float((1.0 / (shape.size as f64).sqrt()) as f32);
    let (targets, sources) = (int(shape.targets)?, int(shape.sources)?);
    Ok([int(shape.heads)?, targets, sources, stride, stride, stride, scale])
}

fn tiles(kernel: &Kernel, what: &str) -> Extent {
    let shape = &kernel.shape;
    let (rows, tile) = (if what == "backward_kv" { shape.sources } else { shape.targets }, 64);
    Extent::new((rows.div_ceil(tile) as u32, shape.heads as u32, shape.batch as u32), 128)
}
