//! Differentiable layers over candle's tensors.
//!
//! candle's own fused normalisation and softmax have no backward and say so
//! nowhere, its CPU convolution is several times slower than a matrix product,
//! and its CPU `matmul` misreads some strided inputs. So the hot operations
//! are custom operations here, each with its backward, and every matrix
//! product gets contiguous operands. On other devices and dtypes the same
//! functions fall back to compositions of differentiable candle operations.

pub mod activation;
pub mod attention;
pub mod conv;
pub mod embedding;
mod im2col;
pub mod kernel;
pub mod linear;
pub mod norm;
pub mod resample;
pub mod softmax;

pub use activation::Activation;
pub use attention::attention;
pub use conv::Conv2d;
pub use linear::{Linear, LowRank};
pub use norm::{GroupNorm, LayerNorm};
