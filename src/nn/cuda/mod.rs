//! The layers' operations on NVIDIA GPUs, each with its backward: own kernels, compiled from
//! `kernels/`, and cuBLAS' and cuDNN's. Numbers are f32, f16 or bf16; sums and statistics f32.

mod adamw;
mod attention;
mod conv;
#[cfg(feature = "cudnn")]
mod cudnn;
mod elementwise;
mod gemm;
mod launch;
mod layer;
mod memory;
mod norm;

pub(super) use adamw::{add_scaled, squared_norm, update};
pub(super) use attention::{attends, attention};
pub(super) use elementwise::{activation, geglu};
pub use launch::launches;
pub(super) use layer::apply;
pub use memory::{forget_peak, open, peak_memory, room, takes};
pub(super) use norm::{group_norm, layer_norm};
