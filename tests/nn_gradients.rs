//! Every layer's backward against central differences in f64, and the layers'
//! values across dtypes, layouts and batch sizes.

mod common;

use candle_core::{DType, Device, Result, Tensor, Var};
use common::{normal, relative_error, values};
use diffusion_sharpening::nn::attention::{attention, attention_in_slices};
use diffusion_sharpening::nn::conv::conv2d;
use diffusion_sharpening::nn::embedding::sinusoidal;
use diffusion_sharpening::nn::kernel::{Real, sigmoid};
use diffusion_sharpening::nn::resample::nearest;
use diffusion_sharpening::nn::softmax::softmax;
use diffusion_sharpening::nn::{Activation, Conv2d, GroupNorm, LayerNorm, Linear, LowRank};

const BAR: f64 = 1e-6;
/// candle's error-function constants have seven digits.
const GELU_BAR: f64 = 1e-5;

type Layer<'a> = &'a dyn Fn(&[Tensor]) -> Result<Tensor>;

/// Analytic gradients of Σ R·f(inputs) for every input, with the weights R.
fn analytic(inputs: &[Tensor], f: Layer) -> (Vec<Tensor>, Tensor) {
    let vars: Vec<Var> = inputs.iter().map(|x| Var::from_tensor(x).unwrap()).collect();
    let tracked: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
    let out = f(&tracked).unwrap();
    let weights = normal(4321, out.dims()).to_dtype(out.dtype()).unwrap();
    let grads = (out * &weights).unwrap().sum_all().unwrap().backward().unwrap();
    let found = vars
        .iter()
        .enumerate()
        .map(|(i, v)| grads.get(v).unwrap_or_else(|| panic!("input {i} got no gradient")).clone());
    (found.collect(), weights)
}

/// Compares every element of every input's gradient with a five-point difference.
fn check(what: &str, bar: f64, inputs: &[Tensor], f: Layer) {
    const STEP: f64 = 1e-3;
    let (gradients, weights) = analytic(inputs, f);
    let mut worst = 0.0_f64;
    for (i, x) in inputs.iter().enumerate() {
        let base = values(x);
        let loss = |at: usize, shift: f64| -> f64 {
            let mut moved = base.clone();
            moved[at] += shift;
            let mut all = inputs.to_vec();
            all[i] = Tensor::from_vec(moved, x.dims(), &Device::Cpu).unwrap();
            values(&(f(&all).unwrap() * &weights).unwrap()).iter().sum()
        };
        let numeric: Vec<f64> = (0..base.len())
            .map(|at| {
                let near = loss(at, STEP) - loss(at, -STEP);
                let far = loss(at, 2.0 * STEP) - loss(at, -2.0 * STEP);
                (8.0 * near - far) / (12.0 * STEP)
            })
            .collect();
        let numeric = Tensor::from_vec(numeric, x.dims(), &Device::Cpu).unwrap();
        let error = relative_error(&gradients[i], &numeric);
        assert!(error < bar, "{what}: gradient of input {i} is off by {error:.2e}");
        worst = worst.max(error);
    }
    println!("{what:44} {worst:.1e}");
}

fn conv_of(stride: usize, padding: usize) -> impl Fn(&[Tensor]) -> Result<Tensor> {
    move |x| {
        let (weight, bias) = (x[1].clone(), x.get(2).cloned());
        let adapter =
            x.get(3).map(|down| LowRank { down: down.clone(), up: x[4].clone(), scale: 0.7 });
        Conv2d { weight, bias, stride, padding, adapter }.forward(&x[0])
    }
}

#[test]
fn convolutions() {
    for (x, w, stride, padding) in [
        ([2, 3, 5, 7], [4, 3, 3, 3], 1, 1),
        ([2, 3, 5, 7], [4, 3, 3, 3], 2, 1),
        ([1, 2, 6, 4], [3, 2, 3, 3], 2, 1),
        ([2, 3, 6, 5], [2, 3, 3, 3], 2, 0),
        ([1, 2, 4, 6], [3, 2, 3, 3], 1, 0),
        ([2, 5, 3, 4], [4, 5, 1, 1], 1, 0),
        ([1, 3, 5, 4], [2, 3, 1, 1], 2, 0),
        ([1, 2, 4, 5], [3, 2, 1, 3], 1, 1),
        ([1, 2, 8, 8], [3, 2, 4, 4], 4, 0),
        ([2, 2, 1, 1], [3, 2, 3, 3], 1, 1),
        ([1, 2, 1, 6], [3, 2, 3, 3], 2, 1),
        // Enough images for the path that spreads them over threads.
        ([9, 2, 3, 4], [2, 2, 3, 3], 1, 1),
    ] {
        let name = format!("conv {x:?} * {w:?} s{stride} p{padding}");
        let inputs = [normal(1, &x), normal(2, &w)];
        check(&name, BAR, &inputs, &conv_of(stride, padding));
        let inputs = [normal(1, &x), normal(2, &w), normal(3, &[w[0]])];
        check(&format!("{name} bias"), BAR, &inputs, &conv_of(stride, padding));
    }
    for (w, stride, padding) in [([4, 3, 3, 3], 1, 1), ([4, 3, 3, 3], 2, 1), ([4, 3, 1, 1], 1, 0)] {
        let down = [2, w[1], w[2], w[3]];
        let shapes: [&[usize]; 5] = [&[2, 3, 5, 4], &w, &[4], &down, &[4, 2, 1, 1]];
        let inputs: Vec<Tensor> = (0..).zip(shapes).map(|(i, s)| normal(i, s)).collect();
        check(&format!("conv {w:?} s{stride} adapter"), BAR, &inputs, &conv_of(stride, padding));
    }
    // A transposed input, and a gradient that arrives transposed.
    let inputs = [normal(1, &[2, 3, 5, 4]), normal(2, &[4, 3, 3, 3])];
    check("conv between transpositions", BAR, &inputs, &|x| {
        conv2d(&x[0].transpose(2, 3)?, &x[1], 1, 1)?.transpose(1, 3)
    });
    let inputs = [normal(1, &[2, 3, 5, 4]), normal(2, &[3, 3, 3, 3])];
    check("conv with a transposed weight", BAR, &inputs, &|x| {
        conv2d(&x[0], &x[1].transpose(0, 1)?, 1, 1)
    });
}

#[test]
fn linears() {
    let linear = |x: &[Tensor], bias: Option<usize>, adapter: Option<usize>| Linear {
        weight: x[1].clone(),
        bias: bias.map(|i| x[i].clone()),
        adapter: adapter.map(|i| LowRank { down: x[i].clone(), up: x[i + 1].clone(), scale: 1.5 }),
    };
    let (w, b, down, up) =
        (normal(2, &[4, 5]), normal(3, &[4]), normal(4, &[2, 5]), normal(5, &[4, 2]));
    let xs: [&[usize]; 4] = [&[3, 5], &[2, 3, 5], &[1, 5], &[2, 2, 3, 5]];
    for dims in xs {
        let x = normal(1, dims);
        check(&format!("linear {dims:?}"), BAR, &[x.clone(), w.clone()], &|x| {
            linear(x, None, None).forward(&x[0])
        });
        check(&format!("linear {dims:?} bias"), BAR, &[x.clone(), w.clone(), b.clone()], &|x| {
            linear(x, Some(2), None).forward(&x[0])
        });
        let inputs = [x.clone(), w.clone(), down.clone(), up.clone()];
        check(&format!("linear {dims:?} adapter"), BAR, &inputs, &|x| {
            linear(x, None, Some(2)).forward(&x[0])
        });
        let inputs = [x, w.clone(), b.clone(), down.clone(), up.clone()];
        check(&format!("linear {dims:?} bias adapter"), BAR, &inputs, &|x| {
            linear(x, Some(2), Some(3)).forward(&x[0])
        });
    }
    let inputs = [normal(1, &[2, 5, 3]), w, b];
    check("linear transposed input", BAR, &inputs, &|x| {
        linear(x, Some(2), None).forward(&x[0].transpose(1, 2)?)
    });
}

#[test]
fn norms() {
    for (dims, groups) in [
        (vec![2, 6, 3, 5], 3),
        (vec![2, 4, 1, 1], 2),
        (vec![3, 4, 7], 4),
        (vec![1, 6, 2, 2], 1),
        (vec![2, 8], 2),
    ] {
        let channels = dims[1];
        let inputs = [normal(1, &dims), normal(2, &[channels]), normal(3, &[channels])];
        let norm = |x: &[Tensor]| GroupNorm {
            groups,
            eps: 1e-5,
            weight: x[1].clone(),
            bias: x[2].clone(),
        };
        let name = format!("group norm {dims:?} / {groups}");
        check(&name, BAR, &inputs, &|x| norm(x).forward(&x[0]));
        check(&format!("{name} silu"), BAR, &inputs, &|x| norm(x).forward_silu(&x[0]));
        if dims.len() == 4 {
            check(&format!("{name} transposed"), BAR, &inputs, &|x| {
                norm(x).forward_silu(&x[0].transpose(2, 3)?)?.transpose(1, 2)
            });
        }
    }
    for dims in [vec![3, 5], vec![2, 3, 6]] {
        let width = dims[dims.len() - 1];
        let inputs = [normal(1, &dims), normal(2, &[width]), normal(3, &[width])];
        check(&format!("layer norm {dims:?}"), BAR, &inputs, &|x| {
            LayerNorm { eps: 1e-5, weight: x[1].clone(), bias: x[2].clone() }.forward(&x[0])
        });
    }
    let inputs = [normal(1, &[2, 6, 3]), normal(2, &[6]), normal(3, &[6])];
    check("layer norm transposed", BAR, &inputs, &|x| {
        let x0 = x[0].transpose(1, 2)?;
        LayerNorm { eps: 1e-5, weight: x[1].clone(), bias: x[2].clone() }.forward(&x0)
    });
}

#[test]
fn softmax_and_attention() {
    check("softmax", BAR, &[normal(1, &[3, 7])], &|x| softmax(&x[0]));
    check("softmax 4-D transposed", BAR, &[normal(1, &[2, 2, 5, 3])], &|x| {
        softmax(&x[0].transpose(2, 3)?)?.transpose(1, 2)
    });
    check("softmax of one value", BAR, &[normal(1, &[4, 3])], &|x| {
        softmax(&x[0].reshape((4, 3, 1))?)?.reshape((4, 3))? * &x[0]
    });
    let causal = |n: usize, m: usize| {
        let mask = (0..n * m).map(|i| if i % m > i / m { f64::NEG_INFINITY } else { 0.0 });
        Tensor::from_vec(mask.collect(), (n, m), &Device::Cpu).unwrap()
    };
    for (targets, sources, width, heads) in
        [(4, 4, 6, 1), (4, 4, 6, 3), (5, 3, 4, 2), (1, 7, 4, 4), (6, 1, 4, 2)]
    {
        let q = normal(1, &[2, targets, width]);
        let (k, v) = (normal(2, &[2, sources, width]), normal(3, &[2, sources, width]));
        let inputs = [q.clone(), k, v];
        let name = format!("attention {targets} on {sources}, {heads} heads");
        check(&name, BAR, &inputs, &|x| attention(&x[0], &x[1], &x[2], heads, None));
        let mask = causal(targets, sources);
        check(&format!("{name}, causal"), BAR, &inputs, &|x| {
            attention(&x[0], &x[1], &x[2], heads, Some(&mask))
        });
        // Two queries at a time, and one at a time.
        for scores in [2 * 2 * heads * sources, 1] {
            check(&format!("{name}, causal, {scores} scores"), BAR, &inputs, &|x| {
                attention_in_slices(&x[0], &x[1], &x[2], heads, Some(&mask), scores)
            });
        }
        check(&format!("{name}, q = k"), BAR, &[q], &|x| {
            attention(&x[0], &x[0], &x[0], heads, None)
        });
    }
}

#[test]
fn activations() {
    let x = (normal(1, &[4, 9]) * 3.0).unwrap();
    check("silu", BAR, std::slice::from_ref(&x), &|x| Activation::Silu.forward(&x[0]));
    check("quick gelu", BAR, std::slice::from_ref(&x), &|x| Activation::QuickGelu.forward(&x[0]));
    check("gelu", GELU_BAR, std::slice::from_ref(&x), &|x| Activation::Gelu.forward(&x[0]));
    check("silu transposed", BAR, &[x], &|x| Activation::Silu.forward(&x[0].t()?)?.t());
}

#[test]
fn resampling_and_embedding() {
    let x = normal(1, &[2, 3, 3, 4]);
    for (height, width) in [(6, 8), (5, 7), (6, 7), (3, 4), (2, 3), (6, 4)] {
        check(&format!("nearest 3x4 to {height}x{width}"), BAR, std::slice::from_ref(&x), &|x| {
            nearest(&x[0], height, width)
        });
        // candle's own operation loses one of the two gradients here, by order of use.
        check(
            &format!("nearest to {height}x{width}, two consumers"),
            BAR,
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
        check(&format!("sinusoidal {dim} flip {flip} shift {shift}"), BAR, &[t], &|x| {
            sinusoidal(&x[0], dim, flip, shift)
        });
    }
}

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

/// Half precision takes the composed operations; they must agree with the fused ones.
#[test]
fn the_composed_path_equals_the_fused_one() {
    let half = |x: &Tensor| x.to_dtype(DType::F16).unwrap();
    let compare = |what: &str, inputs: &[Tensor], f: Layer| {
        let rounded: Vec<Tensor> = inputs.iter().map(half).collect();
        let single: Vec<Tensor> = rounded.iter().map(|x| x.to_dtype(DType::F32).unwrap()).collect();
        let error = relative_error(&f(&rounded).unwrap(), &f(&single).unwrap());
        assert!(error < 2e-3, "{what}: values differ by {error:.1e}");
        let (fused, composed) = (analytic(&single, f).0, analytic(&rounded, f).0);
        let mut worst = 0.0_f64;
        for (i, (fused, composed)) in fused.iter().zip(&composed).enumerate() {
            let error = relative_error(composed, fused);
            assert!(error < 1e-2, "{what}: gradient {i} differs by {error:.1e}");
            worst = worst.max(error);
        }
        println!("{what:24} values {error:.1e} gradients {worst:.1e}");
    };
    let image = normal(1, &[2, 4, 5, 6]);
    let affine = [image.clone(), normal(2, &[4]), normal(3, &[4])];
    let norm =
        |x: &[Tensor]| GroupNorm { groups: 2, eps: 1e-5, weight: x[1].clone(), bias: x[2].clone() };
    compare("group norm", &affine, &|x| norm(x).forward(&x[0]));
    compare("group norm silu", &affine, &|x| norm(x).forward_silu(&x[0]));
    let rows = [normal(1, &[2, 3, 6]), normal(2, &[6]), normal(3, &[6])];
    compare("layer norm", &rows, &|x| {
        LayerNorm { eps: 1e-5, weight: x[1].clone(), bias: x[2].clone() }.forward(&x[0])
    });
    compare("softmax", &[normal(1, &[3, 7])], &|x| softmax(&x[0]));
    let x = (normal(1, &[40]) * 3.0).unwrap();
    for activation in [Activation::Silu, Activation::QuickGelu, Activation::Gelu] {
        compare(&format!("{activation:?}"), std::slice::from_ref(&x), &|x| {
            activation.forward(&x[0])
        });
    }
    let conv = [image, normal(2, &[3, 4, 3, 3]), normal(3, &[3])];
    compare("conv", &conv, &conv_of(1, 1));
    compare("conv s2", &conv, &conv_of(2, 1));
    let q = [normal(1, &[2, 4, 6]), normal(2, &[2, 5, 6]), normal(3, &[2, 5, 6])];
    compare("attention", &q, &|x| attention(&x[0], &x[1], &x[2], 2, None));
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
    }
    let scores = Tensor::new(&[[3e38_f32, -3e38, 0.0], [-1e4, -1e4, -1e4]], &Device::Cpu).unwrap();
    let p = softmax(&scores).unwrap().to_vec2::<f32>().unwrap();
    assert!((p[0][0] - 1.0).abs() < 1e-6 && p[0][1] < 1e-30 && p[0][2] < 1e-30, "{p:?}");
    assert!(p[1].iter().all(|v| (v - 1.0 / 3.0).abs() < 1e-6), "{p:?}");
}

/// f32 layers on strided inputs and on batches give what single, dense inputs give.
#[test]
fn layout_and_batch_do_not_matter() {
    let f32 = |x: Tensor| x.to_dtype(DType::F32).unwrap();
    let of = |seed, shape: &[usize]| f32(normal(seed, shape));
    let conv = Conv2d {
        weight: of(2, &[5, 6, 3, 3]),
        bias: Some(of(3, &[5])),
        stride: 1,
        padding: 1,
        adapter: None,
    };
    let linear = Linear { weight: of(4, &[7, 6]), bias: Some(of(5, &[7])), adapter: None };
    let group = GroupNorm { groups: 3, eps: 1e-5, weight: of(6, &[6]), bias: of(7, &[6]) };
    let layer = LayerNorm { eps: 1e-5, weight: of(6, &[6]), bias: of(7, &[6]) };
    let layers: [(&str, &[usize], Layer); 8] = [
        ("conv", &[4, 6, 5, 4], &|x| conv.forward(&x[0])),
        ("linear", &[4, 5, 6], &|x| linear.forward(&x[0])),
        ("group norm", &[4, 6, 5, 4], &|x| group.forward(&x[0])),
        ("group norm silu", &[4, 6, 5, 4], &|x| group.forward_silu(&x[0])),
        ("layer norm", &[4, 5, 6], &|x| layer.forward(&x[0])),
        ("softmax", &[4, 5, 6], &|x| softmax(&x[0])),
        ("silu", &[4, 5, 6], &|x| Activation::Silu.forward(&x[0])),
        ("attention", &[4, 5, 6], &|x| attention(&x[0], &x[0], &x[0], 2, None)),
    ];
    for (name, shape, f) in layers {
        let x = of(1, shape);
        let last = shape.len() - 1;
        let strided = x.transpose(last, last - 1).unwrap().contiguous().unwrap();
        let strided = strided.transpose(last, last - 1).unwrap();
        assert!(!strided.is_contiguous());
        let (dense, y) = (f(std::slice::from_ref(&x)).unwrap(), f(&[strided]).unwrap());
        assert_eq!(values(&dense), values(&y), "{name}: a strided input matters");
        // A view into the middle of a larger tensor.
        let padded = Tensor::cat(&[&x, &x, &x], 0).unwrap().narrow(0, 4, 4).unwrap();
        assert_eq!(values(&dense), values(&f(&[padded]).unwrap()), "{name}: an offset matters");
        for b in 0..4 {
            let one = f(&[x.narrow(0, b, 1).unwrap()]).unwrap();
            let error = relative_error(&one, &dense.narrow(0, b, 1).unwrap());
            assert!(error < 1e-6, "{name}: sample {b} alone differs by {error:.1e}");
        }
    }
}

/// Large enough for the paths that use several threads.
#[test]
fn large_inputs_give_what_small_ones_give() {
    let f32 = |x: Tensor| x.to_dtype(DType::F32).unwrap();
    let x = f32(normal(1, &[8, 8, 32, 32]));
    let group = GroupNorm {
        groups: 4,
        eps: 1e-5,
        weight: f32(normal(2, &[8])),
        bias: f32(normal(3, &[8])),
    };
    let conv = Conv2d {
        weight: f32(normal(4, &[8, 8, 3, 3])),
        bias: None,
        stride: 1,
        padding: 1,
        adapter: None,
    };
    let layers: [(&str, Layer); 4] = [
        ("group norm silu", &|x| group.forward_silu(&x[0])),
        ("conv", &|x| conv.forward(&x[0])),
        ("softmax", &|x| softmax(&x[0])),
        ("quick gelu", &|x| Activation::QuickGelu.forward(&x[0])),
    ];
    for (name, f) in layers {
        let (all, wide) =
            (f(std::slice::from_ref(&x)).unwrap(), f(&[x.to_dtype(DType::F64).unwrap()]));
        if name != "group norm silu" && name != "conv" {
            let error = relative_error(&all, &wide.unwrap());
            assert!(error < 1e-6, "{name}: f32 differs from f64 by {error:.1e}");
        }
        let parts: Vec<Tensor> =
            (0..8).map(|b| f(&[x.narrow(0, b, 1).unwrap()]).unwrap()).collect();
        let error = relative_error(&Tensor::cat(&parts, 0).unwrap(), &all);
        assert!(error < 1e-6, "{name}: in parts differs by {error:.1e}");
        let whole = analytic(std::slice::from_ref(&x), f).0.remove(0);
        let weights = normal(4321, all.dims()).to_dtype(DType::F32).unwrap();
        let var = Var::from_tensor(&x.narrow(0, 5, 1).unwrap().contiguous().unwrap()).unwrap();
        let loss =
            (f(&[var.as_tensor().clone()]).unwrap() * weights.narrow(0, 5, 1).unwrap()).unwrap();
        let grads = loss.sum_all().unwrap().backward().unwrap();
        let error = relative_error(grads.get(&var).unwrap(), &whole.narrow(0, 5, 1).unwrap());
        assert!(error < 1e-5, "{name}: gradient of one sample differs by {error:.1e}");
    }
}

#[test]
fn the_f32_exponential_is_within_two_units() {
    let mut worst = 0.0_f64;
    let mut x = -87.0_f32;
    while x <= 88.0 {
        let exact = f64::from(x).exp();
        worst = worst.max((f64::from(x.exponential()) - exact).abs() / exact);
        x += 0.000_37;
    }
    println!("f32 exponential: worst relative error {worst:.2e}");
    assert!(worst < 2.0 * f64::from(f32::EPSILON), "{worst:.2e}");
    assert_eq!(0.0_f32.exponential(), 1.0);
    assert!(f32::NAN.exponential().is_nan());
    assert!(f32::NEG_INFINITY.exponential() < 1.3e-38);
    assert!(f32::INFINITY.exponential() > 1e38);
    for x in [-200.0_f32, -3.5, 0.0, 0.1, 9.0, 200.0] {
        let exact = 1.0 / (1.0 + (-f64::from(x)).exp());
        assert!((f64::from(sigmoid(x)) - exact).abs() < 1e-6, "sigmoid({x})");
    }
}

/// Each of a layer's tensors gets a gradient if and only if it is tracked.
#[test]
fn gradients_are_absent_only_for_what_is_not_tracked() {
    let cases: [(&str, Vec<Tensor>, Layer); 6] = [
        (
            "conv",
            vec![normal(1, &[2, 3, 4, 5]), normal(2, &[4, 3, 3, 3]), normal(3, &[4])],
            &conv_of(1, 1),
        ),
        (
            "conv adapter",
            vec![
                normal(1, &[2, 3, 4, 5]),
                normal(2, &[4, 3, 3, 3]),
                normal(3, &[4]),
                normal(4, &[2, 3, 3, 3]),
                normal(5, &[4, 2, 1, 1]),
            ],
            &conv_of(2, 1),
        ),
        ("linear", vec![normal(1, &[2, 3, 4]), normal(2, &[5, 4]), normal(3, &[5])], &|x| {
            Linear { weight: x[1].clone(), bias: Some(x[2].clone()), adapter: None }.forward(&x[0])
        }),
        ("group norm", vec![normal(1, &[2, 4, 3]), normal(2, &[4]), normal(3, &[4])], &|x| {
            let norm = GroupNorm { groups: 2, eps: 1e-5, weight: x[1].clone(), bias: x[2].clone() };
            norm.forward_silu(&x[0])
        }),
        ("layer norm", vec![normal(1, &[2, 4]), normal(2, &[4]), normal(3, &[4])], &|x| {
            LayerNorm { eps: 1e-5, weight: x[1].clone(), bias: x[2].clone() }.forward(&x[0])
        }),
        ("attention", (1..4).map(|i| normal(i, &[2, 3, 4])).collect(), &|x| {
            attention(&x[0], &x[1], &x[2], 2, None)
        }),
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
