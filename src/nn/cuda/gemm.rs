//! Matrix products by cuBLAS. Sums are f32 whatever the type.

use std::ffi::{c_int, c_void};

use candle_core::cuda_backend::cudarc::cublas::{result, sys};
use candle_core::cuda_backend::{CudaDevice, gemm_reduced_precision_f32};
use candle_core::{DType, Result, bail};

/// A row-major matrix in device memory, as stored or transposed.
#[derive(Clone, Copy, Debug)]
pub struct Matrix {
    pub address: u64,
    /// From one stored row to the next.
    pub stride: usize,
    pub transposed: bool,
}

impl Matrix {
    /// Rows of `stride` values.
    pub fn new(address: u64, stride: usize) -> Self {
        Self { address, stride, transposed: false }
    }

    /// The transpose.
    pub fn t(self) -> Self {
        Self { transposed: !self.transposed, ..self }
    }
}

/// `c = alpha · a · b + beta · c` for a [m, k], b [k, n] and c [m, n].
pub fn gemm(
    device: &CudaDevice,
    dtype: DType,
    (m, n, k): (usize, usize, usize),
    (a, b, c): (Matrix, Matrix, Matrix),
    (alpha, beta): (f32, f32),
) -> Result<()> {
    if m == 0 || n == 0 {
        return Ok(());
    }
    let kind = match dtype {
        DType::F32 => sys::cudaDataType::CUDA_R_32F,
        DType::F16 => sys::cudaDataType::CUDA_R_16F,
        DType::BF16 => sys::cudaDataType::CUDA_R_16BF,
        other => bail!("no GPU product of {other:?}"),
    };
    let compute = if dtype == DType::F32 && gemm_reduced_precision_f32() {
        sys::cublasComputeType_t::CUBLAS_COMPUTE_32F_FAST_TF32
    } else {
        sys::cublasComputeType_t::CUBLAS_COMPUTE_32F
    };
    let operation = |matrix: Matrix| match matrix.transposed {
        true => sys::cublasOperation_t::CUBLAS_OP_T,
        false => sys::cublasOperation_t::CUBLAS_OP_N,
    };
    let size = |v: usize| c_int::try_from(v).map_err(candle_core::Error::wrap);
    let blas = device.cublas_handle();
    super::launch::count();
    // cuBLAS stores columns: row-major operands are transposes to it, and cᵀ = bᵀ · aᵀ.
    // SAFETY: the callers give matrices of these sizes in live device memory; the scalars
    // outlive the call.
    unsafe {
        result::gemm_ex(
            *blas.handle(),
            operation(b),
            operation(a),
            size(n)?,
            size(m)?,
            size(k)?,
            (&raw const alpha).cast::<c_void>(),
            b.address as *const c_void,
            kind,
            size(b.stride)?,
            a.address as *const c_void,
            kind,
            size(a.stride)?,
            (&raw const beta).cast::<c_void>(),
            c.address as *mut c_void,
            kind,
            size(c.stride)?,
            compute,
            sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT_TENSOR_OP,
        )
    }
    .map_err(candle_core::Error::wrap)
}
