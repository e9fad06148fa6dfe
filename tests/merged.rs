//! Adapters added into checkpoints, and converted from one naming to another.

mod common;

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use common::{assert_names, fixtures, low_rank, normal, read, relative_error, values};
use diffusion_sharpening::nn::LowRank;
use diffusion_sharpening::nn::device::Placement;
use diffusion_sharpening::sdxl::export::{Layout, export};
use diffusion_sharpening::sdxl::lora::{Adapters, LoraFormat, LoraMap};
use diffusion_sharpening::sdxl::lora_convert::convert;
use diffusion_sharpening::sdxl::merge::Addition;
use diffusion_sharpening::sdxl::tensor_file::read_metadata;
use diffusion_sharpening::sdxl::weights::write_safetensors;
use diffusion_sharpening::sdxl::{ModelFolder, UNet};

const RANK: usize = 3;

fn tiny() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny")
}

fn open(path: &Path) -> ModelFolder {
    ModelFolder::open(path, &Placement::cpu(DType::F32)).unwrap()
}

fn f32s(x: &Tensor) -> Vec<u32> {
    let x: Vec<f32> = x.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap();
    x.into_iter().map(f32::to_bits).collect()
}

/// Random adapters on every second linear layer and convolution of the U-Net and both towers.
fn adapters(model: &ModelFolder, seed: u64, scale: f64) -> Adapters {
    let folder = |name: &str| {
        let path = model.path.join(name);
        diffusion_sharpening::sdxl::Weights::from_folder(&path, DType::F32, &Device::Cpu).unwrap()
    };
    let map = |name: &str| {
        let weights = folder(name);
        let modules = weights.modules().into_iter().filter(|m| !m.contains("embedding"));
        let pair = |(i, module): (usize, String)| {
            let shape = weights.tensors()[&format!("{module}.weight")].dims().to_vec();
            let (down, up) = low_rank(seed + 2 * i as u64, &shape, RANK);
            // Small, so that six layers of them keep the outputs in range.
            let down = (down * 0.2).unwrap();
            (module, LowRank { down, up, scale })
        };
        LoraMap::new(modules.enumerate().step_by(2).map(pair).collect())
    };
    Adapters { unet: map("unet"), text: [map("text_encoder"), map("text_encoder_2")] }
}

fn write(model: &ModelFolder, adapters: &Adapters, path: &Path, format: LoraFormat) {
    let names = model.adapter_names();
    adapters.write(path, &names, format, DType::F32, &BTreeMap::new()).unwrap();
}

fn scaled(adapters: &Adapters, by: f64) -> Adapters {
    let map = |map: &LoraMap| {
        let one = |(name, a): (&str, &LowRank)| {
            (name.to_owned(), LowRank { scale: by * a.scale, ..a.clone() })
        };
        LoraMap::new(map.iter().map(one).collect())
    };
    let [first, second] = &adapters.text;
    Adapters { unet: map(&adapters.unet), text: [map(first), map(second)] }
}

/// The U-Net's output and the towers', on fixed inputs.
fn outputs(
    model: &ModelFolder,
    unet: &UNet,
    towers: [&diffusion_sharpening::sdxl::ClipText; 2],
) -> Vec<Tensor> {
    let f32 = |seed, shape: &[usize]| normal(seed, shape).to_dtype(DType::F32).unwrap();
    let pooled = model.text_2.config().projection_dim;
    let times = Tensor::new(&[801f32, 33.0], &Device::Cpu).unwrap();
    let sizes = Tensor::new(&[[64f32, 64.0, 0.0, 0.0, 64.0, 64.0]; 2], &Device::Cpu).unwrap();
    let context = f32(2, &[2, 8, model.unet_config.cross_attention_dim]);
    let latents = f32(1, &[2, model.unet_config.in_channels, 16, 16]);
    let made = unet.forward(&latents, &times, &context, &f32(3, &[2, pooled]), &sizes).unwrap();
    let ids = model.tokenizers().unwrap().map(|t| vec![t.encode("a red circle").unwrap()]);
    let [first, second] = [0, 1].map(|i| towers[i].forward(&ids[i]).unwrap());
    vec![made, first.penultimate, second.penultimate, second.pooled]
}

fn own(model: &ModelFolder) -> Vec<Tensor> {
    outputs(model, &model.unet, [&model.text_1, &model.text_2])
}

fn adapted(model: &ModelFolder, adapters: &Adapters) -> Vec<Tensor> {
    let [first, second] = model.towers_with(&adapters.text).unwrap();
    outputs(model, &model.unet_with(&adapters.unet).unwrap(), [&first, &second])
}

fn addition(text: impl Into<String>) -> Addition {
    text.into().parse().unwrap()
}

#[test]
fn a_merged_checkpoint_is_the_base_with_its_adapter() {
    let dir = tempfile::tempdir().unwrap();
    let model = open(&tiny());
    let adapters = adapters(&model, 1, 1.5);
    let convolutions = adapters.unet.iter().filter(|(_, a)| a.down.dims().len() == 4).count();
    assert!(convolutions > 5 && adapters.unet.iter().count() > 2 * convolutions, "{convolutions}");
    let file = dir.path().join("lora.safetensors");
    write(&model, &adapters, &file, LoraFormat::Kohya);
    let expected = adapted(&model, &scaled(&adapters, 0.7));
    let plain = own(&model);
    let merged = [addition(format!("{}:0.7", file.display()))];
    for (name, layout) in [("merged.safetensors", Layout::Single), ("merged", Layout::Diffusers)] {
        let out = dir.path().join(name);
        // The tokens are the scene world's: a single file has no place for its tokenizers.
        export(&tiny(), &out, layout, DType::F32, &merged).unwrap();
        let back = open(&out);
        let made = outputs(&model, &back.unet, [&back.text_1, &back.text_2]);
        for (i, (made, expected)) in made.iter().zip(&expected).enumerate() {
            let error = relative_error(made, expected);
            println!("{name}, output {i}: {error:.1e}");
            assert!(error < 1e-5, "{name}, output {i}: {error:.1e}");
            assert!(relative_error(made, &plain[i]) > 0.05, "{name}, output {i} is the base's");
        }
    }
}

/// Two adapters at once, the second taken off: each weight is their sum, rounded once.
#[test]
fn sums_are_rounded_once() {
    let dir = tempfile::tempdir().unwrap();
    let model = open(&tiny());
    let both = [adapters(&model, 1, 0.5), adapters(&model, 1001, 0.25)];
    let files = ["one", "two"].map(|name| dir.path().join(format!("{name}.safetensors")));
    for (adapters, file) in both.iter().zip(&files) {
        write(&model, adapters, file, LoraFormat::Kohya);
    }
    let all =
        [addition(files[0].display().to_string()), addition(format!("{}:-2", files[1].display()))];
    let out = dir.path().join("merged");
    export(&tiny(), &out, Layout::Diffusers, DType::F16, &all).unwrap();
    let written = read(&out.join("unet/diffusion_pytorch_model.safetensors"));
    let (mut changed, mut kept) = (0, 0);
    for (name, weight) in model.unet_weights.tensors() {
        let mut sum = weight.to_dtype(DType::F64).unwrap();
        let module = name.strip_suffix(".weight").unwrap_or(name);
        for (adapters, factor) in both.iter().zip([1.0, -2.0]) {
            let Some(a) = adapters.unet.get(module).filter(|_| name.ends_with(".weight")) else {
                continue;
            };
            let f64 = |x: &Tensor| x.to_dtype(DType::F64).unwrap();
            let up = f64(&a.up).reshape(((), RANK)).unwrap();
            let update = up.matmul(&f64(&a.down).reshape((RANK, ())).unwrap()).unwrap();
            let update = (update * (factor * a.scale)).unwrap().reshape(weight.dims()).unwrap();
            sum = (sum + update).unwrap();
        }
        let written = &written[name];
        assert_eq!(written.dtype(), DType::F16);
        if both[0].unet.get(module).is_none() || !name.ends_with(".weight") {
            assert_eq!(values(written), values(&weight.to_dtype(DType::F16).unwrap()), "{name}");
            kept += 1;
            continue;
        }
        changed += 1;
        // Half a unit in f16's last place, and what f32 sums may be off.
        for (got, exact) in values(written).into_iter().zip(values(&sum)) {
            let unit = 2f64.powi(-11) * exact.abs().max(2f64.powi(-14));
            assert!((got - exact).abs() <= 1.001 * unit + 1e-7, "{name}: {got} for {exact}");
        }
    }
    assert!(changed > 20 && kept > 20, "{changed} changed, {kept} kept");
}

#[test]
fn unusable_additions_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("merged");
    let refused = |file: &Path| {
        let all = [addition(file.display().to_string())];
        let error = export(&tiny(), &out, Layout::Diffusers, DType::F16, &all).unwrap_err();
        assert!(!out.exists());
        error.to_string()
    };
    assert_names(&refused(&dir.path().join("none.safetensors")), &["none.safetensors"]);
    let pair = |module: &str, shape: &[usize]| {
        let (down, up) = low_rank(1, shape, RANK);
        let path = dir.path().join("misfit.safetensors");
        let keys = ["lora_A.weight", "lora_B.weight"].map(|end| format!("unet.{module}.{end}"));
        write_safetensors(&path, &keys.into_iter().zip([down, up]).collect(), None).unwrap();
        path
    };
    let strange = refused(&pair("no.such.module", &[8, 8]));
    assert_names(&strange, &["misfit.safetensors", "no.such.module"]);
    let wide = refused(&pair("time_embedding.linear_1", &[256, 65]));
    assert_names(&wide, &["misfit.safetensors", "unet", "time_embedding.linear_1", "down", "65"]);
    let flat = refused(&pair("conv_in", &[64, 36]));
    assert_names(&flat, &["misfit.safetensors", "conv_in", "down"]);

    assert_eq!(
        addition("a:b.safetensors:-0.5"),
        Addition { file: "a:b.safetensors".into(), scale: -0.5 }
    );
    assert_eq!(
        addition("C:\\a.safetensors"),
        Addition { file: "C:\\a.safetensors".into(), scale: 1.0 }
    );
    for text in ["", ":2", "a:inf", "a:NaN"] {
        let error = text.parse::<Addition>().unwrap_err().to_string();
        assert_names(&error, &["adapter", "FILE:SCALE", text]);
    }
}

/// kohya → diffusers → kohya. The scales are alphas over ranks; those that are no powers of two
/// leave a rounding in the up matrices.
#[test]
fn a_conversion_there_and_back_changes_no_bit() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let folder = fixtures().join("parity/ddim_tiny");
    let model = open(&folder);
    let single = path("model.safetensors");
    export(&folder, &single, Layout::Single, DType::F32, &[]).unwrap();
    for (scale, model_at, exact) in [
        (1.0, &folder, true),
        (0.125, &single, true),
        (4.0, &folder, true),
        (1.0 / 3.0, &folder, false),
    ] {
        let [first, middle, last] = ["1", "2", "3"].map(|n| path(&format!("{n}.safetensors")));
        let header =
            [("ss_steps", "7"), ("title", "mine")].map(|(k, v)| (k.to_owned(), v.to_owned()));
        let written = adapters(&model, 5, scale);
        let names = model.adapter_names();
        let header = BTreeMap::from(header);
        written.write(&first, &names, LoraFormat::Kohya, DType::F32, &header).unwrap();
        convert(
            model_at,
            std::slice::from_ref(&first),
            &middle,
            1.0,
            LoraFormat::Diffusers,
            DType::F32,
        )
        .unwrap();
        assert!(
            read(&middle).keys().all(|key| key.contains(".lora_") && !key.starts_with("lora_"))
        );
        convert(model_at, std::slice::from_ref(&middle), &last, 1.0, LoraFormat::Kohya, DType::F32)
            .unwrap();
        let middle = Adapters::read(&middle, &names, DType::F32, &Device::Cpu).unwrap();
        let error = relative_error(&adapted(&model, &middle)[0], &adapted(&model, &written)[0]);
        assert!(error < 1e-6, "{scale}: {error:.1e}");
        if exact {
            assert_eq!(std::fs::read(&first).unwrap(), std::fs::read(&last).unwrap(), "{scale}");
        }
        let (first, back): (HashMap<_, _>, HashMap<_, _>) = (read(&first), read(&last));
        assert_eq!(first.len(), back.len());
        for (name, tensor) in &first {
            if name.ends_with("lora_up.weight") {
                let pairs = values(tensor).into_iter().zip(values(&back[name]));
                let off =
                    pairs.map(|(a, b)| (a - b).abs() / a.abs().max(1e-30)).fold(0.0, f64::max);
                assert!(off < 2.5e-7, "{scale}, {name}: {off:.1e}");
            } else {
                assert_eq!(f32s(tensor), f32s(&back[name]), "{scale}, {name}");
            }
        }
        let header = read_metadata(&last).unwrap();
        assert_eq!((header["ss_steps"].as_str(), header["title"].as_str()), ("7", "mine"));
    }
}

/// Files that other programs wrote, of a checkpoint of which only configurations are read.
#[test]
fn every_naming_is_converted() {
    let dir = tempfile::tempdir().unwrap();
    let folder = fixtures().join("parity/ddim_tiny");
    let names = open(&folder).adapter_names();
    let model = dir.path().join("model");
    common::copy_dir(&folder, &model);
    for part in ["unet", "vae", "text_encoder", "text_encoder_2"] {
        for entry in std::fs::read_dir(model.join(part)).unwrap().map(Result::unwrap) {
            if entry.path().extension().is_some_and(|e| e == "safetensors") {
                std::fs::remove_file(entry.path()).unwrap();
            }
        }
    }
    for name in ["kohya", "underscored", "comfy", "diffusers", "old"] {
        let file = fixtures().join("lora").join(format!("{name}.safetensors"));
        let original = Adapters::read(&file, &names, DType::F32, &Device::Cpu).unwrap();
        let out = dir.path().join("out.safetensors");
        convert(&model, std::slice::from_ref(&file), &out, 1.0, LoraFormat::Kohya, DType::F32)
            .unwrap();
        let back = Adapters::read(&out, &names, DType::F32, &Device::Cpu).unwrap();
        for (ours, theirs) in [
            (&back.unet, &original.unet),
            (&back.text[0], &original.text[0]),
            (&back.text[1], &original.text[1]),
        ] {
            assert!(ours.names().eq(theirs.names()), "{name}");
            for ((module, ours), (_, theirs)) in ours.iter().zip(theirs.iter()) {
                assert_eq!(f32s(&ours.down), f32s(&theirs.down), "{name}, {module}");
                assert_eq!(f32s(&ours.up), f32s(&theirs.up), "{name}, {module}");
                assert!(
                    (ours.scale - theirs.scale).abs() < 1e-6 * theirs.scale,
                    "{name}, {module}"
                );
            }
        }
    }
    let file = fixtures().join("lora/kohya.safetensors");
    let out = dir.path().join("out.bin");
    let error =
        convert(&model, std::slice::from_ref(&file), &out, 1.0, LoraFormat::Kohya, DType::F32)
            .unwrap_err();
    assert_names(&error.to_string(), &["out", "out.bin", ".safetensors"]);
    let out = dir.path().join("other.safetensors");
    let error =
        convert(&tiny(), std::slice::from_ref(&file), &out, 1.0, LoraFormat::Kohya, DType::F32)
            .unwrap_err();
    assert_names(&error.to_string(), &["kohya.safetensors", "unet", "linear_1", "60", "320"]);
    assert!(!out.exists());
    let none = dir.path().join("none.safetensors");
    let error = convert(
        &model,
        std::slice::from_ref(&none),
        &dir.path().join("o.safetensors"),
        1.0,
        LoraFormat::Kohya,
        DType::F32,
    );
    assert_names(&error.unwrap_err().to_string(), &["none.safetensors"]);
}

/// Several adapters become the mean of their matrices; those that differ in shape are refused.
#[test]
fn adapters_of_one_run_are_averaged() {
    let dir = tempfile::tempdir().unwrap();
    let folder = fixtures().join("parity/ddim_tiny");
    let model = open(&folder);
    let names = model.adapter_names();
    let files: Vec<PathBuf> = (0..3).map(|i| dir.path().join(format!("{i}.safetensors"))).collect();
    let parts: Vec<Adapters> = (5..8).map(|seed| adapters(&model, seed, 0.5)).collect();
    for (file, part) in files.iter().zip(&parts) {
        part.write(file, &names, LoraFormat::Kohya, DType::F32, &BTreeMap::new()).unwrap();
    }
    let out = dir.path().join("mean.safetensors");
    convert(&folder, &files, &out, 1.0, LoraFormat::Kohya, DType::F32).unwrap();
    let mean = Adapters::read(&out, &names, DType::F32, &Device::Cpu).unwrap();
    let mut modules = 0;
    for (module, found) in mean.unet.iter() {
        let of = |part: &Adapters| values(&part.unet.get(module).unwrap().up);
        let all: Vec<_> = parts.iter().map(of).collect();
        for (i, found) in values(&found.up).into_iter().enumerate() {
            let expected = (all[0][i] + all[1][i] + all[2][i]) / 3.0;
            assert!((found - expected).abs() < 1e-6, "{module}: {found} is not {expected}");
        }
        modules += 1;
    }
    assert!(modules > 3);
    let weaker = dir.path().join("weaker.safetensors");
    convert(&folder, &files, &weaker, 0.25, LoraFormat::Kohya, DType::F32).unwrap();
    let weaker = Adapters::read(&weaker, &names, DType::F32, &Device::Cpu).unwrap();
    for (module, found) in weaker.unet.iter() {
        let full = mean.unet.get(module).unwrap();
        assert_eq!(values(&found.down), values(&full.down));
        let quarter: Vec<f64> = values(&full.up).iter().map(|v| 0.25 * v).collect();
        assert_eq!(values(&found.up), quarter, "{module}");
    }
    let other = dir.path().join("other.safetensors");
    let written = adapters(&model, 9, 0.25);
    written.write(&other, &names, LoraFormat::Kohya, DType::F32, &BTreeMap::new()).unwrap();
    let mixed = [files[0].clone(), other];
    let error = convert(&folder, &mixed, &out, 1.0, LoraFormat::Kohya, DType::F32).unwrap_err();
    assert_names(&error.to_string(), &["0.safetensors", "adapted otherwise"]);
}
