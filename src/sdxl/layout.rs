//! Between the outside's layout of images, [B, C, H, W], and the networks', [B, H, W, C].

use candle_core::Tensor;

use crate::Result;

/// [B, C, H, W] → [B, H, W, C].
pub fn to_pixels(x: &Tensor) -> Result<Tensor> {
    Ok(x.permute((0, 2, 3, 1))?.contiguous()?)
}

/// [B, H, W, C] → [B, C, H, W].
pub fn to_planes(x: &Tensor) -> Result<Tensor> {
    Ok(x.permute((0, 3, 1, 2))?.contiguous()?)
}
