//! The operations of `nn`, forward and forward with backward, at sizes of SDXL at 512 px and up:
//! those of `ds-bench speed --only op_…`, which docs/performance.md compares with PyTorch.
//!
//!     RAYON_NUM_THREADS=1 cargo bench --bench ops

use std::hint::black_box;
use std::process::ExitCode;

use candle_core::DType;
use criterion::Criterion;
use diffusion_sharpening::bench::op_workload;
use diffusion_sharpening::nn::device::Placement;

#[global_allocator]
static GLOBAL: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let mut criterion = Criterion::default().sample_size(20).configure_from_args();
    for name in op_workload::names() {
        let mut failed = None;
        match op_workload::prepare(&name, &Placement::cpu(DType::F32)) {
            Ok(mut work) => {
                criterion.bench_function(&name, |b| {
                    b.iter(|| match work() {
                        Ok(result) => drop(black_box(result)),
                        Err(error) => drop(failed.get_or_insert(error)),
                    });
                });
            }
            Err(error) => failed = Some(error),
        }
        if let Some(error) = failed {
            eprintln!("{name}: {error}");
            return ExitCode::FAILURE;
        }
    }
    criterion.final_summary();
    ExitCode::SUCCESS
}
