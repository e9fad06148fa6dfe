//! Images as files.

use std::fmt::Write;
use std::io::Cursor;

use image::codecs::jpeg::JpegEncoder;
use image::codecs::webp::WebPEncoder;
use image::error::{EncodingError, ImageFormatHint};
use image::{ExtendedColorType, ImageEncoder, ImageError, RgbImage};

use super::request::{ImageFormat, ModelRef, Resolved};

const JPEG_QUALITY: u8 = 92;

/// How an image was made, in the words that A1111 writes into a PNG as `parameters` and that
/// many programs read.
#[must_use]
pub fn parameters(resolved: &Resolved, seed: u64, model: &ModelRef) -> String {
    let mut text = resolved.prompt.clone();
    if let Some(negative) = &resolved.negative_prompt {
        text += "\nNegative prompt: ";
        text += negative;
    }
    // Writing to a string does not fail.
    let _ = write!(
        text,
        "\nSteps: {}, Sampler: {}, CFG scale: {}, Seed: {seed}, Size: {}x{}, Model hash: {}, \
         Model: {}",
        resolved.steps,
        resolved.solver,
        resolved.guidance_scale,
        resolved.width,
        resolved.height,
        model.sha256.get(..10).unwrap_or(&model.sha256),
        model.id
    );
    if let Some(adapter) = &resolved.adapter {
        let _ = write!(text, ", Adapter: {adapter}");
    }
    let _ = write!(
        text,
        ", Method: {}, Version: diffusion-sharpening {}",
        resolved.method_name(),
        env!("CARGO_PKG_VERSION")
    );
    text
}

/// An image file: PNG with adaptive filters and `parameters` as text, JPEG at quality 92, or
/// lossless WebP.
///
/// # Errors
/// The encoder's.
pub fn encode(
    pixels: &RgbImage,
    format: ImageFormat,
    parameters: &str,
) -> Result<Vec<u8>, ImageError> {
    let (width, height) = pixels.dimensions();
    let mut bytes = Cursor::new(Vec::new());
    let color = ExtendedColorType::Rgb8;
    match format {
        ImageFormat::Png => write_png(pixels, parameters, &mut bytes).map_err(|e| {
            ImageError::Encoding(EncodingError::new(ImageFormatHint::Name("PNG".to_owned()), e))
        }),
        ImageFormat::Jpeg => JpegEncoder::new_with_quality(&mut bytes, JPEG_QUALITY)
            .write_image(pixels, width, height, color),
        ImageFormat::Webp => {
            WebPEncoder::new_lossless(&mut bytes).write_image(pixels, width, height, color)
        }
    }?;
    Ok(bytes.into_inner())
}

/// Most pixels a side of a preview that is sent or kept.
const PREVIEW_PIXELS: u32 = 256;

/// A PNG file of a preview, made smaller where it is large.
///
/// # Errors
/// The encoder's.
pub fn encode_preview(pixels: &RgbImage) -> Result<Vec<u8>, ImageError> {
    let (width, height) = pixels.dimensions();
    let mut bytes = Cursor::new(Vec::new());
    if width.max(height) <= PREVIEW_PIXELS {
        pixels.write_to(&mut bytes, image::ImageFormat::Png)?;
    } else {
        let whole = image::DynamicImage::ImageRgb8(pixels.clone());
        let small = whole.thumbnail(PREVIEW_PIXELS, PREVIEW_PIXELS);
        small.write_to(&mut bytes, image::ImageFormat::Png)?;
    }
    Ok(bytes.into_inner())
}

fn write_png(
    pixels: &RgbImage,
    parameters: &str,
    into: &mut Cursor<Vec<u8>>,
) -> Result<(), png::EncodingError> {
    let mut encoder = png::Encoder::new(into, pixels.width(), pixels.height());
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    encoder.set_filter(png::Filter::Adaptive);
    let (name, text) = ("parameters".to_owned(), parameters.to_owned());
    // As A1111 does: tEXt holds Latin-1, iTXt everything.
    if text.chars().all(|c| u32::from(c) < 256) {
        encoder.add_text_chunk(name, text)?;
    } else {
        encoder.add_itxt_chunk(name, text)?;
    }
    let mut writer = encoder.write_header()?;
    writer.write_image_data(pixels.as_raw())?;
    writer.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn picture() -> RgbImage {
        RgbImage::from_fn(48, 32, |x, y| image::Rgb([5 * x as u8, 7 * y as u8, 90]))
    }

    #[test]
    fn every_format_reads_back() {
        for (format, exact) in
            [(ImageFormat::Png, true), (ImageFormat::Webp, true), (ImageFormat::Jpeg, false)]
        {
            let bytes = encode(&picture(), format, "a").unwrap();
            let back = image::load_from_memory(&bytes).unwrap().to_rgb8();
            assert_eq!(back.dimensions(), (48, 32));
            assert_eq!(back == picture(), exact, "{format:?}");
        }
    }

    #[test]
    fn a_png_says_how_it_was_made() {
        let resolved: Resolved = serde_json::from_value(serde_json::json!({
            "prompt": "a red circle, 日", "negative_prompt": "blur", "model": "tiny",
            "adapter": "rlhf", "method": {"name": "best-of-n"}, "seed": 1, "width": 48,
            "height": 32, "steps": 20, "guidance_scale": 7.5, "guidance_rescale": 0.0,
            "solver": "ddim", "n": 2, "reward": null, "budget": {}, "output_format": "png",
        }))
        .unwrap();
        let model = ModelRef { id: "tiny".to_owned(), sha256: "0123456789abcdef".to_owned() };
        let text = parameters(&resolved, 2, &model);
        let expected = format!(
            "a red circle, 日\nNegative prompt: blur\nSteps: 20, Sampler: ddim, CFG scale: 7.5, \
             Seed: 2, Size: 48x32, Model hash: 0123456789, Model: tiny, Adapter: rlhf, Method: \
             best-of-n, Version: diffusion-sharpening {}",
            env!("CARGO_PKG_VERSION")
        );
        assert_eq!(text, expected);
        for text in [text.as_str(), "plain é"] {
            let bytes = encode(&picture(), ImageFormat::Png, text).unwrap();
            let reader = png::Decoder::new(Cursor::new(bytes)).read_info().unwrap();
            let info = reader.info();
            let latin = info.uncompressed_latin1_text.iter().map(|t| (&t.keyword, t.text.clone()));
            let all = info.utf8_text.iter().map(|t| (&t.keyword, t.get_text().unwrap()));
            let found: Vec<_> = latin.chain(all).collect();
            assert_eq!(found, [(&"parameters".to_owned(), text.to_owned())]);
        }
    }
}
