//! Latents as images without loss: a decoder for closed-form models, whose rewards can
//! then be computed on exact values.

use candle_core::Tensor;
use image::RgbImage;

use super::denoiser::Decoder;
use crate::Result;

/// Writes the little-endian f32 bytes of a latent into the bytes of an image one row high.
#[derive(Clone, Copy, Debug, Default)]
pub struct PackedDecoder;

impl Decoder for PackedDecoder {
    fn decode(&self, latents: &Tensor) -> Result<Vec<RgbImage>> {
        Ok(latents.flatten_from(1)?.to_vec2::<f32>()?.iter().map(|row| pack(row)).collect())
    }
}

/// An image that `unpack` reads back.
pub fn pack(values: &[f32]) -> RgbImage {
    let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    let mut image = RgbImage::new(bytes.len().div_ceil(3) as u32, 1);
    image.iter_mut().zip(bytes).for_each(|(to, from)| *to = from);
    image
}

/// The values of a packed image; up to two bytes of padding are dropped.
pub fn unpack(image: &RgbImage) -> Vec<f32> {
    let words = image.as_raw().chunks_exact(4);
    words.map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}

#[cfg(test)]
mod tests {
    #[test]
    fn values_survive_exactly() {
        for n in 1..9 {
            let values: Vec<f32> = (0..n).map(|i| (i as f32 + 0.1).sin() * 1e-3).collect();
            assert_eq!(super::unpack(&super::pack(&values)), values);
        }
    }
}
