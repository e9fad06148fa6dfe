//! Connected regions that stand out, and how to part those that touch.

use super::appearance::nearest_colour;
use super::raster::Raster;
use super::template::{GAIN, Patch};

/// Pixels of one object, as indices into the raster.
pub(super) type Region = Vec<usize>;

/// Contrast at which a pixel joins a region that has begun.
const JOIN: f32 = 24.0;
/// Contrast that begins a region.
const BEGIN: f32 = 44.0;
/// Smallest region, as a share of the squared shorter side.
const SPECK: f32 = 0.004;

/// Whether `pixels` are too few to be an object.
pub(super) fn is_speck(raster: &Raster, pixels: usize) -> bool {
    (pixels as f32) < (SPECK * raster.side() * raster.side()).max(5.0)
}

/// The regions of the image, and for each pixel the region it belongs to (0: none).
pub(super) fn regions(raster: &Raster) -> Vec<Region> {
    let join = JOIN.max(3.2 * raster.noise);
    let begin = BEGIN.max(1.4 * join);
    let open: Vec<bool> = raster.contrast.iter().map(|&c| c > join).collect();
    connected(raster, &open)
        .into_iter()
        .filter(|region| {
            !is_speck(raster, region.len())
                && region.iter().filter(|&&k| raster.contrast[k] > begin).count() * 4 > region.len()
        })
        .collect()
}

/// Four-connected components of the pixels that are `open`.
fn connected(raster: &Raster, open: &[bool]) -> Vec<Region> {
    let mut seen = vec![false; open.len()];
    let mut found = Vec::new();
    for start in 0..open.len() {
        if !open[start] || seen[start] {
            continue;
        }
        seen[start] = true;
        let mut region = vec![start];
        let mut next = 0;
        while next < region.len() {
            let k = region[next];
            next += 1;
            for n in neighbours(raster, k).into_iter().flatten() {
                if open[n] && !seen[n] {
                    seen[n] = true;
                    region.push(n);
                }
            }
        }
        found.push(region);
    }
    found
}

/// Left, right, up, down, where they exist.
fn neighbours(raster: &Raster, k: usize) -> [Option<usize>; 4] {
    let (w, h) = (raster.width, raster.height);
    let (x, y) = (k % w, k / w);
    [
        (x > 0).then(|| k - 1),
        (x + 1 < w).then_some(k + 1),
        (y > 0).then(|| k.wrapping_sub(w)),
        (y + 1 < h).then_some(k + w),
    ]
}

/// How much of each pixel in and around `region` it covers: 1 well inside, else
/// the pixel's contrast as a share of what is usual inside.
pub(super) fn patch(raster: &Raster, region: &[usize], owner: &[u32], label: u32) -> Patch {
    const PAD: usize = 4;
    let (w, h) = (raster.width, raster.height);
    let (mut x0, mut y0, mut x1, mut y1) = (w, h, 0, 0);
    for &k in region {
        (x0, x1) = (x0.min(k % w), x1.max(k % w));
        (y0, y1) = (y0.min(k / w), y1.max(k / w));
    }
    let (x0, y0) = (x0.saturating_sub(PAD), y0.saturating_sub(PAD));
    let (x1, y1) = ((x1 + PAD).min(w - 1), (y1 + PAD).min(h - 1));
    let width = x1 - x0 + 1;
    let within = |k: usize, reach| surrounded(raster, owner, k, reach);
    let usual = usual_contrast(raster, region, |k| within(k, 1));
    let mut alpha = Vec::with_capacity(width * (y1 - y0 + 1));
    for y in y0..=y1 {
        for x in x0..=x1 {
            let k = y * w + x;
            alpha.push(if owner[k] != label && owner[k] != 0 {
                0.0
            } else if owner[k] == label && within(k, 2) {
                1.0
            } else {
                ((raster.contrast[k] / usual - 0.5) * GAIN + 0.5).clamp(0.0, 1.0)
            });
        }
    }
    Patch { x0, y0, width, alpha }
}

/// Whether no pixel within `reach` of `k` is background.
fn surrounded(raster: &Raster, owner: &[u32], k: usize, reach: usize) -> bool {
    let (w, h) = (raster.width, raster.height);
    let (x, y) = (k % w, k / w);
    let columns = x.saturating_sub(reach)..=(x + reach).min(w - 1);
    (y.saturating_sub(reach)..=(y + reach).min(h - 1))
        .all(|j| columns.clone().all(|i| owner[j * w + i] != 0))
}

/// A contrast that most pixels inside the region reach, in either tone of a texture.
fn usual_contrast(raster: &Raster, region: &[usize], inside: impl Fn(usize) -> bool) -> f32 {
    let mut contrast: Vec<f32> =
        region.iter().filter(|&&k| inside(k)).map(|&k| raster.contrast[k]).collect();
    if contrast.len() < 6 {
        contrast = region.iter().map(|&k| raster.contrast[k]).collect();
        contrast.sort_by(|a, b| b.total_cmp(a));
        contrast.truncate(region.len().div_ceil(2));
    }
    let rank = contrast.len() * 35 / 100;
    if contrast.is_empty() {
        1.0
    } else {
        contrast.select_nth_unstable_by(rank, f32::total_cmp).1.max(1.0)
    }
}

/// Parts `region` where two colours meet; `None` if it has one colour.
pub(super) fn split_by_colour(raster: &Raster, region: &[usize]) -> Option<Vec<Region>> {
    let mut class = vec![u8::MAX; raster.pixels.len()];
    let mut member = vec![false; raster.pixels.len()];
    region.iter().for_each(|&k| member[k] = true);
    for &k in region {
        // Edge pixels are mixtures and tell nothing.
        if neighbours(raster, k).iter().all(|n| n.is_none_or(|n| member[n])) {
            class[k] = nearest_colour(raster.pixels[k]) as u8;
        }
    }
    let mut seeds: Vec<Region> = Vec::new();
    for colour in 0..8 {
        let open: Vec<bool> = class.iter().map(|&c| c == colour).collect();
        if region.iter().filter(|&&k| open[k]).count() * 8 > region.len() {
            seeds.extend(
                connected(raster, &open).into_iter().filter(|s| s.len() * 8 > region.len()),
            );
        }
    }
    (seeds.len() > 1).then(|| grow(raster, &member, seeds))
}

/// Gives every member pixel to the seed that reaches it first.
fn grow(raster: &Raster, member: &[bool], seeds: Vec<Region>) -> Vec<Region> {
    let mut taken = vec![false; member.len()];
    let mut parts = seeds;
    parts.iter().flatten().for_each(|&k| taken[k] = true);
    let mut fronts = parts.clone();
    while fronts.iter().any(|f| !f.is_empty()) {
        for (part, front) in parts.iter_mut().zip(&mut fronts) {
            for k in std::mem::take(front) {
                for n in neighbours(raster, k).into_iter().flatten() {
                    if member[n] && !taken[n] {
                        taken[n] = true;
                        part.push(n);
                        front.push(n);
                    }
                }
            }
        }
    }
    parts
}

/// Parts `region` into two by position (2-means from its two far ends).
pub(super) fn split_by_place(raster: &Raster, region: &[usize]) -> Option<Vec<Region>> {
    let point = |k: usize| ((k % raster.width) as f32, (k / raster.width) as f32);
    let apart = |a: (f32, f32), b: (f32, f32)| (a.0 - b.0).powi(2) + (a.1 - b.1).powi(2);
    let farthest = |from: (f32, f32)| {
        region.iter().map(|&k| point(k)).max_by(|a, b| apart(*a, from).total_cmp(&apart(*b, from)))
    };
    let first = farthest(point(*region.first()?))?;
    let mut centres = [first, farthest(first)?];
    let mut parts = vec![Region::new(), Region::new()];
    for _ in 0..6 {
        parts.iter_mut().for_each(Vec::clear);
        for &k in region {
            let p = point(k);
            parts[usize::from(apart(p, centres[1]) < apart(p, centres[0]))].push(k);
        }
        for (part, centre) in parts.iter().zip(&mut centres) {
            let n = part.len().max(1) as f32;
            let sum =
                part.iter().map(|&k| point(k)).fold((0.0, 0.0), |s, p| (s.0 + p.0, s.1 + p.1));
            *centre = (sum.0 / n, sum.1 / n);
        }
    }
    parts.iter().all(|p| !is_speck(raster, p.len())).then_some(parts)
}
