//! What the tests of `nn` share: layers as functions of their tensors, and gradients of them.

use candle_core::{DType, Device, Result, Tensor, Var};
use diffusion_sharpening::nn::conv::Padding;
use diffusion_sharpening::nn::{Added, Conv2d, GroupNorm, LayerNorm, Linear, LowRank};

use super::{normal, relative_error};

pub type Layer<'a> = &'a dyn Fn(&[Tensor]) -> Result<Tensor>;

/// Gradients of Σ weights·f(inputs) for every input.
pub fn gradients(inputs: &[Tensor], weights: &Tensor, f: Layer) -> Vec<Tensor> {
    let vars: Vec<Var> = inputs.iter().map(|x| Var::from_tensor(x).unwrap()).collect();
    let tracked: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
    let out = f(&tracked).unwrap();
    let grads = (out * weights).unwrap().sum_all().unwrap().backward().unwrap();
    let of = |(i, v)| grads.get(v).unwrap_or_else(|| panic!("input {i} got no gradient")).clone();
    vars.iter().map(Var::as_tensor).enumerate().map(of).collect()
}

/// Analytic gradients of Σ R·f(inputs) for every input, with the weights R.
pub fn analytic(inputs: &[Tensor], f: Layer) -> (Vec<Tensor>, Tensor) {
    let out = f(inputs).unwrap();
    let weights = normal(4321, out.dims()).to_dtype(out.dtype()).unwrap();
    (gradients(inputs, &weights, f), weights)
}

/// The largest relative error of any of these tensors.
pub fn worst(a: &[Tensor], b: &[Tensor]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| relative_error(a, b)).fold(0.0, f64::max)
}

/// Inputs of these shapes with seeds 1, 2, ...
pub fn normals(shapes: &[&[usize]]) -> Vec<Tensor> {
    (1..).zip(shapes).map(|(seed, shape)| normal(seed, shape)).collect()
}

pub fn f32(x: &Tensor) -> Tensor {
    x.to_dtype(DType::F32).unwrap()
}

pub fn f64(x: &Tensor) -> Tensor {
    x.to_dtype(DType::F64).unwrap()
}

fn adapter_of(x: &[Tensor], at: usize, scale: f64) -> Option<LowRank> {
    x.get(at).map(|down| LowRank { down: down.clone(), up: x[at + 1].clone(), scale })
}

/// A convolution of x, weight, and as far as they are there bias, adapter down and up.
pub fn conv(x: &[Tensor], stride: usize, padding: impl Into<Padding>) -> Conv2d {
    Conv2d::new(x[1].clone(), x.get(2).cloned(), stride, padding, adapter_of(x, 3, 0.7))
}

pub fn conv_of(
    stride: usize,
    padding: impl Into<Padding>,
) -> impl Fn(&[Tensor]) -> Result<Tensor> + Copy {
    let padding = padding.into();
    move |x| conv(x, stride, padding).forward(&x[0])
}

/// Of x, weight, bias, adapter down and up, shift and residual.
pub fn conv_with_all(x: &[Tensor], stride: usize, padding: impl Into<Padding>) -> Result<Tensor> {
    let added = Added { shift: Some(&x[5]), residual: Some(&x[6]) };
    conv(&x[..5], stride, padding).forward_added(&x[0], added)
}

/// Of x, weight, and as far as they are there bias, adapter down and up.
pub fn linear(x: &[Tensor]) -> Linear {
    Linear::new(x[1].clone(), x.get(2).cloned(), adapter_of(x, 3, 1.5))
}

/// Of x, weight and bias.
pub fn group_norm(x: &[Tensor], groups: usize) -> GroupNorm {
    GroupNorm { groups, eps: 1e-5, weight: x[1].clone(), bias: x[2].clone() }
}

/// Of x, weight and bias.
pub fn layer_norm(x: &[Tensor]) -> LayerNorm {
    LayerNorm { eps: 1e-5, weight: x[1].clone(), bias: x[2].clone() }
}

fn mask(targets: usize, sources: usize, hidden: impl Fn(usize, usize) -> bool) -> Tensor {
    let at = |i: usize| if hidden(i / sources, i % sources) { f64::NEG_INFINITY } else { 0.0 };
    let mask = (0..targets * sources).map(at).collect();
    Tensor::from_vec(mask, (targets, sources), &Device::Cpu).unwrap()
}

/// Target i sees sources 0 to i.
pub fn causal(targets: usize, sources: usize) -> Tensor {
    mask(targets, sources, |i, j| j > i)
}

/// Even targets see everything, odd ones only sources from `from` on.
pub fn late(targets: usize, sources: usize, from: usize) -> Tensor {
    mask(targets, sources, |i, j| i % 2 == 1 && j < from)
}
