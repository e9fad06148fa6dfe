//! Finding and launching kernels.

use std::cell::Cell;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use candle_core::cuda_backend::cudarc::driver::{
    CudaFunction, CudaModule, LaunchConfig, PushKernelArg, sys,
};
use candle_core::cuda_backend::cudarc::nvrtc::Ptx;
use candle_core::cuda_backend::{CudaDevice, DeviceId, WrapErr};
use candle_core::{DType, Result, bail};

include!(concat!(env!("OUT_DIR"), "/kernels.rs"));

thread_local! {
    static LAUNCHES: Cell<u64> = const { Cell::new(0) };
}

/// Kernels that the operations of this module have launched on this thread, a library's
/// product or convolution counted as one; what candle launches by itself is not among them.
pub fn launches() -> u64 {
    LAUNCHES.get()
}

/// Counts one more.
pub(super) fn count() {
    LAUNCHES.set(LAUNCHES.get() + 1);
}

/// Shared memory that a kernel gets without asking.
const PLAIN_SHARED: u32 = 48 << 10;

/// What has been loaded, by device.
#[derive(Default)]
struct Loaded {
    modules: HashMap<(DeviceId, &'static str), Arc<CudaModule>>,
    functions: HashMap<(DeviceId, String), CudaFunction>,
}

/// A parameter of a kernel.
#[derive(Clone, Copy, Debug)]
pub enum Arg {
    Pointer(u64),
    Int(i32),
    Long(i64),
    Float(f32),
}

/// A count as a kernel's `int`.
pub fn int(value: usize) -> Result<Arg> {
    i32::try_from(value).map(Arg::Int).map_err(candle_core::Error::wrap)
}

/// A count as a kernel's `long long`.
pub fn long(value: usize) -> Result<Arg> {
    i64::try_from(value).map(Arg::Long).map_err(candle_core::Error::wrap)
}

/// Threads of most kernels' blocks.
pub const BLOCK: u32 = 256;

/// Values that a thread reads or writes at once: 16 bytes of them.
pub fn lanes(dtype: DType) -> usize {
    16 / dtype.size_in_bytes().max(1)
}

/// Pieces that an image's positions, or the rows of a matrix, are summed in.
pub fn pieces(rows: usize) -> usize {
    rows.div_ceil(128).clamp(1, 1024)
}

/// How many threads run a kernel.
#[derive(Clone, Copy, Debug)]
pub struct Extent {
    pub grid: (u32, u32, u32),
    pub block: u32,
    /// Bytes of dynamic shared memory.
    pub shared: u32,
}

impl Extent {
    /// Blocks of the usual size.
    pub fn new(grid: (usize, usize, usize)) -> Self {
        let grid = (grid.0 as u32, grid.1 as u32, grid.2 as u32);
        Self { grid, block: BLOCK, shared: 0 }
    }

    pub fn with_block(self, block: u32) -> Self {
        Self { block, ..self }
    }

    /// For kernels that go over a flat array of `elements` values.
    pub fn flat(elements: usize, dtype: DType) -> Self {
        let blocks = elements.div_ceil(BLOCK as usize * lanes(dtype));
        Self::new((blocks.clamp(1, 65_535), 1, 1))
    }

    /// For kernels whose blocks take 8 · lanes channels of a piece of rows of an image.
    pub fn tiled(channels: usize, pieces: usize, images: usize, dtype: DType) -> Self {
        Self::new((channels.div_ceil(8 * lanes(dtype)), pieces, images))
    }
}

/// The name of a kernel's instance for a type.
pub fn of_type(name: &str, dtype: DType) -> Result<String> {
    let suffix = match dtype {
        DType::F32 => "f32",
        DType::F16 => "f16",
        DType::BF16 => "bf16",
        other => bail!("no GPU kernel takes {other:?}"),
    };
    Ok(format!("{name}_{suffix}"))
}

/// Launches the kernel `name` of the source file `file`.
pub fn launch(
    device: &CudaDevice,
    file: &str,
    name: &str,
    extent: Extent,
    args: &[Arg],
) -> Result<()> {
    let function = function(device, file, name, extent.shared)?;
    let stream = device.cuda_stream();
    let mut builder = stream.launch_builder(&function);
    for arg in args {
        match arg {
            Arg::Pointer(v) => builder.arg(v),
            Arg::Int(v) => builder.arg(v),
            Arg::Long(v) => builder.arg(v),
            Arg::Float(v) => builder.arg(v),
        };
    }
    let config = LaunchConfig {
        grid_dim: extent.grid,
        block_dim: (extent.block, 1, 1),
        shared_mem_bytes: extent.shared,
    };
    // SAFETY: the callers in this module give every kernel the parameters of its declaration,
    // with memory of the sizes that it documents.
    unsafe { builder.launch(config) }.w()?;
    count();
    Ok(())
}

fn function(device: &CudaDevice, file: &str, name: &str, shared: u32) -> Result<CudaFunction> {
    static LOADED: OnceLock<Mutex<Loaded>> = OnceLock::new();
    let loaded = LOADED.get_or_init(Mutex::default);
    let mut loaded = loaded.lock().unwrap_or_else(PoisonError::into_inner);
    let key = (device.id(), name.to_owned());
    if let Some(function) = loaded.functions.get(&key) {
        return Ok(function.clone());
    }
    let Some((file, image)) = IMAGES.iter().find(|(known, _)| *known == file) else {
        bail!("no kernels from '{file}'")
    };
    let module = match loaded.modules.get(&(device.id(), *file)) {
        Some(module) => module.clone(),
        None => {
            let image = Ptx::from_binary(image.to_vec());
            let module = device.cuda_stream().context().load_module(image).w()?;
            loaded.modules.insert((device.id(), *file), module.clone());
            module
        }
    };
    let function = module.load_function(name).w()?;
    if shared > PLAIN_SHARED {
        let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        function.set_attribute(attribute, shared.cast_signed()).w()?;
    }
    loaded.functions.insert(key, function.clone());
    Ok(function)
}
