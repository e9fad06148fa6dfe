//! What a GPU computes against what the CPU computes: every operation with its gradients, the
//! shipped model's networks, samplers, training steps. Without a GPU these run on the libraries
//! of `tools/cuda_emulator` (docs/gpu.md).
#![cfg(feature = "cuda")]

#[path = "../common/mod.rs"]
mod common;
mod model;
mod operations;
mod optimizer;

use candle_core::{DType, Device, Tensor};
use diffusion_sharpening::nn::device::DeviceChoice;

/// The first GPU, opened once.
fn gpu() -> &'static Device {
    static GPU: std::sync::OnceLock<Device> = std::sync::OnceLock::new();
    GPU.get_or_init(|| DeviceChoice::Cuda(0).open().expect("a GPU"))
}

fn on_gpu(x: &Tensor, dtype: DType) -> Tensor {
    x.to_dtype(dtype).unwrap().to_device(gpu()).unwrap()
}

fn on_cpu(x: &Tensor) -> Tensor {
    x.to_device(&Device::Cpu).unwrap().to_dtype(DType::F32).unwrap()
}
