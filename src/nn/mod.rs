//! Differentiable layers over candle's tensors. Images are channels-last, [B, H, W, C], so
//! that their positions are the tokens of a transformer without a copy.
//!
//! candle's own fused normalisation and softmax have no backward and say so
//! nowhere, its CPU convolution is several times slower than a matrix product,
//! and its CPU `matmul` misreads some strided inputs. So the hot operations
//! are kernels here, each with its backward, which compute gradients only of
//! what is being trained. On other devices and dtypes the same functions fall
//! back to compositions of differentiable candle operations.

pub mod activation;
pub mod adamw;
mod affine;
pub mod attention;
pub mod autograd;
pub mod checkpoint;
pub mod conv;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod device;
pub mod device_memory;
pub mod embedding;
mod flash;
pub mod gemm;
mod group_norm;
pub mod kernel;
pub mod layer;
pub mod linear;
pub mod memory;
pub mod norm;
pub mod resample;
pub mod simd;
pub mod threads;
mod window;
mod winograd;

pub use activation::{Activation, geglu};
pub use attention::attention;
pub use checkpoint::{Recompute, checkpoint};
pub use conv::Conv2d;
pub use layer::{Added, LowRank};
pub use linear::Linear;
pub use norm::{GroupNorm, LayerNorm};
