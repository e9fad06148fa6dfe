//! Adapter files of the tools that people use: what tools/lora_fixture.py wrote with diffusers is
//! read to the outputs that PyTorch gives, and what is written here is read back.

mod common;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use common::{assert_names, fixtures, ids, read, relative_error, values};
use diffusion_sharpening::Result;
use diffusion_sharpening::nn::LowRank;
use diffusion_sharpening::nn::device::Placement;
use diffusion_sharpening::sdxl::config::read_json;
use diffusion_sharpening::sdxl::lora::{Adapters, LoraFormat, LoraMap};
use diffusion_sharpening::sdxl::lora_names::{AdapterNames, Network, Part};
use diffusion_sharpening::sdxl::tensor_file::read_metadata;
use diffusion_sharpening::sdxl::weights::write_safetensors;
use diffusion_sharpening::sdxl::{ModelFolder, TextOutput};

fn file(name: &str) -> PathBuf {
    fixtures().join("lora").join(format!("{name}.safetensors"))
}

struct Bench {
    model: ModelFolder,
    names: AdapterNames,
    inputs: HashMap<String, Tensor>,
    expected: HashMap<String, Tensor>,
}

impl Bench {
    fn open() -> Self {
        let folder = fixtures().join("parity/ddim_tiny");
        let model = ModelFolder::open(&folder, &Placement::cpu(DType::F32)).unwrap();
        Self {
            names: model.adapter_names(),
            model,
            inputs: read(&folder.join("reference.safetensors")),
            expected: read(&file("reference")),
        }
    }

    fn read(&self, path: &Path) -> Result<Adapters> {
        Adapters::read(path, &self.names, DType::F32, &Device::Cpu)
    }

    fn unet(&self, adapters: &Adapters) -> Tensor {
        let r = &self.inputs;
        let t = r["timesteps"].to_dtype(DType::F32).unwrap();
        let unet = self.model.unet_with(&adapters.unet).unwrap();
        unet.forward(&r["latents"], &t, &r["hidden_states"], &r["pooled"], &r["time_ids"]).unwrap()
    }

    fn towers(&self, adapters: &Adapters) -> [TextOutput; 2] {
        let rows = ids(&self.expected["ids"]);
        self.model.towers_with(&adapters.text).unwrap().map(|tower| tower.forward(&rows).unwrap())
    }

    fn compare(&self, name: &str, adapters: &Adapters, with_towers: bool, bar: f64) {
        let mut outputs = vec![("unet", self.unet(adapters))];
        let [first, second] = self.towers(adapters);
        if with_towers {
            outputs.push(("text_encoder", first.penultimate));
            outputs.push(("text_encoder_2", second.penultimate));
            outputs.push(("text_encoder_2.pooled", second.pooled));
        }
        for (what, output) in outputs {
            let error = relative_error(&output, &self.expected[what]);
            println!("{name}, {what}: {error:.1e}");
            assert!(error < bar, "{name}, {what}: {error:.1e}");
        }
    }
}

/// Every matrix and scale of an adapter by network and module.
fn parts(adapters: &Adapters) -> BTreeMap<(Network, String), LowRank> {
    let of = |network| {
        let all = adapters.network(network).iter();
        all.map(move |(name, adapter)| ((network, name.to_owned()), adapter.clone()))
    };
    Network::ALL.into_iter().flat_map(of).collect()
}

#[test]
fn files_of_every_naming_give_pytorchs_outputs() {
    let bench = Bench::open();
    let plain = bench.towers(&Adapters::default());
    for (name, towers) in [
        ("kohya", true),
        ("underscored", false),
        ("comfy", false),
        ("diffusers", true),
        ("old", true),
    ] {
        let adapters = bench.read(&file(name)).unwrap();
        let count = adapters.network(Network::UNet).names().count();
        assert_eq!(count, 20, "{name}");
        for (i, text) in adapters.text.iter().enumerate() {
            assert_eq!(text.names().count(), if towers { 6 } else { 0 }, "{name}, tower {i}");
        }
        // diffusers rounds the scaled matrices of old.safetensors to half precision.
        bench.compare(name, &adapters, towers, if name == "old" { 5e-4 } else { 1e-5 });
        let changed = bench.towers(&adapters);
        for (ours, base) in changed.iter().zip(&plain) {
            let same = values(&ours.penultimate) == values(&base.penultimate);
            assert_eq!(same, !towers, "{name}");
        }
    }
}

/// The written files stay in the target folder for tools/lora_fixture.py --check.
#[test]
fn written_files_come_back() {
    let bench = Bench::open();
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("lora");
    let adapters = bench.read(&file("kohya")).unwrap();
    let metadata = BTreeMap::from([
        ("ss_steps".to_owned(), "3".to_owned()),
        ("ss_network_dim".to_owned(), "my own".to_owned()),
    ]);
    for (name, format, bar) in
        [("kohya", LoraFormat::Kohya, 1e-5), ("diffusers", LoraFormat::Diffusers, 5e-4)]
    {
        assert_eq!(name.parse::<LoraFormat>().unwrap(), format);
        let path = folder.join(format!("{name}.safetensors"));
        adapters.write(&path, &bench.names, format, DType::F16, &metadata).unwrap();
        assert!(read(&path).values().all(|t| t.dtype() == DType::F16 || t.rank() == 0));
        let back = bench.read(&path).unwrap();
        bench.compare(name, &back, true, bar);
        let header = read_metadata(&path).unwrap();
        assert_eq!(header["ss_steps"], "3");
        assert_eq!(header["ss_network_dim"], "my own");
        assert_eq!(header["ss_network_alpha"], "1");
        assert_eq!(header["modelspec.architecture"], "stable-diffusion-xl-v1-base/lora");
        // kohya's hash: SHA-256 of all that follows the header.
        let bytes = std::fs::read(&path).unwrap();
        let start = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let data = folder.join("data");
        std::fs::write(&data, &bytes[start..]).unwrap();
        let hash = diffusion_sharpening::sdxl::weights::sha256_of(&[data]).unwrap();
        assert_eq!(header["sshs_model_hash"], hash);
        assert_eq!(header["modelspec.hash_sha256"], format!("0x{hash}"));
        // The same call writes the same bytes.
        adapters.write(&path, &bench.names, format, DType::F16, &metadata).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), bytes);
    }
    // Nothing is lost in kohya's names in f32, whatever the scale.
    for scale in [0.37, 1.0, 2.5] {
        let scaled = |map: &LoraMap| {
            let one =
                |(name, a): (&str, &LowRank)| (name.to_owned(), LowRank { scale, ..a.clone() });
            LoraMap::new(map.iter().map(one).collect())
        };
        let changed = Adapters {
            unet: scaled(&adapters.unet),
            text: [scaled(&adapters.text[0]), scaled(&adapters.text[1])],
        };
        let path = folder.join("scaled.safetensors");
        changed.write(&path, &bench.names, LoraFormat::Kohya, DType::F32, &metadata).unwrap();
        let (ours, back) = (parts(&changed), parts(&bench.read(&path).unwrap()));
        assert!(ours.keys().eq(back.keys()));
        for (key, part) in &ours {
            let other = &back[key];
            assert_eq!(values(&part.down), values(&other.down), "{key:?}");
            assert_eq!(values(&part.up), values(&other.up), "{key:?}");
            assert!((part.scale - other.scale).abs() < 1e-6, "{key:?}");
        }
    }
    let path = folder.join("none.safetensors");
    let none = Adapters::default();
    let error = none.write(&path, &bench.names, LoraFormat::Kohya, DType::F32, &metadata);
    assert_names(&error.unwrap_err().to_string(), &["none.safetensors", "no adapter"]);
    let stranger = parts(&adapters).into_values().next().unwrap();
    let stranger = LoraMap::new(BTreeMap::from([("no.such.module".to_owned(), stranger)]));
    let stranger = Adapters::from(stranger);
    let error = stranger.write(&path, &bench.names, LoraFormat::Kohya, DType::F32, &metadata);
    assert_names(&error.unwrap_err().to_string(), &["no.such.module", "kohya"]);
    assert_names(&"lycoris".parse::<LoraFormat>().unwrap_err().to_string(), &["kohya, diffusers"]);
}

/// `lora_adapter_metadata` in the header decides the scale where no alpha is there.
#[test]
fn the_headers_metadata_sets_the_scale() {
    let bench = Bench::open();
    let (dir, module) = (tempfile::tempdir().unwrap(), "mid_block.attentions.0.proj_in");
    let whole = bench.read(&file("diffusers")).unwrap();
    let rank = whole.unet.get(module).unwrap().down.dim(0).unwrap() as f64;
    let mut tensors: BTreeMap<String, Tensor> = read(&file("comfy")).into_iter().collect();
    tensors.retain(|key, _| !key.ends_with(".alpha"));
    let scale = |metadata: &str| -> Result<f64> {
        let path = dir.path().join("given.safetensors");
        let header = HashMap::from([("lora_adapter_metadata".to_owned(), metadata.to_owned())]);
        write_safetensors(&path, &tensors, Some(header))?;
        Ok(bench.read(&path)?.unet.get(module).unwrap().scale)
    };
    assert_eq!(scale("{}").unwrap(), 1.0);
    assert_eq!(scale(r#"{"unet.lora_alpha": 6}"#).unwrap(), 6.0 / rank);
    assert_eq!(scale(r#"{"text_encoder.lora_alpha": 6}"#).unwrap(), 1.0);
    let stabilised = r#"{"unet.lora_alpha": 6, "unet.use_rslora": true}"#;
    assert_eq!(scale(stabilised).unwrap(), 6.0 / rank.sqrt());
    for (pattern, alpha) in
        [("proj_in", 3.0), ("^proj_in", 6.0), ("attentions.0.proj_in", 3.0), ("oj_in", 6.0)]
    {
        let text = format!(r#"{{"unet.lora_alpha": 6, "unet.alpha_pattern": {{"{pattern}": 3}}}}"#);
        assert_eq!(scale(&text).unwrap(), alpha / rank, "{pattern}");
    }
    for (text, part) in [
        ("no JSON", "lora_adapter_metadata"),
        (r#"{"unet.lora_alpha": "six"}"#, "unet.lora_alpha"),
        (r#"{"unet.lora_alpha": 6, "unet.use_dora": true}"#, "DoRA"),
        (r#"{"unet.lora_alpha": 6, "unet.alpha_pattern": {"attn.*": 3}}"#, "attn.*"),
    ] {
        assert_names(&scale(text).unwrap_err().to_string(), &["given.safetensors", part]);
    }
}

/// The tensors of SDXL itself: (name in Stability's layout, name in diffusers' layout).
fn sdxl_names() -> Vec<(String, String)> {
    let text = std::fs::read_to_string(fixtures().join("single_file/sdxl.tsv")).unwrap();
    let line = |line: &str| {
        let mut fields = line.split('\t').map(str::to_owned);
        (fields.next().unwrap(), fields.next().unwrap())
    };
    text.lines().map(line).collect()
}

/// Names that diffusers' converter maps, of every linear layer and convolution of the real SDXL.
#[test]
fn the_full_size_names_are_kohyas() {
    let all = sdxl_names();
    let modules = |prefix: &str| -> Vec<(String, String)> {
        let module = |(theirs, ours): &(String, String)| {
            let theirs = theirs.strip_prefix(prefix)?.strip_suffix(".weight")?;
            Some((theirs.to_owned(), ours.strip_suffix(".weight")?.to_owned()))
        };
        all.iter().filter_map(module).filter(|(_, ours)| !ours.contains("norm")).collect()
    };
    let unet = modules("model.diffusion_model.");
    let first = modules("conditioner.embedders.0.transformer.");
    let linears = |i: usize| {
        ["self_attn.q_proj", "self_attn.out_proj", "mlp.fc1"]
            .map(|layer| format!("text_model.encoder.layers.{i}.{layer}"))
    };
    let second: Vec<String> = (0..32).flat_map(linears).collect();
    let ours = |pairs: &[(String, String)]| pairs.iter().map(|(_, ours)| ours.clone()).collect();
    let config = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/sdxl/data/unet.json");
    let config = read_json(&config).unwrap();
    let names = AdapterNames::new(&config, [ours(&unet), ours(&first), second.clone()]);
    let attention =
        |m: &&(String, String)| m.1.contains(".transformer_blocks.") || m.1.contains(".proj_");
    assert_eq!(unet.iter().filter(attention).count(), 722);
    assert_eq!(unet.len(), 722 + 17 * 3 + 11 + 2 + 2 + 2 + 2 + 2);
    let mut flat = BTreeSet::new();
    let towers = first.iter().map(|(theirs, ours)| (Network::Text1, theirs.clone(), ours.clone()));
    let second = second.into_iter().map(|m| (Network::Text2, m.clone(), m));
    let unet = unet.into_iter().map(|(theirs, ours)| (Network::UNet, theirs, ours));
    for (network, theirs, ours) in unet.chain(towers).chain(second) {
        let kohya = format!("{}{}", network.kohya(), theirs.replace('.', "_"));
        assert_eq!(names.kohya(network, &ours).as_deref(), Some(kohya.as_str()));
        assert!(flat.insert(kohya.clone()), "{kohya} twice");
        let diffusers = names.diffusers(network, &ours);
        let old = diffusers.replace(".to_out.0", ".to_out").replace("to_", "processor.to_");
        for (key, part) in [
            (format!("{kohya}.lora_down.weight"), Part::Down),
            (format!("{kohya}.lora_up.weight"), Part::Up),
            (format!("{kohya}.alpha"), Part::Alpha),
            (format!("{}{}.lora_down.weight", network.kohya(), ours.replace('.', "_")), Part::Down),
            (format!("{diffusers}.lora_A.weight"), Part::Down),
            (format!("{diffusers}.lora_B.default.weight"), Part::Up),
            (format!("{diffusers}.lora.up.weight"), Part::Up),
            (format!("{diffusers}.lora_linear_layer.down.weight"), Part::Down),
            (
                format!(
                    "{old}{}",
                    if old.contains("processor") { "_lora.up.weight" } else { ".lora_B.weight" }
                ),
                Part::Up,
            ),
        ] {
            assert_eq!(names.parse(&key), Some((network, ours.as_str(), part)), "{key}");
        }
        if network == Network::UNet {
            for key in [
                format!("diffusion_model.{theirs}.lora_A.weight"),
                format!("{ours}.lora.down.weight"),
            ] {
                assert_eq!(names.parse(&key), Some((network, ours.as_str(), Part::Down)), "{key}");
            }
        }
    }
    let example = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.alpha";
    let module = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q";
    assert_eq!(names.parse(example), Some((Network::UNet, module, Part::Alpha)));
    for key in [
        "lora_unet_input_blocks_9_1_proj_in.alpha",
        "lora_te1_input_blocks_4_1_proj_in.alpha",
        "lora_te_text_model_encoder_layers_0_mlp_fc1.alpha",
        "unet.mid_block.attentions.0.proj_in.weight",
        "",
    ] {
        assert_eq!(names.parse(key), None, "{key}");
    }
}
