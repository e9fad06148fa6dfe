//! From a finished generation to the bytes of its answer.

use std::collections::BTreeMap;
use std::io::Cursor;
use std::time::Instant;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use image::codecs::jpeg::JpegEncoder;
use image::codecs::png::{CompressionType, FilterType, PngEncoder};
use image::codecs::webp::WebPEncoder;
use image::{ExtendedColorType, ImageEncoder, RgbImage};
use serde::Serialize;
use serde_json::Value;

use crate::engine::request::{CostReport, Generation, ImageFormat, ModelRef, Resolved};

/// A finished generation could not be written; the request is not at fault.
#[derive(Debug, thiserror::Error)]
pub enum AnswerError {
    #[error("an image was not encoded: {0}")]
    Image(#[from] image::ImageError),
    #[error("the answer was not serialised: {0}")]
    Json(#[from] serde_json::Error),
}

const JPEG_QUALITY: u8 = 92;

#[derive(Serialize)]
struct AnswerImage {
    data: String,
    format: ImageFormat,
    seed: u64,
    scores: BTreeMap<String, Option<f64>>,
}

#[derive(Serialize)]
struct Answer {
    id: String,
    images: Vec<AnswerImage>,
    cost: CostReport,
    resolved: Resolved,
    model: ModelRef,
    trace: Vec<Value>,
}

/// Encodes the images and writes the JSON answer. Numbers that are not finite
/// become null. Time spent here is added to the stage "encode".
pub fn write(id: &str, generation: Generation) -> Result<Vec<u8>, AnswerError> {
    let start = Instant::now();
    let Generation { images, mut cost, resolved, model, trace } = generation;
    let format = resolved.output_format;
    let images = images
        .into_iter()
        .map(|image| {
            let mut scores = image.scores;
            for score in scores.values_mut() {
                *score = score.filter(|s| s.is_finite());
            }
            let data = STANDARD.encode(encode(&image.pixels, format)?);
            Ok(AnswerImage { data, format, seed: image.seed, scores })
        })
        .collect::<Result<Vec<_>, AnswerError>>()?;
    *cost.actual.seconds.entry("encode".to_owned()).or_default() += start.elapsed().as_secs_f64();
    let answer = Answer { id: id.to_owned(), images, cost, resolved, model, trace };
    Ok(serde_json::to_vec(&answer)?)
}

/// An image file: PNG with adaptive filters, JPEG at quality 92, lossless WebP.
pub fn encode(pixels: &RgbImage, format: ImageFormat) -> Result<Vec<u8>, image::ImageError> {
    let (width, height) = pixels.dimensions();
    let mut bytes = Cursor::new(Vec::new());
    let color = ExtendedColorType::Rgb8;
    match format {
        ImageFormat::Png => {
            PngEncoder::new_with_quality(&mut bytes, CompressionType::Default, FilterType::Adaptive)
                .write_image(pixels, width, height, color)
        }
        ImageFormat::Jpeg => JpegEncoder::new_with_quality(&mut bytes, JPEG_QUALITY)
            .write_image(pixels, width, height, color),
        ImageFormat::Webp => {
            WebPEncoder::new_lossless(&mut bytes).write_image(pixels, width, height, color)
        }
    }?;
    Ok(bytes.into_inner())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_format_reads_back() {
        let picture = RgbImage::from_fn(48, 32, |x, y| image::Rgb([5 * x as u8, 7 * y as u8, 90]));
        for (format, exact) in
            [(ImageFormat::Png, true), (ImageFormat::Webp, true), (ImageFormat::Jpeg, false)]
        {
            let bytes = encode(&picture, format).unwrap();
            let back = image::load_from_memory(&bytes).unwrap().to_rgb8();
            assert_eq!(back.dimensions(), (48, 32));
            assert_eq!(back == picture, exact, "{format:?}");
        }
    }
}
