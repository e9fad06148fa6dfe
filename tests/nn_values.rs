//! The layers' values against closed forms, compositions of candle's operations and f64, also
//! far out.

mod common;

use candle_core::{D, DType, Device, Result, Tensor};
use common::layers::{
    Layer, analytic, causal, conv, conv_of, conv_with_all, f32, f64, group_norm, late, layer_norm,
    linear, normals, worst,
};
use common::{normal, relative_error, values};
use diffusion_sharpening::nn::conv::Padding;
use diffusion_sharpening::nn::embedding::sinusoidal;
use diffusion_sharpening::nn::kernel::{Real, sigmoid};
use diffusion_sharpening::nn::resample::nearest;
use diffusion_sharpening::nn::{Activation, Added, attention, geglu};

#[test]
fn embeddings_are_the_closed_form_and_tell_neighbouring_sizes_apart() {
    let t = Tensor::new(&[981.0_f32, 1024.0, 1025.0], &Device::Cpu).unwrap();
    let out = sinusoidal(&t, 256, true, 0.0).unwrap().to_vec2::<f32>().unwrap();
    for (row, t) in out.iter().zip([981.0_f64, 1024.0, 1025.0]) {
        for i in 0..128 {
            let angle = t * (-(10_000_f64.ln()) * i as f64 / 128.0).exp();
            // One f32 rounding of an angle of up to 1025.
            assert!((f64::from(row[i]) - angle.cos()).abs() < 2e-4, "cos {i} of {t}");
            assert!((f64::from(row[128 + i]) - angle.sin()).abs() < 2e-4, "sin {i} of {t}");
        }
    }
    assert!((out[1][0] - out[2][0]).abs() > 0.1, "1024 and 1025 look the same");
}

#[test]
fn the_f32_exponential_is_within_two_units() {
    for (exponential, sigmoid) in [
        (f32::exponential::<false> as fn(f32) -> f32, sigmoid::<false, f32> as fn(f32) -> f32),
        (f32::exponential::<true>, sigmoid::<true, f32>),
    ] {
        let mut worst = 0.0_f64;
        let mut x = -87.0_f32;
        while x <= 88.0 {
            let exact = f64::from(x).exp();
            worst = worst.max((f64::from(exponential(x)) - exact).abs() / exact);
            x += 0.000_37;
        }
        println!("f32 exponential: worst relative error {worst:.2e}");
        assert!(worst < 2.0 * f64::from(f32::EPSILON), "{worst:.2e}");
        assert_eq!(exponential(0.0), 1.0);
        assert!(exponential(f32::NAN).is_nan());
        assert!(exponential(f32::NEG_INFINITY) < 1.3e-38);
        assert!(exponential(f32::INFINITY) > 1e38);
        for x in [-200.0_f32, -3.5, 0.0, 0.1, 9.0, 200.0] {
            let exact = 1.0 / (1.0 + (-f64::from(x)).exp());
            assert!((f64::from(sigmoid(x)) - exact).abs() < 1e-6, "sigmoid({x})");
        }
    }
}

/// Half precision takes the composed operations; they must agree with the fused ones.
#[test]
fn the_composed_path_equals_the_fused_one() {
    let half = |x: &Tensor| x.to_dtype(DType::F16).unwrap();
    let compare = |what: &str, inputs: &[Tensor], f: Layer| {
        let rounded: Vec<Tensor> = inputs.iter().map(half).collect();
        let single: Vec<Tensor> = rounded.iter().map(f32).collect();
        let error = relative_error(&f(&rounded).unwrap(), &f(&single).unwrap());
        assert!(error < 2e-3, "{what}: values differ by {error:.1e}");
        let (fused, composed) = (analytic(&single, f).0, analytic(&rounded, f).0);
        let mut worst = 0.0_f64;
        for (i, (fused, composed)) in fused.iter().zip(&composed).enumerate() {
            let error = relative_error(composed, fused);
            assert!(error < 1e-2, "{what}: gradient {i} differs by {error:.1e}");
            worst = worst.max(error);
        }
        println!("{what:36} values {error:.1e} gradients {worst:.1e}");
    };
    let affine = normals(&[&[2, 5, 6, 4], &[4], &[4]]);
    compare("group norm", &affine, &|x| group_norm(x, 2).forward(&x[0]));
    compare("group norm silu", &affine, &|x| group_norm(x, 2).forward_silu(&x[0]));
    let rows = normals(&[&[2, 3, 6], &[6], &[6]]);
    compare("layer norm", &rows, &|x| layer_norm(x).forward(&x[0]));
    let x = (normal(1, &[40]) * 3.0).unwrap();
    for activation in [Activation::Silu, Activation::QuickGelu, Activation::Gelu] {
        compare(&format!("{activation:?}"), std::slice::from_ref(&x), &|x| {
            activation.forward(&x[0])
        });
    }
    compare("geglu", &normals(&[&[2, 3, 10]]), &|x| geglu(&x[0]));
    let weights: [&[usize]; 5] = [&[2, 5, 6, 4], &[3, 4, 3, 3], &[3], &[2, 4, 3, 3], &[3, 2, 1, 1]];
    let below = Padding { before: 0, after: 1 };
    for (stride, padding, y) in [
        (1, Padding::from(1), [2, 5, 6, 3]),
        (2, Padding::from(1), [2, 3, 3, 3]),
        (2, below, [2, 2, 3, 3]),
    ] {
        let name = format!("conv s{stride} p{}+{}", padding.before, padding.after);
        let all = normals(&[&weights[..], &[&[2, 3], &y]].concat());
        compare(&name, &all[..3], &conv_of(stride, padding));
        compare(&format!("{name} adapter"), &all[..5], &conv_of(stride, padding));
        compare(&format!("{name} with all"), &all, &|x| conv_with_all(x, stride, padding));
        let shifted = [&all[..3], &all[5..6]].concat();
        compare(&format!("{name} shift"), &shifted, &|x| {
            let added = Added { shift: Some(&x[3]), residual: None };
            conv(&x[..3], stride, padding).forward_added(&x[0], added)
        });
    }
    for size in [(10, 12), (9, 11), (7, 6), (4, 5)] {
        compare(&format!("conv enlarged to {size:?}"), &normals(&weights[..3]), &|x| {
            conv(x, 1, 1).forward_enlarged(&x[0], size)
        });
    }
    let rows = normals(&[&[2, 3, 6], &[5, 6], &[5], &[2, 6], &[5, 2], &[2, 3, 5]]);
    compare("linear", &rows[..3], &|x| linear(x).forward(&x[0]));
    compare("linear adapter residual", &rows, &|x| linear(&x[..5]).forward_onto(&x[0], &x[5]));
    let q = normals(&[&[2, 4, 6], &[2, 5, 6], &[2, 5, 6]]);
    compare("attention", &q, &|x| attention(&x[0], &x[1], &x[2], 2, None));
    let mask = f32(&causal(4, 5));
    compare("attention, causal", &q, &|x| attention(&x[0], &x[1], &x[2], 2, Some(&mask)));
}

/// candle's own convolution of the image enlarged and padded, plus the bias.
fn candles(x: &[Tensor], size: (usize, usize), stride: usize, padding: Padding) -> Result<Tensor> {
    let nchw = nearest(&x[0], size.0, size.1)?.permute((0, 3, 1, 2))?;
    let nchw = nchw.pad_with_zeros(2, padding.before, padding.after)?;
    let nchw = nchw.pad_with_zeros(3, padding.before, padding.after)?;
    let y = nchw.contiguous()?.conv2d(&x[1], 0, stride, 1, 1)?;
    y.permute((0, 2, 3, 1))?.broadcast_add(&x[2])
}

/// Every geometry against candle's.
#[test]
fn convolutions_are_candles() {
    let mut next = numbers();
    let mut pick = |from: usize, to: usize| from + next() % (to + 1 - from);
    for _ in 0..300 {
        let (h, w, inner, outer) = (pick(1, 6), pick(1, 6), pick(1, 5), pick(1, 40));
        let (kh, kw, stride) = (pick(1, 4), pick(1, 4), pick(1, 3));
        let padding = Padding { before: pick(0, 3), after: pick(0, 3) };
        let size = if pick(0, 1) == 0 { (h, w) } else { (pick(1, 13), pick(1, 13)) };
        let all = padding.before + padding.after;
        if size.0 + all < kh || size.1 + all < kw {
            continue;
        }
        let x = normals(&[&[2, h, w, inner], &[outer, inner, kh, kw], &[outer]]);
        let y = conv(&x, stride, padding).forward_enlarged(&x[0], size).unwrap();
        let expected = candles(&x, size, stride, padding).unwrap();
        let error = relative_error(&y, &expected);
        let name =
            format!("{h}x{w} to {size:?}, {inner} to {outer}, {kh}x{kw} s{stride} {padding:?}");
        assert!(error < 1e-13, "{name}: differs by {error:.1e}");
    }
}

/// The same of those with channels enough for transformed products, and f32 against f64.
#[test]
fn transformed_convolutions_are_candles() {
    let mut next = numbers();
    let mut pick = |from: usize, to: usize| from + next() % (to + 1 - from);
    let random = (0..60).map(|_| {
        let (image, channels) = ((pick(1, 9), pick(1, 9)), (pick(32, 70), pick(32, 70)));
        let same = image.0.min(image.1) > 1 && pick(0, 1) == 0;
        (image, if same { image } else { (pick(2, 13), pick(2, 13)) }, channels)
    });
    let mut all = vec![
        ((2, 2), (2, 2), (32, 32)),
        ((7, 8), (7, 8), (400, 32)),
        ((4, 5), (8, 9), (800, 33)),
        ((8, 7), (8, 7), (32, 400)),
        ((1, 40), (1, 40), (33, 32)),
        ((44, 40), (44, 40), (32, 32)),
        ((15, 17), (30, 33), (33, 48)),
    ];
    all.extend(random);
    let (mut far, mut single) = (0.0_f64, 0.0_f64);
    for ((h, w), size, (inner, outer)) in all {
        let x = normals(&[&[2, h, w, inner], &[outer, inner, 3, 3], &[outer]]);
        let x: Vec<Tensor> = x.iter().map(|x| f64(&f32(x))).collect();
        let f = |x: &[Tensor]| conv(x, 1, 1).forward_enlarged(&x[0], size).unwrap();
        let y = f(&x);
        let error = relative_error(&y, &candles(&x, size, 1, 1.into()).unwrap());
        let name = format!("{h}x{w} to {size:?}, {inner} to {outer}");
        assert!(error < 1e-12, "{name}: differs by {error:.1e}");
        far = far.max(error);
        let error = relative_error(&f(&x.iter().map(f32).collect::<Vec<_>>()), &y);
        assert!(error < 1e-6, "{name}: f32 differs from f64 by {error:.1e}");
        single = single.max(error);
    }
    println!("transformed convolutions: from candle's {far:.1e}, f32 {single:.1e}");
}

/// The transforms cost next to no accuracy.
#[test]
fn transformed_convolutions_are_as_exact_as_plain_ones() {
    let transformed: Layer = &|x| conv(x, 1, 1).forward(&x[0]);
    // One row and column of padding more than is looked at: not a transformed geometry.
    let plain: Layer = &|x| {
        let y = conv(x, 1, Padding { before: 1, after: 2 }).forward(&x[0])?;
        y.narrow(1, 0, x[0].dim(1)?)?.narrow(2, 0, x[0].dim(2)?)
    };
    for (x, outer) in [
        ([2, 8, 7, 32], 32),
        ([1, 16, 15, 64], 64),
        ([1, 7, 8, 800], 40),
        ([1, 8, 7, 40], 800),
        ([1, 44, 40, 32], 32),
    ] {
        for mean in [0.0, 3.0] {
            let mut single: Vec<Tensor> =
                normals(&[&x, &[outer, x[3], 3, 3]]).iter().map(f32).collect();
            single[0] = (&single[0] + mean).unwrap();
            let double: Vec<Tensor> = single.iter().map(f64).collect();
            let (exact, gradients) =
                (transformed(&double).unwrap(), analytic(&double, transformed).0);
            let pair = [transformed, plain].map(|f| values(&f(&single).unwrap()));
            assert!(pair[0] != pair[1], "{x:?} to {outer} is not transformed");
            let errors = [transformed, plain].map(|f| {
                let found = analytic(&single, f).0;
                let of = |i: usize| relative_error(&found[i], &gradients[i]);
                [relative_error(&f(&single).unwrap(), &exact), of(0), of(1)]
            });
            let name = format!("conv {x:?} of mean {mean} to {outer}");
            let [[y, dx, dw], plain] = errors;
            println!("{name}: y {y:.1e} dx {dx:.1e} dw {dw:.1e}");
            println!("  plain: y {:.1e} dx {:.1e} dw {:.1e}", plain[0], plain[1], plain[2]);
            for (transformed, plain) in errors[0].into_iter().zip(errors[1]) {
                assert!(transformed < 4.0 * plain, "{name}: {errors:?}");
            }
        }
    }
}

/// A fixed sequence of numbers.
fn numbers() -> impl FnMut() -> usize {
    let mut state = 1_u64;
    move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 33) as usize
    }
}

/// Attention as it is defined.
fn defined(x: &[Tensor], heads: usize, mask: Option<&Tensor>) -> Result<Tensor> {
    let (_, _, width) = x[0].dims3()?;
    let split = |x: &Tensor| {
        let x = x.reshape((x.dim(0)?, x.dim(1)?, heads, width / heads))?;
        x.transpose(1, 2)?.contiguous()
    };
    let (q, k, v) = (split(&x[0])?, split(&x[1])?, split(&x[2])?);
    let scale = 1.0 / ((width / heads) as f64).sqrt();
    let mut scores = (q.matmul(&k.transpose(2, 3)?.contiguous()?)? * scale)?;
    if let Some(mask) = mask {
        scores = scores.broadcast_add(mask)?;
    }
    let e = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?)?.exp()?;
    let p = e.broadcast_div(&e.sum_keepdim(D::Minus1)?)?;
    p.matmul(&v)?.transpose(1, 2)?.contiguous()?.reshape(x[0].shape())
}

#[test]
fn attention_is_what_is_defined() {
    for (targets, sources, heads, size) in [
        (4, 5, 1, 3),
        (12, 384, 2, 4),
        (13, 385, 2, 32),
        (97, 33, 3, 7),
        (200, 1000, 1, 5),
        (3, 400, 2, 400),
        (1, 769, 4, 1),
    ] {
        let (q, kv) = ([2, targets, heads * size], [2, sources, heads * size]);
        let x = normals(&[&q, &kv, &kv]);
        let late = late(targets, sources, sources - 2);
        for (kind, mask) in
            [("", None), (", causal", Some(causal(targets, sources))), (", late", Some(late))]
        {
            let expected = defined(&x, heads, mask.as_ref()).unwrap();
            let y = attention(&x[0], &x[1], &x[2], heads, mask.as_ref()).unwrap();
            let error = relative_error(&y, &expected);
            let name = format!("{targets} on {sources}, {heads} x {size}{kind}");
            assert!(error < 1e-13, "{name}: differs by {error:.1e}");
            let single: Vec<Tensor> = x.iter().map(f32).collect();
            let y = attention(&single[0], &single[1], &single[2], heads, mask.as_ref()).unwrap();
            let error = relative_error(&y, &expected);
            println!("attention {name:36} f32 {error:.1e}");
            assert!(error < 1e-6, "{name}: f32 differs by {error:.1e}");
        }
    }
}

/// A query whose first tile of sources is hidden, with scores far below (and above) zero.
#[test]
fn hidden_sources_do_not_count_whatever_the_scores() {
    let (targets, sources) = (3, 400);
    let mut x = normals(&[&[1, targets, 4], &[1, sources, 4], &[1, sources, 4]]);
    x[0] = x[0].abs().unwrap();
    for score in [0.0, -20.0, -60.0, -80.0, -200.0, 80.0, 200.0] {
        let mask = (late(targets, sources, 390) + score).unwrap();
        let expected = defined(&x, 1, Some(&mask)).unwrap();
        let single: Vec<Tensor> = x.iter().map(f32).collect();
        let f: Layer = &|x| attention(&x[0], &x[1], &x[2], 1, Some(&mask));
        let y = f(&single).unwrap();
        let error = relative_error(&y, &expected);
        let gradients = worst(&analytic(&single, f).0, &analytic(&x, f).0);
        println!("scores of {score}: values {error:.1e} gradients {gradients:.1e}");
        // The scores themselves are rounded at their size.
        let bar = 2e-6 + 2e-7 * score.abs();
        assert!(error < bar, "scores of {score}: f32 differs from f64 by {error:.1e}");
        assert!(gradients < bar, "scores of {score}: f32 gradients differ by {gradients:.1e}");
    }
}

#[test]
fn activations_stay_finite_far_out() {
    for dtype in [DType::F64, DType::F32, DType::F16] {
        let x = Tensor::new(
            &[-6e4_f64, -100.0, -20.0, -11.5, 0.0, 11.5, 20.0, 100.0, 6e4],
            &Device::Cpu,
        );
        let x = x.unwrap().to_dtype(dtype).unwrap();
        for activation in [Activation::Silu, Activation::QuickGelu, Activation::Gelu] {
            let f = |x: &[Tensor]| activation.forward(&x[0]);
            let y = values(&f(std::slice::from_ref(&x)).unwrap());
            // The product of slope and x overflows half precision before x does.
            if !(dtype == DType::F16 && activation == Activation::QuickGelu) {
                assert!(y.iter().all(|v| v.is_finite()), "{activation:?} {dtype:?}: {y:?}");
            }
            let inner = x.narrow(0, 1, 7).unwrap();
            let gradient = values(&analytic(&[inner], &f).0[0]);
            assert!(
                gradient.iter().all(|v| v.is_finite()),
                "{activation:?} {dtype:?}: {gradient:?}"
            );
        }
        let gated = |x: &Tensor| Tensor::cat(&[&x.ones_like().unwrap(), x], 0).unwrap();
        let f = |x: &[Tensor]| geglu(&x[0]);
        let y = f(&[gated(&x)]).unwrap();
        let gradient = analytic(&[gated(&x.narrow(0, 1, 7).unwrap())], &f).0.remove(0);
        for found in [values(&y), values(&gradient)] {
            assert!(found.iter().all(|v| v.is_finite()), "geglu {dtype:?}: {found:?}");
        }
    }
}

/// Probabilities of these scores, as attention has them: by a mask, and as products.
fn probabilities(scores: [[f32; 3]; 4]) -> [Vec<Vec<f32>>; 2] {
    let rows = scores.len();
    let scores = Tensor::new(&scores, &Device::Cpu).unwrap();
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
    let v = Tensor::eye(3, DType::F32, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
    let masked = attention(&zeros(&[1, rows, 3]), &zeros(&[1, 3, 3]), &v, 1, Some(&scores));
    // Four values wide, so that the scale of ½ meets queries of 2.
    let pad = |x: Tensor, width| x.pad_with_zeros(D::Minus1, 0, width).unwrap();
    let products = (0..rows).map(|i| {
        let q = pad(Tensor::full(2.0_f32, (1, 1, 1), &Device::Cpu).unwrap(), 3);
        let k = pad(scores.get(i).unwrap().reshape((1, 3, 1)).unwrap(), 3);
        attention(&q, &k, &pad(v.clone(), 1), 1, None).unwrap()
    });
    let products = Tensor::cat(&products.collect::<Vec<_>>(), 1).unwrap();
    let rows = |x: Tensor| x.squeeze(0).unwrap().narrow(1, 0, 3).unwrap().to_vec2().unwrap();
    [rows(masked.unwrap()), rows(products)]
}

#[test]
fn attention_stays_finite_far_out() {
    for p in probabilities([[3e38, -3e38, 0.0], [-1e4; 3], [1e4; 3], [-3e38, 3e38, 3e38]]) {
        assert!((p[0][0] - 1.0).abs() < 1e-6 && p[0][1] < 1e-30 && p[0][2] < 1e-30, "{p:?}");
        for row in &p[1..3] {
            assert!(row.iter().all(|v| (v - 1.0 / 3.0).abs() < 1e-6), "{p:?}");
        }
        assert!(p[3][0] < 1e-30 && p[3][1..].iter().all(|v| (v - 0.5).abs() < 1e-6), "{p:?}");
    }
}

/// A mean that is large against the deviation costs the digits that it takes up in f32, and no
/// more.
#[test]
fn norms_of_a_large_mean() {
    let layers: [(&str, &[usize], Layer); 3] = [
        ("group norm", &[2, 30, 20, 8], &|x| group_norm(x, 2).forward(&x[0])),
        ("group norm silu", &[2, 30, 20, 8], &|x| group_norm(x, 2).forward_silu(&x[0])),
        ("layer norm", &[2, 300, 64], &|x| layer_norm(x).forward(&x[0])),
    ];
    for (name, dims, f) in layers {
        let channels = [dims[dims.len() - 1]];
        for (mean, deviation) in [(0.0, 1.0), (10.0, 1.0), (100.0, 1.0), (1e4, 1.0), (1e4, 0.1)] {
            let mut single: Vec<Tensor> =
                normals(&[dims, &channels, &channels]).iter().map(f32).collect();
            single[0] = single[0].affine(deviation, mean).unwrap();
            let double: Vec<Tensor> = single.iter().map(f64).collect();
            let error = relative_error(&f(&single).unwrap(), &f(&double).unwrap());
            let gradients = worst(&analytic(&single, f).0, &analytic(&double, f).0);
            println!("{name} of {mean} ± {deviation}: {error:.1e} gradients {gradients:.1e}");
            let bar = 5e-7 + 2e-7 * mean / deviation;
            let name = format!("{name} of {mean} ± {deviation}");
            assert!(error < bar, "{name}: f32 differs from f64 by {error:.1e}");
            assert!(gradients < bar, "{name}: f32 gradients differ by {gradients:.1e}");
        }
    }
    // Group norm takes differences to a channel's first value, which may be an outlier.
    for (size, outlier, bar) in [(128, 30.0, 1e-5), (512, 30.0, 1e-5), (128, 100.0, 1e-4)] {
        let mut single: Vec<Tensor> =
            normals(&[&[1, size, size, 4], &[4], &[4]]).iter().map(f32).collect();
        let mut all = values(&single[0]);
        all[0] = outlier;
        single[0] = f32(&Tensor::from_vec(all, (1, size, size, 4), &Device::Cpu).unwrap());
        let double: Vec<Tensor> = single.iter().map(f64).collect();
        let f = |x: &[Tensor]| group_norm(x, 2).forward(&x[0]);
        let error = relative_error(&f(&single).unwrap(), &f(&double).unwrap());
        println!("group norm, first of {size}² is {outlier}: {error:.1e}");
        assert!(error < bar, "first of {size}² is {outlier}: f32 differs by {error:.1e}");
    }
}
