//! Every network against diffusers and transformers on the same weights
//! (fixtures: `tools/parity_fixtures.py`).

mod common;

use candle_core::{DType, Device, Tensor};
use common::{fixtures, ids, parity_models, read, relative_error};
use diffusion_sharpening::nn::device::Placement;
use diffusion_sharpening::sdxl::{ClipTokenizer, ModelFolder};

const BAR: f64 = 1e-4;

#[test]
fn components_agree_with_diffusers() {
    let mut worst = 0.0_f64;
    for folder in parity_models() {
        let name = folder.file_name().unwrap().to_string_lossy().into_owned();
        let model = ModelFolder::open(&folder, &Placement::cpu(DType::F32)).expect(&name);
        let r = read(&folder.join("reference.safetensors"));
        let text = model.encode_ids(&ids(&r["input_ids"]), &ids(&r["input_ids_2"])).unwrap();
        let timesteps = r["timesteps"].to_dtype(DType::F32).unwrap();
        let noise = model
            .unet
            .forward(&r["latents"], &timesteps, &text.context, &text.pooled, &r["time_ids"])
            .unwrap();
        let posterior = model.vae.encode(&r["image"]).unwrap();
        let decoded = model.vae.decode(&r["latents"]).unwrap();
        for (what, ours, theirs) in [
            ("hidden_states", &text.context, &r["hidden_states"]),
            ("pooled", &text.pooled, &r["pooled"]),
            ("noise_pred", &noise, &r["noise_pred"]),
            ("decoded", &decoded, &r["decoded"]),
            ("encoded_mean", &posterior.mean, &r["encoded_mean"]),
            ("encoded_std", &posterior.std, &r["encoded_std"]),
        ] {
            let error = relative_error(ours, theirs);
            println!("{name:24} {what:14} {error:.2e}");
            assert!(error < BAR, "{name}: {what} differs by {error:.3e}");
            worst = worst.max(error);
        }
    }
    println!("worst {worst:.2e}");
}

#[test]
fn a_batch_equals_its_samples_one_by_one() {
    for folder in parity_models() {
        let model = ModelFolder::open(&folder, &Placement::cpu(DType::F32)).unwrap();
        let r = read(&folder.join("reference.safetensors"));
        let (context, pooled, time_ids) = (&r["hidden_states"], &r["pooled"], &r["time_ids"]);
        let timesteps = r["timesteps"].to_dtype(DType::F32).unwrap();
        let whole =
            model.unet.forward(&r["latents"], &timesteps, context, pooled, time_ids).unwrap();
        let decoded = model.vae.decode(&r["latents"]).unwrap();
        for b in 0..r["latents"].dim(0).unwrap() {
            let row = |x: &Tensor| x.narrow(0, b, 1).unwrap();
            let one = model
                .unet
                .forward(
                    &row(&r["latents"]),
                    &row(&timesteps),
                    &row(context),
                    &row(pooled),
                    &row(time_ids),
                )
                .unwrap();
            assert!(relative_error(&one, &row(&whole)) < 1e-5, "U-Net of {}", folder.display());
            let one = model.vae.decode(&row(&r["latents"])).unwrap();
            assert!(relative_error(&one, &row(&decoded)) < 1e-5, "VAE of {}", folder.display());
        }
    }
}

/// d loss / d everything against PyTorch's autograd, loss = mean((U-Net − target)²).
#[test]
fn gradients_agree_with_pytorch() {
    use diffusion_sharpening::sdxl::{UNet, Weights};
    let mut checked = 0;
    for folder in parity_models() {
        if !folder.join("grads.safetensors").is_file() {
            continue;
        }
        let name = folder.display().to_string();
        let model = ModelFolder::open(&folder, &Placement::cpu(DType::F32)).unwrap();
        let (r, g) =
            (read(&folder.join("reference.safetensors")), read(&folder.join("grads.safetensors")));
        let vars: std::collections::HashMap<String, candle_core::Var> = model
            .unet_weights
            .tensors()
            .iter()
            .map(|(k, t)| (k.clone(), candle_core::Var::from_tensor(t).unwrap()))
            .collect();
        let tensors = vars.iter().map(|(k, v)| (k.clone(), v.as_tensor().clone())).collect();
        let unet = Weights::new(tensors, "vars")
            .build(None, |s| UNet::load(s, &model.unet_config))
            .unwrap();
        let inputs = ["latents", "hidden_states", "pooled"]
            .map(|k| candle_core::Var::from_tensor(&r[k]).unwrap());
        let timesteps = r["timesteps"].to_dtype(DType::F32).unwrap();
        let out =
            unet.forward(&inputs[0], &timesteps, &inputs[1], &inputs[2], &r["time_ids"]).unwrap();
        let loss = (out - &g["target"]).unwrap().sqr().unwrap().mean_all().unwrap();
        assert!(relative_error(&loss.reshape(g["loss"].dims()).unwrap(), &g["loss"]) < BAR);
        let grads = loss.backward().unwrap();
        let mut pairs: Vec<(String, &candle_core::Var)> =
            vars.iter().map(|(k, v)| (format!("grad.{k}"), v)).collect();
        for (key, var) in ["grad_latents", "grad_context", "grad_pooled"].into_iter().zip(&inputs) {
            pairs.push((key.into(), var));
        }
        for (key, var) in pairs {
            let theirs = g.get(&key).unwrap_or_else(|| panic!("{name}: no {key} in the fixture"));
            let ours = grads.get(var).unwrap_or_else(|| panic!("{name}: {key} got no gradient"));
            let scale = common::values(theirs).iter().fold(0.0_f64, |m, v| m.max(v.abs()));
            if scale < 1e-9 {
                continue;
            }
            let error = relative_error(ours, theirs);
            assert!(error < 1e-3, "{name}: {key} differs by {error:.3e}");
            checked += 1;
        }
    }
    assert!(checked > 300, "only {checked} gradients were checked");
}

#[test]
fn tokenizers_agree_with_transformers() {
    let folder = fixtures().join("tokenizer");
    let text = std::fs::read_to_string(folder.join("expected.json")).unwrap();
    let cases: Vec<serde_json::Value> = serde_json::from_str(&text).unwrap();
    assert!(cases.len() >= 25);
    for name in ["tokenizer", "tokenizer_2"] {
        let tokenizer = ClipTokenizer::from_folder(&folder.join(name)).unwrap();
        for case in &cases {
            let prompt = case["text"].as_str().unwrap();
            for length in [24_usize, 77] {
                let expected: Vec<u32> =
                    serde_json::from_value(case[name][length.to_string()].clone()).unwrap();
                let got = tokenizer.clone().with_max_length(length).encode(prompt).unwrap();
                assert_eq!(got, expected, "{name} at {length}: {prompt:?}");
            }
        }
    }
}

/// Missing, mis-shaped and extra tensors come in one error.
#[test]
fn misfitting_weights_are_listed_together() {
    use diffusion_sharpening::sdxl::{UNet, Weights};
    let folder = &parity_models()[0];
    let model = ModelFolder::open(folder, &Placement::cpu(DType::F32)).unwrap();
    let mut tensors = model.unet_weights.tensors().clone();
    tensors.remove("conv_in.weight");
    tensors.insert("conv_out.bias".into(), Tensor::zeros(99, DType::F32, &Device::Cpu).unwrap());
    tensors.insert("surplus.weight".into(), Tensor::zeros(1, DType::F32, &Device::Cpu).unwrap());
    let error = Weights::new(tensors, "broken")
        .build(None, |s| UNet::load(s, &model.unet_config))
        .unwrap_err()
        .to_string();
    for part in ["broken", "conv_in.weight", "conv_out.bias", "[99]", "surplus.weight"] {
        assert!(error.contains(part), "'{part}' is not named in: {error}");
    }
}
