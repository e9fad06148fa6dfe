//! Draws a scene at any resolution, anti-aliased by supersampling.

use image::{Rgb, RgbImage};

use super::layout::{Placed, Scene};
use super::vocabulary::{DOT_RADIUS, TEXTURE_CELLS, Texture};

/// Samples per pixel and axis.
const SAMPLES: u32 = 4;

/// Renders `scene` at `width` × `height` pixels; positions scale with each
/// side, radii with the shorter one.
pub fn render(scene: &Scene, width: u32, height: u32) -> RgbImage {
    let side = f64::from(width.min(height));
    let mut image = RgbImage::from_fn(width, height, |_, y| {
        Rgb(background(scene, y, height).map(|c| c.round().clamp(0.0, 255.0) as u8))
    });
    for object in &scene.objects {
        draw(&mut image, object, side);
    }
    image
}

fn background(scene: &Scene, y: u32, height: u32) -> [f64; 3] {
    let t = (f64::from(y) + 0.5) / f64::from(height);
    let [top, bottom] = scene.background;
    std::array::from_fn(|c| top[c] * (1.0 - t) + bottom[c] * t)
}

fn draw(image: &mut RgbImage, object: &Placed, side: f64) {
    let (width, height) = image.dimensions();
    let (cx, cy) = (object.x * f64::from(width), object.y * f64::from(height));
    let r = object.radius * side;
    let bound = |v: f64, max: u32| (v.max(0.0) as u32).min(max);
    let tones = [object.colour.rgb(), object.colour.second_tone()].map(|t| t.map(f64::from));
    for py in bound(cy - 1.1 * r - 1.0, height)..bound(cy + 1.1 * r + 2.0, height) {
        for px in bound(cx - 1.1 * r - 1.0, width)..bound(cx + 1.1 * r + 2.0, width) {
            let (mut hits, mut sum) = (0.0, [0.0; 3]);
            for k in 0..SAMPLES * SAMPLES {
                let sub = |i: u32| (f64::from(i) + 0.5) / f64::from(SAMPLES);
                let (x, y) = (f64::from(px) + sub(k % SAMPLES), f64::from(py) + sub(k / SAMPLES));
                if !object.shape.contains((x - cx) / r, (y - cy) / r) {
                    continue;
                }
                let second = in_second_tone(object.texture, x / side, y / side);
                hits += 1.0;
                (0..3).for_each(|c| sum[c] += tones[usize::from(second)][c]);
            }
            if hits > 0.0 {
                let total = f64::from(SAMPLES * SAMPLES);
                let under = image.get_pixel(px, py).0.map(f64::from);
                let blend = |c: usize| (sum[c] + under[c] * (total - hits)) / total;
                image.put_pixel(px, py, Rgb([0, 1, 2].map(|c| blend(c).round() as u8)));
            }
        }
    }
}

/// Textures are anchored to the image, not to the object. `u`, `v` are in
/// units of the shorter side.
fn in_second_tone(texture: Texture, u: f64, v: f64) -> bool {
    let (u, v) = ((u * TEXTURE_CELLS).fract(), (v * TEXTURE_CELLS).fract());
    match texture {
        Texture::Plain => false,
        Texture::Striped => v < 0.5,
        Texture::Dotted => (u - 0.5).hypot(v - 0.5) < DOT_RADIUS,
    }
}
