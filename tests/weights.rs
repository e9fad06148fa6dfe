//! Reading and writing checkpoints, and what is said when one is unusable.

mod common;

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use common::{
    assert_names, edit_json, fixtures, model_copy, normal, parity_models, read, relative_error,
    values,
};
use diffusion_sharpening::nn::device::Placement;
use diffusion_sharpening::sdxl::config::{ClipTextConfig, UNetConfig, VaeConfig, read_json};
use diffusion_sharpening::sdxl::weights::{
    save_component, sha256_of, weight_files, write_safetensors,
};
use diffusion_sharpening::sdxl::{ClipText, ModelFolder, UNet, Vae, Weights};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

const STEM: &str = "diffusion_pytorch_model";
const WHOLE: usize = 1 << 40;

fn load(folder: &Path, dtype: DType) -> diffusion_sharpening::Result<Weights> {
    Weights::from_folder(folder, dtype, &Device::Cpu)
}

fn open(folder: &Path) -> Result<ModelFolder, String> {
    ModelFolder::open(folder, &Placement::cpu(DType::F32)).map_err(|e| e.to_string())
}

fn sorted(weights: &Weights) -> BTreeMap<String, Tensor> {
    weights.tensors().iter().map(|(k, v)| (k.clone(), v.clone())).collect()
}

fn same_bits(a: &Weights, b: &Weights) {
    let (a, b) = (sorted(a), sorted(b));
    assert!(a.keys().eq(b.keys()));
    for (name, tensor) in &a {
        let other = &b[name];
        assert_eq!((tensor.dtype(), tensor.dims()), (other.dtype(), other.dims()), "{name}");
        assert_eq!(values(tensor), values(other), "{name}");
    }
}

#[test]
fn components_come_back_bit_by_bit() {
    for (name, dtype) in [
        ("ddim_tiny", DType::F16),
        ("euler_v_odd", DType::BF16),
        ("heun_karras", DType::F32),
        ("euler_all_attention", DType::F16),
    ] {
        let folder = fixtures().join("parity").join(name).join("unet");
        let weights = load(&folder, dtype).unwrap();
        assert!(weights.tensors().values().all(|t| t.dtype() == dtype));
        let dir = tempfile::tempdir().unwrap();
        for (shard, least) in [(WHOLE, 1), (50_000, 2), (1, weights.tensors().len())] {
            let target = dir.path().join(format!("{shard}"));
            save_component(&target, STEM, &sorted(&weights), shard).unwrap();
            let files = weight_files(&target).unwrap();
            assert!(files.len() >= least, "{} files", files.len());
            if shard != WHOLE && shard != 1 {
                for file in &files {
                    assert!(std::fs::metadata(file).unwrap().len() < 50_000 + 40_000);
                }
                let text =
                    std::fs::read_to_string(target.join(format!("{STEM}.safetensors.index.json")));
                let index: Value = serde_json::from_str(&text.unwrap()).unwrap();
                assert_eq!(index["weight_map"].as_object().unwrap().len(), weights.tensors().len());
                let size = weights.parameters() * dtype.size_in_bytes() as u64;
                assert_eq!(index["metadata"]["total_size"], json!(size));
            }
            same_bits(&weights, &load(&target, dtype).unwrap());
        }
    }
}

/// A later save replaces an earlier one, whichever of the two is sharded.
#[test]
fn saving_again_leaves_nothing_of_the_earlier_save() {
    let dir = tempfile::tempdir().unwrap();
    let version = |seed: u64| -> BTreeMap<String, Tensor> {
        (0..6)
            .map(|i| (format!("t{i}"), normal(seed + i, &[10]).to_dtype(DType::F32).unwrap()))
            .collect()
    };
    std::fs::write(dir.path().join("config.json"), "{}").unwrap();
    std::fs::write(dir.path().join("model.safetensors"), "another component's").unwrap();
    for (i, shard) in [WHOLE, 80, 40, WHOLE, 120].into_iter().enumerate() {
        let tensors = version(100 * i as u64);
        save_component(dir.path(), STEM, &tensors, shard).unwrap();
        let back = load(dir.path(), DType::F32).unwrap();
        same_bits(&Weights::new(tensors.into_iter().collect(), ""), &back);
        let kept = std::fs::read_dir(dir.path()).unwrap().count();
        let files = weight_files(dir.path()).unwrap().len();
        assert_eq!(kept, 2 + files + usize::from(files > 1), "save {i}");
    }
}

#[test]
fn every_precision_loads() {
    for folder in parity_models() {
        let stored = load(&folder.join("unet"), DType::F32).unwrap();
        for (dtype, bar) in [(DType::F16, 1e-3), (DType::BF16, 8e-3), (DType::F64, 0.0)] {
            let cast = load(&folder.join("unet"), dtype).unwrap();
            for (name, tensor) in stored.tensors() {
                assert!(
                    relative_error(&cast.tensors()[name], tensor) <= bar,
                    "{name} as {dtype:?}"
                );
            }
        }
    }
}

/// Reading and saving a whole checkpoint changes nothing, and it stays usable.
#[test]
fn checkpoints_come_back_whole() {
    for (name, dtype) in [("ddim_tiny", DType::F16), ("euler_sdxl_shape", DType::F32)] {
        let folder = fixtures().join("parity").join(name);
        let model = open(&folder).unwrap();
        let dir = tempfile::tempdir().unwrap();
        for shard in [WHOLE, 30_000, WHOLE] {
            model.save(dir.path(), dtype, shard).unwrap();
            let back = open(dir.path()).unwrap();
            for part in ["unet", "vae", "text_encoder", "text_encoder_2"] {
                let of = |folder: &Path| load(&folder.join(part), DType::F32).unwrap();
                same_bits(&of(&folder), &of(dir.path()));
            }
            assert_eq!(back.force_zeros_for_empty_prompt, model.force_zeros_for_empty_prompt);
            if folder.join("tokenizer").is_dir() {
                let [ours, theirs] = [&back, &model].map(|m| m.tokenizers().unwrap());
                let prompt = "three small dotted stars";
                assert_eq!(ours[1].encode(prompt).unwrap(), theirs[1].encode(prompt).unwrap());
            }
            let scheduler = "scheduler/scheduler_config.json";
            let bytes = [dir.path(), &folder].map(|f| std::fs::read(f.join(scheduler)).unwrap());
            assert_eq!(bytes[0], bytes[1]);
        }
        let error = model.save(&folder, dtype, WHOLE).unwrap_err().to_string();
        assert_names(&error, &[name]);
    }
}

/// Weights stored in half precision are computed with in f32 on the CPU; a network that is
/// to compute in f16 all the same runs through the composed operations.
#[test]
fn the_unet_in_half_precision_stays_close() {
    let folder = fixtures().join("parity/ddim_tiny");
    let r = read(&folder.join("reference.safetensors"));
    let model = ModelFolder::open(&folder, &Placement::cpu(DType::F16)).unwrap();
    let weights = model.unet_weights.clone().computing_in(DType::F16);
    let half = weights.build(None, |scope| UNet::load(scope, &model.unet_config)).unwrap();
    let timesteps = r["timesteps"].to_dtype(DType::F32).unwrap();
    for (unet, computed, bar) in [(&model.unet, DType::F32, 5e-3), (&half, DType::F16, 2e-2)] {
        let (x, context, pooled) = (&r["latents"], &r["hidden_states"], &r["pooled"]);
        let out = unet.forward(x, &timesteps, context, pooled, &r["time_ids"]).unwrap();
        assert_eq!(out.dtype(), computed);
        let error = relative_error(&out, &r["noise_pred"]);
        println!("U-Net stored in f16, computed in {computed:?}: {error:.1e}");
        assert!(error < bar, "{computed:?}: {error:.1e}");
    }
}

#[test]
fn damaged_files_are_named() {
    let (_dir, model) = model_copy("ddim_tiny");
    let file = model.join("unet").join(format!("{STEM}.safetensors"));
    let bytes = std::fs::read(&file).unwrap();
    let damaged: Vec<(&str, Vec<u8>)> = vec![
        ("empty", Vec::new()),
        ("four bytes", bytes[..4].to_vec()),
        ("half a header", bytes[..100].to_vec()),
        ("half the data", bytes[..bytes.len() / 2].to_vec()),
        ("one byte short", bytes[..bytes.len() - 1].to_vec()),
        ("one byte long", [&bytes[..], &[0]].concat()),
        ("a huge header", [&u64::MAX.to_le_bytes(), &bytes[8..]].concat()),
        ("no JSON", [&bytes[..8], &vec![b'x'; bytes.len() - 8][..]].concat()),
    ];
    for (what, bytes) in damaged {
        std::fs::write(&file, bytes).unwrap();
        let error = open(&model).expect_err(what);
        assert_names(&error, &["unet", "diffusion_pytorch_model.safetensors"]);
    }
    std::fs::remove_file(&file).unwrap();
    assert_names(
        &open(&model).unwrap_err(),
        &["unet", "no weights here", "diffusion_pytorch_model"],
    );
}

#[test]
fn shards_that_do_not_fit_are_named() {
    let (_dir, model) = model_copy("euler_all_attention");
    open(&model).unwrap();
    let shard = "diffusion_pytorch_model-00002-of-00002.safetensors";
    let (index, file) =
        (format!("vae/{STEM}.safetensors.index.json"), model.join("vae").join(shard));
    let kept = std::fs::read(&file).unwrap();
    std::fs::remove_file(&file).unwrap();
    assert_names(&open(&model).unwrap_err(), &["vae", shard]);
    // Both shards hold the same tensors.
    std::fs::copy(model.join("vae/diffusion_pytorch_model-00001-of-00002.safetensors"), &file)
        .unwrap();
    assert_names(&open(&model).unwrap_err(), &[shard, "two shards"]);
    // A shard that lacks tensors which the index promises.
    write_safetensors(&file, &BTreeMap::new(), None).unwrap();
    assert_names(&open(&model).unwrap_err(), &["vae", "missing", "decoder."]);
    std::fs::write(&file, kept).unwrap();
    open(&model).unwrap();
    std::fs::write(model.join(&index), "{\"weight_map\": 3}").unwrap();
    assert_names(&open(&model).unwrap_err(), &["index.json", "weight_map"]);
}

#[test]
fn folders_whose_parts_do_not_fit_together_are_refused() {
    let (_dir, model) = model_copy("ddim_tiny");
    edit_json(&model.join("unet/config.json"), "cross_attention_dim", json!(30));
    assert_names(&open(&model).unwrap_err(), &["attn2.to_k.weight", "30", "26"]);
    // Weights that fit it, but towers that do not.
    let (_dir, model) = model_copy("ddim_tiny");
    let other = fixtures().join("parity/euler_v_odd/text_encoder");
    std::fs::remove_dir_all(model.join("text_encoder")).unwrap();
    common::copy_dir(&other, &model.join("text_encoder"));
    assert_names(&open(&model).unwrap_err(), &["30", "26", "text towers"]);
    let (_dir, model) = model_copy("ddim_tiny");
    std::fs::remove_dir_all(model.join("vae")).unwrap();
    common::copy_dir(&fixtures().join("parity/ddim_v_eight_channels/vae"), &model.join("vae"));
    assert_names(&open(&model).unwrap_err(), &["VAE", "8", "4"]);
    for part in ["unet", "vae", "text_encoder", "text_encoder_2"] {
        let (_dir, model) = model_copy("ddim_tiny");
        std::fs::remove_file(model.join(part).join("config.json")).unwrap();
        assert_names(&open(&model).unwrap_err(), &[part, "config.json"]);
    }
    let (_dir, model) = model_copy("ddim_tiny");
    std::fs::remove_file(model.join("tokenizer_2/vocab.json")).unwrap();
    assert_names(
        &open(&model).unwrap().tokenizers().unwrap_err().to_string(),
        &["tokenizer_2", "vocab.json"],
    );
}

fn edited<T: serde::de::DeserializeOwned>(
    part: &str,
    key: &str,
    value: &Value,
) -> Result<T, String> {
    let path = fixtures().join("parity/ddim_tiny").join(part).join("config.json");
    let mut document: Value = read_json(&path).unwrap();
    document[key] = value.clone();
    serde_json::from_value(document).map_err(|e| e.to_string())
}

#[test]
fn unet_configurations_are_checked_by_name() {
    let check = |key: &str, value: &Value| -> Result<(), String> {
        edited::<UNetConfig>("unet", key, value)?.check().map_err(|e| e.to_string())
    };
    for (key, value) in [
        ("block_out_channels", json!([])),
        ("down_block_types", json!(["DownBlock2D"])),
        ("down_block_types", json!(["DownBlock2D", "AttnDownBlock2D"])),
        ("up_block_types", json!(["UpBlock2D", "UpBlock2D", "UpBlock2D"])),
        ("up_block_types", json!(["SkipUpBlock2D", "UpBlock2D"])),
        ("mid_block_type", json!("UNetMidBlock2D")),
        ("layers_per_block", json!([1, 2, 3])),
        ("transformer_layers_per_block", json!([1])),
        ("attention_head_dim", json!([2, 2, 2])),
        ("attention_head_dim", json!(0)),
        ("attention_head_dim", json!(5)),
        ("num_attention_heads", json!([1])),
        ("num_attention_heads", json!([1, 5])),
        ("norm_num_groups", json!(5)),
        ("norm_num_groups", json!(0)),
        ("addition_embed_type", json!("image")),
        ("addition_time_embed_dim", Value::Null),
        ("projection_class_embeddings_input_dim", Value::Null),
        ("act_fn", json!("gelu")),
        ("center_input_sample", json!(true)),
        ("class_embed_type", json!("timestep")),
        ("conv_in_kernel", json!(5)),
        ("conv_out_kernel", json!(1)),
        ("cross_attention_norm", json!("layer_norm")),
        ("dual_cross_attention", json!(true)),
        ("encoder_hid_dim_type", json!("text_proj")),
        ("mid_block_scale_factor", json!(2)),
        ("only_cross_attention", json!(true)),
        ("resnet_skip_time_act", json!(true)),
        ("resnet_time_scale_shift", json!("scale_shift")),
        ("time_embedding_type", json!("fourier")),
        ("attention_type", json!("gated")),
    ] {
        let error = check(key, &value).expect_err(&format!("{key} = {value}"));
        assert_names(&error, &[key]);
    }
    for (key, value) in [
        ("mid_block_scale_factor", json!(1.0)),
        ("class_embed_type", Value::Null),
        ("num_attention_heads", json!([7, 3])),
        ("layers_per_block", json!([1, 3])),
        ("sample_size", json!([8, 6])),
        ("an_unknown_key", json!("x")),
    ] {
        check(key, &value).unwrap();
    }
    // Wrong types and absent keys, through the file.
    let (_dir, model) = model_copy("ddim_tiny");
    let file = model.join("unet/config.json");
    edit_json(&file, "act_fn", json!("relu"));
    assert_names(&open(&model).unwrap_err(), &["act_fn", "relu"]);
    edit_json(&file, "norm_eps", json!("small"));
    assert_names(&open(&model).unwrap_err(), &["unet", "config.json", "norm_eps", "small"]);
    std::fs::write(&file, "{}").unwrap();
    assert_names(&open(&model).unwrap_err(), &["unet", "config.json", "block_out_channels"]);
}

#[test]
fn vae_and_text_configurations_are_checked_by_name() {
    let folder = fixtures().join("parity/ddim_tiny");
    for (key, value) in [
        ("block_out_channels", json!([])),
        ("down_block_types", json!(["DownEncoderBlock2D", "AttnDownEncoderBlock2D"])),
        ("up_block_types", json!(["AttnUpDecoderBlock2D", "UpDecoderBlock2D"])),
        ("act_fn", json!("relu")),
        ("latents_mean", json!([0.1])),
        ("scaling_factor", json!(0.0)),
        ("norm_num_groups", json!(0)),
        ("norm_num_groups", json!(3)),
    ] {
        let config = edited::<VaeConfig>("vae", key, &value).unwrap();
        let weights = load(&folder.join("vae"), DType::F32).unwrap();
        let error = weights.build(None, |s| Vae::load(s, &config)).expect_err(key).to_string();
        assert_names(&error, &[key]);
    }
    for (key, value) in [
        ("hidden_act", json!("relu")),
        ("num_hidden_layers", json!(0)),
        ("num_attention_heads", json!(0)),
        ("num_attention_heads", json!(3)),
    ] {
        let config = edited::<ClipTextConfig>("text_encoder", key, &value).unwrap();
        let weights = load(&folder.join("text_encoder"), DType::F32).unwrap();
        let error = weights.build(None, |s| ClipText::load(s, &config)).expect_err(key).to_string();
        assert_names(&error, &[key]);
    }
}

#[test]
fn the_hash_is_that_of_the_bytes() {
    let (_dir, model) = model_copy("ddim_tiny");
    let hash = || open(&model).unwrap().sha256().unwrap();
    let first = hash();
    let original = open(&fixtures().join("parity/ddim_tiny")).unwrap().sha256().unwrap();
    assert_eq!(first, original, "the hash depends on where the model lies");
    let mut expected = Sha256::new();
    for part in [
        "text_encoder/model",
        "text_encoder_2/model",
        "unet/diffusion_pytorch_model",
        "vae/diffusion_pytorch_model",
    ] {
        expected.update(std::fs::read(model.join(format!("{part}.safetensors"))).unwrap());
    }
    let expected: String = expected.finalize().iter().map(|b| format!("{b:02x}")).collect();
    assert_eq!(first, expected);
    let file = model.join("vae").join(format!("{STEM}.safetensors"));
    let mut bytes = std::fs::read(&file).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&file, bytes).unwrap();
    assert_ne!(hash(), first);
    assert!(sha256_of(&[model.join("absent")]).unwrap_err().to_string().contains("absent"));
}
