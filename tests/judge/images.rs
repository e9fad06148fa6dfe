//! Damage to images, of the kinds that a small VAE or a diffusion model does.

use diffusion_sharpening::data::scenes::render::render;
use diffusion_sharpening::data::scenes::{Scene, Texture};
use image::{Rgb, RgbImage};
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, Normal};

fn byte(v: f64) -> u8 {
    v.round().clamp(0.0, 255.0) as u8
}

/// Gaussian blur, edges repeated.
pub fn blur(image: &RgbImage, sigma: f64) -> RgbImage {
    if sigma <= 0.0 {
        return image.clone();
    }
    let reach = (3.0 * sigma).ceil() as i64;
    let kernel: Vec<f64> =
        (-reach..=reach).map(|k| (-(k * k) as f64 / (2.0 * sigma * sigma)).exp()).collect();
    let total: f64 = kernel.iter().sum();
    let (w, h) = (i64::from(image.width()), i64::from(image.height()));
    let pass = |from: &RgbImage, dx: i64, dy: i64| {
        RgbImage::from_fn(w as u32, h as u32, |x, y| {
            let mut sum = [0.0; 3];
            for (k, weight) in (-reach..=reach).zip(&kernel) {
                let x = (i64::from(x) + k * dx).clamp(0, w - 1) as u32;
                let y = (i64::from(y) + k * dy).clamp(0, h - 1) as u32;
                let p = from.get_pixel(x, y).0;
                (0..3).for_each(|c| sum[c] += weight * f64::from(p[c]));
            }
            Rgb(sum.map(|v| byte(v / total)))
        })
    };
    pass(&pass(image, 1, 0), 0, 1)
}

/// Uniform noise of at most `level` in each channel.
pub fn uniform_noise(image: &RgbImage, level: f64, rng: &mut ChaCha8Rng) -> RgbImage {
    let mut out = image.clone();
    for v in out.iter_mut() {
        *v = byte(f64::from(*v) + rng.random_range(-level..=level));
    }
    out
}

pub fn gaussian_noise(image: &RgbImage, sigma: f64, rng: &mut ChaCha8Rng) -> RgbImage {
    let normal = Normal::new(0.0, sigma).unwrap();
    let mut out = image.clone();
    for v in out.iter_mut() {
        *v = byte(f64::from(*v) + normal.sample(rng));
    }
    out
}

/// Shifts each channel of the whole image by up to `level`.
pub fn colour_shift(image: &RgbImage, level: f64, rng: &mut ChaCha8Rng) -> RgbImage {
    let shift: [f64; 3] = std::array::from_fn(|_| rng.random_range(-level..=level));
    let mut out = image.clone();
    for p in out.pixels_mut() {
        (0..3).for_each(|c| p.0[c] = byte(f64::from(p.0[c]) + shift[c]));
    }
    out
}

/// Shifts each channel of each object, but not the background, by up to `level`.
pub fn object_shift(scene: &Scene, size: u32, level: f64, rng: &mut ChaCha8Rng) -> RgbImage {
    let mut out = render(&Scene { objects: vec![], ..scene.clone() }, size, size);
    let bare = out.clone();
    for object in &scene.objects {
        let shift: [f64; 3] = std::array::from_fn(|_| rng.random_range(-level..=level));
        let one = render(&Scene { objects: vec![object.clone()], ..scene.clone() }, size, size);
        for ((to, from), under) in out.pixels_mut().zip(one.pixels()).zip(bare.pixels()) {
            if from != under {
                // Half-covered pixels are shifted by about half as much.
                let far = (0..3).map(|c| from.0[c].abs_diff(under.0[c])).max().unwrap_or(0);
                let part = (f64::from(far) / 60.0).min(1.0);
                (0..3).for_each(|c| to.0[c] = byte(f64::from(from.0[c]) + part * shift[c]));
            }
        }
    }
    out
}

/// Renders with the contrast of every texture halved.
pub fn faint_texture(scene: &Scene, size: u32) -> RgbImage {
    let mut plain = scene.clone();
    plain.objects.iter_mut().for_each(|o| o.texture = Texture::Plain);
    let mut out = render(scene, size, size);
    for (a, b) in out.iter_mut().zip(render(&plain, size, size).iter()) {
        *a = byte((f64::from(*a) + f64::from(*b)) / 2.0);
    }
    out
}
