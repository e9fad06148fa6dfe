//! One U-Net forward (three batch sizes), one VAE decode, one text encoding and one 50-step
//! image, on the checkpoint `DS_BENCH_MODEL` (default `models/tiny`):
//!
//!     RAYON_NUM_THREADS=1 cargo bench --bench model
//!
//! The same pieces as `ds-bench speed`; docs/performance.md says how to compare them with PyTorch.

use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use candle_core::DType;
use criterion::Criterion;
use diffusion_sharpening::bench::workload::{Piece, Workload};
use diffusion_sharpening::nn::device::Placement;

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

fn all(criterion: &mut Criterion) -> diffusion_sharpening::Result<()> {
    let folder = match std::env::var_os("DS_BENCH_MODEL") {
        Some(folder) => PathBuf::from(folder),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny"),
    };
    let workload = Workload::open(&folder, None, &Placement::cpu(DType::F32))?;
    for (name, piece) in Piece::ALL {
        let mut work = workload.prepare(piece)?;
        let mut failed = None;
        let mut group = criterion.benchmark_group("model");
        if matches!(piece, Piece::Images { .. }) {
            group.sample_size(10);
        }
        group.bench_function(name, |b| {
            b.iter(|| match work() {
                Ok(result) => drop(black_box(result)),
                Err(error) => drop(failed.get_or_insert(error)),
            });
        });
        group.finish();
        if let Some(error) = failed {
            return Err(error);
        }
    }
    Ok(())
}
