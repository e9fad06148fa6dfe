// For kernels that were written for nvcc and know nothing of the emulator: include it first
// (g++ -include foreign.h). Pretends to be nvcc 13.0 for sm_89.
#pragma once
#include "emulator.h"

#include <math.h>

#include <cuda/std/limits>
#include <cuda_fp8.h>

#define EMULATED_UNARY(name, function)                                                       \
    inline __half name(__half x) { return __float2half(function(__half2float(x))); }          \
    inline __nv_bfloat16 name(__nv_bfloat16 x) {                                              \
        return __float2bfloat16(function(__bfloat162float(x)));                               \
    }
EMULATED_UNARY(hsqrt, std::sqrt)
EMULATED_UNARY(hrsqrt, rsqrtf)
EMULATED_UNARY(hcos, std::cos)
EMULATED_UNARY(hsin, std::sin)
EMULATED_UNARY(hlog, std::log)
EMULATED_UNARY(hexp, std::exp)
#undef EMULATED_UNARY

#define __CUDA_ARCH__ 890
#define __CUDACC_VER_MAJOR__ 13
#define __CUDACC_VER_MINOR__ 0
