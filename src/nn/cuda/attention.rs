//! FlashAttention (arXiv 2205.14135, 2307.08691): scores are never stored as a whole, neither
//! forward nor backward.

use candle_core::{DType, Layout, Result, Tensor, bail};

use super::launch::{Arg, Extent, int, launch, of_type};
use super::memory::{Fresh, address, device};
use crate::nn::autograd::{attach_storage, constant, wanted};
use crate::nn::flash::Heads;

/// Whether there are kernels for these heads.
pub fn attends(shape: &Heads) -> bool {
    matches!(shape.size, 32 | 64)
}

/// One attention's kernels.
struct Kernels<'a> {
    like: &'a Tensor,
    shape: Heads,
}

impl Kernels<'_> {
    fn run(&self, what: &str, pointers: &[u64], numbers: &[Arg]) -> Result<()> {
        let Heads { batch, targets, sources, heads, size } = self.shape;
        let plain = self.like.dtype() == DType::F32;
        let tiles = |rows: usize, tile: usize| Extent::new((rows.div_ceil(tile), heads, batch));
        let (file, extent) = match (what, plain) {
            ("delta", _) => {
                let bytes = targets * heads * size * self.like.dtype().size_in_bytes();
                ("flash_backward", Extent::new((bytes.div_ceil(4096), 1, batch)))
            }
            ("forward", true) => ("flash_f32", tiles(targets, 64)),
            ("backward_kv", true) => ("flash_f32", tiles(sources, 32).with_block(128)),
            ("backward_q", true) => ("flash_f32", tiles(targets, 32).with_block(128)),
            ("forward", false) => ("flash_forward", tiles(targets, 128).with_block(128)),
            ("backward_kv", false) => ("flash_backward", tiles(sources, 64).with_block(128)),
            ("backward_q", false) => ("flash_backward", tiles(targets, 128).with_block(128)),
            (other, _) => bail!("no attention kernel '{other}'"),
        };
        let name = format!("{}_{size}", of_type(&format!("flash_{what}"), self.like.dtype())?);
        let mut args: Vec<Arg> = pointers.iter().map(|p| Arg::Pointer(*p)).collect();
        args.extend_from_slice(numbers);
        launch(device(self.like)?, file, &name, extent, &args)
    }
}

/// Contiguous, and at an address that 16 bytes divide, which the kernels read at once.
fn aligned(x: &Tensor) -> Result<Tensor> {
    let x = x.contiguous()?;
    if address(&x)?.is_multiple_of(16) { Ok(x) } else { x.copy() }
}

/// softmax(q kᵀ / √d) v for q [B, T, heads·d], k and v [B, S, heads·d].
pub fn attention(shape: Heads, qkv: [&Tensor; 3]) -> Result<Tensor> {
    let [q, k, v] = qkv.map(aligned);
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
    let kernels = Kernels { like: q, shape };
    kernels.run("forward", &pointers, &numbers(&shape)?)?;
    let Some(normalisers) = normalisers else {
        return Ok(out.into_tensor(q.shape()));
    };
    let normalisers = normalisers.into_tensor(rows);
    let wants = inputs.each_ref().map(wanted);
    let kept = inputs.each_ref().map(|t| t.detach());
    // The output has two owners: the graph, and what the backward pass keeps.
    let storage = out.into_storage();
    let out = constant(storage.try_clone(&Layout::contiguous(q.shape()))?, q.shape());
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
    let kernels = Kernels { like: q, shape };
    let dy = aligned(dy)?;
    let delta = Fresh::new(device(q)?, DType::F32, normalisers.elem_count())?;
    let sizes = [int(shape.heads)?, int(shape.targets)?];
    let pointers = [address(out)?, address(&dy)?, delta.address];
    kernels.run("delta", &pointers, &sizes)?;
    let given = [
        address(q)?,
        address(k)?,
        address(v)?,
        address(&dy)?,
        address(normalisers)?,
        delta.address,
    ];
    let numbers = numbers(&shape)?;
    let mut found = Vec::new();
    if wants[0] {
        let dq = Fresh::like(q)?;
        let pointers: Vec<u64> = given.into_iter().chain([dq.address]).collect();
        kernels.run("backward_q", &pointers, &numbers)?;
        found.push(dq.into_tensor(q.shape()));
    }
    if wants[1] || wants[2] {
        let (dk, dv) = (Fresh::like(k)?, Fresh::like(v)?);
        let pointers: Vec<u64> = given.into_iter().chain([dk.address, dv.address]).collect();
        kernels.run("backward_kv", &pointers, &numbers)?;
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
