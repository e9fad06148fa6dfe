//! cuDNN's convolutions, channels-last. Only deterministic algorithms are taken, so that a
//! run that is resumed gives the same bits; sums are f32.

use std::cell::RefCell;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::{c_int, c_void};
use std::mem::zeroed;
use std::ptr::null_mut;
use std::rc::Rc;

use candle_core::cuda_backend::cudarc::cudnn::{CudnnError, result, sys};
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, DevicePtr};
use candle_core::cuda_backend::{CudaDevice, DeviceId, gemm_reduced_precision_f32};
use candle_core::{DType, Error, Result, bail};

use super::conv::Conv;
use crate::nn::window::Window;

/// Bytes of workspace that an algorithm may ask for.
const WORKSPACE: usize = 1 << 30;

/// Whether cuDNN has this convolution: its padding is the same on both sides.
pub fn takes(w: &Window) -> bool {
    let covered = |size: usize, kernel: usize| (size + 2 * w.padding).checked_sub(kernel);
    let fits = |size, kernel, out| covered(size, kernel).is_some_and(|c| c / w.stride + 1 == out);
    fits(w.height, w.kernel.0, w.out.0) && fits(w.width, w.kernel.1, w.out.1)
}

pub fn forward(conv: &Conv, x: u64, weight: u64, y: u64) -> Result<()> {
    run(conv, Pass::Forward, [x, weight, y])
}

pub fn input_gradient(conv: &Conv, dy: u64, weight: u64, dx: u64) -> Result<()> {
    run(conv, Pass::Input, [dx, weight, dy])
}

pub fn weight_gradient(conv: &Conv, x: u64, dy: u64, dw: u64) -> Result<()> {
    run(conv, Pass::Weight, [x, dw, dy])
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Pass {
    Forward,
    Input,
    Weight,
}

#[derive(Clone, Copy)]
enum Algorithm {
    Forward(sys::cudnnConvolutionFwdAlgo_t),
    Input(sys::cudnnConvolutionBwdDataAlgo_t),
    Weight(sys::cudnnConvolutionBwdFilterAlgo_t),
}

/// Descriptors of one convolution, and what was chosen for it.
struct Plan {
    x: sys::cudnnTensorDescriptor_t,
    weight: sys::cudnnFilterDescriptor_t,
    y: sys::cudnnTensorDescriptor_t,
    conv: sys::cudnnConvolutionDescriptor_t,
    algorithm: Algorithm,
    workspace: usize,
}

impl Drop for Plan {
    fn drop(&mut self) {
        // SAFETY: made in `Plan::new` and used by nothing else. A failure leaks a few bytes.
        unsafe {
            let _ = result::destroy_tensor_descriptor(self.x);
            let _ = result::destroy_filter_descriptor(self.weight);
            let _ = result::destroy_tensor_descriptor(self.y);
            let _ = result::destroy_convolution_descriptor(self.conv);
        }
    }
}

type Key = (Pass, DType, Window, usize, bool);

/// A thread's cuDNN on one device.
struct Library {
    handle: sys::cudnnHandle_t,
    plans: HashMap<Key, Rc<Plan>>,
    workspace: Option<CudaSlice<u8>>,
}

impl Drop for Library {
    fn drop(&mut self) {
        // SAFETY: made in `Library::new` and used by nothing else.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

thread_local! {
    static LIBRARIES: RefCell<HashMap<DeviceId, Library>> = RefCell::default();
}

fn with_library<R>(device: &CudaDevice, f: impl FnOnce(&mut Library) -> Result<R>) -> Result<R> {
    LIBRARIES.with_borrow_mut(|libraries| match libraries.entry(device.id()) {
        Entry::Occupied(mut library) => f(library.get_mut()),
        Entry::Vacant(place) => f(place.insert(Library::new(device)?)),
    })
}

fn wrap<T>(outcome: std::result::Result<T, CudnnError>) -> Result<T> {
    outcome.map_err(Error::wrap)
}

fn run(conv: &Conv, pass: Pass, [x, weight, y]: [u64; 3]) -> Result<()> {
    let exact = conv.dtype == DType::F32 && !gemm_reduced_precision_f32();
    with_library(conv.device, |library| {
        let key = (pass, conv.dtype, conv.window, conv.outer, exact);
        let plan = match library.plans.get(&key) {
            Some(plan) => plan.clone(),
            None => {
                let plan = Rc::new(Plan::new(library.handle, pass, conv, exact)?);
                library.plans.insert(key, plan.clone());
                plan
            }
        };
        super::launch::count();
        let workspace = library.workspace(conv.device, plan.workspace)?;
        let (one, zero) = (1.0_f32, 0.0_f32);
        let (one, zero) = ((&raw const one).cast(), (&raw const zero).cast());
        let (handle, size) = (library.handle, plan.workspace);
        let (x, weight, y) = (x as *mut c_void, weight as *mut c_void, y as *mut c_void);
        // SAFETY: the descriptors are alive, and the addresses are of live device memory of
        // the sizes that they describe.
        wrap(unsafe {
            match plan.algorithm {
                Algorithm::Forward(a) => result::convolution_forward(
                    handle,
                    one,
                    plan.x,
                    x,
                    plan.weight,
                    weight,
                    plan.conv,
                    a,
                    workspace,
                    size,
                    zero,
                    plan.y,
                    y,
                ),
                Algorithm::Input(a) => result::convolution_backward_data(
                    handle,
                    one,
                    plan.weight,
                    weight,
                    plan.y,
                    y,
                    plan.conv,
                    a,
                    workspace,
                    size,
                    zero,
                    plan.x,
                    x,
                ),
                Algorithm::Weight(a) => result::convolution_backward_filter(
                    handle,
                    one,
                    plan.x,
                    x,
                    plan.y,
                    y,
                    plan.conv,
                    a,
                    workspace,
                    size,
                    zero,
                    plan.weight,
                    weight,
                ),
            }
        })
    })
}

impl Library {
    fn new(device: &CudaDevice) -> Result<Self> {
        let stream = device.cuda_stream();
        stream.context().bind_to_thread().map_err(Error::wrap)?;
        let library =
            Self { handle: wrap(result::create_handle())?, plans: HashMap::new(), workspace: None };
        // SAFETY: both are valid; a device keeps its stream.
        wrap(unsafe { result::set_stream(library.handle, stream.cu_stream().cast()) })?;
        Ok(library)
    }

    /// Memory that this thread's convolutions share: they run one after another.
    fn workspace(&mut self, device: &CudaDevice, bytes: usize) -> Result<*mut c_void> {
        if bytes == 0 {
            return Ok(null_mut());
        }
        if self.workspace.as_ref().is_none_or(|w| w.len() < bytes) {
            self.workspace = None;
            // SAFETY: cuDNN writes it before it reads it.
            self.workspace = Some(unsafe { device.alloc::<u8>(bytes)? });
        }
        let stream = device.cuda_stream();
        Ok(self.workspace.as_ref().map_or(null_mut(), |w| w.device_ptr(&stream).0 as *mut c_void))
    }
}

impl Plan {
    fn new(handle: sys::cudnnHandle_t, pass: Pass, conv: &Conv, exact: bool) -> Result<Self> {
        let kind = match conv.dtype {
            DType::F32 => sys::cudnnDataType_t::CUDNN_DATA_FLOAT,
            DType::F16 => sys::cudnnDataType_t::CUDNN_DATA_HALF,
            DType::BF16 => sys::cudnnDataType_t::CUDNN_DATA_BFLOAT16,
            other => bail!("cuDNN: no convolution of {other:?}"),
        };
        let w = &conv.window;
        let layout = sys::cudnnTensorFormat_t::CUDNN_TENSOR_NHWC;
        let math = if exact {
            sys::cudnnMathType_t::CUDNN_FMA_MATH
        } else {
            sys::cudnnMathType_t::CUDNN_TENSOR_OP_MATH
        };
        let (padding, stride) = (int(w.padding)?, int(w.stride)?);
        let algorithm = match pass {
            Pass::Forward => Algorithm::Forward(
                sys::cudnnConvolutionFwdAlgo_t::CUDNN_CONVOLUTION_FWD_ALGO_IMPLICIT_PRECOMP_GEMM,
            ),
            Pass::Input => Algorithm::Input(
                sys::cudnnConvolutionBwdDataAlgo_t::CUDNN_CONVOLUTION_BWD_DATA_ALGO_1,
            ),
            Pass::Weight => Algorithm::Weight(
                sys::cudnnConvolutionBwdFilterAlgo_t::CUDNN_CONVOLUTION_BWD_FILTER_ALGO_1,
            ),
        };
        // Whole from the start, so that a failure below destroys what was made.
        let mut plan = Self {
            x: wrap(result::create_tensor_descriptor())?,
            weight: wrap(result::create_filter_descriptor())?,
            y: wrap(result::create_tensor_descriptor())?,
            conv: wrap(result::create_convolution_descriptor())?,
            algorithm,
            workspace: 0,
        };
        let sizes = |[n, c, h, w]: [usize; 4]| Ok::<_, Error>([int(n)?, int(c)?, int(h)?, int(w)?]);
        let x = sizes([w.batch, w.channels, w.height, w.width])?;
        let y = sizes([w.batch, conv.outer, w.out.0, w.out.1])?;
        let filter = sizes([conv.outer, w.channels, w.kernel.0, w.kernel.1])?;
        // SAFETY: the descriptors were made above.
        unsafe {
            wrap(result::set_tensor4d_descriptor(plan.x, layout, kind, x))?;
            wrap(result::set_tensor4d_descriptor(plan.y, layout, kind, y))?;
            wrap(result::set_filter4d_descriptor(plan.weight, kind, layout, filter))?;
            wrap(result::set_convolution2d_descriptor(
                plan.conv,
                padding,
                padding,
                stride,
                stride,
                1,
                1,
                sys::cudnnConvolutionMode_t::CUDNN_CROSS_CORRELATION,
                sys::cudnnDataType_t::CUDNN_DATA_FLOAT,
            ))?;
            wrap(result::set_convolution_math_type(plan.conv, math))?;
        }
        plan.choose(handle, pass)?;
        Ok(plan)
    }

    /// The first of cuDNN's suggestions, fastest first, that is deterministic, works with the
    /// chosen arithmetic and whose workspace is affordable.
    fn choose(&mut self, handle: sys::cudnnHandle_t, pass: Pass) -> Result<()> {
        const MOST: usize = 8;
        let mut count: c_int = 0;
        // SAFETY: handle and descriptors are alive; the results are plain numbers, for `MOST`
        // of which there is room.
        let chosen = unsafe {
            match pass {
                Pass::Forward => {
                    let mut all: [sys::cudnnConvolutionFwdAlgoPerf_t; MOST] = zeroed();
                    wrap(result::get_convolution_forward_algorithm(
                        handle,
                        self.x,
                        self.weight,
                        self.conv,
                        self.y,
                        MOST as c_int,
                        &mut count,
                        all.as_mut_ptr(),
                    ))?;
                    let fits = |p: &&sys::cudnnConvolutionFwdAlgoPerf_t| {
                        usable(p.status, p.determinism, p.memory)
                    };
                    let found = all[..count as usize].iter().find(fits);
                    found.map(|p| (Algorithm::Forward(p.algo), p.memory))
                }
                Pass::Input => {
                    let mut all: [sys::cudnnConvolutionBwdDataAlgoPerf_t; MOST] = zeroed();
                    wrap(result::get_convolution_backward_data_algorithm(
                        handle,
                        self.weight,
                        self.y,
                        self.conv,
                        self.x,
                        MOST as c_int,
                        &mut count,
                        all.as_mut_ptr(),
                    ))?;
                    let fits = |p: &&sys::cudnnConvolutionBwdDataAlgoPerf_t| {
                        usable(p.status, p.determinism, p.memory)
                    };
                    let found = all[..count as usize].iter().find(fits);
                    found.map(|p| (Algorithm::Input(p.algo), p.memory))
                }
                Pass::Weight => {
                    let mut all: [sys::cudnnConvolutionBwdFilterAlgoPerf_t; MOST] = zeroed();
                    wrap(result::get_convolution_backward_filter_algorithm(
                        handle,
                        self.x,
                        self.y,
                        self.conv,
                        self.weight,
                        MOST as c_int,
                        &mut count,
                        all.as_mut_ptr(),
                    ))?;
                    let fits = |p: &&sys::cudnnConvolutionBwdFilterAlgoPerf_t| {
                        usable(p.status, p.determinism, p.memory)
                    };
                    let found = all[..count as usize].iter().find(fits);
                    found.map(|p| (Algorithm::Weight(p.algo), p.memory))
                }
            }
        };
        let Some((algorithm, workspace)) = chosen else {
            bail!("cuDNN: no deterministic algorithm for a convolution")
        };
        (self.algorithm, self.workspace) = (algorithm, workspace);
        Ok(())
    }
}

fn usable(status: sys::cudnnStatus_t, determinism: sys::cudnnDeterminism_t, memory: usize) -> bool {
    status == sys::cudnnStatus_t::CUDNN_STATUS_SUCCESS
        && determinism == sys::cudnnDeterminism_t::CUDNN_DETERMINISTIC
        && memory <= WORKSPACE
}

fn int(value: usize) -> Result<c_int> {
    c_int::try_from(value).map_err(Error::wrap)
}
