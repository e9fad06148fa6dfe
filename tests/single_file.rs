//! Checkpoints in one file: names and configuration of the real SDXL, the file that
//! tools/single_file_fixture.py checked with diffusers' converters, exports, and what is refused.

mod common;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use common::{assert_names, fixtures, low_rank, normal, parity_models, read, values};
use diffusion_sharpening::engine::{Backend, Engine, request::GenerateRequest};
use diffusion_sharpening::nn::device::Placement;
use diffusion_sharpening::sdxl::config::read_json;
use diffusion_sharpening::sdxl::export::{Layout, export};
use diffusion_sharpening::sdxl::folder::OpenOptions;
use diffusion_sharpening::sdxl::key_names;
use diffusion_sharpening::sdxl::single_config::{Configs, Shapes};
use diffusion_sharpening::sdxl::weights::write_safetensors;
use diffusion_sharpening::sdxl::{ClipTokenizer, ModelFolder, Weights};
use diffusion_sharpening::util::CancelToken;
use serde_json::{Value, json};

const PARTS: [&str; 4] = ["unet", "vae", "text_encoder", "text_encoder_2"];
const PREFIXES: [&str; 4] = [
    "model.diffusion_model.",
    "first_stage_model.",
    "conditioner.embedders.0.transformer.",
    "conditioner.embedders.1.model.",
];

struct Line {
    theirs: String,
    /// Empty for a tensor that becomes several or another one.
    ours: String,
    shape: Vec<usize>,
}

fn lines(name: &str) -> Vec<Line> {
    let text = std::fs::read_to_string(fixtures().join("single_file").join(name)).unwrap();
    let line = |line: &str| {
        let fields: Vec<&str> = line.split('\t').collect();
        let shape = fields[2].split(',').map(|n| n.parse().unwrap()).collect();
        Line { theirs: fields[0].into(), ours: fields[1].into(), shape }
    };
    text.lines().map(line).collect()
}

fn open(path: &Path) -> Result<ModelFolder, String> {
    ModelFolder::open(path, &Placement::cpu(DType::F32)).map_err(|e| e.to_string())
}

#[test]
fn sdxls_shapes_give_its_configuration() {
    let shapes: Shapes = lines("sdxl.tsv").into_iter().map(|l| (l.theirs, l.shape)).collect();
    let found = serde_json::to_value(Configs::of(&shapes).unwrap()).unwrap();
    for part in ["unet", "vae", "text_encoder", "text_encoder_2", "scheduler", "model_index"] {
        let file = format!("src/sdxl/data/{part}.json");
        let data: Value = read_json(&Path::new(env!("CARGO_MANIFEST_DIR")).join(file)).unwrap();
        for (field, value) in data.as_object().unwrap() {
            assert_eq!(&found[part][field], value, "{part}.{field}");
        }
    }
}

/// diffusers' converters make the right column of the left one.
#[test]
fn every_name_of_sdxl_goes_both_ways() {
    for (file, changed) in [("sdxl.tsv", false), ("small.tsv", true)] {
        let shapes: Shapes = lines(file).into_iter().map(|l| (l.theirs, l.shape)).collect();
        let configs = Configs::of(&shapes).unwrap();
        assert_eq!(configs.unet["block_out_channels"] == json!([32, 64, 128]), changed);
        let unet = serde_json::from_value(configs.unet).unwrap();
        let layers = configs.text_encoder_2["num_hidden_layers"].as_u64().unwrap() as usize;
        let maps = [
            key_names::unet(&unet),
            key_names::vae(4, 2),
            key_names::clip(),
            key_names::open_clip(layers),
        ];
        let mut apart = 0;
        for line in lines(file) {
            let i = PREFIXES.iter().position(|p| line.theirs.starts_with(p)).unwrap();
            let theirs = &line.theirs[PREFIXES[i].len()..];
            if line.ours.is_empty() {
                apart += 1;
                assert!(theirs.contains("in_proj_") || theirs == "text_projection", "{theirs}");
                continue;
            }
            assert_eq!(maps[i].theirs(&line.ours).as_deref(), Some(theirs));
            assert_eq!(maps[i].ours(theirs), Some(line.ours));
        }
        assert_eq!(apart, 1 + 2 * layers);
        for stranger in ["input_blocks.99.0.in_layers.0.weight", "model", "", "in.0"] {
            assert!(maps.iter().all(|map| map.ours(stranger).is_none()), "{stranger}");
        }
    }
}

/// A component's tensors with the towers' names as transformers 4 has them, and the VAE's as
/// today's diffusers.
fn component(folder: &Path, part: &str) -> BTreeMap<String, Tensor> {
    let weights = Weights::from_folder(&folder.join(part), DType::F32, &Device::Cpu).unwrap();
    let name = |name: String| {
        if part.starts_with("text") && !name.starts_with("text_") {
            return format!("text_model.{name}");
        }
        let old = [(".query.", ".to_q."), (".key.", ".to_k."), (".value.", ".to_v.")];
        let all = old.into_iter().chain([(".proj_attn.", ".to_out.0.")]);
        all.fold(name, |name, (from, to)| name.replace(from, to))
    };
    let all = weights.into_tensors().into_iter().filter(|(k, _)| !k.ends_with("position_ids"));
    all.map(|(key, tensor)| (name(key), tensor)).collect()
}

fn same(a: &BTreeMap<String, Tensor>, b: &BTreeMap<String, Tensor>, what: &str) {
    let keys = |map: &BTreeMap<String, Tensor>| map.keys().cloned().collect::<BTreeSet<_>>();
    assert_eq!(keys(a), keys(b), "{what}");
    for (name, tensor) in a {
        assert_eq!(tensor.dims(), b[name].dims(), "{what}: {name}");
        assert_eq!(values(tensor), values(&b[name]), "{what}: {name}");
    }
}

#[test]
fn the_fixture_is_the_folder() {
    let folder = fixtures().join("parity/euler_sdxl_shape");
    let file = fixtures().join("single_file/model.safetensors");
    let (model, original) = (open(&file).unwrap(), open(&folder).unwrap());
    let dir = tempfile::tempdir().unwrap();
    model.save(dir.path(), DType::F16, 1 << 40).unwrap();
    for part in PARTS {
        same(&component(dir.path(), part), &component(&folder, part), part);
    }
    assert_eq!(model.default_size(), original.default_size());
    assert_eq!(model.force_zeros_for_empty_prompt, original.force_zeros_for_empty_prompt);
    let of = |model: &ModelFolder| model.scheduler::<Value>().unwrap();
    assert_eq!(of(&model), of(&original));
    let bytes = diffusion_sharpening::sdxl::weights::sha256_of(&[file]).unwrap();
    assert_eq!(model.sha256().unwrap(), bytes);
    let error = model.tokenizers().unwrap_err().to_string();
    assert_names(&error, &["model.safetensors", "99", "49408"]);
    // What was exported here has the same tensors; the file stays for the script's --check.
    let export = Path::new(env!("CARGO_TARGET_TMPDIR")).join("single/model.safetensors");
    let metadata = BTreeMap::from([("modelspec.title".to_owned(), "Fixture".to_owned())]);
    original.save_single_file(&export, DType::F16, &metadata).unwrap();
    let ignored = |k: &String| {
        ["model_ema", "denoiser", "logit_scale", "position_ids"].iter().any(|i| k.contains(i))
    };
    let theirs = read(&fixtures().join("single_file/model.safetensors"));
    let theirs = theirs.into_iter().filter(|(k, _)| !ignored(k)).collect();
    same(&read(&export).into_iter().collect(), &theirs, "export");
    let header = diffusion_sharpening::sdxl::tensor_file::read_metadata(&export).unwrap();
    assert_eq!(header["modelspec.title"], "Fixture");
    assert_eq!(header["modelspec.prediction_type"], "epsilon");
    assert_eq!(header["modelspec.architecture"], "stable-diffusion-xl-v1-base");
}

#[test]
fn folders_go_to_files_and_back() {
    let dir = tempfile::tempdir().unwrap();
    for folder in parity_models() {
        let name = folder.file_name().unwrap().to_string_lossy().into_owned();
        let (file, back) = (dir.path().join(format!("{name}.safetensors")), dir.path().join(&name));
        let model = open(&folder).unwrap();
        model.save_single_file(&file, DType::F32, &BTreeMap::new()).unwrap();
        let single = open(&file).unwrap_or_else(|e| panic!("{name}: {e}"));
        single.save(&back, DType::F32, 1 << 40).unwrap();
        for part in PARTS {
            let what = format!("{name}, {part}");
            same(&component(&back, part), &component(&folder, part), &what);
        }
        let again = open(&back).unwrap();
        let of = |model: &ModelFolder| model.scheduler::<Value>().unwrap();
        assert_eq!(of(&again), of(&model), "{name}");
        assert_eq!(of(&single), of(&model), "{name}");
        let v = of(&model)["prediction_type"] == "v_prediction";
        assert_eq!(read(&file).contains_key("v_pred"), v, "{name}");
    }
}

/// The reduced SDXL of small.tsv with random weights, as tensors of a single file.
fn small(vocabulary: usize) -> BTreeMap<String, Tensor> {
    let line = |(i, line): (usize, Line)| {
        let mut shape = line.shape;
        if line.theirs.ends_with("token_embedding.weight") {
            shape[0] = vocabulary;
        }
        let scale = if shape.len() > 1 { 0.05 } else { 0.3 };
        let tensor = (normal(i as u64, &shape) * scale).unwrap().to_dtype(DType::F16).unwrap();
        (line.theirs, tensor)
    };
    lines("small.tsv").into_iter().enumerate().map(line).collect()
}

fn written(dir: &Path, name: &str, tensors: &BTreeMap<String, Tensor>) -> PathBuf {
    let path = dir.join(format!("{name}.safetensors"));
    write_safetensors(&path, tensors, None).unwrap();
    path
}

#[test]
fn unusable_files_are_named_in_their_own_words() {
    let dir = tempfile::tempdir().unwrap();
    let whole = small(100);
    let model = open(&written(dir.path(), "whole", &whole)).unwrap();
    assert_eq!(model.unet_config.heads(2), 2);
    assert_eq!(model.unet_config.addition_time_embed_dim, Some(32));
    let refused = |name: &str, edit: &dyn Fn(&mut BTreeMap<String, Tensor>), parts: &[&str]| {
        let mut tensors = whole.clone();
        edit(&mut tensors);
        let error = open(&written(dir.path(), name, &tensors)).map(|_| ()).expect_err(name);
        assert_names(&error, &[&format!("{name}.safetensors")]);
        assert_names(&error, parts);
    };
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F16, &Device::Cpu).unwrap();
    for key in [
        "model.diffusion_model.output_blocks.4.1.transformer_blocks.0.attn2.to_v.weight",
        "model.diffusion_model.label_emb.0.2.bias",
        "first_stage_model.decoder.up.1.block.0.nin_shortcut.weight",
        "first_stage_model.encoder.mid.attn_1.q.weight",
        "conditioner.embedders.0.transformer.text_model.encoder.layers.1.mlp.fc2.bias",
        "conditioner.embedders.1.model.transformer.resblocks.2.attn.in_proj_bias",
        "conditioner.embedders.1.model.transformer.resblocks.0.ln_2.weight",
        "conditioner.embedders.1.model.ln_final.bias",
        "conditioner.embedders.1.model.text_projection",
        "conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight",
        "model.diffusion_model.input_blocks.0.0.weight",
    ] {
        assert!(whole.contains_key(key), "{key}");
        refused("lacking", &|t| drop(t.remove(key)), &[key, "missing"]);
        if key.ends_with("bias") || key.contains("ln_") {
            let wrong = |t: &mut BTreeMap<String, Tensor>| drop(t.insert(key.into(), zeros(&[9])));
            refused("wrong", &wrong, &[key, "another shape"]);
        }
    }
    let key = "model.diffusion_model.input_blocks.8.1.transformer_blocks.0.attn3.to_q.weight";
    let add = |t: &mut BTreeMap<String, Tensor>| drop(t.insert(key.into(), zeros(&[2, 2])));
    refused("layer", &add, &[key, "not part of the network"]);
    for key in [
        "first_stage_model.encoder.up.0.weight",
        "conditioner.embedders.2.weight",
        "cond_stage_model.transformer.weight",
        "edm_vpred.sigma_max",
    ] {
        refused(
            "stranger",
            &|t| drop(t.insert(key.into(), zeros(&[2, 2]))),
            &[key, "SDXL has not"],
        );
    }
    let narrow = "model.diffusion_model.label_emb.0.0.weight";
    refused("sizes", &|t| drop(t.insert(narrow.into(), zeros(&[128, 130]))), &[narrow, "130"]);
    let prefix = "model.diffusion_model.";
    refused("no-unet", &|t| t.retain(|k, _| !k.starts_with(prefix)), &["no SDXL", prefix]);
    std::fs::write(dir.path().join("text.safetensors"), "not a checkpoint").unwrap();
    assert_names(&open(&dir.path().join("text.safetensors")).unwrap_err(), &["text.safetensors"]);
}

#[test]
fn markers_of_velocity_prediction_count() {
    let dir = tempfile::tempdir().unwrap();
    let mut tensors = small(100);
    let empty = Tensor::zeros(0, DType::F32, &Device::Cpu).unwrap();
    let scheduler = |tensors: &BTreeMap<String, Tensor>| {
        open(&written(dir.path(), "v", tensors)).unwrap().scheduler::<Value>().unwrap()
    };
    assert_eq!(scheduler(&tensors)["prediction_type"], "epsilon");
    tensors.insert("v_pred".into(), empty.clone());
    assert_eq!(scheduler(&tensors)["prediction_type"], "v_prediction");
    assert_eq!(scheduler(&tensors)["rescale_betas_zero_snr"], false);
    tensors.insert("ztsnr".into(), empty);
    assert_eq!(scheduler(&tensors)["rescale_betas_zero_snr"], true);
}

/// A VAE from elsewhere: a folder, another checkpoint's, a file in either naming.
#[test]
fn another_vae_takes_the_place_of_the_own_one() {
    let dir = tempfile::tempdir().unwrap();
    let (own, all) = (fixtures().join("parity/ddim_tiny"), small(100));
    let whole = written(dir.path(), "whole", &all);
    let other = open(&whole).unwrap();
    let bare = |(k, t): (&String, &Tensor)| {
        Some((k.strip_prefix("first_stage_model.")?.to_owned(), t.clone()))
    };
    let ldm = written(dir.path(), "ldm", &all.iter().filter_map(bare).collect());
    other.save(&dir.path().join("saved"), DType::F16, 1 << 40).unwrap();
    let folder = dir.path().join("saved/vae");
    let diffusers = folder.join("diffusion_pytorch_model.safetensors");
    let latents = normal(3, &[1, 4, 4, 6]).to_dtype(DType::F32).unwrap();
    let expected = values(&other.vae.decode(&latents).unwrap());
    assert_ne!(values(&open(&own).unwrap().vae.decode(&latents).unwrap()), expected);
    let with = |vae: &Path| {
        let options = OpenOptions { vae: Some(vae.to_path_buf()), ..OpenOptions::default() };
        ModelFolder::open_with(&own, &Placement::cpu(DType::F32), &options)
    };
    let mut sums = BTreeSet::from([open(&own).unwrap().sha256().unwrap()]);
    for vae in [&whole, &ldm, &folder, &diffusers] {
        let model = with(vae).unwrap_or_else(|e| panic!("{}: {e}", vae.display()));
        assert_eq!(values(&model.vae.decode(&latents).unwrap()), expected, "{}", vae.display());
        sums.insert(model.sha256().unwrap());
        // It belongs to what is saved.
        let out = tempfile::tempdir().unwrap();
        model.save(out.path(), DType::F32, 1 << 40).unwrap();
        let again = open(out.path()).unwrap();
        assert_eq!(values(&again.vae.decode(&latents).unwrap()), expected);
        let file = out.path().join("one.safetensors");
        model.save_single_file(&file, DType::F32, &BTreeMap::new()).unwrap();
        assert_eq!(values(&open(&file).unwrap().vae.decode(&latents).unwrap()), expected);
    }
    // The folder and its file hold the same bytes.
    assert_eq!(sums.len(), 4);
    let key = "decoder.up.1.block.0.nin_shortcut.weight";
    let mut lacking: BTreeMap<String, Tensor> = read(&ldm).into_iter().collect();
    lacking.remove(key).unwrap();
    let error = with(&written(dir.path(), "lacking", &lacking)).unwrap_err().to_string();
    assert_names(&error, &["lacking.safetensors", "missing", key]);
    let adapter = fixtures().join("lora/kohya.safetensors");
    assert_names(
        &with(&adapter).unwrap_err().to_string(),
        &["kohya.safetensors", "no tensor of a VAE"],
    );
}

#[test]
fn a_vae_beside_a_checkpoint_is_exported_with_it() {
    let dir = tempfile::tempdir().unwrap();
    let (model, out) = (dir.path().join("a.safetensors"), dir.path().join("b.safetensors"));
    let folder = fixtures().join("parity/ddim_tiny");
    export(&folder, &model, Layout::Single, DType::F32, &[]).unwrap();
    let own = open(&model).unwrap();
    let other = open(&written(dir.path(), "a.vae", &small(100))).unwrap();
    export(&model, &out, Layout::Single, DType::F32, &[]).unwrap();
    let latents = normal(3, &[1, 4, 4, 6]).to_dtype(DType::F32).unwrap();
    let decoded = |model: &ModelFolder| values(&model.vae.decode(&latents).unwrap());
    assert_eq!(decoded(&open(&out).unwrap()), decoded(&other));
    assert_ne!(decoded(&own), decoded(&other));
}

/// `NAME.safetensors`, `NAME.vae.safetensors` and `NAME.adapters` in a folder of models.
#[test]
fn the_engine_serves_single_files() {
    let dir = tempfile::tempdir().unwrap();
    let tensors = small(49408);
    let file = written(dir.path(), "small", &tensors);
    common::copy_dir(&fixtures().join("parity/ddim_tiny"), &dir.path().join("folder"));
    let adapters = dir.path().join("small.adapters");
    std::fs::create_dir(&adapters).unwrap();
    let (down, up) = low_rank(1, &[64, 64], 2);
    let stem = "lora_te1_text_model_encoder_layers_0_self_attn_v_proj";
    let strong = |x: Tensor| (x * 20.0).unwrap();
    let lora = BTreeMap::from([
        (format!("{stem}.lora_down.weight"), strong(down)),
        (format!("{stem}.lora_up.weight"), strong(up)),
    ]);
    written(&adapters, "words", &lora);
    let request = |adapter: Option<&str>| -> GenerateRequest {
        let fields = json!({
            "prompt": "a red circle", "model": "small", "seed": 1, "steps": 2,
            "width": 64, "height": 64, "adapter": adapter,
        });
        serde_json::from_value(fields).unwrap()
    };
    let run = |engine: &Engine, adapter: Option<&str>| {
        let planned = engine.plan(&request(adapter)).unwrap();
        let made = engine.generate(&planned, &CancelToken::default(), &mut |_| {}).unwrap();
        made.images[0].pixels.clone().into_raw()
    };
    let engine = Engine::open(dir.path(), &Placement::cpu(DType::F32)).unwrap();
    let ids: Vec<String> = engine.models().into_iter().map(|m| m.id).collect();
    assert_eq!(ids, ["folder", "small"]);
    assert_eq!(engine.models()[1].adapters, ["words"]);
    assert_eq!((engine.models()[1].default_width, engine.models()[1].default_height), (1024, 1024));
    let plain = run(&engine, None);
    assert!(plain.iter().collect::<BTreeSet<_>>().len() > 8, "an image of nothing");
    assert_ne!(run(&engine, Some("words")), plain);
    let one = Engine::open(&file, &Placement::cpu(DType::F32)).unwrap();
    assert_eq!(run(&one, None), plain);
    // Another VAE beside it.
    let vae = tensors.iter().filter(|(k, _)| k.starts_with("first_stage_model."));
    let changed = vae.map(|(k, t)| (k.clone(), (t * 0.5).unwrap())).collect();
    written(dir.path(), "small.vae", &changed);
    let with = Engine::open(dir.path(), &Placement::cpu(DType::F32)).unwrap();
    let ids: Vec<String> = with.models().into_iter().map(|m| m.id).collect();
    assert_eq!(ids, ["folder", "small"]);
    assert_ne!(run(&with, None), plain);
    assert_ne!(with.models()[1].sha256, engine.models()[1].sha256);
    // The same in a folder.
    assert_eq!(with.models()[0].sha256, engine.models()[0].sha256);
    let (from, to) = ("small.vae.safetensors", "folder/vae.safetensors");
    std::fs::copy(dir.path().join(from), dir.path().join(to)).unwrap();
    let with = Engine::open(dir.path(), &Placement::cpu(DType::F32)).unwrap();
    assert_ne!(with.models()[0].sha256, engine.models()[0].sha256);
    common::copy_dir(&fixtures().join("parity/ddim_tiny"), &dir.path().join("small"));
    let Err(error) = Engine::open(dir.path(), &Placement::cpu(DType::F32)) else {
        panic!("two models of one name")
    };
    assert_names(&error.to_string(), &["small", "another checkpoint"]);
}

/// transformers' ids with OpenAI's vocabulary, from tools/tokenizer_fixture.py.
#[test]
fn clips_vocabulary_is_built_in() {
    let text = std::fs::read_to_string(fixtures().join("clip_tokens.json")).unwrap();
    let cases: Vec<Value> = serde_json::from_str(&text).unwrap();
    assert!(cases.len() > 390);
    let pads = ["<|endoftext|>", "!"];
    let all: HashMap<&str, ClipTokenizer> =
        pads.iter().map(|pad| (*pad, ClipTokenizer::open_ai(pad).unwrap())).collect();
    let mut wrong = Vec::new();
    for case in &cases {
        let tokenizer = &all[case["pad"].as_str().unwrap()];
        let mut ids: Vec<u32> = serde_json::from_value(case["ids"].clone()).unwrap();
        ids.resize(77, if case["pad"] == "!" { 0 } else { 49407 });
        let ours = tokenizer.encode(case["text"].as_str().unwrap()).unwrap();
        if ours != ids {
            wrong.push(format!("{} {}: {ours:?}", case["pad"], case["text"]));
        }
    }
    assert!(wrong.is_empty(), "{} of {}: {wrong:#?}", wrong.len(), cases.len());
    let error = ClipTokenizer::open_ai("two words").unwrap_err().to_string();
    assert_names(&error, &["pad_token", "two words"]);
}
