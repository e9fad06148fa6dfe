//! Bytes of heap, counted: what gradient checkpoints save, and what bounds the VAE.

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use candle_core::{DType, Device, Tensor};
use common::normal;
use common::training::unet;
use diffusion_sharpening::nn::Recompute;
use diffusion_sharpening::sdxl::config::{VaeConfig, read_json};
use diffusion_sharpening::sdxl::vae_tiling::{Bounds, Tiling};
use diffusion_sharpening::sdxl::{Vae, Weights};
use diffusion_sharpening::train::optimizer::{Gradients, Missing};

/// The system's allocator, and how many bytes are and were at most out.
struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

fn grown(by: usize) {
    PEAK.fetch_max(LIVE.fetch_add(by, Ordering::SeqCst) + by, Ordering::SeqCst);
}

// SAFETY: hands every call on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        grown(layout.size());
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        grown(layout.size());
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, p: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Ordering::SeqCst);
        unsafe { System.dealloc(p, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// One measurement at a time.
static TURN: Mutex<()> = Mutex::new(());

/// By how many bytes the heap grows at most while `f` runs.
fn growth(f: impl FnOnce()) -> usize {
    let before = LIVE.load(Ordering::SeqCst);
    PEAK.store(before, Ordering::SeqCst);
    f();
    PEAK.load(Ordering::SeqCst) - before
}

fn tiny() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny")
}

fn single(seed: u64, shape: &[usize]) -> Tensor {
    normal(seed, shape).to_dtype(DType::F32).unwrap()
}

/// Peak of a forward and backward pass, whose sums are there already.
fn step(lora: bool, recompute: Recompute) -> usize {
    let (vars, unet) = unet(&tiny(), lora);
    let unet = unet.with_recompute(recompute);
    let shapes: [&[usize]; 5] =
        [&[2, 4, 32, 32], &[2], &[2, 24, unet.config().cross_attention_dim], &[2, 128], &[2, 6]];
    let [x, t, context, pooled, sizes] = shapes.map(|shape| single(shape.len() as u64, shape));
    let mut gradients = Gradients::new(&vars, Missing::Allow).unwrap();
    let mut pass = || {
        let y = unet.forward(&x, &t, &context, &pooled, &sizes).unwrap();
        gradients.backward(&y.sqr().unwrap().mean_all().unwrap(), 1.0).unwrap();
    };
    // Makes the sums and packs weights.
    pass();
    growth(pass)
}

#[test]
fn checkpoints_save_memory() {
    let _turn = TURN.lock().unwrap();
    for lora in [false, true] {
        let [kept, recomputed] = [Recompute::Off, Recompute::Blocks].map(|r| step(lora, r));
        let ratio = recomputed as f64 / kept as f64;
        println!("lora {lora}: {kept} bytes, with checkpoints {recomputed}: {ratio:.2}");
        assert!(ratio < 0.6, "lora {lora}: {recomputed} of {kept} bytes");
    }
}

#[test]
fn a_vae_keeps_to_its_bounds() {
    let _turn = TURN.lock().unwrap();
    let folder = tiny().join("vae");
    let config: VaeConfig = read_json(&folder.join("config.json")).unwrap();
    let weights = Weights::from_folder(&folder, DType::F32, &Device::Cpu).unwrap();
    let vae = weights.build(None, |scope| Vae::load(scope, &config)).unwrap();
    let latents = single(1, &[8, 4, 48, 48]);
    let decode = |bounds: Bounds| {
        growth(|| {
            for part in vae.decode_slices(&latents, &bounds).unwrap() {
                part.unwrap();
            }
        })
    };
    let off = |slice_bytes| Bounds { tiling: Tiling::Off, slice_bytes };
    // Packs weights.
    decode(off(0));
    let (alone, all) = (decode(off(0)), decode(off(usize::MAX)));
    assert!(all > 7 * alone, "{all} and {alone} bytes");
    // From none to all: the estimate must be no less than what is taken, nor much more.
    let mut sizes = Vec::new();
    for images in [2, 3, 5, 8] {
        let limit = alone * images + alone / 2;
        let taken = decode(off(limit));
        println!("{limit} bytes allowed, {taken} taken; one image takes {alone}");
        assert!(taken <= limit, "{taken} of {limit} bytes");
        assert!(2 * taken > limit, "{taken} of {limit} bytes");
        sizes.push(taken);
    }
    assert!(sizes.is_sorted());
    // Tiles of 64 pixels of an image of 192.
    let tiled = decode(Bounds { tiling: Tiling::Above(0), slice_bytes: 0 });
    println!("tiled {tiled}");
    assert!(3 * tiled < alone, "{tiled} of {alone} bytes");
    let images = single(2, &[4, 3, 192, 192]).clamp(-1.0, 1.0).unwrap();
    let encode = |bounds: Bounds| growth(|| drop(vae.encode_within(&images, &bounds).unwrap()));
    let (one, four) = (encode(off(0)), encode(off(usize::MAX)));
    let two = encode(off(2 * one + one / 2));
    println!("encode: one {one}, two {two}, four {four}");
    assert!(one < two && two <= 2 * one + one / 2 && 3 * one < four);
}
