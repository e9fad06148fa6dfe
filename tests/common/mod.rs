//! What the integration tests share.
#![allow(dead_code)]

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
