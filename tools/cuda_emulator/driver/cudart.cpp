// Stand-in for libcudart. Programs here use the driver API; candle's kernels
// for quantised weights are linked through the runtime, where they are built
// at all, and are not emulated.

#include "handles.h"

#pragma GCC visibility push(default)
#include <cuda_runtime_api.h>
#pragma GCC visibility pop

using namespace driver;

namespace {

constexpr int VERSION = 13000;

cudaError_t translated(CUresult result) {
    switch (result) {
    case CUDA_SUCCESS: return cudaSuccess;
    case CUDA_ERROR_OUT_OF_MEMORY: return cudaErrorMemoryAllocation;
    case CUDA_ERROR_INVALID_VALUE: return cudaErrorInvalidValue;
    default: return cudaErrorUnknown;
    }
}

} // namespace

#pragma GCC visibility push(default)
extern "C" {

cudaError_t cudaRuntimeGetVersion(int* version) {
    *version = VERSION;
    return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int* version) {
    return translated(cuDriverGetVersion(version));
}

cudaError_t cudaGetDeviceCount(int* count) {
    *count = 1;
    return translated(cuInit(0));
}

cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
    return device == 0 ? cudaSuccess : cudaErrorInvalidDevice;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int device) {
    return translated(cuDeviceGetAttribute(value, CUdevice_attribute(which), device));
}

cudaError_t cudaDeviceSynchronize() {
    return translated(cuCtxSynchronize());
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    return translated(cuStreamSynchronize(reinterpret_cast<CUstream>(stream)));
}

cudaError_t cudaGetLastError() {
    return cudaSuccess;
}

cudaError_t cudaPeekAtLastError() {
    return cudaSuccess;
}

const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaSuccess ? "no error" : "an error of the emulated runtime";
}

cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) {
    fail("cudaFuncSetAttribute: kernels linked through the runtime are not emulated");
}

cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t) {
    fail("cudaLaunchKernel: kernels linked through the runtime are not emulated");
}

cudaError_t cudaMallocAsync(void**, size_t, cudaStream_t) {
    fail("cudaMallocAsync: the runtime's memory is not emulated");
}

cudaError_t cudaFreeAsync(void*, cudaStream_t) {
    fail("cudaFreeAsync: the runtime's memory is not emulated");
}

cudaError_t cudaMemcpyAsync(void*, const void*, size_t, cudaMemcpyKind, cudaStream_t) {
    fail("cudaMemcpyAsync: the runtime's memory is not emulated");
}

cudaError_t cudaMemsetAsync(void*, int, size_t, cudaStream_t) {
    fail("cudaMemsetAsync: the runtime's memory is not emulated");
}

// What nvcc's host objects call before main.

void** __cudaRegisterFatBinary(void*) {
    static void* handle;
    return &handle;
}

void __cudaRegisterFatBinaryEnd(void**) {}

void __cudaUnregisterFatBinary(void**) {}

void __cudaRegisterFunction(void**, const char*, char*, const char*, int, void*, void*, void*, void*, int*) {}

void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}

unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, void*) {
    return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) {
    return cudaSuccess;
}

} // extern "C"
#pragma GCC visibility pop
