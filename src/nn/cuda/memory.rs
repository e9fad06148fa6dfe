//! Tensors as the kernels see them: addresses of contiguous device memory.

use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::cuda_backend::cudarc::driver::result::{device, mem_pool};
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, DevicePtr, sys};
use candle_core::cuda_backend::{CudaDevice, CudaStorage, CudaStorageSlice, WrapErr};
use candle_core::{DType, Device, Result, Shape, Storage, Tensor, bail};

use crate::nn::autograd::constant;

/// Opens a GPU: one stream for all threads, so that what they do is ordered, and freed memory
/// kept for later instead of given back at every synchronisation.
///
/// # Errors
/// When there is no such GPU or its driver is too old.
pub fn open(ordinal: usize) -> Result<Device> {
    let device = CudaDevice::new_with_stream(ordinal)?;
    // SAFETY: tracking orders uses in several streams; this device has one.
    unsafe { device.disable_event_tracking() };
    keep_freed(&device)?;
    Ok(Device::Cuda(device))
}

fn keep_freed(device: &CudaDevice) -> Result<()> {
    set_pool(device, sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, u64::MAX)
}

/// Most bytes that tensors took since [`forget_peak`] or the start; workspaces of cuBLAS and
/// cuDNN that they take for themselves are not among them.
///
/// # Errors
/// The driver's.
pub fn peak_memory(device: &CudaDevice) -> Result<u64> {
    pool(device, PEAK)
}

/// Counts the peak from the bytes that tensors take now.
///
/// # Errors
/// The driver's.
pub fn forget_peak(device: &CudaDevice) -> Result<()> {
    // Any other value than 0 is refused.
    set_pool(device, PEAK, 0)
}

const PEAK: sys::CUmemPool_attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH;

/// Free and total bytes of a GPU. What its pool holds and nothing uses is free.
///
/// # Errors
/// The driver's.
pub fn room(device: &CudaDevice) -> Result<(u64, u64)> {
    let (free, total) = device.cuda_stream().context().mem_get_info().w()?;
    let held = pool(device, sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT)?;
    let used = pool(device, sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT)?;
    Ok((free as u64 + held.saturating_sub(used), total as u64))
}

/// An attribute of the device's memory pool.
fn pool(device: &CudaDevice, attribute: sys::CUmemPool_attribute) -> Result<u64> {
    let mut value = 0_u64;
    // SAFETY: the pool is the device's own, and the attribute is one 64-bit number.
    unsafe {
        let pool = device::get_default_mem_pool(device.cuda_stream().context().cu_device()).w()?;
        mem_pool::get_attribute(pool, attribute, (&raw mut value).cast()).w()?;
    }
    Ok(value)
}

fn set_pool(device: &CudaDevice, attribute: sys::CUmemPool_attribute, value: u64) -> Result<()> {
    let mut value = value;
    // SAFETY: the pool is the device's own, and the attribute is one 64-bit number.
    unsafe {
        let pool = device::get_default_mem_pool(device.cuda_stream().context().cu_device()).w()?;
        mem_pool::set_attribute(pool, attribute, (&raw mut value).cast()).w()
    }
}

/// Whether the operations of this module apply to the tensor.
pub fn takes(x: &Tensor) -> bool {
    x.device().is_cuda() && matches!(x.dtype(), DType::F32 | DType::F16 | DType::BF16)
}

/// The tensor's GPU.
pub fn device(x: &Tensor) -> Result<&CudaDevice> {
    match x.device() {
        Device::Cuda(device) => Ok(device),
        _ => bail!("expected a tensor on a GPU"),
    }
}

/// The address of the first element of a contiguous tensor. What kernels do there is ordered
/// after what was done to the tensor before, since a device has one stream.
pub fn address(x: &Tensor) -> Result<u64> {
    let (storage, layout) = x.storage_and_layout();
    if !layout.is_contiguous() {
        bail!("expected a contiguous tensor")
    }
    let Storage::Cuda(storage) = &*storage else { bail!("expected a tensor on a GPU") };
    let offset = layout.start_offset() * x.dtype().size_in_bytes();
    Ok(start(storage)? + offset as u64)
}

/// [`address`], or 0 for nothing.
pub fn address_or_null(x: Option<&Tensor>) -> Result<u64> {
    x.map_or(Ok(0), address)
}

fn start(storage: &CudaStorage) -> Result<u64> {
    fn of<T>(slice: &CudaSlice<T>, storage: &CudaStorage) -> u64 {
        slice.device_ptr(&storage.device.cuda_stream()).0
    }
    Ok(match &storage.slice {
        CudaStorageSlice::F32(s) => of(s, storage),
        CudaStorageSlice::F64(s) => of(s, storage),
        CudaStorageSlice::F16(s) => of(s, storage),
        CudaStorageSlice::BF16(s) => of(s, storage),
        _ => bail!("no GPU kernel takes {:?}", storage.dtype()),
    })
}

/// New device memory, which a kernel fills.
pub struct Fresh {
    storage: CudaStorage,
    pub address: u64,
}

impl Fresh {
    /// Memory for `elements` values.
    pub fn new(device: &CudaDevice, dtype: DType, elements: usize) -> Result<Self> {
        // A device gives no empty memory.
        let shape = Shape::from(elements.max(1));
        // SAFETY: every kernel of this module writes all of its output.
        let storage = unsafe { device.alloc_uninit(&shape, dtype)? };
        let address = start(&storage)?;
        Ok(Self { storage, address })
    }

    /// Memory for as many values of the same type on the same device.
    pub fn like(x: &Tensor) -> Result<Self> {
        Self::new(device(x)?, x.dtype(), x.elem_count())
    }

    pub fn into_storage(self) -> Storage {
        Storage::Cuda(self.storage)
    }

    pub fn into_tensor(self, shape: impl Into<Shape>) -> Tensor {
        constant(self.into_storage(), shape)
    }
}
