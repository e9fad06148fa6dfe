//! Every layer's backward against five-point differences in f64.

mod common;

use candle_core::{Device, Tensor, Var};
use common::layers::{
    Layer, analytic, causal, conv, conv_of, conv_with_all, group_norm, late, layer_norm, linear,
    normals,
};
use common::{normal, relative_error, values};
use diffusion_sharpening::nn::conv::Padding;
use diffusion_sharpening::nn::embedding::sinusoidal;
use diffusion_sharpening::nn::resample::nearest;
use diffusion_sharpening::nn::{Activation, Added, Linear, LowRank, attention, geglu};

const BAR: f64 = 1e-6;
const STEP: f64 = 1e-3;
const BELOW: Padding = Padding { before: 0, after: 1 };

/// Σ weights·f(inputs), with input `i` in place of the given one.
fn loss(inputs: &[Tensor], weights: &Tensor, f: Layer, i: usize, moved: Tensor) -> f64 {
    let mut all = inputs.to_vec();
    all[i] = moved;
    values(&(f(&all).unwrap() * weights).unwrap()).iter().sum()
}

/// The derivative at 0, from four values around it.
fn five_point(at: impl Fn(f64) -> f64) -> f64 {
    let near = at(STEP) - at(-STEP);
    let far = at(2.0 * STEP) - at(-2.0 * STEP);
    (8.0 * near - far) / (12.0 * STEP)
}

fn norm(x: &Tensor) -> f64 {
    values(x).iter().map(|v| v * v).sum::<f64>().sqrt()
}

/// Compares every element of every input's gradient.
fn check(what: &str, inputs: &[Tensor], f: Layer) {
    let (gradients, weights) = analytic(inputs, f);
    let mut worst = 0.0_f64;
    for (i, x) in inputs.iter().enumerate() {
        let base = values(x);
        let derivative = |at: usize| {
            five_point(|shift| {
                let mut moved = base.clone();
                moved[at] += shift;
                let moved = Tensor::from_vec(moved, x.dims(), &Device::Cpu).unwrap();
                loss(inputs, &weights, f, i, moved)
            })
        };
        let numeric: Vec<f64> = (0..base.len()).map(derivative).collect();
        let numeric = Tensor::from_vec(numeric, x.dims(), &Device::Cpu).unwrap();
        // With one source, attention's queries have no gradient at all: the floor.
        let error = norm(&(&gradients[i] - &numeric).unwrap()) / norm(&numeric).max(BAR);
        assert!(error < BAR, "{what}: gradient of input {i} is off by {error:.2e}");
        worst = worst.max(error);
    }
    println!("{what:56} {worst:.1e}");
}

/// The same along random directions, for inputs too large to move every element.
fn check_along(what: &str, inputs: &[Tensor], f: Layer) {
    const DIRECTIONS: u64 = 3;
    let (gradients, weights) = analytic(inputs, f);
    let mut worst = 0.0_f64;
    for (i, x) in inputs.iter().enumerate() {
        let norm = norm(&gradients[i]);
        for seed in 0..DIRECTIONS {
            let direction = normal(5000 + seed + DIRECTIONS * i as u64, x.dims());
            let expected: f64 = values(&(&direction * &gradients[i]).unwrap()).iter().sum();
            let numeric = five_point(|shift| {
                let moved = (x + (&direction * shift).unwrap()).unwrap();
                loss(inputs, &weights, f, i, moved)
            });
            // A unit-normal direction meets a gradient g in a number of about ‖g‖.
            let error = (expected - numeric).abs() / norm;
            assert!(error < BAR, "{what}: gradient of input {i} is off by {error:.2e}");
            worst = worst.max(error);
        }
    }
    println!("{what:56} {worst:.1e} along directions");
}

#[test]
fn convolutions() {
    for (x, w, stride, padding) in [
        ([2, 5, 7, 3], [4, 3, 3, 3], 1, 1),
        ([2, 5, 7, 3], [4, 3, 3, 3], 2, 1),
        ([1, 6, 4, 2], [3, 2, 3, 3], 2, 1),
        ([2, 6, 5, 3], [2, 3, 3, 3], 2, 0),
        ([1, 4, 6, 2], [3, 2, 3, 3], 1, 0),
        ([2, 3, 4, 5], [4, 5, 1, 1], 1, 0),
        ([1, 5, 4, 3], [2, 3, 1, 1], 2, 0),
        ([1, 4, 5, 2], [3, 2, 1, 3], 1, 1),
        ([1, 8, 8, 2], [3, 2, 4, 4], 4, 0),
        ([2, 1, 1, 2], [3, 2, 3, 3], 1, 1),
        ([1, 1, 6, 2], [3, 2, 3, 3], 2, 1),
        ([9, 3, 4, 2], [2, 2, 3, 3], 1, 1),
        // More padding than the adjoint convolution has taps for.
        ([1, 3, 4, 2], [3, 2, 2, 2], 1, 2),
    ] {
        let name = format!("conv {x:?} * {w:?} s{stride} p{padding}");
        let inputs = normals(&[&x, &w, &[w[0]]]);
        check(&name, &inputs[..2], &conv_of(stride, padding));
        check(&format!("{name} bias"), &inputs, &conv_of(stride, padding));
    }
    for (w, stride, padding) in [([4, 3, 3, 3], 1, 1), ([4, 3, 3, 3], 2, 1), ([4, 3, 1, 1], 1, 0)] {
        let down = [2, w[1], w[2], w[3]];
        let inputs = normals(&[&[2, 5, 4, 3], &w, &[4], &down, &[4, 2, 1, 1]]);
        check(&format!("conv {w:?} s{stride} adapter"), &inputs, &conv_of(stride, padding));
    }
    for (x, stride, padding) in [
        ([2, 6, 4, 3], 2, BELOW),
        ([1, 5, 6, 3], 2, BELOW),
        ([1, 4, 5, 3], 1, BELOW),
        ([1, 4, 5, 3], 1, Padding { before: 2, after: 0 }),
    ] {
        let inputs = normals(&[&x, &[4, 3, 3, 3], &[4], &[2, 3, 3, 3], &[4, 2, 1, 1]]);
        let name = format!("conv {x:?} s{stride} p{}+{}", padding.before, padding.after);
        check(&name, &inputs[..2], &conv_of(stride, padding));
        check(&format!("{name} adapter"), &inputs, &conv_of(stride, padding));
    }
    // A transposed input, and a gradient that arrives transposed.
    let inputs = normals(&[&[2, 5, 4, 3], &[4, 3, 3, 3]]);
    check("conv between transpositions", &inputs, &|x| {
        conv(x, 1, 1).forward(&x[0].transpose(1, 2)?)?.transpose(1, 3)
    });
    let inputs = normals(&[&[2, 5, 4, 3], &[3, 3, 3, 3]]);
    check("conv with a transposed weight", &inputs, &|x| {
        conv(&[x[0].clone(), x[1].transpose(0, 1)?], 1, 1).forward(&x[0])
    });
}

#[test]
fn convolutions_with_what_is_added() {
    for (x, w, stride, padding, y) in [
        ([2, 4, 3, 3], [4, 3, 3, 3], 1, Padding::from(1), [2, 4, 3, 4]),
        ([2, 5, 4, 3], [4, 3, 3, 3], 2, Padding::from(1), [2, 3, 2, 4]),
        ([2, 4, 4, 3], [4, 3, 3, 3], 2, BELOW, [2, 2, 2, 4]),
        ([2, 4, 3, 3], [4, 3, 1, 1], 1, Padding::from(0), [2, 4, 3, 4]),
    ] {
        let name = format!("conv {w:?} s{stride}");
        let down = [2, w[1], w[2], w[3]];
        let all = normals(&[&x, &w, &[4], &down, &[4, 2, 1, 1], &[2, 4], &y]);
        check(&format!("{name} adapter, shift and residual"), &all, &|x| {
            conv_with_all(x, stride, padding)
        });
        let onto = |x: &[Tensor], bias: usize, shift: Option<usize>, residual: Option<usize>| {
            let (shift, residual) = (shift.map(|i| &x[i]), residual.map(|i| &x[i]));
            conv(&x[..2 + bias], stride, padding).forward_added(&x[0], Added { shift, residual })
        };
        let inputs = normals(&[&x, &w, &[4], &[2, 4], &y]);
        check(&format!("{name} shift and residual"), &inputs, &|x| onto(x, 1, Some(3), Some(4)));
        check(&format!("{name} shift"), &inputs[..4], &|x| onto(x, 1, Some(3), None));
        let inputs = normals(&[&x, &w, &y]);
        check(&format!("{name} residual"), &inputs, &|x| onto(x, 0, None, Some(2)));
        // One shift for all images.
        let inputs = normals(&[&x, &w, &[1, 4]]);
        check(&format!("{name} one shift"), &inputs, &|x| onto(x, 0, Some(2), None));
    }
    // The input is also what is added, and the outcome is used twice.
    let inputs = normals(&[&[2, 3, 4, 3], &[3, 3, 3, 3], &[3], &[2, 3]]);
    check("conv onto its input, twice", &inputs, &|x| {
        let added = Added { shift: Some(&x[3]), residual: Some(&x[0]) };
        let y = conv(&x[..3], 1, 1).forward_added(&x[0], added)?;
        let again = Added { shift: Some(&x[3]), residual: Some(&y) };
        conv(&x[..3], 1, 1).forward_added(&y, again)? * &y
    });
    // Enough for several threads and pieces of the inner dimension, and too few outputs for
    // transformed products.
    let shapes: [&[usize]; 7] = [
        &[2, 9, 7, 50],
        &[31, 50, 3, 3],
        &[31],
        &[3, 50, 3, 3],
        &[31, 3, 1, 1],
        &[2, 31],
        &[2, 9, 7, 31],
    ];
    check_along("conv, large", &normals(&shapes), &|x| conv_with_all(x, 1, 1));
}

#[test]
fn enlarged_convolutions() {
    for (size, w, stride, padding) in [
        ((6, 8), [4, 3, 3, 3], 1, Padding::from(1)),
        ((5, 7), [4, 3, 3, 3], 1, Padding::from(1)),
        ((6, 7), [4, 3, 3, 3], 1, Padding::from(1)),
        ((3, 8), [4, 3, 3, 3], 1, Padding::from(1)),
        ((3, 4), [4, 3, 3, 3], 1, Padding::from(1)),
        ((2, 3), [4, 3, 3, 3], 1, Padding::from(1)),
        ((6, 8), [4, 3, 1, 1], 1, Padding::from(0)),
        ((6, 8), [4, 3, 3, 3], 2, Padding::from(1)),
        ((5, 7), [4, 3, 3, 3], 2, BELOW),
        ((5, 7), [4, 3, 1, 3], 1, Padding::from(1)),
    ] {
        let down = [2, w[1], w[2], w[3]];
        let inputs = normals(&[&[2, 3, 4, 3], &w, &[4], &down, &[4, 2, 1, 1]]);
        let name = format!("conv {w:?} s{stride} of 3x4 at {size:?}");
        let f = |x: &[Tensor]| conv(x, stride, padding).forward_enlarged(&x[0], size);
        check(&name, &inputs[..2], &f);
        check(&format!("{name} bias"), &inputs[..3], &f);
        check(&format!("{name} adapter"), &inputs, &f);
    }
    let inputs = normals(&[&[2, 8, 6, 40], &[31, 40, 3, 3], &[31]]);
    check_along("conv enlarged, large", &inputs, &|x| {
        conv(x, 1, 1).forward_enlarged(&x[0], (16, 12))
    });
}

/// Channels enough for transformed products, with remainders of vectors of them, images of even
/// and odd sizes, and more tiles and channels than are taken at once.
#[test]
fn transformed_convolutions() {
    for (x, outer, rank, size) in [
        ([2, 6, 4, 32], 32, 3, (6, 4)),
        ([2, 5, 7, 33], 40, 3, (5, 7)),
        ([2, 2, 2, 40], 33, 3, (2, 2)),
        ([1, 2, 3, 32], 32, 3, (2, 3)),
        ([2, 7, 8, 47], 49, 34, (7, 8)),
        ([1, 1, 33, 32], 33, 3, (1, 33)),
        ([1, 33, 1, 33], 32, 3, (33, 1)),
        ([1, 7, 8, 400], 32, 3, (7, 8)),
        ([1, 8, 7, 32], 400, 3, (8, 7)),
        ([1, 44, 40, 32], 32, 3, (44, 40)),
        ([2, 5, 4, 32], 33, 3, (10, 8)),
        ([1, 4, 5, 33], 32, 34, (7, 9)),
        ([1, 1, 4, 32], 32, 3, (2, 33)),
        ([1, 17, 16, 32], 32, 3, (9, 8)),
        ([1, 22, 20, 32], 32, 3, (43, 41)),
    ] {
        let [batch, height, width, inner] = x;
        let (w, y) = ([outer, inner, 3, 3], [batch, size.0, size.1, outer]);
        let (down, up) = ([rank, inner, 3, 3], [outer, rank, 1, 1]);
        let all = normals(&[&x, &w, &[outer], &down, &up, &[batch, outer], &y]);
        let name = format!("conv {x:?} to {outer} at {size:?}");
        let f = |x: &[Tensor]| conv(x, 1, 1).forward_enlarged(&x[0], size);
        check_along(&name, &all[..2], &f);
        check_along(&format!("{name} adapter"), &all[..5], &f);
        if size == (height, width) {
            check_along(&format!("{name} with all"), &all, &|x| conv_with_all(x, 1, 1));
        }
    }
}

#[test]
fn linears() {
    let without_bias = |x: &[Tensor]| {
        let adapter = LowRank { down: x[2].clone(), up: x[3].clone(), scale: 1.5 };
        Linear::new(x[1].clone(), None, Some(adapter)).forward(&x[0])
    };
    let xs: [&[usize]; 4] = [&[3, 5], &[2, 3, 5], &[1, 5], &[2, 2, 3, 5]];
    for dims in xs {
        let mut out = dims.to_vec();
        out[dims.len() - 1] = 4;
        let all = normals(&[dims, &[4, 5], &[4], &[2, 5], &[4, 2], &out]);
        let of = |at: &[usize]| at.iter().map(|i| all[*i].clone()).collect::<Vec<_>>();
        let name = format!("linear {dims:?}");
        check(&name, &all[..2], &|x| linear(x).forward(&x[0]));
        check(&format!("{name} bias"), &all[..3], &|x| linear(x).forward(&x[0]));
        check(&format!("{name} adapter"), &of(&[0, 1, 3, 4]), &without_bias);
        check(&format!("{name} bias adapter"), &all[..5], &|x| linear(x).forward(&x[0]));
        check(&format!("{name} bias adapter residual"), &all, &|x| {
            linear(&x[..5]).forward_onto(&x[0], &x[5])
        });
        check(&format!("{name} residual"), &of(&[0, 1, 5]), &|x| {
            linear(&x[..2]).forward_onto(&x[0], &x[2])
        });
    }
    check("linear transposed input", &normals(&[&[2, 5, 3], &[4, 5], &[4]]), &|x| {
        linear(x).forward(&x[0].transpose(1, 2)?)
    });
    check("linear transposed residual", &normals(&[&[2, 5], &[4, 5], &[4], &[4, 2]]), &|x| {
        linear(&x[..3]).forward_onto(&x[0], &x[3].t()?)
    });
    // Enough for several threads and pieces of the inner dimension.
    let large = normals(&[&[2, 30, 400], &[70, 400], &[70], &[5, 400], &[70, 5], &[2, 30, 70]]);
    check_along("linear, large", &large, &|x| linear(&x[..5]).forward_onto(&x[0], &x[5]));
}

#[test]
fn norms() {
    for (dims, groups) in [
        (vec![2, 3, 5, 6], 3),
        (vec![2, 1, 1, 4], 2),
        (vec![3, 7, 4], 4),
        (vec![1, 2, 2, 6], 1),
        (vec![2, 8], 2),
    ] {
        let channels = dims[dims.len() - 1];
        let inputs = normals(&[&dims, &[channels], &[channels]]);
        let name = format!("group norm {dims:?} / {groups}");
        check(&name, &inputs, &|x| group_norm(x, groups).forward(&x[0]));
        check(&format!("{name} silu"), &inputs, &|x| group_norm(x, groups).forward_silu(&x[0]));
        if dims.len() == 4 {
            check(&format!("{name} transposed"), &inputs, &|x| {
                group_norm(x, groups).forward_silu(&x[0].transpose(1, 2)?)?.transpose(1, 3)
            });
        }
    }
    // Several pieces of positions, on one thread and on more.
    for dims in [[2, 13, 11, 6], [2, 27, 19, 36]] {
        let channels = dims[3];
        let mut inputs = normals(&[&dims, &[channels], &[channels]]);
        inputs[0] = (&inputs[0] + 2.0).unwrap();
        let name = format!("group norm {dims:?}");
        check_along(&name, &inputs, &|x| group_norm(x, 3).forward(&x[0]));
        check_along(&format!("{name} silu"), &inputs, &|x| group_norm(x, 3).forward_silu(&x[0]));
    }
    for dims in [vec![3, 5], vec![2, 3, 6], vec![2, 3, 19]] {
        let width = dims[dims.len() - 1];
        let inputs = normals(&[&dims, &[width], &[width]]);
        check(&format!("layer norm {dims:?}"), &inputs, &|x| layer_norm(x).forward(&x[0]));
    }
    check("layer norm transposed", &normals(&[&[2, 6, 3], &[6], &[6]]), &|x| {
        layer_norm(x).forward(&x[0].transpose(1, 2)?)
    });
    check_along("layer norm, large", &normals(&[&[3, 70, 200], &[200], &[200]]), &|x| {
        layer_norm(x).forward(&x[0])
    });
}

#[test]
fn attentions() {
    for (targets, sources, width, heads) in
        [(4, 4, 6, 1), (4, 4, 6, 3), (5, 3, 4, 2), (1, 7, 4, 4), (6, 1, 4, 2), (15, 14, 4, 2)]
    {
        let tokens = [2, sources, width];
        let inputs = normals(&[&[2, targets, width], &tokens, &tokens]);
        let name = format!("attention {targets} on {sources}, {heads} heads");
        check(&name, &inputs, &|x| attention(&x[0], &x[1], &x[2], heads, None));
        let mask = causal(targets, sources);
        check(&format!("{name}, causal"), &inputs, &|x| {
            attention(&x[0], &x[1], &x[2], heads, Some(&mask))
        });
        check(&format!("{name}, q = k"), &inputs[..1], &|x| {
            attention(&x[0], &x[0], &x[0], heads, None)
        });
        let shapes: [&[usize]; 3] =
            [&[2, width, targets], &[2, width, sources], &[2, sources, width]];
        check(&format!("{name}, transposed"), &normals(&shapes), &|x| {
            let (q, k) = (x[0].transpose(1, 2)?, x[1].transpose(1, 2)?);
            attention(&q, &k, &x[2], heads, None)?.transpose(1, 2)
        });
    }
    // Several tiles of sources, blocks of targets and pieces of a head's width.
    for (targets, sources, heads, size) in [
        (13, 400, 2, 3),
        (110, 20, 2, 3),
        (97, 385, 1, 4),
        (200, 800, 1, 5),
        (110, 110, 3, 33),
        (3, 4, 2, 400),
        (14, 390, 1, 390),
    ] {
        let (q, kv) = ([2, targets, heads * size], [2, sources, heads * size]);
        let inputs = normals(&[&q, &kv, &kv]);
        let name = format!("attention {targets} on {sources}, {heads} x {size}");
        let masks = [
            ("", None),
            (", causal", Some(causal(targets, sources))),
            (", late", Some(late(targets, sources, sources - 3))),
        ];
        for (kind, mask) in masks {
            check_along(&format!("{name}{kind}"), &inputs, &|x| {
                attention(&x[0], &x[1], &x[2], heads, mask.as_ref())
            });
        }
    }
}

#[test]
fn activations() {
    let x = (normal(1, &[4, 9]) * 3.0).unwrap();
    let one = std::slice::from_ref(&x);
    check("silu", one, &|x| Activation::Silu.forward(&x[0]));
    check("quick gelu", one, &|x| Activation::QuickGelu.forward(&x[0]));
    check("gelu", one, &|x| Activation::Gelu.forward(&x[0]));
    check("silu transposed", one, &|x| Activation::Silu.forward(&x[0].t()?)?.t());
    for dims in [vec![4, 6], vec![2, 3, 10], vec![3, 2], vec![6]] {
        let x = (normal(1, &dims) * 2.0).unwrap();
        check(&format!("geglu {dims:?}"), &[x], &|x| geglu(&x[0]));
    }
    check("geglu transposed", &normals(&[&[6, 4]]), &|x| geglu(&x[0].t()?)?.t());
    check_along("geglu, large", &normals(&[&[3, 60, 400]]), &|x| geglu(&x[0]));
}

#[test]
fn resampling_and_embedding() {
    let x = normal(1, &[2, 3, 4, 3]);
    for (height, width) in [(6, 8), (5, 7), (6, 7), (3, 4), (2, 3), (6, 4)] {
        check(&format!("nearest 3x4 to {height}x{width}"), std::slice::from_ref(&x), &|x| {
            nearest(&x[0], height, width)
        });
        // candle's own operation loses one of the two gradients here, by order of use.
        check(
            &format!("nearest to {height}x{width}, two consumers"),
            std::slice::from_ref(&x),
            &|x| {
                let before = x[0].sqr()?.mean_all()?;
                let up = nearest(&x[0], height, width)?;
                let after = x[0].sin()?.sum_all()?;
                up.broadcast_mul(&(before + after)?)
            },
        );
    }
    for (dim, flip, shift) in [(8, true, 0.0), (8, false, 1.0), (7, true, 0.0)] {
        let t = Tensor::new(&[0.3_f64, 7.5, 981.0], &Device::Cpu).unwrap();
        check(&format!("sinusoidal {dim} flip {flip} shift {shift}"), &[t], &|x| {
            sinusoidal(&x[0], dim, flip, shift)
        });
    }
}

/// Each of a layer's tensors gets a gradient if and only if it is tracked.
#[test]
fn gradients_are_absent_only_for_what_is_not_tracked() {
    let weights: [&[usize]; 5] = [&[2, 4, 5, 3], &[4, 3, 3, 3], &[4], &[2, 3, 3, 3], &[4, 2, 1, 1]];
    let all = [&weights[..], &[&[2, 4], &[2, 2, 3, 4]]].concat();
    let rows: [&[usize]; 6] = [&[2, 3, 4], &[5, 4], &[5], &[2, 4], &[5, 2], &[2, 3, 5]];
    let cases: [(&str, Vec<Tensor>, Layer); 9] = [
        ("conv", normals(&weights[..3]), &conv_of(1, 1)),
        ("conv adapter", normals(&weights), &conv_of(2, 1)),
        ("conv adapter, shift and residual", normals(&all), &|x| conv_with_all(x, 2, 1)),
        ("conv enlarged", normals(&weights), &|x| conv(x, 1, 1).forward_enlarged(&x[0], (8, 7))),
        ("linear", normals(&rows[..3]), &|x| linear(x).forward(&x[0])),
        ("linear adapter residual", normals(&rows), &|x| {
            linear(&x[..5]).forward_onto(&x[0], &x[5])
        }),
        ("group norm", normals(&[&[2, 3, 4], &[4], &[4]]), &|x| {
            group_norm(x, 2).forward_silu(&x[0])
        }),
        ("layer norm", normals(&[&[2, 4], &[4], &[4]]), &|x| layer_norm(x).forward(&x[0])),
        ("attention", normals(&[&[2, 3, 4][..]; 3]), &|x| attention(&x[0], &x[1], &x[2], 2, None)),
    ];
    for (name, inputs, f) in cases {
        let full = analytic(&inputs, f).0;
        for subset in 1..1_usize << inputs.len() {
            let tracked = |i: usize| subset >> i & 1 == 1;
            let vars: Vec<Option<Var>> = inputs
                .iter()
                .enumerate()
                .map(|(i, x)| tracked(i).then(|| Var::from_tensor(x).unwrap()))
                .collect();
            let given: Vec<Tensor> = vars
                .iter()
                .zip(&inputs)
                .map(|(v, x)| v.as_ref().map_or(x.clone(), |v| v.as_tensor().clone()))
                .collect();
            let out = f(&given).unwrap();
            let weights = normal(4321, out.dims());
            let grads = (out * weights).unwrap().sum_all().unwrap().backward().unwrap();
            for (i, var) in vars.iter().enumerate() {
                let Some(var) = var else { continue };
                let found = grads.get(var);
                let found =
                    found.unwrap_or_else(|| panic!("{name}: no gradient for {i} of {subset:b}"));
                let error = relative_error(found, &full[i]);
                assert!(error < 1e-12, "{name}: gradient {i} depends on what else is tracked");
            }
        }
        let plain = f(&inputs).unwrap();
        assert!(!plain.track_op(), "{name}: a graph is kept though nothing is tracked");
    }
}

#[test]
fn a_batch_of_nothing_gives_gradients_of_zero() {
    for outer in [31, 32, 300] {
        let inputs = normals(&[&[0, 4, 4, 32], &[outer, 32, 3, 3], &[outer]]);
        for (i, gradient) in analytic(&inputs, &conv_of(1, 1)).0.iter().enumerate() {
            assert_eq!(gradient.dims(), inputs[i].dims());
            assert_eq!(norm(gradient), 0.0, "gradient {i} of none to {outer}");
        }
    }
}
