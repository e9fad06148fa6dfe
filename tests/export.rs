//! Checkpoints written in the other layout by `ds-train export`'s library function.

mod common;

use std::path::Path;

use candle_core::{DType, Device};
use common::{assert_names, fixtures, values};
use diffusion_sharpening::sdxl::Weights;
use diffusion_sharpening::sdxl::export::{Layout, export};

const PARTS: [&str; 4] = ["unet", "vae", "text_encoder", "text_encoder_2"];

fn part(folder: &Path, part: &str, dtype: DType) -> Weights {
    Weights::from_folder(&folder.join(part), dtype, &Device::Cpu).unwrap()
}

/// Through one file and back to a folder: the weights are the original's, rounded once.
#[test]
fn weights_are_rounded_once() {
    let folder = fixtures().join("parity/euler_v_odd");
    let dir = tempfile::tempdir().unwrap();
    let (file, back) = (dir.path().join("model.safetensors"), dir.path().join("back"));
    export(&folder, &file, Layout::Single, DType::F16, &[]).unwrap();
    export(&file, &back, Layout::Diffusers, DType::F16, &[]).unwrap();
    let mut compared = 0;
    for name in PARTS {
        let (original, written) = (part(&folder, name, DType::F16), part(&back, name, DType::F16));
        for (key, tensor) in written.tensors() {
            let plain = key.strip_prefix("text_model.").unwrap_or(key);
            let theirs = original.tensors().get(key).or_else(|| original.tensors().get(plain));
            let Some(theirs) = theirs else { panic!("{name}: {key} is new") };
            assert_eq!(tensor.dtype(), DType::F16);
            assert_eq!(values(tensor), values(theirs), "{name}: {key}");
            compared += 1;
        }
    }
    assert!(compared > 100, "{compared}");
}

#[test]
fn outputs_that_would_not_be_found_are_refused() {
    let folder = fixtures().join("parity/ddim_tiny");
    let dir = tempfile::tempdir().unwrap();
    for (name, layout) in [("model", Layout::Single), ("m.safetensors", Layout::Diffusers)] {
        let out = dir.path().join(name);
        let error = export(&folder, &out, layout, DType::F16, &[]).unwrap_err().to_string();
        assert_names(&error, &["out", "safetensors", name]);
        assert!(!out.exists());
    }
}
