//! Images as latents: how they are seen, the cache, and the batches.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Tensor};
use diffusion_sharpening::data::images;
use diffusion_sharpening::nn::device::Placement;
use diffusion_sharpening::sdxl::folder::ModelFolder;
use diffusion_sharpening::train::latents::{Batches, CacheKey, Crop, LatentCache, Transform};
use diffusion_sharpening::util::CancelToken;
use diffusion_sharpening::{Error, Result};
use image::{Rgb, RgbImage};
use proptest::prelude::*;
use tempfile::TempDir;

const PLAIN: Transform =
    Transform { resolution: 64, crop: Crop::Center, flip: false, buckets: false, step: 16 };
const KEY: CacheKey = CacheKey { transform: PLAIN, variants: 1, seed: 7 };

/// Every pixel says where it is.
fn places(width: u32, height: u32) -> RgbImage {
    RgbImage::from_fn(width, height, |x, y| Rgb([x as u8, y as u8, 128]))
}

#[test]
fn time_ids_describe_the_crop() {
    // 100 × 50 pixels: 1.28 times as large they are 128 × 64, of which the middle is 32 in.
    let view = PLAIN.view([50, 100], 0, 0, 0).unwrap();
    assert_eq!(view.scaled, [64, 128]);
    assert_eq!(view.time_ids(), [50.0, 100.0, 0.0, 32.0, 64.0, 64.0]);
    // 30 × 90 pixels are as long as 32 × 96.
    let buckets = Transform { buckets: true, ..PLAIN };
    let view = buckets.view([90, 30], 0, 0, 0).unwrap();
    assert_eq!(view.time_ids(), [90.0, 30.0, 0.0, 0.0, 96.0, 32.0]);
    // 3000 × 2000 pixels at SDXL's size: 1216 × 832 covers 1.5 best (1.4615 to 1.5), of
    // 1248 × 832 the middle is 16 in.
    let large = Transform { resolution: 1024, step: 64, ..buckets };
    let view = large.view([2000, 3000], 0, 0, 0).unwrap();
    assert_eq!(view.time_ids(), [2000.0, 3000.0, 0.0, 16.0, 832.0, 1216.0]);
    assert!(PLAIN.view([10, 400], 0, 0, 0).unwrap_err().contains("400 × 10"));
}

#[test]
fn a_view_shows_what_its_record_says() {
    let image = places(150, 64);
    let random = Transform { crop: Crop::Random, flip: true, ..PLAIN };
    let (mut flips, mut lefts) = (0, Vec::new());
    for index in 0..40 {
        let view = random.view([64, 150], 3, index, 0).unwrap();
        let seen = view.of(&image);
        assert_eq!(seen.dimensions(), (64, 64));
        let [top, left] = view.offset;
        let x = if view.flipped { 149 - left - 5 } else { left + 5 };
        assert_eq!(seen.get_pixel(5, 9), image.get_pixel(x, top + 9), "{view:?}");
        assert_eq!(view, random.view([64, 150], 3, index, 0).unwrap());
        // The crop is the same where flips are off.
        let upright = Transform { flip: false, ..random }.view([64, 150], 3, index, 0).unwrap();
        assert_eq!((upright.offset, upright.flipped), (view.offset, false));
        flips += usize::from(view.flipped);
        lefts.push(left);
    }
    assert!((10..=30).contains(&flips), "{flips}");
    lefts.sort_unstable();
    assert!(lefts[0] < 15 && lefts[39] > 71 && lefts[39] <= 86, "{lefts:?}");
    let views: Vec<_> = (0..4).map(|v| random.view([64, 150], 3, 0, v).unwrap().offset).collect();
    assert!(views.iter().any(|v| *v != views[0]), "{views:?}");
}

proptest! {
    #[test]
    fn targets_are_of_the_area_and_step(resolution in 1u32..20, step in 1u32..5) {
        let (step, resolution) = (8 * step, 8 * step * resolution);
        let transform = Transform { resolution, step, buckets: true, ..PLAIN };
        let targets = transform.targets();
        prop_assert!(targets.contains(&[resolution, resolution]));
        for [h, w] in targets.iter().copied() {
            prop_assert!(h % step == 0 && w % step == 0 && h * w <= resolution * resolution);
            prop_assert!(targets.contains(&[w, h]));
            prop_assert!(2 * h.min(w) >= resolution && h.max(w) <= 2 * resolution);
        }
    }
}

fn model() -> ModelFolder {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny");
    ModelFolder::open(&path, &Placement::cpu(DType::F32)).unwrap()
}

fn open(source: &str, key: &CacheKey, dir: &Path) -> Result<LatentCache> {
    let set = images::open(&source.parse()?, key.transform.resolution)?;
    LatentCache::open(&*set, &model(), key, dir, &CancelToken::default(), &mut |_, _| {})
}

fn put(dir: &TempDir, name: &str, bytes: impl AsRef<[u8]>) {
    std::fs::write(dir.path().join(name), bytes).unwrap();
}

/// Images of several shapes with captions; `broken` more cannot be read.
fn pictures(good: u32, broken: u32) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for i in 0..good {
        let (width, height) = [(90, 60), (40, 80), (64, 64)][i as usize % 3];
        places(width, height).save(dir.path().join(format!("good{i:02}.png"))).unwrap();
        put(&dir, &format!("good{i:02}.txt"), format!("picture {i}"));
    }
    for i in 0..broken {
        put(&dir, &format!("broken{i:02}.png"), "no image");
        put(&dir, &format!("broken{i:02}.txt"), "broken");
    }
    dir
}

fn source(dir: &TempDir) -> String {
    dir.path().display().to_string()
}

fn difference(a: &Tensor, b: &Tensor) -> f32 {
    let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    assert_eq!(a.dims(), b.dims());
    flat(a).iter().zip(flat(b)).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn the_cache_holds_what_the_vae_makes_of_each_view() {
    let (images, dir) = (pictures(7, 2), tempfile::tempdir().unwrap());
    let transform = Transform { crop: Crop::Random, flip: true, buckets: true, ..PLAIN };
    let key = CacheKey { transform, variants: 2, seed: 5 };
    let cache = open(&source(&images), &key, dir.path()).unwrap();
    assert_eq!(cache.len(), 14);
    let skipped: Vec<&str> = cache.skipped().iter().map(|s| s.row.as_str()).collect();
    assert_eq!(skipped, ["broken00.png", "broken01.png"]);
    let set = images::open(&source(&images).parse().unwrap(), 64).unwrap();
    let model = model();
    let mut flips = 0;
    for i in 0..cache.len() {
        let latent = cache.get(i).unwrap();
        let (index, variant) = (2 + i / 2, i as u32 % 2);
        let example = set.example(index).unwrap();
        assert_eq!((&latent.name, &latent.caption), (&example.name, &example.caption));
        let size = [example.image.height(), example.image.width()];
        let view = transform.view(size, 5, index, variant).unwrap();
        assert_eq!((latent.time_ids, latent.flipped), (view.time_ids(), view.flipped));
        let (height, width) = cache.bucket(i);
        assert_eq!([height, width], view.target);
        let seen = view.of(&example.image);
        let pixels: Vec<f32> = seen.as_raw().iter().map(|v| f32::from(*v) / 127.5 - 1.0).collect();
        let shape = (1, height as usize, width as usize, 3);
        let pixels = Tensor::from_vec(pixels, shape, model.device()).unwrap();
        let pixels = pixels.permute((0, 3, 1, 2)).unwrap().contiguous().unwrap();
        let posterior = model.vae.encode(&pixels).unwrap();
        let factor = model.vae.config().scaling_factor;
        for (held, direct) in [(&latent.mean, &posterior.mean), (&latent.std, &posterior.std)] {
            let direct = (direct.get(0).unwrap() * factor).unwrap();
            assert!(direct.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap() > 1e-3);
            assert!(difference(held, &direct) < 1e-6, "{}", difference(held, &direct));
        }
        flips += usize::from(latent.flipped);
    }
    assert!((1..14).contains(&flips), "{flips}");
    assert!(cache.buckets().collect::<std::collections::BTreeSet<_>>().len() >= 3);
}

/// The files of the one cache in `dir`.
fn files(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let only: Vec<_> = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).collect();
    let [only] = only.as_slice() else { panic!("{only:?}") };
    let file = |e: std::io::Result<std::fs::DirEntry>| {
        let path = e.unwrap().path();
        (path.file_name().unwrap().into(), std::fs::read(&path).unwrap())
    };
    std::fs::read_dir(only).unwrap().map(file).collect()
}

const RUN: &str = "scenes:train:300";
const CHILD: &str = "DS_TEST_CACHE";

#[test]
fn a_killed_run_goes_on_to_the_same_bytes() {
    let key = CacheKey { transform: Transform { resolution: 32, ..PLAIN }, ..KEY };
    if let Some(dir) = std::env::var_os(CHILD) {
        let set = images::open(&RUN.parse().unwrap(), 32).unwrap();
        let mut dies = |row, _| {
            if row > 200 {
                std::process::abort()
            }
        };
        let token = CancelToken::default();
        LatentCache::open(&*set, &model(), &key, dir.as_ref(), &token, &mut dies).unwrap();
        return;
    }
    let (whole, cut) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let cache = open(RUN, &key, whole.path()).unwrap();
    assert_eq!((cache.len(), cache.skipped().len()), (300, 0));
    let whole = files(whole.path());
    assert_eq!(whole.len(), 4, "three shards and the key");

    let child = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "a_killed_run_goes_on_to_the_same_bytes"])
        .env(CHILD, cut.path())
        .output()
        .unwrap();
    assert!(!child.status.success());
    assert_eq!(files(cut.path()).len(), 2, "one shard and the key");
    let set = images::open(&RUN.parse().unwrap(), 32).unwrap();
    let mut told = Vec::new();
    let token = CancelToken::default();
    let mut tell = |row, of| told.push((row, of));
    LatentCache::open(&*set, &model(), &key, cut.path(), &token, &mut tell).unwrap();
    assert_eq!((told[0], told.last()), ((128, 300), Some(&(300, 300))));
    assert!(files(cut.path()) == whole);

    // A damaged shard is made anew, others are left as they are.
    let dir = std::fs::read_dir(cut.path()).unwrap().next().unwrap().unwrap().path();
    std::fs::write(dir.join("shard-00001.safetensors"), b"damaged").unwrap();
    let changed = |name: &str| std::fs::metadata(dir.join(name)).unwrap().modified().unwrap();
    let before = changed("shard-00000.safetensors");
    open(RUN, &key, cut.path()).unwrap();
    assert!(files(cut.path()) == whole);
    assert_eq!(changed("shard-00000.safetensors"), before);
}

#[test]
fn a_cancelled_run_stops() {
    let dir = tempfile::tempdir().unwrap();
    let set = images::open(&"scenes:train:40".parse().unwrap(), 32).unwrap();
    let token = CancelToken::default();
    let mut raise = |_, _| token.cancel();
    let result = LatentCache::open(&*set, &model(), &KEY, dir.path(), &token, &mut raise);
    assert!(matches!(result, Err(Error::Cancelled)));
}

#[test]
fn each_key_has_a_folder_of_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let folder =
        |source: &str, key: &CacheKey| open(source, key, dir.path()).unwrap().dir().to_path_buf();
    let small = Transform { resolution: 32, ..PLAIN };
    let key = CacheKey { transform: small, ..KEY };
    let first = folder("scenes:train:3", &key);
    assert_eq!(folder("scenes:train:3", &key), first);
    let mut all = vec![first];
    for other in [
        CacheKey { seed: 8, ..key },
        CacheKey { variants: 2, ..key },
        CacheKey { transform: PLAIN, ..key },
        CacheKey { transform: Transform { flip: true, ..small }, ..key },
        CacheKey { transform: Transform { crop: Crop::Random, ..small }, ..key },
    ] {
        all.push(folder("scenes:train:3", &other));
    }
    all.push(folder("scenes:train:4", &key));
    let distinct: std::collections::BTreeSet<_> = all.iter().collect();
    assert_eq!(distinct.len(), 7, "{all:?}");
    let text = std::fs::read_to_string(all[0].join("key.json")).unwrap();
    assert!(text.contains("vae_sha256") && text.contains("3 scenes of the train split"), "{text}");
}

#[test]
fn too_many_broken_rows_are_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(&source(&pictures(6, 10)), &KEY, dir.path()).unwrap();
    assert_eq!((cache.len(), cache.skipped().len()), (6, 10));
    let error = open(&source(&pictures(30, 11)), &KEY, dir.path()).err().unwrap().to_string();
    assert!(error.contains("11 of 41 rows") && error.contains("broken00.png: "), "{error}");
    let error = open(&source(&pictures(0, 2)), &KEY, dir.path()).err().unwrap().to_string();
    assert!(error.contains("2 of 2 rows"), "{error}");
}

#[test]
fn what_does_not_fit_the_vae_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    for (transform, part) in [
        (Transform { resolution: 62, ..PLAIN }, "resolution"),
        (Transform { buckets: true, step: 6, ..PLAIN }, "step"),
        (Transform { buckets: true, step: 48, ..PLAIN }, "resolution"),
    ] {
        let key = CacheKey { transform, ..KEY };
        let error = open("scenes:train:2", &key, dir.path()).err().unwrap().to_string();
        assert!(error.starts_with(part), "{error}");
    }
    let error = open("scenes:train:2", &CacheKey { variants: 0, ..KEY }, dir.path());
    assert!(error.err().unwrap().to_string().starts_with("variants"));
}

proptest! {
    #[test]
    fn an_epoch_holds_every_example_once(
        kinds in prop::collection::vec(0u32..4, 1..60),
        batch in 1usize..9,
        seed: u64,
    ) {
        let bucket = |kind: u32| (64 + kind, 64);
        let new = || Batches::new(kinds.iter().map(|k| bucket(*k)), batch, seed).unwrap();
        let batches = new();
        let epoch = batches.per_epoch();
        for e in 0..3 {
            let all: Vec<_> = (0..epoch).map(|s| batches.at(e * epoch + s)).collect();
            let mut seen: Vec<usize> = all.concat();
            seen.sort_unstable();
            prop_assert_eq!(seen, (0..kinds.len()).collect::<Vec<_>>());
            let mut small = BTreeMap::new();
            for examples in &all {
                prop_assert!(!examples.is_empty() && examples.len() <= batch);
                prop_assert!(examples.iter().all(|i| kinds[*i] == kinds[examples[0]]));
                if examples.len() < batch {
                    *small.entry(kinds[examples[0]]).or_insert(0) += 1;
                }
            }
            prop_assert!(small.values().all(|n| *n == 1));
        }
        // Whatever was asked for before.
        let other = new();
        for step in (0..3 * epoch).rev() {
            prop_assert_eq!(other.at(step), batches.at(step));
        }
    }
}

#[test]
fn epochs_and_seeds_have_orders_of_their_own() {
    let new = |seed| Batches::new(vec![(64, 64); 100], 10, seed).unwrap();
    let (batches, other) = (new(1), new(2));
    let epoch = |b: &Batches, e: u64| (0..10).flat_map(|s| b.at(10 * e + s)).collect::<Vec<_>>();
    assert_ne!(epoch(&batches, 0), epoch(&batches, 1));
    assert_ne!(epoch(&batches, 0), epoch(&other, 0));
    assert_ne!(epoch(&batches, 0), (0..100).collect::<Vec<_>>());
    assert!(Batches::new([], 4, 0).is_err() && Batches::new([(64, 64)], 0, 0).is_err());
}
