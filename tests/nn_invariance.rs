//! What the layers' values and gradients may not depend on: instruction sets, threads, the
//! batch, the layout, packing and, but for rounding, the type.

mod common;

use candle_core::{Result, Tensor, Var};
use common::layers::{
    analytic, causal, conv, conv_of, conv_with_all, f32, f64, gradients, group_norm, late,
    layer_norm, linear, normals, worst,
};
use common::{normal, relative_error, values};
use diffusion_sharpening::nn::autograd::no_grad;
use diffusion_sharpening::nn::conv::Padding;
use diffusion_sharpening::nn::simd::Level;
use diffusion_sharpening::nn::{Activation, Added, Conv2d, Linear, LowRank, attention, geglu};

const BELOW: Padding = Padding { before: 0, after: 1 };

type Shared = dyn Fn(&[Tensor]) -> Result<Tensor> + Sync;

struct Case {
    name: &'static str,
    /// In f64.
    inputs: Vec<Tensor>,
    /// Inputs with a sample of the batch in every place of their first dimension.
    samples: &'static [usize],
    /// Of products and sums alone, which all vector instructions compute alike.
    products: bool,
    /// Whether rows of the first input stand for themselves.
    rows: bool,
    layer: Box<Shared>,
}

fn case(
    name: &'static str,
    shapes: &[&[usize]],
    samples: &'static [usize],
    layer: impl Fn(&[Tensor]) -> Result<Tensor> + Sync + 'static,
) -> Case {
    let (products, rows, layer) = (false, false, Box::new(layer));
    Case { name, inputs: normals(shapes), samples, products, rows, layer }
}

/// Batches of three of every layer, most of them large enough for more than one thread and for
/// more than one piece of what is summed.
fn cases() -> Vec<Case> {
    let image: &[usize] = &[3, 9, 7, 50];
    let weights: [&[usize]; 5] = [image, &[40, 50, 3, 3], &[40], &[4, 50, 3, 3], &[40, 4, 1, 1]];
    let all = [&weights[..], &[&[3, 40], &[3, 9, 7, 40]]].concat();
    let few: [&[usize]; 3] = [image, &[31, 50, 3, 3], &[31]];
    let wide: [&[usize]; 5] =
        [&[3, 8, 11, 33], &[48, 33, 3, 3], &[48], &[34, 33, 3, 3], &[48, 34, 1, 1]];
    let wide = [&wide[..], &[&[3, 48], &[3, 8, 11, 48]]].concat();
    let rows: [&[usize]; 6] = [&[3, 20, 400], &[70, 400], &[70], &[4, 400], &[70, 4], &[3, 20, 70]];
    let norm: [&[usize]; 3] = [&[3, 20, 15, 48], &[48], &[48]];
    let causal = f32(&causal(20, 400));
    let late = f32(&late(110, 400, 390));
    vec![
        case("linear", &rows[..3], &[0], |x| linear(x).forward(&x[0])).rows().products(),
        case("linear, small", &[&[3, 5, 6], &[7, 6]], &[0], |x| linear(x).forward(&x[0]))
            .rows()
            .products(),
        case("linear residual", &[rows[0], rows[1], rows[5]], &[0, 2], |x| {
            linear(&x[..2]).forward_onto(&x[0], &x[2])
        })
        .products(),
        case("linear adapter", &rows[..5], &[0], |x| linear(x).forward(&x[0])).rows(),
        case("linear adapter residual", &rows, &[0, 5], |x| {
            linear(&x[..5]).forward_onto(&x[0], &x[5])
        }),
        case("conv", &weights[..3], &[0], conv_of(1, 1)).products(),
        case("conv, small", &[&[3, 5, 4, 6], &[5, 6, 3, 3]], &[0], conv_of(1, 1)).products(),
        case("conv, few outputs", &few, &[0], conv_of(1, 1)).products(),
        case("conv, tiny", &[&[3, 2, 3, 32], &[32, 32, 3, 3]], &[0], conv_of(1, 1)).products(),
        case("conv, many tiles", &[&[3, 24, 25, 32], &[33, 32, 3, 3]], &[0], conv_of(1, 1))
            .products(),
        case("conv, many inputs", &[&[3, 7, 8, 400], &[32, 400, 3, 3]], &[0], conv_of(1, 1))
            .products(),
        case("conv, many outputs", &[&[3, 8, 7, 32], &[400, 32, 3, 3]], &[0], conv_of(1, 1))
            .products(),
        case("conv s2", &weights[..3], &[0], conv_of(2, BELOW)).products(),
        case("conv 1x1 residual", &[image, &[9, 50, 1, 1], &[3, 9, 7, 9]], &[0, 2], |x| {
            let added = Added { shift: None, residual: Some(&x[2]) };
            conv(&x[..2], 1, 0).forward_added(&x[0], added)
        })
        .products(),
        case("conv enlarged", &weights[..3], &[0], |x| {
            conv(x, 1, 1).forward_enlarged(&x[0], (18, 14))
        })
        .products(),
        case("conv enlarged, odd", &weights[..3], &[0], |x| {
            conv(x, 1, 1).forward_enlarged(&x[0], (17, 15))
        })
        .products(),
        case("conv enlarged, few outputs", &few, &[0], |x| {
            conv(x, 1, 1).forward_enlarged(&x[0], (17, 14))
        })
        .products(),
        case("conv wide adapter, shift and residual", &wide, &[0, 5, 6], |x| {
            conv_with_all(x, 1, 1)
        }),
        case("conv adapter, shift and residual", &all, &[0, 5, 6], |x| conv_with_all(x, 1, 1)),
        case("group norm", &norm, &[0], |x| group_norm(x, 6).forward(&x[0])),
        case("group norm, small", &[&[3, 5, 4, 6], &[6], &[6]], &[0], |x| {
            group_norm(x, 3).forward(&x[0])
        }),
        case("group norm silu", &norm, &[0], |x| group_norm(x, 6).forward_silu(&x[0])),
        case("layer norm", &[&[3, 200, 60], &[60], &[60]], &[0], |x| layer_norm(x).forward(&x[0]))
            .rows(),
        case("layer norm, small", &[&[3, 5, 6], &[6], &[6]], &[0], |x| {
            layer_norm(x).forward(&x[0])
        })
        .rows(),
        case("geglu", &[&[3, 150, 160]], &[0], |x| geglu(&x[0])).rows(),
        case("geglu, small", &[&[3, 5, 14]], &[0], |x| geglu(&x[0])).rows(),
        case("silu", &[&[3, 120, 101]], &[0], |x| Activation::Silu.forward(&x[0])).rows(),
        case("quick gelu", &[&[3, 120, 101]], &[0], |x| Activation::QuickGelu.forward(&x[0]))
            .rows(),
        case("gelu", &[&[3, 120, 101]], &[0], |x| Activation::Gelu.forward(&x[0])).rows(),
        attending("attention", [25, 30], 24, 3, None).rows(),
        attending("attention, one head", [120, 120], 24, 1, None).rows(),
        attending("attention, two tiles", [14, 400], 16, 2, None).rows(),
        attending("attention, causal", [20, 400], 16, 2, Some(causal)),
        attending("attention, late", [110, 400], 8, 2, Some(late)),
        attending("attention, wide", [4, 5], 800, 2, None).rows(),
    ]
}

fn attending(
    name: &'static str,
    [targets, sources]: [usize; 2],
    width: usize,
    heads: usize,
    mask: Option<Tensor>,
) -> Case {
    let shapes: [&[usize]; 3] = [&[3, targets, width], &[3, sources, width], &[3, sources, width]];
    case(name, &shapes, &[0, 1, 2], move |x| attention(&x[0], &x[1], &x[2], heads, mask.as_ref()))
}

impl Case {
    fn products(self) -> Self {
        Self { products: true, ..self }
    }

    fn rows(self) -> Self {
        Self { rows: true, ..self }
    }

    fn single(&self) -> Vec<Tensor> {
        self.inputs.iter().map(f32).collect()
    }

    /// Values without a graph, which packs weights, then gradients.
    fn outcome(&self, inputs: &[Tensor]) -> Vec<Tensor> {
        let mut all = vec![(self.layer)(inputs).unwrap()];
        all.extend(analytic(inputs, &self.layer).0);
        all
    }
}

fn same(a: &Tensor, b: &Tensor) -> bool {
    a.dims() == b.dims() && values(a) == values(b)
}

#[test]
fn instruction_sets_agree() {
    for case in cases() {
        let inputs = case.single();
        let at = |level: &Level| (*level, level.run(|| case.outcome(&inputs)));
        let all: Vec<_> = Level::supported().iter().map(at).collect();
        for (level, outcome) in &all[1..] {
            let error = worst(outcome, &all[0].1);
            println!("{:36} {level:?} {error:.1e}", case.name);
            assert!(error < 1e-5, "{}: {level:?} differs by {error:.1e}", case.name);
        }
        for pair in all[1..].windows(2) {
            let equal = pair[0].1.iter().zip(&pair[1].1).all(|(a, b)| same(a, b));
            println!("{:36} vectors are equal: {equal}", case.name);
            assert!(equal || !case.products, "{}: {:?} differs", case.name, pair[1].0);
        }
    }
}

#[test]
fn threads_do_not_matter() {
    let pools = [1, 2, 3].map(|n| rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap());
    for case in cases() {
        let inputs = case.single();
        let [one, two, three] = pools.each_ref().map(|p| p.install(|| case.outcome(&inputs)));
        for (i, one) in one.iter().enumerate() {
            let equal = same(one, &two[i]) && same(one, &three[i]);
            assert!(equal, "{}: result {i} depends on the number of threads", case.name);
        }
    }
}

#[test]
fn single_precision_is_close_to_double() {
    for case in cases() {
        let (single, double) = (case.outcome(&case.single()), case.outcome(&case.inputs));
        let error = worst(&single[..1], &double[..1]);
        let gradients = worst(&single[1..], &double[1..]);
        println!("{:36} {error:.1e} gradients {gradients:.1e}", case.name);
        assert!(error < 1e-6, "{}: f32 values differ from f64 by {error:.1e}", case.name);
        assert!(gradients < 1e-6, "{}: f32 gradients differ by {gradients:.1e}", case.name);
    }
}

/// Values and the samples' gradients, bit for bit.
#[test]
fn a_sample_alone_is_the_same_as_in_a_batch() {
    for case in cases() {
        let inputs = case.single();
        let whole = (case.layer)(&inputs).unwrap();
        let weights = f32(&normal(4321, whole.dims()));
        let all = gradients(&inputs, &weights, &case.layer);
        for b in 0..3 {
            let one = |x: &Tensor| x.narrow(0, b, 1).unwrap().contiguous().unwrap();
            let mut alone = inputs.clone();
            case.samples.iter().for_each(|i| alone[*i] = one(&inputs[*i]));
            let y = (case.layer)(&alone).unwrap();
            assert!(same(&y, &one(&whole)), "{}: sample {b} depends on others", case.name);
            let found = gradients(&alone, &one(&weights), &case.layer);
            for i in case.samples {
                let equal = same(&found[*i], &one(&all[*i]));
                assert!(equal, "{}: gradient {i} of sample {b} depends on others", case.name);
            }
        }
    }
}

#[test]
fn a_row_alone_is_the_same_as_among_others() {
    for case in cases().into_iter().filter(|c| c.rows) {
        let mut inputs = case.single();
        let whole = (case.layer)(&inputs).unwrap();
        let x = inputs[0].clone();
        for row in 0..x.dim(1).unwrap() {
            let one = |x: &Tensor| x.narrow(1, row, 1).unwrap();
            inputs[0] = one(&x);
            let y = (case.layer)(&inputs).unwrap();
            assert!(same(&y, &one(&whole)), "{}: row {row} depends on others", case.name);
        }
    }
}

#[test]
fn the_layout_does_not_matter() {
    for case in cases() {
        let inputs = case.single();
        let dense = (case.layer)(&inputs).unwrap();
        for (i, x) in inputs.iter().enumerate() {
            let with = |x: Tensor| {
                let mut all = inputs.clone();
                all[i] = x;
                (case.layer)(&all).unwrap()
            };
            for axis in 0..x.rank() - 1 {
                let strided = x.transpose(axis, axis + 1).unwrap().contiguous().unwrap();
                let strided = strided.transpose(axis, axis + 1).unwrap();
                let equal = same(&with(strided), &dense);
                assert!(equal, "{}: strides of axis {axis} of input {i} matter", case.name);
            }
            // A view into the middle of a larger tensor.
            let n = x.dim(0).unwrap();
            let padded = Tensor::cat(&[x, x, x], 0).unwrap().narrow(0, n, n).unwrap();
            assert!(same(&with(padded), &dense), "{}: an offset of input {i} matters", case.name);
        }
    }
}

#[test]
fn without_gradients_variables_give_constants_of_the_same_values() {
    for case in cases() {
        let vars: Vec<Var> = case.single().iter().map(|x| Var::from_tensor(x).unwrap()).collect();
        let inputs: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
        let tracked = (case.layer)(&inputs).unwrap();
        assert!(tracked.track_op(), "{}", case.name);
        let constant = no_grad(|| (case.layer)(&inputs)).unwrap();
        assert!(!constant.track_op(), "{}: a graph is kept", case.name);
        assert!(same(&constant, &tracked), "{}: other values without gradients", case.name);
        assert!((case.layer)(&inputs).unwrap().track_op(), "{}: stays off", case.name);
    }
    let x = Var::from_tensor(&normal(1, &[3])).unwrap();
    let unwound = std::panic::catch_unwind(|| no_grad(|| std::panic::resume_unwind(Box::new(()))));
    assert!(unwound.is_err() && Activation::Silu.forward(&x).unwrap().track_op());
}

type Made = Box<dyn Fn(&Tensor) -> Result<Tensor>>;

#[test]
fn packed_weights_give_what_plain_ones_give() {
    let conv = |stride, padding: Padding, size: Option<(usize, usize)>| {
        move |weight: Tensor, adapter: Option<LowRank>| -> Made {
            let bias = f32(&normal(3, &[weight.dim(0).unwrap()]));
            let conv = Conv2d::new(weight, Some(bias), stride, padding, adapter);
            Box::new(move |x| match size {
                Some(size) => conv.forward_enlarged(x, size),
                // Clones share the packed form.
                None => conv.clone().forward(x),
            })
        }
    };
    let linear = |weight: Tensor, adapter: Option<LowRank>| -> Made {
        let linear = Linear::new(weight, None, adapter);
        Box::new(move |x| linear.forward(x))
    };
    type Make<'a> = &'a dyn Fn(Tensor, Option<LowRank>) -> Made;
    let cases: [(&str, &[usize], &[usize], Make); 10] = [
        ("linear", &[2, 30, 400], &[70, 400], &linear),
        ("linear, small", &[5, 6], &[7, 6], &linear),
        ("conv", &[2, 9, 7, 50], &[40, 50, 3, 3], &conv(1, 1.into(), None)),
        ("conv, small", &[1, 4, 3, 2], &[3, 2, 3, 3], &conv(1, 1.into(), None)),
        ("conv, few outputs", &[2, 9, 7, 50], &[31, 50, 3, 3], &conv(1, 1.into(), None)),
        ("conv, many inputs", &[2, 7, 8, 400], &[33, 400, 3, 3], &conv(1, 1.into(), None)),
        ("conv, many tiles", &[1, 24, 11, 32], &[64, 32, 3, 3], &conv(1, 1.into(), None)),
        ("conv s2", &[2, 8, 6, 50], &[40, 50, 3, 3], &conv(2, BELOW, None)),
        ("conv 1x1", &[2, 9, 7, 50], &[40, 50, 1, 1], &conv(1, 0.into(), None)),
        ("conv enlarged", &[2, 5, 4, 50], &[40, 50, 3, 3], &conv(1, 1.into(), Some((10, 7)))),
    ];
    for (name, x, weight, make) in cases {
        let (x, of) = (f32(&normal(1, x)), |seed, shape: &[usize]| f32(&normal(seed, shape)));
        let (mut down, mut up) = (weight.to_vec(), vec![1; weight.len()]);
        (down[0], up[0], up[1]) = (4, weight[0], 4);
        let (w, down, up) = (of(2, weight), of(4, &down), of(5, &up));
        let var = |x: &Tensor| Var::from_tensor(x).unwrap().as_tensor().clone();
        let adapter = || Some(LowRank { down: down.clone(), up: up.clone(), scale: 0.3 });
        let learnt = || Some(LowRank { down: var(&down), up: var(&up), scale: 0.3 });

        let plain = make(var(&w), None)(&x).unwrap();
        assert!(plain.track_op());
        let layer = make(w.clone(), None);
        let (first, second) = (layer(&x).unwrap(), layer(&x).unwrap());
        assert!(same(&first, &second), "{name}: the second call differs");
        assert!(same(&first, &plain), "{name}: packed weights differ");
        let tracked = layer(&var(&x)).unwrap();
        assert!(tracked.track_op() && same(&tracked, &plain), "{name}: tracked differs");
        // The gradient of the input from a packed weight, twice, and from a plain one.
        let weights = f32(&normal(6, plain.dims()));
        let gradient = |layer: &Made| {
            gradients(std::slice::from_ref(&x), &weights, &|x| layer(&x[0])).remove(0)
        };
        let (first, second) = (gradient(&layer), gradient(&layer));
        assert!(same(&first, &second), "{name}: the second gradient differs");
        let plain_gradient = gradient(&make(var(&w), None));
        assert!(same(&first, &plain_gradient), "{name}: packed weights' gradient differs");

        let plain = make(var(&w), adapter())(&x).unwrap();
        let layer = make(w.clone(), adapter());
        let before = layer(&var(&x)).unwrap();
        assert!(before.track_op());
        let (first, second) = (layer(&x).unwrap(), layer(&x).unwrap());
        assert!(same(&first, &second), "{name}: the second call with an adapter differs");
        let error = relative_error(&first, &plain).max(relative_error(&before, &plain));
        println!("{name:24} merged adapter {error:.1e}");
        assert!(error < 2e-6, "{name}: a merged adapter differs by {error:.1e}");

        // An adapter that is being trained stays out of the packed weight.
        let layer = make(w.clone(), learnt());
        let (first, second) = (no_grad(|| layer(&x)).unwrap(), no_grad(|| layer(&x)).unwrap());
        assert!(same(&first, &plain) && same(&second, &plain), "{name}: a learnt adapter differs");
        let tracked = layer(&x).unwrap();
        assert!(tracked.track_op() && same(&tracked, &plain), "{name}: a learnt adapter differs");
    }
}

/// The forms of packed weights are those of the first image; others may need other ones.
#[test]
fn packed_convolutions_take_images_of_every_shape() {
    // Images, and what they are enlarged to.
    let images: [([usize; 4], (usize, usize)); 8] = [
        ([2, 9, 7, 40], (9, 7)),
        ([1, 1, 33, 40], (1, 33)),
        ([2, 1, 5, 40], (1, 5)),
        ([1, 5, 1, 40], (5, 1)),
        ([1, 2, 2, 40], (2, 2)),
        ([1, 1, 1, 40], (1, 1)),
        ([1, 1, 3, 40], (7, 9)),
        ([1, 3, 2, 40], (6, 1)),
    ];
    let images = images.map(|(shape, size)| (f32(&normal(5, &shape)), size));
    for (k, stride, padding) in [(3, 1, 1), (3, 2, 1), (1, 1, 0)] {
        let of = |seed, shape: &[usize]| f32(&normal(seed, shape));
        let (w, bias) = (of(1, &[33, 40, k, k]), of(2, &[33]));
        let (down, up) = (of(3, &[4, 40, k, k]), of(4, &[33, 4, 1, 1]));
        for adapter in [None, Some(LowRank { down, up, scale: 0.3 })] {
            let layer = |of: fn(&Tensor) -> Tensor| {
                let adapter = adapter.as_ref();
                let adapter =
                    adapter.map(|a| LowRank { down: of(&a.down), up: of(&a.up), scale: a.scale });
                Conv2d::new(of(&w), Some(of(&bias)), stride, padding, adapter)
            };
            let run = |layer: &Conv2d, x: &Tensor, size: (usize, usize)| {
                let y = layer.forward_enlarged(x, size).unwrap();
                let weights = normal(6, y.dims()).to_dtype(y.dtype()).unwrap();
                let dx = gradients(std::slice::from_ref(x), &weights, &|x| {
                    layer.forward_enlarged(&x[0], size)
                });
                [vec![y], dx].concat()
            };
            let exact = images.each_ref().map(|(x, size)| run(&layer(f64), &f64(x), *size));
            for first in 0..images.len() {
                for second in 0..images.len() {
                    let layer = layer(f32);
                    for at in [first, second, first] {
                        let (x, size) = &images[at];
                        let error = worst(&run(&layer, x, *size), &exact[at]);
                        let name = format!(
                            "{k}x{k} s{stride}, adapter: {}, image {at} of {first} and {second}",
                            adapter.is_some(),
                        );
                        assert!(error < 1e-6, "{name}: f32 differs from f64 by {error:.1e}");
                    }
                }
            }
        }
    }
}
