//! Nearest-neighbour resampling of channels-last images. candle's own operation loses
//! gradients when its input has a second consumer.

use candle_core::{Result, Tensor};

/// [B, H, W, C] → [B, height, width, C], as PyTorch's `interpolate(mode="nearest")`.
/// A convolution that follows reads the small image itself, see `Conv2d::forward_enlarged`.
pub fn nearest(x: &Tensor, height: usize, width: usize) -> Result<Tensor> {
    let (_, h, w, _) = x.dims4()?;
    if (height, width) == (h, w) {
        return Ok(x.clone());
    }
    let rows = x.contiguous()?.index_select(&indices(h, height, x)?, 1)?;
    rows.index_select(&indices(w, width, x)?, 2)
}

fn indices(from: usize, to: usize, like: &Tensor) -> Result<Tensor> {
    let scale = from as f32 / to as f32;
    let index =
        (0..to).map(|i| ((i as f32 * scale) as u32).min(from as u32 - 1)).collect::<Vec<_>>();
    Tensor::from_vec(index, to, like.device())
}
