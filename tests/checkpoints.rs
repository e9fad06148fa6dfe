//! Gradient checkpoints change what is kept, and nothing that is computed.

mod common;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use candle_core::{DType, Tensor, Var};
use common::training::{Vars, unet};
use common::{fixtures, normal, read, values};
use diffusion_sharpening::Result;
use diffusion_sharpening::nn::autograd::no_grad;
use diffusion_sharpening::nn::{Activation, Linear, Recompute, checkpoint};
use diffusion_sharpening::sdxl::UNet;
use diffusion_sharpening::train::optimizer::{Gradients, Missing};

fn fixture(name: &str) -> PathBuf {
    fixtures().join("parity").join(name)
}

fn single(seed: u64, shape: &[usize]) -> Tensor {
    normal(seed, shape).to_dtype(DType::F32).unwrap()
}

fn var(seed: u64, shape: &[usize]) -> Var {
    Var::from_tensor(&single(seed, shape)).unwrap()
}

/// Adds latents, context and pooled text to the variables.
fn with_inputs(name: &str, vars: &mut Vars) -> BTreeMap<String, Tensor> {
    let r = read(&fixture(name).join("reference.safetensors"));
    let mut inputs = BTreeMap::new();
    for key in ["latents", "hidden_states", "pooled"] {
        let var = Var::from_tensor(&r[key]).unwrap();
        inputs.insert(key.to_owned(), var.as_tensor().clone());
        vars.insert(format!("input {key}"), var);
    }
    for key in ["timesteps", "time_ids"] {
        inputs.insert(key.to_owned(), r[key].to_dtype(DType::F32).unwrap());
    }
    inputs
}

fn prediction(unet: &UNet, x: &BTreeMap<String, Tensor>) -> Tensor {
    let [latents, t] = ["latents", "timesteps"].map(|key| &x[key]);
    unet.forward(latents, t, &x["hidden_states"], &x["pooled"], &x["time_ids"]).unwrap()
}

fn loss(unet: &UNet, x: &BTreeMap<String, Tensor>) -> Tensor {
    let y = prediction(unet, x);
    (y.sub(&single(99, y.dims()))).unwrap().sqr().unwrap().mean_all().unwrap()
}

fn bits(x: &Tensor) -> Vec<u64> {
    values(x).into_iter().map(f64::to_bits).collect()
}

fn norm(x: &Tensor) -> f64 {
    values(x).iter().map(|v| v * v).sum::<f64>().sqrt()
}

/// Two accumulated backward passes with and without checkpoints.
fn same_gradients(name: &str, lora: bool, least: usize) {
    let (mut vars, plain) = unet(&fixture(name), lora);
    let inputs = with_inputs(name, &mut vars);
    let checkpointed = plain.clone().with_recompute(Recompute::Blocks);
    assert_eq!(bits(&prediction(&plain, &inputs)), bits(&prediction(&checkpointed, &inputs)));
    let [kept, recomputed] = [&plain, &checkpointed].map(|unet| {
        let mut gradients = Gradients::new(&vars, Missing::Refuse).unwrap();
        gradients.backward(&loss(unet, &inputs), 1.0).unwrap();
        gradients.backward(&loss(unet, &inputs), 0.5).unwrap();
        gradients
    });
    let (mut difference, mut size, mut equal) = (0.0, 0.0, 0);
    for key in vars.keys() {
        let [a, b] = [&kept, &recomputed].map(|g| g.get(key).unwrap().unwrap());
        assert!(!b.track_op(), "{key} keeps a graph alive");
        equal += usize::from(bits(&a) == bits(&b));
        // The contributions of several users of a tensor are added in another order. Where they
        // cancel, as a bias before a norm shows, hardly more than rounding is left of them.
        let (error, norm) = (norm(&(&a - &b).unwrap()), norm(&a));
        assert!(error < 5e-6 * (norm + 1e-3), "{name}: {key} differs by {error:e} of {norm:e}");
        difference += error.powi(2);
        size += norm.powi(2);
    }
    let whole = (difference / size).sqrt();
    assert!(whole < 1e-6, "{name}: the gradient as a whole differs by {whole:e}");
    println!("{name}, lora {lora}: {equal} of {} equal to the bit, all {whole:.1e}", vars.len());
    assert!(vars.len() >= least && equal > 0);
}

#[test]
fn every_gradient_of_a_unet() {
    same_gradients("ddim_tiny", false, 100);
    same_gradients("euler_sdxl_shape", false, 300);
}

#[test]
fn every_gradient_of_an_adapter() {
    same_gradients("ddim_tiny", true, 60);
    same_gradients("euler_v_odd", true, 80);
}

/// Without a sum to go to, a gradient inside a segment would be lost.
#[test]
fn a_gradient_without_a_sum_is_an_error() {
    let (mut vars, unet) = unet(&fixture("ddim_tiny"), false);
    let inputs = with_inputs("ddim_tiny", &mut vars);
    let unet = unet.with_recompute(Recompute::Blocks);
    let error = loss(&unet, &inputs).backward().unwrap_err().to_string();
    assert!(error.contains("checkpointed segment") && error.contains("summed"), "{error}");
    let left_out = "mid_block.attentions.0.transformer_blocks.0.ff.net.2.weight";
    let shape = format!("{:?}", vars.remove(left_out).unwrap().dims());
    let mut gradients = Gradients::new(&vars, Missing::Refuse).unwrap();
    let error = gradients.backward(&loss(&unet, &inputs), 1.0).unwrap_err().to_string();
    assert!(error.contains("checkpointed segment") && error.contains(&shape), "{error}");
}

/// A segment with candle's own operations on a variable that a layer uses too, with an input
/// that it uses twice, one that it does not use, and one that is a constant.
fn segment(linear: &Linear, scale: &Var, x: &[Tensor]) -> Result<Tensor> {
    let h = linear.forward(&Activation::Silu.forward(&x[0])?)?;
    Ok((h.broadcast_mul(scale)? + (&x[0] * &x[2])?)?)
}

#[test]
fn other_operations_inside_a_segment() {
    let (scale, weight, x, unused) = (var(1, &[6]), var(2, &[6, 6]), var(3, &[4, 6]), var(4, &[2]));
    let constant = single(5, &[4, 6]);
    let bias = scale.as_tensor().clone();
    let linear = Linear::new(weight.as_tensor().clone(), Some(bias), None);
    let vars: Vars = [("scale", &scale), ("weight", &weight), ("x", &x), ("unused", &unused)]
        .map(|(name, var)| (name.to_owned(), var.clone()))
        .into();
    let inputs = [x.as_tensor(), unused.as_tensor(), &constant];
    let calls = Arc::new(AtomicUsize::new(0));
    let counted = {
        let (linear, scale, calls) = (linear.clone(), scale.clone(), calls.clone());
        move |x: &[Tensor]| {
            calls.fetch_add(1, Ordering::Relaxed);
            segment(&linear, &scale, x)
        }
    };
    let finish = |y: Tensor| y.sqr().unwrap().sum_all().unwrap();
    let mut theirs = Gradients::new(&vars, Missing::Allow).unwrap();
    let plain = inputs.map(Tensor::clone);
    theirs.backward(&finish(segment(&linear, &scale, &plain).unwrap()), 1.0).unwrap();
    // A segment within a segment.
    let nested = {
        let counted = counted.clone();
        move |x: &[Tensor]| checkpoint(&x.iter().collect::<Vec<_>>(), counted.clone())
    };
    for (depth, once, again) in [(1, 1, 1), (2, 1, 2)] {
        let calls_before = calls.load(Ordering::Relaxed);
        let y = if depth == 1 {
            checkpoint(&inputs, counted.clone()).unwrap()
        } else {
            checkpoint(&inputs, nested.clone()).unwrap()
        };
        assert_eq!(calls.load(Ordering::Relaxed) - calls_before, once);
        assert_eq!(bits(&y), bits(&segment(&linear, &scale, &plain).unwrap()));
        let mut ours = Gradients::new(&vars, Missing::Allow).unwrap();
        ours.backward(&finish(y), 1.0).unwrap();
        assert_eq!(calls.load(Ordering::Relaxed) - calls_before, once + again);
        for key in ["scale", "weight", "x"] {
            let [a, b] = [&ours, &theirs].map(|g| g.get(key).unwrap().unwrap());
            let error = norm(&(&a - &b).unwrap()) / norm(&b);
            assert!(error < 1e-6, "depth {depth}: {key} differs by {error:e}");
        }
        assert!(norm(&ours.get("unused").unwrap().unwrap()) == 0.0);
    }
}

#[test]
fn nothing_runs_twice_where_no_input_wants_a_gradient() {
    let weight = var(1, &[6, 6]);
    let linear = Linear::new(weight.as_tensor().clone(), None, None);
    let calls = Arc::new(AtomicUsize::new(0));
    let run = |x: &Tensor| {
        let (linear, calls) = (linear.clone(), calls.clone());
        let f = move |x: &[Tensor]| {
            calls.fetch_add(1, Ordering::Relaxed);
            Ok(linear.forward(&x[0])?)
        };
        checkpoint(&[x], f).unwrap()
    };
    // The variable inside gets its gradient in the ordinary way.
    let grads = run(&single(2, &[3, 6])).sum_all().unwrap().backward().unwrap();
    assert!(grads.get(&weight).is_some());
    assert_eq!(calls.load(Ordering::Relaxed), 1);
    let x = var(3, &[3, 6]);
    assert!(!no_grad(|| run(&x)).track_op());
    assert_eq!(calls.load(Ordering::Relaxed), 2);
}
