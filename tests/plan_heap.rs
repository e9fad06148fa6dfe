//! Plans against the heap: what the networks really keep and hold, counted by an allocator.

use std::alloc::{GlobalAlloc, Layout, System};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use candle_core::{DType, Device, Tensor, Var};
use diffusion_sharpening::nn::LowRank;
use diffusion_sharpening::sdxl::lora::LoraMap;
use diffusion_sharpening::sdxl::plan::{
    Networks, Rule, Sample, Saving, Trace, Trained, decode, unet,
};
use diffusion_sharpening::sdxl::{UNet, Vae, Weights};

struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(0);

fn grown(bytes: usize) {
    MOST.fetch_max(LIVE.fetch_add(bytes, Relaxed) + bytes, Relaxed);
}

// SAFETY: hands everything to the system's allocator and counts.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        grown(layout.size());
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        grown(layout.size());
        // SAFETY: the caller's promise.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// Bytes alive after `f` that were not before, and the most there were in between.
fn measured<R>(f: impl FnOnce() -> R) -> (R, u64, u64) {
    let before = LIVE.load(Relaxed);
    MOST.store(before, Relaxed);
    let result = f();
    let (after, most) = (LIVE.load(Relaxed), MOST.load(Relaxed));
    (result, (after - before) as u64, (most - before) as u64)
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).to_path_buf()
}

const TARGETS: [&str; 4] = ["to_q", "to_k", "to_v", "to_out.0"];
const RANK: usize = 8;

/// A U-Net of which everything or an adapter is trained.
fn trained(folder: &Path, networks: &Networks, adapters: bool) -> UNet {
    let weights = Weights::from_folder(&folder.join("unet"), DType::F32, &Device::Cpu).unwrap();
    if !adapters {
        let var = |t: &Tensor| Var::from_tensor(t).unwrap().as_tensor().clone();
        let tensors = weights.tensors().iter().map(|(name, t)| (name.clone(), var(t))).collect();
        let weights = Weights::new(tensors, "unet");
        return weights.build(None, |scope| UNet::load(scope, &networks.unet)).unwrap();
    }
    let mut modules = BTreeMap::new();
    for (name, tensor) in weights.tensors() {
        let Some(module) = name.strip_suffix(".weight") else { continue };
        if TARGETS.iter().any(|target| module.ends_with(&format!(".{target}"))) {
            let (output, input) = tensor.dims2().unwrap();
            let var = |shape| {
                let var = Var::randn(0_f32, 0.02, shape, &Device::Cpu).unwrap();
                var.as_tensor().clone()
            };
            let (down, up) = (var((RANK, input)), var((output, RANK)));
            modules.insert(module.to_owned(), LowRank { down, up, scale: 1.0 });
        }
    }
    let lora = LoraMap::new(modules);
    weights.build(Some(&lora), |scope| UNet::load(scope, &networks.unet)).unwrap()
}

struct Inputs {
    x: Tensor,
    timesteps: Tensor,
    context: Tensor,
    pooled: Tensor,
    sizes: Tensor,
}

impl Inputs {
    fn of(networks: &Networks, sample: Sample) -> Self {
        let (config, batch) = (&networks.unet, sample.batch);
        let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
        let sizes = 6 * config.addition_time_embed_dim.unwrap();
        let pooled = config.projection_class_embeddings_input_dim.unwrap() - sizes;
        Self {
            x: zeros(&[batch, config.in_channels, sample.height, sample.width]),
            timesteps: zeros(&[batch]),
            context: zeros(&[batch, sample.tokens, config.cross_attention_dim]),
            pooled: zeros(&[batch, pooled]),
            sizes: zeros(&[batch, 6]),
        }
    }

    fn forward(&self, unet: &UNet) -> Tensor {
        unet.forward(&self.x, &self.timesteps, &self.context, &self.pooled, &self.sizes).unwrap()
    }
}

fn near(what: &str, got: u64, planned: u64, below: f64, above: f64) {
    let ratio = got as f64 / planned as f64;
    println!("{what}: {got} bytes, planned {planned}, ratio {ratio:.4}");
    assert!((1.0 - below..=1.0 + above).contains(&ratio), "{what}: {got}, planned {planned}");
}

/// One test, so that nothing else allocates meanwhile.
#[test]
fn plans_are_what_the_heap_holds() {
    for name in ["models/tiny", "tests/fixtures/parity/euler_all_attention"] {
        let folder = root().join(name);
        let networks = Networks::read(&folder).unwrap();
        let sample = Sample { batch: 2, height: 32, width: 40, tokens: networks.tokens() };
        let trace = unet(&networks.unet, sample).unwrap();
        let inputs = Inputs::of(&networks, sample);
        let targets = TARGETS.map(str::to_owned);
        let adapters = Trained::Adapters { rank: RANK as u64, targets: &targets };
        for (kind, trains) in [("full", Trained::Everything), ("LoRA", adapters)] {
            let network = trained(&folder, &networks, matches!(trains, Trained::Adapters { .. }));
            graph(&format!("{name}, {kind}"), &trace, trains, &network, &inputs);
        }
        inference(name, &folder, &networks, &trace, &inputs);
        decoding(name, &folder, &networks);
    }
}

fn graph(what: &str, trace: &Trace, trained: Trained, network: &UNet, inputs: &Inputs) {
    // Packed weights and threads' scratch stay from the first pass on.
    drop(inputs.forward(network).sqr().unwrap().mean_all().unwrap().backward().unwrap());
    let saving = Saving { trained, rule: Rule::Held, element: 4 };
    let (output, kept, _) = measured(|| inputs.forward(network));
    // The output is the caller's; nodes of the graph and shapes come to a few kilobytes.
    let planned = trace.saved(&saving) + 4 * output.elem_count() as u64;
    near(&format!("{what}: kept"), kept, planned, 0.02, 0.05);

    let loss = output.sqr().unwrap().mean_all().unwrap();
    let (gradients, _, most) = measured(|| loss.backward().unwrap());
    let weights = 4 * match trained {
        Trained::Everything => trace.parameters(),
        _ => trained.adapters(trace),
    };
    // candle holds every weight's gradient until the end; kernels have scratch of their own.
    let planned = weights + trace.gradients_in_flight(&saving);
    near(&format!("{what}: backward"), most, planned, 0.15, 0.15);
    drop((gradients, loss));
}

/// Without gradients, with weights that stay and are packed by the first pass.
fn inference(what: &str, folder: &Path, networks: &Networks, trace: &Trace, inputs: &Inputs) {
    let weights = Weights::from_folder(&folder.join("unet"), DType::F32, &Device::Cpu).unwrap();
    let network = weights.build(None, |scope| UNet::load(scope, &networks.unet)).unwrap();
    drop(inputs.forward(&network));
    let (output, _, most) = measured(|| inputs.forward(&network));
    near(&format!("{what}: without gradients"), most, trace.live(4), 0.1, 0.1);
    drop(output);
}

fn decoding(what: &str, folder: &Path, networks: &Networks) {
    let weights = Weights::from_folder(&folder.join("vae"), DType::F32, &Device::Cpu).unwrap();
    let vae = weights.build(None, |scope| Vae::load(scope, &networks.vae)).unwrap();
    let factor = networks.vae.factor();
    let (height, width) = (256 / factor, 320 / factor);
    let shape = (2, networks.vae.latent_channels, height, width);
    let latents = Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
    let decode_once = || vae.decode(&latents).unwrap();
    drop(decode_once());
    let (images, _, most) = measured(decode_once);
    let planned = decode(&networks.vae, 2, (height * factor, width * factor)).unwrap().live(4);
    near(&format!("{what}: decode"), most, planned, 0.1, 0.1);
    drop(images);
}
