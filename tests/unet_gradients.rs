//! Whole networks in f64: the derivative along a random direction of every
//! parameter and input, against a central difference.

mod common;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor, Var};
use common::{fixtures, ids, normal, read, values};
use diffusion_sharpening::sdxl::config::read_json;
use diffusion_sharpening::sdxl::{ClipText, Scope, UNet, Vae, Weights};

const BAR: f64 = 1e-6;
const STEP: f64 = 2e-5;

fn fixture(name: &str) -> PathBuf {
    fixtures().join("parity").join(name)
}

/// A network whose parameters are variables.
fn tracked<T>(
    folder: &Path,
    make: impl FnOnce(&Scope) -> diffusion_sharpening::Result<T>,
) -> (HashMap<String, Var>, T) {
    let weights = Weights::from_folder(folder, DType::F64, &Device::Cpu).unwrap();
    let floats = weights.tensors().iter().filter(|(_, t)| t.dtype() == DType::F64);
    let vars: HashMap<String, Var> =
        floats.map(|(name, t)| (name.clone(), Var::from_tensor(t).unwrap())).collect();
    let tensors = vars.iter().map(|(k, v)| (k.clone(), v.as_tensor().clone())).collect();
    let network = Weights::new(tensors, folder).build(None, make).unwrap();
    (vars, network)
}

/// Checks every variable; a variable without a gradient is a failure.
fn check(what: &str, vars: &HashMap<String, Var>, loss: &dyn Fn() -> Tensor) {
    let grads = loss().backward().unwrap();
    let total = || loss().to_scalar::<f64>().unwrap();
    let mut names: Vec<&String> = vars.keys().collect();
    names.sort();
    let missing: Vec<_> = names.iter().filter(|n| grads.get(&vars[**n]).is_none()).collect();
    assert!(missing.is_empty(), "{what}: no gradient for {missing:?}");
    let norm = |x: &Tensor| values(x).iter().map(|v| v * v).sum::<f64>().sqrt();
    let (mut worst, mut worst_of) = (0.0_f64, "");
    for (i, name) in names.iter().enumerate() {
        let (var, gradient) = (&vars[*name], grads.get(&vars[*name]).unwrap());
        let base = var.as_tensor().copy().unwrap();
        let direction = normal(1000 + i as u64, base.dims());
        let analytic: f64 = values(&(&direction * gradient).unwrap()).iter().sum();
        let at = |shift: f64| {
            var.set(&(&base + (&direction * shift).unwrap()).unwrap()).unwrap();
            total()
        };
        // The length of the step itself, whatever the number of elements.
        let step = STEP / (base.elem_count() as f64).sqrt();
        let numeric = (at(step) - at(-step)) / (2.0 * step);
        at(0.0);
        // A unit-normal direction meets a gradient g in a number of about ‖g‖. Key biases have
        // none at all (softmax does not see them): the floor.
        let error = (analytic - numeric).abs() / (norm(gradient) + 1e-3);
        assert!(error < BAR, "{what}: {name}: {analytic} is not {numeric} ({error:.1e})");
        if error > worst {
            (worst, worst_of) = (error, name);
        }
    }
    println!("{what}: {} tensors, worst {worst:.1e} ({worst_of})", names.len());
}

fn f64_of(x: &Tensor) -> Tensor {
    x.to_dtype(DType::F64).unwrap()
}

/// Σ R·x with fixed R, over √n so that losses stay near 1.
fn weighted(seed: u64, x: &Tensor) -> Tensor {
    let scale = 1.0 / (x.elem_count() as f64).sqrt();
    ((x * normal(seed, x.dims())).unwrap().sum_all().unwrap() * scale).unwrap()
}

fn unet(name: &str, least: usize) {
    let folder = fixture(name);
    let config = read_json(&folder.join("unet/config.json")).unwrap();
    let (mut vars, network) = tracked(&folder.join("unet"), |s| UNet::load(s, &config));
    assert!(vars.len() >= least, "{} tensors", vars.len());
    let r = read(&folder.join("reference.safetensors"));
    let first = |name: &str| f64_of(&r[name].narrow(0, 0, 1).unwrap().contiguous().unwrap());
    let inputs = ["latents", "hidden_states", "pooled"]
        .map(|name| (name, Var::from_tensor(&first(name)).unwrap()));
    let [latents, context, pooled] = inputs.clone().map(|(_, var)| var.as_tensor().clone());
    vars.extend(inputs.map(|(name, var)| (format!("input {name}"), var)));
    let (timesteps, time_ids) = (first("timesteps"), first("time_ids"));
    check(name, &vars, &|| {
        let out = network.forward(&latents, &timesteps, &context, &pooled, &time_ids).unwrap();
        weighted(7, &out)
    });
}

#[test]
fn every_parameter_of_a_unet() {
    unet("ddim_tiny", 100);
}

/// Convolutional projections, odd sizes, attention in the first level and none in the last.
#[test]
fn every_parameter_of_a_unet_with_conv_projections() {
    unet("euler_v_odd", 150);
}

#[test]
fn every_parameter_of_a_vae() {
    let folder = fixture("ddim_tiny");
    let config = read_json(&folder.join("vae/config.json")).unwrap();
    let (mut vars, vae) = tracked(&folder.join("vae"), |s| Vae::load(s, &config));
    assert!(vars.len() > 80, "{} tensors", vars.len());
    let r = read(&folder.join("reference.safetensors"));
    let latents = Var::from_tensor(&f64_of(&r["latents"])).unwrap();
    let image = Var::from_tensor(&f64_of(&r["image"])).unwrap();
    vars.insert("input latents".into(), latents.clone());
    vars.insert("input image".into(), image.clone());
    check("vae", &vars, &|| {
        let posterior = vae.encode(&image).unwrap();
        let decoded = weighted(1, &vae.decode(&latents).unwrap());
        let encoded = (weighted(2, &posterior.mean) + weighted(3, &posterior.std)).unwrap();
        (decoded + encoded).unwrap()
    });
}

#[test]
fn every_parameter_of_the_text_towers() {
    let folder = fixture("ddim_tiny");
    let r = read(&folder.join("reference.safetensors"));
    for (tower, rows) in [("text_encoder", "input_ids"), ("text_encoder_2", "input_ids_2")] {
        let config = read_json(&folder.join(tower).join("config.json")).unwrap();
        let (vars, text) = tracked(&folder.join(tower), |s| ClipText::load(s, &config));
        assert!(vars.len() > 30, "{} tensors", vars.len());
        let ids = ids(&r[rows]);
        check(tower, &vars, &|| {
            let out = text.forward(&ids).unwrap();
            (weighted(1, &out.penultimate) + weighted(2, &out.pooled)).unwrap()
        });
    }
}
