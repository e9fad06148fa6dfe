//! The operations of `nn`, forward and backward, at sizes of `models/tiny` (a batch of 8) and
//! of SDXL at 512 px (a batch of 1). Throughput is in elements for the pointwise operations
//! and in FLOP (2 a multiplication) for the others: criterion prints both as `elem/s`.
//!
//!     RAYON_NUM_THREADS=1 cargo bench --bench ops
//!
//! `backward` is the backward pass alone, to every input and weight, plus one product of the
//! output's size with a fixed gradient.

use std::hint::black_box;
use std::process::ExitCode;

use candle_core::{Device, Result, Tensor, Var};
use criterion::{BatchSize, Criterion, Throughput};
use diffusion_sharpening::nn::conv::conv2d;
use diffusion_sharpening::nn::{Activation, GroupNorm, Linear, attention};

#[global_allocator]
static GLOBAL: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let mut criterion = Criterion::default().sample_size(20).configure_from_args();
    if let Err(error) = all(&mut criterion) {
        eprintln!("{error}");
        return ExitCode::FAILURE;
    }
    criterion.final_summary();
    ExitCode::SUCCESS
}

fn all(c: &mut Criterion) -> Result<()> {
    for (size, batch, from, to, side) in [
        ("tiny_64_16x16", 8, 64, 64, 16),
        ("tiny_256to128_4x4", 8, 256, 128, 4),
        ("sdxl_320_64x64", 1, 320, 320, 64),
    ] {
        let op = Op { name: "conv2d_3x3", size, work: 2 * batch * side * side * from * to * 9 };
        op.bench(c, &[&[batch, from, side, side], &[to, from, 3, 3]], |v| {
            conv2d(&v[0], &v[1], 1, 1)
        })?;
    }
    for (size, batch, targets, sources, heads, width) in [
        ("tiny_self_64x3x32", 8, 64, 64, 3, 96),
        ("tiny_cross_64to24x3x32", 8, 64, 24, 3, 96),
        ("sdxl_self_1024x10x64", 1, 1024, 1024, 10, 640),
        ("sdxl_cross_1024to77x10x64", 1, 1024, 77, 10, 640),
    ] {
        let op = Op { name: "attention", size, work: 4 * batch * targets * sources * width };
        let source = [batch, sources, width];
        op.bench(c, &[&[batch, targets, width], &source, &source], |v| {
            attention(&v[0], &v[1], &v[2], heads, None)
        })?;
    }
    for (size, rows, from, to) in
        [("tiny_512x96to768", 512, 96, 768), ("sdxl_1024x640to5120", 1024, 640, 5120)]
    {
        let op = Op { name: "linear", size, work: 2 * rows * from * to };
        op.bench(c, &[&[rows, from], &[to, from], &[to]], |v| {
            let (weight, bias) = (v[1].clone(), Some(v[2].clone()));
            Linear { weight, bias, adapter: None }.forward(&v[0])
        })?;
    }
    for (size, batch, channels, side, groups) in
        [("tiny_64_16x16", 8, 64, 16, 16), ("sdxl_320_64x64", 1, 320, 64, 32)]
    {
        let x = [batch, channels, side, side];
        let work = x.iter().product();
        let op = Op { name: "group_norm_silu", size, work };
        op.bench(c, &[&x, &[channels], &[channels]], |v| {
            let (weight, bias) = (v[1].clone(), v[2].clone());
            GroupNorm { groups, eps: 1e-5, weight, bias }.forward_silu(&v[0])
        })?;
        let op = Op { name: "silu", size, work };
        op.bench(c, &[&x], |v| Activation::Silu.forward(&v[0]))?;
    }
    Ok(())
}

/// An operation at one size.
struct Op {
    name: &'static str,
    size: &'static str,
    /// Elements or FLOP of one forward.
    work: usize,
}

impl Op {
    /// Times `forward` on normal inputs of the given shapes: without gradients, then the
    /// backward pass of its graph.
    fn bench(
        &self,
        c: &mut Criterion,
        shapes: &[&[usize]],
        forward: impl Fn(&[Tensor]) -> Result<Tensor>,
    ) -> Result<()> {
        let normal = |shape: &[usize]| Tensor::randn(0f32, 1f32, shape, &Device::Cpu);
        let plain = shapes.iter().map(|s| normal(s)).collect::<Result<Vec<_>>>()?;
        let output_gradient = normal(forward(&plain)?.dims())?;
        let tracked = plain
            .iter()
            .map(|t| Ok(Var::from_tensor(t)?.as_tensor().clone()))
            .collect::<Result<Vec<_>>>()?;
        let loss = || (forward(&tracked)? * &output_gradient)?.sum_all();
        loss()?.backward()?;
        let mut group = c.benchmark_group(self.name);
        group.throughput(Throughput::Elements(self.work as u64));
        let mut failed = None;
        group.bench_function(format!("{}/forward", self.size), |b| {
            b.iter(|| match forward(&plain) {
                Ok(result) => drop(black_box(result)),
                Err(error) => drop(failed.get_or_insert(error)),
            });
        });
        group.bench_function(format!("{}/backward", self.size), |b| {
            let backward =
                |loss: Result<Tensor>| loss.and_then(|loss| loss.backward().map(|g| (loss, g)));
            b.iter_batched(loss, |loss| black_box(backward(loss)), BatchSize::PerIteration);
        });
        group.finish();
        failed.map_or(Ok(()), Err)
    }
}
