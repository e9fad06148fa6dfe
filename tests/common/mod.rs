//! What the integration tests share.
#![allow(dead_code)]

pub mod layers;
pub mod training;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use diffusion_sharpening::sdxl::weights::read_safetensors;

pub fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

/// Every model folder that the Python script made.
pub fn parity_models() -> Vec<PathBuf> {
    let mut folders: Vec<PathBuf> = std::fs::read_dir(fixtures().join("parity"))
        .expect("parity fixtures")
        .map(|e| e.expect("entry").path())
        .filter(|p| p.join("reference.safetensors").is_file())
        .collect();
    folders.sort();
    assert!(folders.len() >= 8, "expected at least eight configurations, got {}", folders.len());
    folders
}

pub fn read(path: &Path) -> HashMap<String, Tensor> {
    read_safetensors(path, &Device::Cpu).expect("fixture")
}

pub fn values(x: &Tensor) -> Vec<f64> {
    x.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// ‖a − b‖ / ‖b‖.
pub fn relative_error(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.dims(), b.dims(), "shapes differ");
    let (a, b) = (values(a), values(b));
    let difference: f64 = a.iter().zip(&b).map(|(a, b)| (a - b).powi(2)).sum();
    let norm: f64 = b.iter().map(|b| b * b).sum();
    (difference / norm.max(1e-300)).sqrt()
}

pub fn ids(x: &Tensor) -> Vec<Vec<u32>> {
    let rows: Vec<Vec<i64>> = x.to_dtype(DType::I64).unwrap().to_vec2().unwrap();
    rows.into_iter().map(|r| r.into_iter().map(|v| v as u32).collect()).collect()
}

/// Unit normals [shape] in f64, the same for the same seed.
pub fn normal(seed: u64, shape: &[usize]) -> Tensor {
    use rand::SeedableRng;
    use rand_distr::Distribution;
    let rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
    let count = shape.iter().product();
    let values: Vec<f64> = rand_distr::StandardNormal.sample_iter(rng).take(count).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

pub fn copy_dir(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy_dir(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).unwrap();
        }
    }
}

/// A writable copy of one fixture, called `model` in a temporary folder.
pub fn model_copy(name: &str) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    copy_dir(&fixtures().join("parity").join(name), &model);
    (dir, model)
}

/// Changes one top-level key of a JSON file.
pub fn edit_json(path: &Path, key: &str, value: serde_json::Value) {
    let text = std::fs::read_to_string(path).unwrap();
    let mut document: serde_json::Value = serde_json::from_str(&text).unwrap();
    document[key] = value;
    std::fs::write(path, document.to_string()).unwrap();
}

pub fn assert_names(error: &str, parts: &[&str]) {
    for part in parts {
        assert!(error.contains(part), "'{part}' is not named in: {error}");
    }
}

/// An adapter for `module` with a weight of this shape, [out, in] or [out, in, kh, kw].
pub fn low_rank(seed: u64, weight: &[usize], rank: usize) -> (Tensor, Tensor) {
    let mut down = weight.to_vec();
    down[0] = rank;
    let mut up = vec![1; weight.len()];
    (up[0], up[1]) = (weight[0], rank);
    let f32 = |x: Tensor| (x * 0.2).unwrap().to_dtype(DType::F32).unwrap();
    (f32(normal(seed, &down)), f32(normal(seed + 1, &up)))
}
