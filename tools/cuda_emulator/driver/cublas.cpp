// Stand-in for libcublas: products of column-major matrices.

#include "handles.h"

#pragma GCC visibility push(default)
#include <cublas_v2.h>
#pragma GCC visibility pop

#include <algorithm>
#include <cinttypes>

#include "products.h"

using namespace driver;

struct cublasContext : Handle<cublasContext> {
    cudaStream_t stream = nullptr;
    cublasMath_t math = CUBLAS_DEFAULT_MATH;
    cublasPointerMode_t pointers = CUBLAS_POINTER_MODE_HOST;
    cublasAtomicsMode_t atomics = CUBLAS_ATOMICS_NOT_ALLOWED;
};

namespace {

constexpr int VERSION = 130000;

struct Gemm {
    cublasOperation_t a_op, b_op;
    int64_t m, n, k;
    const void* alpha;
    const void *a, *b;
    cudaDataType a_type, b_type;
    int64_t lda, ldb, a_step, b_step;
    const void* beta;
    void* c;
    cudaDataType c_type;
    int64_t ldc, c_step;
    int64_t batch;
    cublasComputeType_t compute;
};

bool type_of(cudaDataType from, Type& to) {
    switch (from) {
    case CUDA_R_64F: to = Type::F64; return true;
    case CUDA_R_32F: to = Type::F32; return true;
    case CUDA_R_16F: to = Type::F16; return true;
    case CUDA_R_16BF: to = Type::BF16; return true;
    default: return false;
    }
}

// The type of alpha and beta, and what inputs are rounded to.
bool arithmetic(cublasHandle_t handle, cublasComputeType_t compute, Type& scale, Reduced& reduced) {
    scale = Type::F32;
    reduced = Reduced::No;
    switch (compute) {
    case CUBLAS_COMPUTE_64F:
    case CUBLAS_COMPUTE_64F_PEDANTIC: scale = Type::F64; return true;
    case CUBLAS_COMPUTE_32F:
        if (handle->math == CUBLAS_TF32_TENSOR_OP_MATH) {
            reduced = Reduced::Tf32;
        }
        return true;
    case CUBLAS_COMPUTE_32F_PEDANTIC: return true;
    case CUBLAS_COMPUTE_32F_FAST_TF32: reduced = Reduced::Tf32; return true;
    case CUBLAS_COMPUTE_32F_FAST_16F: reduced = Reduced::F16; return true;
    case CUBLAS_COMPUTE_32F_FAST_16BF: reduced = Reduced::BF16; return true;
    // Sums are in f32 here all the same.
    case CUBLAS_COMPUTE_16F:
    case CUBLAS_COMPUTE_16F_PEDANTIC: scale = Type::F16; return true;
    default: return false;
    }
}

// The combinations of cublasGemmEx's table that are about real floats.
bool supported(Type scale, Type a, Type b, Type c) {
    if (a != b) {
        return false;
    }
    switch (scale) {
    case Type::F64: return a == Type::F64 && c == Type::F64;
    case Type::F16: return a == Type::F16 && c == Type::F16;
    default: return a == Type::F32 ? c == Type::F32 : a != Type::F64 && (c == a || c == Type::F32);
    }
}

double scalar(cublasHandle_t handle, const void* at, Type type, const char* what) {
    if (handle->pointers == CUBLAS_POINTER_MODE_DEVICE) {
        at = host(at, bytes_of(type), what);
    } else if (!at || on_device(at)) {
        fail("%s is not a host pointer", what);
    }
    return load(at, type, 0);
}

// Where a batch of column-major matrices lies, which must be whole inside one allocation.
void* operand(const void* at, int64_t rows, int64_t columns, int64_t ld, int64_t step, int64_t batch, Type type,
              const char* what) {
    const size_t size = bytes_of(type);
    if (reinterpret_cast<uint64_t>(at) % size != 0) {
        fail("%s is not aligned to its type", what);
    }
    if (step < 0) {
        fail("%s has a negative stride", what);
    }
    const int64_t elements = (batch - 1) * step + (columns - 1) * ld + rows;
    return host(at, size_t(elements) * size, what);
}

cublasStatus_t multiply_all(cublasHandle_t handle, const Gemm& g, const char* name) {
    Operation operation(name);
    if (!cublasContext::is_live(handle)) {
        return CUBLAS_STATUS_NOT_INITIALIZED;
    }
    if (need_stream(reinterpret_cast<CUstream>(handle->stream))) {
        return CUBLAS_STATUS_EXECUTION_FAILED;
    }
    Type scale, a_type, b_type, c_type;
    Reduced reduced;
    if (!arithmetic(handle, g.compute, scale, reduced) || !type_of(g.a_type, a_type) || !type_of(g.b_type, b_type) ||
        !type_of(g.c_type, c_type) || !supported(scale, a_type, b_type, c_type)) {
        return CUBLAS_STATUS_NOT_SUPPORTED;
    }
    const bool a_flip = g.a_op != CUBLAS_OP_N, b_flip = g.b_op != CUBLAS_OP_N;
    const int64_t a_rows = a_flip ? g.k : g.m, b_rows = b_flip ? g.n : g.k;
    if (g.m < 0 || g.n < 0 || g.k < 0 || g.batch < 0 || g.lda < std::max<int64_t>(1, a_rows) ||
        g.ldb < std::max<int64_t>(1, b_rows) || g.ldc < std::max<int64_t>(1, g.m)) {
        return CUBLAS_STATUS_INVALID_VALUE;
    }
    if (g.m == 0 || g.n == 0 || g.batch == 0) {
        return CUBLAS_STATUS_SUCCESS;
    }
    const double alpha = scalar(handle, g.alpha, scale, "alpha"), beta = scalar(handle, g.beta, scale, "beta");
    if (g.batch > 1 && g.c_step == 0) {
        fail("%" PRId64 " products with one and the same output", g.batch);
    }
    if (g.c == g.a || g.c == g.b) {
        fail("the output is an input too");
    }
    Matrix a{nullptr, a_type, a_flip ? g.lda : 1, a_flip ? 1 : g.lda};
    Matrix b{nullptr, b_type, b_flip ? g.ldb : 1, b_flip ? 1 : g.ldb};
    const bool read = g.k > 0 && alpha != 0;
    if (read) {
        a.data = operand(g.a, a_rows, a_flip ? g.m : g.k, g.lda, g.a_step, g.batch, a_type, "A");
        b.data = operand(g.b, b_rows, b_flip ? g.k : g.n, g.ldb, g.b_step, g.batch, b_type, "B");
    }
    Result c{operand(g.c, g.m, g.n, g.ldc, g.c_step, g.batch, c_type, "C"), c_type, 1, g.ldc};
    const auto moved = [](const void* data, int64_t step, Type type) {
        return static_cast<const char*>(data) + step * int64_t(bytes_of(type));
    };
    for (int64_t i = 0; i < g.batch; i++) {
        multiply(g.m, g.n, g.k, alpha, a, b, beta, c, reduced);
        if (read) {
            a.data = moved(a.data, g.a_step, a_type);
            b.data = moved(b.data, g.b_step, b_type);
        }
        c.data = const_cast<char*>(moved(c.data, g.c_step, c_type));
    }
    count_gemm(2.0 * double(g.m) * double(g.n) * double(g.k) * double(g.batch));
    return CUBLAS_STATUS_SUCCESS;
}

} // namespace

extern "C" {

// ---- the handle ----

cublasStatus_t cublasCreate_v2(cublasHandle_t* handle) {
    if (need_context()) {
        return CUBLAS_STATUS_NOT_INITIALIZED;
    }
    *handle = new cublasContext;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasDestroy_v2(cublasHandle_t handle) {
    if (!cublasContext::is_live(handle)) {
        return CUBLAS_STATUS_NOT_INITIALIZED;
    }
    delete handle;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasGetVersion_v2(cublasHandle_t, int* version) {
    *version = VERSION;
    return CUBLAS_STATUS_SUCCESS;
}

#define SETTER(function, type, field)                                                                                  \
    cublasStatus_t function(cublasHandle_t handle, type value) {                                                       \
        if (!cublasContext::is_live(handle)) {                                                                         \
            return CUBLAS_STATUS_NOT_INITIALIZED;                                                                      \
        }                                                                                                              \
        handle->field = value;                                                                                         \
        return CUBLAS_STATUS_SUCCESS;                                                                                  \
    }
#define GETTER(function, type, field)                                                                                  \
    cublasStatus_t function(cublasHandle_t handle, type* value) {                                                      \
        if (!cublasContext::is_live(handle)) {                                                                         \
            return CUBLAS_STATUS_NOT_INITIALIZED;                                                                      \
        }                                                                                                              \
        *value = handle->field;                                                                                        \
        return CUBLAS_STATUS_SUCCESS;                                                                                  \
    }

SETTER(cublasSetStream_v2, cudaStream_t, stream)
GETTER(cublasGetStream_v2, cudaStream_t, stream)
SETTER(cublasSetMathMode, cublasMath_t, math)
GETTER(cublasGetMathMode, cublasMath_t, math)
SETTER(cublasSetPointerMode_v2, cublasPointerMode_t, pointers)
GETTER(cublasGetPointerMode_v2, cublasPointerMode_t, pointers)
SETTER(cublasSetAtomicsMode, cublasAtomicsMode_t, atomics)
GETTER(cublasGetAtomicsMode, cublasAtomicsMode_t, atomics)

cublasStatus_t cublasSetWorkspace_v2(cublasHandle_t handle, void* workspace, size_t bytes) {
    Operation operation("cublasSetWorkspace");
    if (!cublasContext::is_live(handle)) {
        return CUBLAS_STATUS_NOT_INITIALIZED;
    }
    if (reinterpret_cast<uint64_t>(workspace) % 256 != 0) {
        return CUBLAS_STATUS_INVALID_VALUE;
    }
    if (bytes > 0) {
        host(workspace, bytes, "the workspace");
    }
    return CUBLAS_STATUS_SUCCESS;
}

// ---- products of one type ----

cublasStatus_t cublasSgemm_v2(cublasHandle_t handle, cublasOperation_t a_op, cublasOperation_t b_op, int m, int n,
                              int k, const float* alpha, const float* a, int lda, const float* b, int ldb,
                              const float* beta, float* c, int ldc) {
    return cublasSgemmStridedBatched(handle, a_op, b_op, m, n, k, alpha, a, lda, 0, b, ldb, 0, beta, c, ldc, 0, 1);
}

cublasStatus_t cublasDgemm_v2(cublasHandle_t handle, cublasOperation_t a_op, cublasOperation_t b_op, int m, int n,
                              int k, const double* alpha, const double* a, int lda, const double* b, int ldb,
                              const double* beta, double* c, int ldc) {
    return cublasDgemmStridedBatched(handle, a_op, b_op, m, n, k, alpha, a, lda, 0, b, ldb, 0, beta, c, ldc, 0, 1);
}

cublasStatus_t cublasSgemmStridedBatched(cublasHandle_t handle, cublasOperation_t a_op, cublasOperation_t b_op, int m,
                                         int n, int k, const float* alpha, const float* a, int lda, long long a_step,
                                         const float* b, int ldb, long long b_step, const float* beta, float* c,
                                         int ldc, long long c_step, int batch) {
    return multiply_all(handle,
                        {a_op, b_op, m, n, k, alpha, a, b, CUDA_R_32F, CUDA_R_32F, lda, ldb, a_step, b_step, beta, c,
                         CUDA_R_32F, ldc, c_step, batch, CUBLAS_COMPUTE_32F},
                        "cublasSgemm");
}

cublasStatus_t cublasDgemmStridedBatched(cublasHandle_t handle, cublasOperation_t a_op, cublasOperation_t b_op, int m,
                                         int n, int k, const double* alpha, const double* a, int lda, long long a_step,
                                         const double* b, int ldb, long long b_step, const double* beta, double* c,
                                         int ldc, long long c_step, int batch) {
    return multiply_all(handle,
                        {a_op, b_op, m, n, k, alpha, a, b, CUDA_R_64F, CUDA_R_64F, lda, ldb, a_step, b_step, beta, c,
                         CUDA_R_64F, ldc, c_step, batch, CUBLAS_COMPUTE_64F},
                        "cublasDgemm");
}

// ---- products of given types ----

cublasStatus_t cublasGemmEx(cublasHandle_t handle, cublasOperation_t a_op, cublasOperation_t b_op, int m, int n, int k,
                            const void* alpha, const void* a, cudaDataType a_type, int lda, const void* b,
                            cudaDataType b_type, int ldb, const void* beta, void* c, cudaDataType c_type, int ldc,
                            cublasComputeType_t compute, cublasGemmAlgo_t) {
    return multiply_all(handle,
                        {a_op, b_op, m, n, k, alpha, a, b, a_type, b_type, lda, ldb, 0, 0, beta, c, c_type, ldc, 0, 1,
                         compute},
                        "cublasGemmEx");
}

cublasStatus_t cublasGemmStridedBatchedEx(cublasHandle_t handle, cublasOperation_t a_op, cublasOperation_t b_op, int m,
                                          int n, int k, const void* alpha, const void* a, cudaDataType a_type, int lda,
                                          long long a_step, const void* b, cudaDataType b_type, int ldb,
                                          long long b_step, const void* beta, void* c, cudaDataType c_type, int ldc,
                                          long long c_step, int batch, cublasComputeType_t compute, cublasGemmAlgo_t) {
    return multiply_all(handle,
                        {a_op, b_op, m, n, k, alpha, a, b, a_type, b_type, lda, ldb, a_step, b_step, beta, c, c_type,
                         ldc, c_step, batch, compute},
                        "cublasGemmStridedBatchedEx");
}

} // extern "C"
