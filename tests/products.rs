//! Matrix products from every kind of operand, at every vector level.

use diffusion_sharpening::nn::gemm::{Columns, Finish, Packed, Plain, Rows, Transposed, product};
use diffusion_sharpening::nn::kernel::Real;
use diffusion_sharpening::nn::simd::Level;

fn numbers<T: Real>(seed: usize, n: usize) -> Vec<T> {
    (0..n)
        .map(|i| T::from_f64((((i * 7919 + seed * 104_729) % 2003) as f64 / 1001.5) - 1.0))
        .collect()
}

/// [m, k] · [k, n] by definition, in f64.
fn expected<T: Real>(a: &[T], b: &[T], (m, n, k): (usize, usize, usize)) -> Vec<f64> {
    let at = |v: &[T], i: usize| v[i].to_f64();
    (0..m * n).map(|i| (0..k).map(|p| at(a, i / n * k + p) * at(b, p * n + i % n)).sum()).collect()
}

fn transpose<T: Copy>(x: &[T], rows: usize, columns: usize) -> Vec<T> {
    (0..rows * columns).map(|i| x[i % rows * columns + i / rows]).collect()
}

fn check<T: Real>(sizes: (usize, usize, usize), tolerance: f64) {
    let (m, n, k) = sizes;
    let (a, b): (Vec<T>, Vec<T>) = (numbers(1, m * k), numbers(2, k * n));
    let (at, bt) = (transpose(&a, m, k), transpose(&b, k, n));
    let (bias, residual): (Vec<T>, Vec<T>) = (numbers(3, n), numbers(4, m * n));
    let shift: Vec<T> = numbers(5, m.div_ceil(2) * n);
    let want: Vec<f64> = expected(&a, &b, sizes);
    let close = |got: &[T], want: &dyn Fn(usize) -> f64, what: &str| {
        for (i, got) in got.iter().enumerate() {
            let error = (got.to_f64() - want(i)).abs();
            assert!(
                error < tolerance * (1.0 + k as f64).sqrt(),
                "{what} {sizes:?} at {i}: {error}"
            );
        }
    };
    let nothing = Finish::default();
    let (rows, columns) = (Rows { data: &a, stride: k }, Columns { data: &at, stride: m });
    let plain = Plain { data: &b, stride: n, columns: n };
    let strided = Transposed { data: &bt, stride: k, columns: n };
    let packed = Packed::new(&plain, k, n);
    let mut c = vec![T::ONE; m * n];
    product(sizes, &rows, &plain, &mut c, false, &nothing);
    close(&c, &|i| want[i], "rows, plain");
    let first = c.clone();
    product(sizes, &rows, &packed, &mut c, false, &nothing);
    assert!(c == first, "packed differs");
    product(sizes, &columns, &strided, &mut c, false, &nothing);
    assert!(c == first, "columns, strided differ");
    product(sizes, &columns, &plain, &mut c, true, &nothing);
    close(&c, &|i| 2.0 * want[i], "accumulated");
    let finish = Finish { bias: Some(&bias), shift: Some((&shift, 2)), residual: Some(&residual) };
    product(sizes, &rows, &packed, &mut c, false, &finish);
    let all = |i: usize| {
        let (row, column) = (i / n, i % n);
        want[i]
            + bias[column].to_f64()
            + shift[row / 2 * n + column].to_f64()
            + residual[i].to_f64()
    };
    close(&c, &all, "finished");
    // A row alone is the same row.
    let last = Rows { data: &a[(m - 1) * k..], stride: k };
    let mut one = vec![T::ZERO; n];
    product((1, n, k), &last, &packed, &mut one, false, &nothing);
    assert!(one == first[(m - 1) * n..], "a row depends on the others");
}

const SIZES: [(usize, usize, usize); 10] = [
    (1, 1, 1),
    (3, 5, 7),
    (12, 32, 16),
    (13, 33, 385),
    (25, 64, 768),
    (64, 16, 400),
    (7, 77, 40),
    (100, 130, 1000),
    (24, 800, 30),
    (2, 48, 2000),
];

#[test]
fn products_at_every_level() {
    for level in Level::supported() {
        level.run(|| {
            for sizes in SIZES {
                check::<f32>(sizes, 1e-6);
                check::<f64>(sizes, 1e-14);
            }
        });
    }
}

#[test]
fn vector_levels_agree_bit_for_bit() {
    let levels: Vec<Level> = Level::supported().into_iter().filter(|l| *l > Level::Plain).collect();
    for (m, n, k) in SIZES {
        let (a, b): (Vec<f32>, Vec<f32>) = (numbers(1, m * k), numbers(2, k * n));
        let results = levels.iter().map(|level| {
            level.run(|| {
                let mut c = vec![0.0; m * n];
                let plain = Plain { data: &b, stride: n, columns: n };
                product(
                    (m, n, k),
                    &Rows { data: &a, stride: k },
                    &plain,
                    &mut c,
                    false,
                    &Finish::default(),
                );
                c
            })
        });
        let results: Vec<_> = results.collect();
        assert!(results.windows(2).all(|w| w[0] == w[1]), "{m}x{n}x{k}");
    }
}

#[test]
fn an_empty_inner_dimension_is_zero_and_finished() {
    let mut c = vec![5.0_f32; 4];
    let plain = Plain { data: &[], stride: 2, columns: 2 };
    let finish = Finish { bias: Some(&[1.0, 2.0]), ..Finish::default() };
    product((2, 2, 0), &Rows { data: &[], stride: 0 }, &plain, &mut c, false, &finish);
    assert_eq!(c, [1.0, 2.0, 1.0, 2.0]);
}
