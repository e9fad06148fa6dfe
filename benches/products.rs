//! Matrix products of this crate and of the crate `gemm`, at sizes of the networks: rows x
//! columns x inner size. `packed` has the weight packed beforehand, `plain` takes it [inner,
//! columns], `weight` as a linear layer has it, [columns, inner].
//!
//!     RAYON_NUM_THREADS=1 cargo bench --bench products
//!
//! criterion's `elem/s` are FLOP per second.

use candle_core::{Device, Tensor};
use criterion::{Criterion, Throughput};
use diffusion_sharpening::nn::gemm::{Finish, Packed, Plain, Rows, Transposed, product};

const SIZES: [(usize, usize, usize); 7] = [
    (1024, 5120, 640),
    (1024, 640, 2560),
    (256, 1280, 1280),
    (256, 10_240, 1280),
    (512, 768, 96),
    (512, 96, 96),
    (64, 96, 96),
];

fn main() {
    let mut criterion = Criterion::default().sample_size(20).configure_from_args();
    for (m, n, k) in SIZES {
        let random = |length: usize| -> Vec<f32> {
            let values = Tensor::randn(0_f32, 1.0, length, &Device::Cpu);
            values.and_then(|t| t.to_vec1()).unwrap_or_else(|_| vec![1.0; length])
        };
        let (a, b) = (random(m * k), random(k * n));
        let mut c = vec![0.0_f32; m * n];
        let mut group = criterion.benchmark_group(format!("product/{m}x{n}x{k}"));
        group.throughput(Throughput::Elements((2 * m * n * k) as u64));
        let (sizes, rows, nothing) = ((m, n, k), Rows { data: &a, stride: k }, Finish::default());
        let plain = Plain { data: &b, stride: n, columns: n };
        let weight = Transposed { data: &b, stride: k, columns: n };
        let packed = Packed::new(&plain, k, n);
        group.bench_function("packed", |bench| {
            bench.iter(|| product(sizes, &rows, &packed, &mut c, false, &nothing));
        });
        group.bench_function("plain", |bench| {
            bench.iter(|| product(sizes, &rows, &plain, &mut c, false, &nothing));
        });
        group.bench_function("weight", |bench| {
            bench.iter(|| product(sizes, &rows, &weight, &mut c, false, &nothing));
        });
        for (name, (row, column)) in [("plain", (n, 1)), ("weight", (1, k))] {
            group.bench_function(format!("crate gemm, {name}"), |bench| {
                bench.iter(|| {
                    // SAFETY: the three matrices have the sizes and strides given.
                    unsafe {
                        gemm::gemm(
                            m,
                            n,
                            k,
                            c.as_mut_ptr(),
                            1,
                            n as isize,
                            false,
                            a.as_ptr(),
                            1,
                            k as isize,
                            b.as_ptr(),
                            column as isize,
                            row as isize,
                            1.0,
                            1.0,
                            false,
                            false,
                            false,
                            gemm::Parallelism::Rayon(0),
                        );
                    }
                });
            });
        }
        group.finish();
    }
    criterion.final_summary();
}
