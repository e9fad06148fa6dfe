//! What fuzz targets share: files of given bytes, and a server without a model's arithmetic.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use diffusion_sharpening::Result;
use diffusion_sharpening::diffusion::cost::Cost;
use diffusion_sharpening::engine::request::{
    CostReport, GenerateRequest, GeneratedImage, Generation, Listing, ModelInfo, ModelRef,
};
use diffusion_sharpening::engine::{Backend, CancelToken, Engine, Planned, Progress};
use diffusion_sharpening::nn::device::Placement;
use diffusion_sharpening::serve::{self, Settings};
use image::{Rgb, RgbImage};

pub mod http;

/// The folder of this process's files; removed by whoever runs the fuzzer.
fn folder() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| tempfile::tempdir().expect("a folder").keep())
}

/// Calls `with` with the path of a file that has these bytes.
pub fn with_file<T>(bytes: &[u8], with: impl FnOnce(&Path) -> T) -> T {
    let path = folder().join("input");
    std::fs::write(&path, bytes).expect("the file is written");
    with(&path)
}

/// The engine with the models of the repository.
pub fn engine() -> &'static Engine {
    static ENGINE: OnceLock<Engine> = OnceLock::new();
    ENGINE.get_or_init(|| {
        let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models");
        Engine::open(&models, &Placement::cpu(candle_core::DType::F32)).expect("models/tiny opens")
    })
}

/// Plans as the engine does, and makes grey images.
struct Grey;

impl Backend for Grey {
    fn models(&self) -> Vec<ModelInfo> {
        engine().models()
    }

    fn methods(&self) -> Vec<Listing> {
        engine().methods()
    }

    fn rewards(&self) -> Vec<Listing> {
        engine().rewards()
    }

    fn plan(&self, request: &GenerateRequest) -> Result<Planned> {
        engine().plan(request)
    }

    fn generate(
        &self,
        planned: &Planned,
        cancel: &CancelToken,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Generation> {
        cancel.check()?;
        let (resolved, cost) = (planned.resolved.clone(), planned.cost);
        progress(Progress { spent: cost, planned: cost, event: None, preview: None });
        let image = |i: u32| GeneratedImage {
            pixels: RgbImage::from_pixel(8, 8, Rgb([128; 3])),
            seed: resolved.seed + u64::from(i),
            scores: BTreeMap::new(),
        };
        Ok(Generation {
            images: (0..resolved.n).map(image).collect(),
            previews: Vec::new(),
            cost: CostReport { planned: cost, actual: Cost { units: cost, seconds: BTreeMap::new() } },
            model: ModelRef { id: resolved.model.clone(), sha256: "00".repeat(32) },
            resolved,
            trace: Vec::new(),
        })
    }
}

/// The address of a server that is ready; it ends with the process.
fn server() -> &'static str {
    static SERVER: OnceLock<String> = OnceLock::new();
    SERVER.get_or_init(|| {
        let settings = Settings {
            listen: "127.0.0.1:0".to_owned(),
            data: folder().join("data"),
            keep: 50,
            max_steps: 50,
            max_images: 4,
            max_request_f: 5_000,
            warm_up_steps: 0,
            body_seconds: 2,
            ..Settings::default()
        };
        let backend: Arc<dyn Backend> = Arc::new(Grey);
        let running = serve::start(settings, move || Ok(backend)).expect("the server starts");
        let address = running.address().to_string();
        std::thread::spawn(move || running.wait());
        http::until_ready(&address);
        address
    })
}
