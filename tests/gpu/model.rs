//! Networks, training passes and whole images.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use diffusion_sharpening::engine::request::GenerateRequest;
use diffusion_sharpening::engine::{Backend, CancelToken, Engine};
use diffusion_sharpening::nn::device::Placement;
use diffusion_sharpening::nn::{Recompute, cuda};
use diffusion_sharpening::sdxl::ModelFolder;
use diffusion_sharpening::sdxl::plan::{Kind, Sample, launches, unet};
use diffusion_sharpening::train::optimizer::{Gradients, Missing};

use super::common::training::unet_on;
use super::common::{fixtures, ids, parity_models, read, relative_error};
use super::{gpu, on_cpu, on_gpu};

fn placement(weights: DType) -> Placement {
    Placement { device: gpu().clone(), weights, vae: DType::F32 }
}

fn shipped() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny")
}

/// Every network against diffusers and transformers, as the CPU's `parity_components`. In half
/// precision the U-Nets may lose a quarter more than PyTorch does on the same inputs, taken
/// together; a single one with its few channels a group scatters more.
#[test]
fn components_agree_with_diffusers() {
    let file = std::fs::read(fixtures().join("half_precision.json")).unwrap();
    let lost: serde_json::Value = serde_json::from_slice(&file).unwrap();
    for dtype in [DType::F32, DType::BF16] {
        let mut ratios = Vec::new();
        for folder in parity_models() {
            let name = folder.file_name().unwrap().to_string_lossy().into_owned();
            let model = ModelFolder::open(&folder, &placement(dtype)).expect(&name);
            let r = read(&folder.join("reference.safetensors"));
            let at = |key: &str| on_gpu(&r[key], DType::F32);
            let text = model.encode_ids(&ids(&r["input_ids"]), &ids(&r["input_ids_2"])).unwrap();
            let (latents, timesteps) = (at("latents"), at("timesteps"));
            let (context, pooled) = (at("hidden_states"), at("pooled"));
            let noise = model
                .unet
                .forward(&latents, &timesteps, &context, &pooled, &at("time_ids"))
                .unwrap();
            let posterior = model.vae.encode(&at("image")).unwrap();
            let decoded = model.vae.decode(&latents).unwrap();
            let torch = lost["bf16"][&name].as_f64().unwrap();
            let (text_bar, unet_bar) = match dtype {
                DType::F32 => (1e-4, 1e-4),
                _ => (3e-2, 3.0 * torch),
            };
            ratios.push(relative_error(&on_cpu(&noise), &r["noise_pred"]) / torch);
            for (what, ours, bar) in [
                ("hidden_states", &text.context, text_bar),
                ("pooled", &text.pooled, text_bar),
                ("noise_pred", &noise, unet_bar),
                ("decoded", &decoded, 1e-4),
                ("encoded_mean", &posterior.mean, 1e-4),
                ("encoded_std", &posterior.std, 1e-4),
            ] {
                let error = relative_error(&on_cpu(ours), &r[what]);
                println!("{dtype:?} {name:24} {what:14} {error:.2e}");
                assert!(error < bar, "{dtype:?} {name}: {what} differs by {error:.3e}");
            }
        }
        let mean = (ratios.iter().map(|r| r.ln()).sum::<f64>() / ratios.len() as f64).exp();
        println!("{dtype:?}: {mean:.3} of what PyTorch loses in bf16");
        assert!(mean < 1.25, "{dtype:?}: errors are {mean:.2} times PyTorch's");
    }
}

/// The VAE in bf16 against itself in f32: at least 30 dB below the signal.
#[test]
fn the_vae_in_half_precision_is_bounded() {
    let r = read(&fixtures().join("parity/ddim_tiny/reference.safetensors"));
    let latents = on_gpu(&r["latents"], DType::F32);
    let decode = |vae| {
        let placement = Placement { vae, ..placement(DType::F32) };
        let model = ModelFolder::open(&fixtures().join("parity/ddim_tiny"), &placement).unwrap();
        on_cpu(&model.vae.decode(&latents).unwrap())
    };
    let error = relative_error(&decode(DType::BF16), &decode(DType::F32));
    assert!(error > 0.0 && error < 0.03, "{error:.1e}");
}

/// Loss and gradients of one pass of the shipped model's kind, LoRA and all parameters, with
/// and without recomputation.
#[test]
fn training_passes_are_those_of_the_cpu() {
    let folder = fixtures().join("parity/ddim_tiny");
    let r = read(&folder.join("reference.safetensors"));
    let text = ModelFolder::open(&folder, &Placement::cpu(DType::F32)).unwrap();
    let text = text.encode_ids(&ids(&r["input_ids"]), &ids(&r["input_ids_2"])).unwrap();
    let pass = |device: &Device, computed, lora, recompute| {
        let (vars, unet) = unet_on(&folder, lora, device, computed);
        let unet = unet.with_recompute(recompute);
        let at = |x: &Tensor| x.to_dtype(DType::F32).unwrap().to_device(device).unwrap();
        let (x, t) = (at(&r["latents"]), at(&r["timesteps"]));
        let (context, pooled) = (at(&text.context), at(&text.pooled));
        let out = unet.forward(&x, &t, &context, &pooled, &at(&r["time_ids"])).unwrap();
        let loss = out.to_dtype(DType::F32).unwrap().sqr().unwrap().mean_all().unwrap();
        let mut gradients = Gradients::new(&vars, Missing::Refuse).unwrap();
        gradients.backward(&loss, 1.0).unwrap();
        let sums: Vec<Tensor> =
            vars.keys().map(|name| on_cpu(&gradients.get(name).unwrap().unwrap())).collect();
        (on_cpu(&loss).to_scalar::<f32>().unwrap(), sums)
    };
    // The whole gradient: single tensors may nearly cancel.
    let flat = |all: &[Tensor]| {
        let rows: Vec<Tensor> = all.iter().map(|t| t.flatten_all().unwrap()).collect();
        Tensor::cat(&rows, 0).unwrap()
    };
    for lora in [true, false] {
        let (loss, expected) = pass(&Device::Cpu, DType::F32, lora, Recompute::Off);
        // The gradient in half precision is off by more than 0.1, but its direction holds.
        for (computed, recompute, bar) in [
            (DType::F32, Recompute::Off, 1e-4),
            (DType::F32, Recompute::Blocks, 1e-4),
            (DType::BF16, Recompute::Off, 0.2),
            (DType::BF16, Recompute::Blocks, 0.2),
        ] {
            let (got_loss, got) = pass(gpu(), computed, lora, recompute);
            let error = relative_error(&flat(&got), &flat(&expected));
            println!("lora {lora} {computed:?} {recompute:?}: gradients differ by {error:.1e}");
            assert!(error < bar, "lora {lora}, {computed:?}, {recompute:?}: {error:.1e}");
            assert!((got_loss - loss).abs() < 0.02 * loss.abs(), "{got_loss} for {loss}");
        }
    }
}

/// Images of every sampler from keyed noise: the same as the CPU's up to rounding.
#[test]
fn images_are_those_of_the_cpu() {
    let open = |placement: &Placement| Engine::open(&shipped(), placement).unwrap();
    let (here, there) = (open(&Placement::cpu(DType::F32)), open(&placement(DType::F32)));
    for solver in ["ddim", "euler", "dpmpp-2m", "heun"] {
        let request = GenerateRequest {
            prompt: "a red circle left of a blue square".into(),
            seed: Some(3),
            steps: Some(4),
            solver: Some(solver.into()),
            ..GenerateRequest::default()
        };
        let image = |engine: &Engine| {
            let planned = engine.plan(&request).unwrap();
            let made = engine.generate(&planned, &CancelToken::default(), &mut |_| {}).unwrap();
            made.images[0].pixels.as_raw().clone()
        };
        let worst = image(&here).iter().zip(&image(&there)).map(|(a, b)| a.abs_diff(*b)).max();
        println!("{solver}: pixels differ by at most {worst:?}");
        assert!(worst.unwrap() <= 2, "{solver}: pixels differ by {worst:?}");
    }
}

/// A U-Net forward launches what the plan counts for the operations that are ours: one product
/// and one pass for what is added, three kernels for a group norm, one for the others.
#[test]
fn a_forward_launches_what_the_plan_says() {
    let model = ModelFolder::open(&shipped(), &placement(DType::BF16)).unwrap();
    let (batch, side, tokens) = (2, 16, 20);
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, gpu()).unwrap();
    let config = &model.unet_config;
    let pooled = model.text_2.config().projection_dim;
    let (x, t) = (zeros(&[batch, config.in_channels, side, side]), zeros(&[batch]));
    let context = zeros(&[batch, tokens, config.cross_attention_dim]);
    let (pooled, sizes) = (zeros(&[batch, pooled]), zeros(&[batch, 6]));
    let sample = Sample { batch, height: side, width: side, tokens };
    let trace = unet(config, sample).unwrap();
    let ours = |kind: Kind| {
        !matches!(kind, Kind::Layout | Kind::Concatenate | Kind::Add | Kind::Embedding)
    };
    let planned: u64 = trace.ops.iter().filter(|op| ours(op.kind)).map(launches).sum();
    let before = cuda::launches();
    model.unet.forward(&x, &t, &context, &pooled, &sizes).unwrap();
    assert_eq!(cuda::launches() - before, planned);
}
