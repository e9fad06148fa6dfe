//! Layers and their gradients.

use candle_core::{D, DType, Result, Tensor};
use diffusion_sharpening::nn::conv::Padding;
use diffusion_sharpening::nn::{Activation, attention, geglu};

use super::common::layers::{
    Layer, conv, conv_of, conv_with_all, gradients, group_norm, layer_norm, linear, normals,
};
use super::common::{normal, relative_error};
use super::{on_cpu, on_gpu};

/// The largest relative errors of values and of gradients that a type may show.
const BARS: [(DType, f64, f64); 3] =
    [(DType::F32, 2e-6, 1e-5), (DType::F16, 2e-3, 4e-3), (DType::BF16, 1.6e-2, 3e-2)];

/// Values and gradients on the GPU against those on the CPU in f32 from the same numbers.
fn compare(what: &str, inputs: &[Tensor], f: Layer) {
    for (dtype, value_bar, gradient_bar) in BARS {
        let rounded: Vec<Tensor> = inputs.iter().map(|x| x.to_dtype(dtype).unwrap()).collect();
        let plain: Vec<Tensor> = rounded.iter().map(on_cpu).collect();
        let there: Vec<Tensor> = rounded.iter().map(|x| on_gpu(x, dtype)).collect();
        let expected = f(&plain).unwrap();
        let got = f(&there).unwrap();
        assert_eq!(got.dtype(), dtype, "{what}: the type of the result");
        let error = relative_error(&on_cpu(&got), &expected);
        assert!(error < value_bar, "{what} in {dtype:?}: values differ by {error:.1e}");
        let weights = normal(4321, expected.dims()).to_dtype(dtype).unwrap();
        let expected = gradients(&plain, &on_cpu(&weights), f);
        let got = gradients(&there, &on_gpu(&weights, dtype), f);
        let mut worst = 0.0_f64;
        for (i, (got, expected)) in got.iter().zip(&expected).enumerate() {
            let error = relative_error(&on_cpu(got), expected);
            assert!(error < gradient_bar, "{what} in {dtype:?}: gradient {i} is {error:.1e} off");
            worst = worst.max(error);
        }
        println!("{what:32} {dtype:?}: values {error:.1e} gradients {worst:.1e}");
    }
}

#[test]
fn linear_layers() {
    let rows = normals(&[&[2, 7, 24], &[40, 24], &[40], &[4, 24], &[40, 4]]);
    compare("linear", &rows[..2], &|x| linear(x).forward(&x[0]));
    compare("linear with bias", &rows[..3], &|x| linear(x).forward(&x[0]));
    compare("linear with an adapter", &rows, &|x| linear(x).forward(&x[0]));
    let onto = [rows[..3].to_vec(), normals(&[&[2, 7, 40]])].concat();
    compare("linear onto a residual", &onto, &|x| linear(&x[..3]).forward_onto(&x[0], &x[3]));
}

#[test]
fn convolutions() {
    let images = normals(&[&[2, 6, 5, 8], &[12, 8, 3, 3], &[12], &[3, 8, 3, 3], &[12, 3, 1, 1]]);
    compare("conv 3x3", &images[..3], &conv_of(1, 1));
    compare("conv 3x3 with an adapter", &images, &conv_of(1, 1));
    compare("conv 3x3 stride 2", &images, &conv_of(2, 1));
    compare(
        "conv 3x3 stride 2, one side",
        &images[..3],
        &conv_of(2, Padding { before: 0, after: 1 }),
    );
    let pointwise = normals(&[&[2, 6, 5, 8], &[12, 8, 1, 1], &[12], &[3, 8, 1, 1], &[12, 3, 1, 1]]);
    compare("conv 1x1", &pointwise, &conv_of(1, 0));
    let all = [images.clone(), normals(&[&[2, 12], &[2, 6, 5, 12]])].concat();
    compare("conv with everything", &all, &|x| conv_with_all(x, 1, 1));
    let enlarged = |x: &[Tensor]| conv(x, 1, 1).forward_enlarged(&x[0], (12, 10));
    compare("conv of an enlarged image", &images, &enlarged);
}

/// A GPU has the weights of convolutions in another order: such views must give the same.
#[test]
fn convolutions_with_weights_laid_out_for_the_gpu() -> Result<()> {
    let images = normals(&[&[2, 6, 5, 8], &[12, 8, 3, 3], &[12]]);
    let there: Vec<Tensor> = images.iter().map(|x| on_gpu(x, DType::F32)).collect();
    let expected = conv(&there, 1, 1).forward(&there[0])?;
    let laid = there[1].permute((0, 2, 3, 1))?.contiguous()?.permute((0, 3, 1, 2))?;
    let got = conv(&[there[0].clone(), laid, there[2].clone()], 1, 1).forward(&there[0])?;
    assert_eq!(relative_error(&on_cpu(&got), &on_cpu(&expected)), 0.0);
    Ok(())
}

#[test]
fn norms() {
    for (channels, groups) in [(32, 4), (24, 3), (64, 16)] {
        let affine = normals(&[&[2, 5, 7, channels], &[channels], &[channels]]);
        compare("group norm", &affine, &|x| group_norm(x, groups).forward(&x[0]));
        compare("group norm silu", &affine, &|x| group_norm(x, groups).forward_silu(&x[0]));
    }
    for width in [24, 96, 130] {
        let rows = normals(&[&[3, 11, width], &[width], &[width]]);
        compare("layer norm", &rows, &|x| layer_norm(x).forward(&x[0]));
    }
}

#[test]
fn activations() {
    for activation in [Activation::Silu, Activation::Gelu, Activation::QuickGelu] {
        compare("activation", &normals(&[&[3, 5, 33]]), &|x| activation.forward(&x[0]));
    }
    compare("geglu", &normals(&[&[2, 9, 48]]), &|x| geglu(&x[0]));
}

#[test]
fn attentions() {
    for (heads, size) in [(1, 64), (3, 32), (2, 40)] {
        for (targets, sources) in [(70, 70), (33, 77)] {
            let width = heads * size;
            let all = normals(&[&[2, targets, width], &[2, sources, width], &[2, sources, width]]);
            compare("attention", &all, &|x| attention(&x[0], &x[1], &x[2], heads, None));
        }
    }
}

/// An adapter that is not being trained is merged into a copy of the weight.
#[test]
fn constant_adapters_are_merged() -> Result<()> {
    let rows = normals(&[&[2, 7, 24], &[40, 24], &[40], &[4, 24], &[40, 4]]);
    let there: Vec<Tensor> = rows.iter().map(|x| on_gpu(x, DType::F32)).collect();
    let here: Vec<Tensor> = rows.iter().map(on_cpu).collect();
    let layer = linear(&there);
    for _ in 0..2 {
        let got = layer.forward(&there[0])?;
        let expected = linear(&here).forward(&here[0])?;
        assert!(relative_error(&on_cpu(&got), &expected) < 2e-6);
    }
    let alone = linear(&there[..3]).forward(&there[0])?;
    let expected = linear(&here[..3]).forward(&here[0])?;
    assert!(relative_error(&on_cpu(&alone), &expected) < 2e-6, "the base weight was changed");
    Ok(())
}

/// What is computed twice is the same to the bit: sums have a fixed order.
#[test]
fn results_are_the_same_each_time() -> Result<()> {
    let all = normals(&[&[1, 130, 64], &[1, 77, 64], &[1, 77, 64]]);
    let there: Vec<Tensor> = all.iter().map(|x| on_gpu(x, DType::BF16)).collect();
    let run = || gradients(&there, &there[0], &|x| attention(&x[0], &x[1], &x[2], 1, None));
    for (first, second) in run().iter().zip(&run()) {
        let difference = (on_cpu(first) - on_cpu(second))?.abs()?.flatten_all()?;
        assert_eq!(difference.max(D::Minus1)?.to_scalar::<f32>()?, 0.0);
    }
    Ok(())
}
