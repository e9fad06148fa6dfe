//! A safetensors file as checkpoints and adapters are read: whole, and a header with as many bytes
//! behind it as it asks for.

#![no_main]

use std::sync::OnceLock;

use candle_core::{DType, Device};
use diffusion_sharpening::sdxl::lora::Adapters;
use diffusion_sharpening::sdxl::lora_names::AdapterNames;
use diffusion_sharpening::sdxl::plan::Networks;
use diffusion_sharpening::sdxl::single_config::{Configs, Shapes};
use diffusion_sharpening::sdxl::tensor_file::TensorFile;
use diffusion_sharpening_fuzz::with_file;
use libfuzzer_sys::fuzz_target;

/// Values that a header may ask for here.
const MOST: u64 = 1 << 16;

fn names() -> &'static AdapterNames {
    static NAMES: OnceLock<AdapterNames> = OnceLock::new();
    NAMES.get_or_init(|| {
        let module = |name: &str| vec![name.to_owned()];
        let config = Networks::sdxl().expect("part of the program").unet;
        AdapterNames::new(
            &config,
            [
                module("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"),
                module("text_model.encoder.layers.0.self_attn.q_proj"),
                module("text_model.encoder.layers.0.self_attn.q_proj"),
            ],
        )
    })
}

fn whole(header: &[u8]) -> Option<Vec<u8>> {
    let value: serde_json::Value = serde_json::from_slice(header).ok()?;
    let ends = value.as_object()?.values().filter_map(|t| t["data_offsets"][1].as_u64());
    let bytes = ends.max().unwrap_or(0).min(MOST) as usize;
    let length = (header.len() as u64).to_le_bytes();
    Some([&length[..], header, &vec![0; bytes]].concat())
}

fuzz_target!(|data: &[u8]| {
    let bytes = match data.split_first() {
        Some((b'h', header)) => whole(header),
        _ => Some(data.to_vec()),
    };
    let Some(bytes) = bytes else { return };
    with_file(&bytes, |path| {
        let Ok(file) = TensorFile::open(path) else { return };
        for name in file.names() {
            let _ = file.read(&name, &Device::Cpu);
        }
        let shapes: Shapes = file.shapes().collect();
        if let Ok(configs) = Configs::of(&shapes) {
            let _ = Networks::of(&configs);
        }
        let _ = Adapters::read(path, names(), DType::F32, &Device::Cpu);
    });
});
