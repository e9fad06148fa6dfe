//! Low-rank adapters: both naming schemes, what they compute, and what is refused.

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use common::{assert_names, fixtures, low_rank, read, relative_error, values};
use diffusion_sharpening::Result;
use diffusion_sharpening::nn::LowRank;
use diffusion_sharpening::nn::device::Placement;
use diffusion_sharpening::sdxl::lora::{Adapters, LoraMap};
use diffusion_sharpening::sdxl::weights::write_safetensors;
use diffusion_sharpening::sdxl::{ModelFolder, UNet, Weights};

const RANK: usize = 3;

/// Linears with and without bias, and convolutions 3×3, 3×3 with stride 2, 1×1, first and last.
const MODULES: [&str; 9] = [
    "mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
    "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k",
    "up_blocks.0.attentions.1.transformer_blocks.0.ff.net.0.proj",
    "mid_block.attentions.0.proj_in",
    "time_embedding.linear_1",
    "conv_in",
    "down_blocks.0.downsamplers.0.conv",
    "up_blocks.0.resnets.0.conv_shortcut",
    "conv_out",
];

struct Bench {
    dir: tempfile::TempDir,
    model: ModelFolder,
    inputs: std::collections::HashMap<String, Tensor>,
}

impl Bench {
    fn open() -> Self {
        let folder = fixtures().join("parity/ddim_tiny");
        Self {
            dir: tempfile::tempdir().unwrap(),
            model: ModelFolder::open(&folder, &Placement::cpu(DType::F32)).unwrap(),
            inputs: read(&folder.join("reference.safetensors")),
        }
    }

    fn output(&self, unet: &UNet) -> Tensor {
        let r = &self.inputs;
        let t = r["timesteps"].to_dtype(DType::F32).unwrap();
        unet.forward(&r["latents"], &t, &r["hidden_states"], &r["pooled"], &r["time_ids"]).unwrap()
    }

    fn weight(&self, module: &str) -> &Tensor {
        &self.model.unet_weights.tensors()[&format!("{module}.weight")]
    }

    fn pairs(&self) -> BTreeMap<&'static str, (Tensor, Tensor)> {
        let pair = |(i, module): (usize, &&'static str)| {
            (*module, low_rank(10 * i as u64, self.weight(module).dims(), RANK))
        };
        MODULES.iter().enumerate().map(pair).collect()
    }

    fn write(&self, name: &str, tensors: BTreeMap<String, Tensor>) -> PathBuf {
        let path = self.dir.path().join(format!("{name}.safetensors"));
        write_safetensors(&path, &tensors, None).unwrap();
        path
    }

    fn read(&self, path: &Path) -> Result<UNet> {
        let names = self.model.adapter_names();
        let adapters = Adapters::read(path, &names, DType::F32, &Device::Cpu)?;
        self.model.unet_with(&adapters.unet)
    }

    fn file(&self, name: &str, keys: fn(&str) -> [String; 3], alpha: Option<f32>) -> PathBuf {
        let mut tensors = BTreeMap::new();
        for (module, (down, up)) in self.pairs() {
            let [down_key, up_key, alpha_key] = keys(module);
            tensors.insert(down_key, down);
            tensors.insert(up_key, up);
            if let Some(alpha) = alpha {
                tensors.insert(alpha_key, Tensor::new(alpha, &Device::Cpu).unwrap());
            }
        }
        self.write(name, tensors)
    }

    /// The U-Net with `scale` times every update added into the weights.
    fn merged(&self, scale: f64) -> UNet {
        let mut tensors = self.model.unet_weights.tensors().clone();
        for (module, (down, up)) in self.pairs() {
            let weight = self.weight(module);
            let (out, rank) = (weight.dim(0).unwrap(), RANK);
            let up = up.reshape((out, rank)).unwrap();
            let update = up.matmul(&down.reshape((rank, ())).unwrap()).unwrap();
            let update = (update.reshape(weight.dims()).unwrap() * scale).unwrap();
            tensors.insert(format!("{module}.weight"), (weight + update).unwrap());
        }
        let config = &self.model.unet_config;
        Weights::new(tensors, "merged").build(None, |s| UNet::load(s, config)).unwrap()
    }
}

fn peft(module: &str) -> [String; 3] {
    ["lora_A.weight", "lora_B.weight", "alpha"].map(|end| format!("unet.{module}.{end}"))
}

fn old_diffusers(module: &str) -> [String; 3] {
    ["lora.down.weight", "lora.up.weight", "alpha"].map(|end| format!("unet.{module}.{end}"))
}

fn kohya(module: &str) -> [String; 3] {
    let stem = format!("lora_unet_{}", module.replace('.', "_"));
    ["lora_down.weight", "lora_up.weight", "alpha"].map(|end| format!("{stem}.{end}"))
}

#[test]
fn an_adapter_equals_merged_weights_in_every_naming() {
    let bench = Bench::open();
    let plain = bench.output(&bench.model.unet);
    let merged = bench.output(&bench.merged(1.0));
    assert!(relative_error(&merged, &plain) > 0.05, "the adapter does next to nothing");
    let first = bench.output(&bench.read(&bench.file("peft", peft, None)).unwrap());
    let error = relative_error(&first, &merged);
    println!("adapter against merged weights: {error:.1e}");
    assert!(error < 1e-5, "{error:.1e}");
    for (name, keys, alpha) in [
        ("old", old_diffusers as fn(&str) -> [String; 3], None),
        ("kohya", kohya, None),
        ("kohya-alpha", kohya, Some(RANK as f32)),
        ("peft-alpha", peft, Some(RANK as f32)),
    ] {
        let other = bench.output(&bench.read(&bench.file(name, keys, alpha)).unwrap());
        assert_eq!(values(&other), values(&first), "{name}");
    }
}

#[test]
fn alpha_over_rank_scales_the_update() {
    let bench = Bench::open();
    for alpha in [1.0_f32, 6.0, 0.0] {
        let ours = bench.output(&bench.read(&bench.file("alpha", kohya, Some(alpha))).unwrap());
        let scale = f64::from(alpha) / RANK as f64;
        let error = relative_error(&ours, &bench.output(&bench.merged(scale)));
        assert!(error < 1e-5, "alpha {alpha}: {error:.1e}");
    }
}

/// Each kind of module by itself, so that none hides behind another.
#[test]
fn every_module_takes_its_own_adapter() {
    let bench = Bench::open();
    let plain = bench.output(&bench.model.unet);
    for (module, (down, up)) in bench.pairs() {
        let one = |up: &Tensor, scale: f64| {
            let adapter = LowRank { down: down.clone(), up: up.clone(), scale };
            let map = LoraMap::new(BTreeMap::from([(module.to_owned(), adapter)]));
            bench.output(&bench.model.unet_with(&map).unwrap())
        };
        assert_ne!(values(&one(&up, 1.0)), values(&plain), "{module} ignores its adapter");
        let zero = up.zeros_like().unwrap();
        assert_eq!(values(&one(&zero, 1.0)), values(&plain), "{module}: a zero update matters");
        assert_eq!(values(&one(&up, 0.0)), values(&plain), "{module}: a zero scale matters");
    }
}

/// Two keys of one matrix: which of them counts nobody can say.
#[test]
fn a_module_in_two_namings_is_refused() {
    let bench = Bench::open();
    let module = MODULES[3];
    let (down, up) = bench.pairs().remove(module).unwrap();
    let keys = [peft(module), kohya(module)].concat();
    let tensors = [&down, &up, &up, &down, &up, &up];
    let tensors = keys.into_iter().zip(tensors.map(Tensor::clone));
    let tensors = tensors.filter(|(key, _)| !key.ends_with("alpha")).collect();
    let error = bench.read(&bench.write("twice", tensors)).unwrap_err().to_string();
    assert_names(&error, &["twice.safetensors", module, "again"]);
}

#[test]
fn the_base_network_stays_as_it_was() {
    let bench = Bench::open();
    let before = bench.output(&bench.model.unet);
    let adapted = bench.read(&bench.file("peft", peft, None)).unwrap();
    assert_ne!(values(&bench.output(&adapted)), values(&before));
    assert_eq!(values(&bench.output(&bench.model.unet)), values(&before));
}

#[test]
fn unusable_adapters_are_named() {
    let bench = Bench::open();
    let module = "mid_block.attentions.0.proj_in";
    let (down, up) = bench.pairs().remove(module).unwrap();
    let width = down.dim(1).unwrap();
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
    let refused = |name: &str, keys: [String; 3], pair: (Option<&Tensor>, Option<&Tensor>)| {
        let mut tensors = BTreeMap::new();
        let [down_key, up_key, _] = keys;
        tensors.extend(pair.0.map(|t| (down_key, t.clone())));
        tensors.extend(pair.1.map(|t| (up_key, t.clone())));
        bench.read(&bench.write(name, tensors)).unwrap_err().to_string()
    };
    let whole = (Some(&down), Some(&up));
    assert_names(&refused("where", peft("no.such.module"), whole), &["no.such.module"]);
    assert_names(
        &refused("where-kohya", kohya("no.such.module"), whole),
        &["where-kohya.safetensors", "lora_unet_no_such_module"],
    );
    // The U-Net's module in a text tower's name.
    let text = kohya(module).map(|key| key.replace("lora_unet", "lora_te1"));
    assert_names(&refused("text", text, whole), &["text.safetensors", "lora_te1"]);
    for (name, end, kind) in [
        ("dora", "dora_scale", "DoRA"),
        ("dora-peft", "lora_magnitude_vector.weight", "DoRA"),
        ("loha", "hada_w1_a", "LoHa"),
        ("lokr", "lokr_w1", "LoKr"),
        ("tucker", "lora_mid.weight", "lora_mid"),
        ("difference", "diff", "full difference"),
    ] {
        let mut keys = kohya(module);
        keys[0] = keys[0].replace("lora_down.weight", end);
        let error = refused(name, keys.clone(), (Some(&down), None));
        assert_names(
            &error,
            &[&format!("{name}.safetensors"), &keys[0], kind, "supported is LoRA"],
        );
    }
    assert_names(
        &refused("half", peft(module), (Some(&down), None)),
        &["half.safetensors", module],
    );
    assert_names(
        &refused("half-up", peft(module), (None, Some(&up))),
        &["half-up.safetensors", module],
    );
    let wrong = zeros(&[width, RANK + 1]);
    let error = refused("ranks", peft(module), (Some(&down), Some(&wrong)));
    assert_names(&error, &["ranks.safetensors", module, "3", "4"]);
    let wrong = zeros(&[RANK, width + 1]);
    let error = refused("wide", peft(module), (Some(&wrong), Some(&up)));
    assert_names(&error, &[module, "down", "another shape"]);
    let wrong = zeros(&[width + 1, RANK]);
    let error = refused("tall", peft(module), (Some(&down), Some(&wrong)));
    assert_names(&error, &[module, "up", "another shape"]);
    for shape in [&[][..], &[3], &[0, 12]] {
        let error = refused("flat", peft(module), (Some(&zeros(shape)), Some(&up)));
        assert_names(&error, &["flat.safetensors", module]);
    }
    // A convolution's adapter on a linear layer.
    let (down, up) = low_rank(1, &[width, width, 3, 3], RANK);
    let error = refused("conv", peft(module), (Some(&down), Some(&up)));
    assert_names(&error, &[module, "another shape"]);
}
