//! A picture small enough to be kept with its cell, to tell how far images lie apart.

use image::RgbImage;
use image::imageops::thumbnail;

/// Pixels a side.
const SIDE: u32 = 8;

/// The image averaged to 8×8 pixels, as hexadecimal RGB.
pub fn of(image: &RgbImage) -> String {
    thumbnail(image, SIDE, SIDE).as_raw().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Root mean squared difference of two thumbnails, 0 to 1; none where one is damaged.
pub fn distance(a: &str, b: &str) -> Option<f64> {
    let (a, b) = (bytes(a)?, bytes(b)?);
    let squares = a.iter().zip(&b).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2));
    Some((squares.sum::<f64>() / a.len() as f64).sqrt() / 255.0)
}

fn bytes(text: &str) -> Option<Vec<u8>> {
    let byte = |at: usize| u8::from_str_radix(text.get(at..at + 2)?, 16).ok();
    let length = 2 * 3 * (SIDE * SIDE) as usize;
    (text.len() == length).then(|| (0..length).step_by(2).map(byte).collect()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances_of_known_images() {
        let plain = |value: u8| RgbImage::from_pixel(64, 64, image::Rgb([value; 3]));
        let (black, grey, white) = (of(&plain(0)), of(&plain(51)), of(&plain(255)));
        assert_eq!(distance(&black, &black), Some(0.0));
        assert_eq!(distance(&black, &white), Some(1.0));
        assert!((distance(&black, &grey).unwrap() - 0.2).abs() < 1e-12);
        // Half of the pixels differ by all there is.
        let half = RgbImage::from_fn(64, 64, |x, _| image::Rgb([if x < 32 { 0 } else { 255 }; 3]));
        assert!((distance(&black, &of(&half)).unwrap() - 0.5f64.sqrt()).abs() < 1e-12);
        assert_eq!((distance(&black, "00"), distance(&black, &"zz".repeat(192))), (None, None));
    }
}
