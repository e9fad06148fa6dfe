// What all kernels share: element types, 16-byte accesses, warp and block reductions, tensor-core
// products and asynchronous copies. With -DDS_EMULATED the same names run on the host, see
// tools/cuda_emulator; kernels have no other difference.
#pragma once

#ifdef DS_EMULATED
#include "emulator.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>
#endif

using f32 = float;
using f16 = __half;
using bf16 = __nv_bfloat16;

// Makes the entry points of a file: M(suffix, type) for every element type.
#define FOR_EACH_TYPE(M) M(f32, float) M(f16, __half) M(bf16, __nv_bfloat16)

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(f16 x) { return __half2float(x); }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }

template <class T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ f16 from_float<f16>(float x) { return __float2half_rn(x); }
template <> __device__ __forceinline__ bf16 from_float<bf16>(float x) {
    return __float2bfloat16_rn(x);
}

// --- 16-byte accesses -----------------------------------------------------------------------

// Elements of one 16-byte access.
template <class T> constexpr int LANES = 16 / int(sizeof(T));

template <class T> struct alignas(16) Vec {
    T v[LANES<T>];
};

// `p` must be a multiple of 16 bytes.
template <class T> __device__ __forceinline__ Vec<T> load_vector(const T* p) {
#ifdef DS_EMULATED
    emulator::check_aligned(p, 16, "load_vector");
#endif
    return *reinterpret_cast<const Vec<T>*>(p);
}

template <class T> __device__ __forceinline__ void store_vector(T* p, const Vec<T>& x) {
#ifdef DS_EMULATED
    emulator::check_aligned(p, 16, "store_vector");
#endif
    *reinterpret_cast<Vec<T>*>(p) = x;
}

template <class T>
__device__ __forceinline__ void load_floats(const T* p, float (&to)[LANES<T>]) {
    Vec<T> x = load_vector(p);
#pragma unroll
    for (int i = 0; i < LANES<T>; i++) to[i] = to_float(x.v[i]);
}

template <class T>
__device__ __forceinline__ void store_floats(T* p, const float (&from)[LANES<T>]) {
    Vec<T> x;
#pragma unroll
    for (int i = 0; i < LANES<T>; i++) x.v[i] = from_float<T>(from[i]);
    store_vector(p, x);
}

__device__ __forceinline__ bool is_aligned(const void* p) {
    return reinterpret_cast<uintptr_t>(p) % 16 == 0;
}

// --- Shared memory --------------------------------------------------------------------------

#ifdef DS_EMULATED
// An array of `count` elements; `&name[0]` is its address.
#define SHARED(type, name, count)                                              \
    static thread_local ::emulator::SharedArray<type, (count)> name##_storage; \
    ::emulator::Checked<type> name = name##_storage.open()
// The launch's dynamic shared memory as a `type*`.
#define DYNAMIC_SHARED(type, name) type* name = ::emulator::dynamic_shared<type>()
#else
#define SHARED(type, name, count) __shared__ __align__(16) type name[count]
#define DYNAMIC_SHARED(type, name)                                     \
    extern __shared__ __align__(128) unsigned char dynamic_shared_bytes[]; \
    type* name = reinterpret_cast<type*>(dynamic_shared_bytes)
#endif

// --- Reductions -----------------------------------------------------------------------------

constexpr unsigned ALL_LANES = 0xffffffffu;

// The sum over a warp's 32 lanes, the same in all of them.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(ALL_LANES, x, step);
    return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, step));
    return x;
}

// The sum over a block of whole warps along x, the same in all threads. `scratch` is shared memory
// for 32 floats, which the previous call may still be reading.
__device__ __forceinline__ float block_sum(float x, float* scratch) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    x = warp_sum(x);
    __syncthreads();
    if (lane == 0) scratch[warp] = x;
    __syncthreads();
    return warp_sum(lane < warps ? scratch[lane] : 0.0f);
}

// --- Tensor cores and asynchronous copies ---------------------------------------------------

#ifdef DS_EMULATED

template <class T>
void mma_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    constexpr bool BRAIN = std::is_same_v<T, bf16>;
    static_assert(BRAIN || std::is_same_v<T, f16>);
    emulator::multiply_accumulate(d, a, b, BRAIN ? emulator::Kind::Brain : emulator::Kind::Half);
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
    emulator::load_matrices(r, row, false);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
    emulator::load_matrices(r, row, true);
}

inline void cp_async_16(void* shared, const void* global, bool valid) {
    emulator::copy_async(shared, global, valid);
}
inline void cp_async_commit() { emulator::commit_copies(); }
template <int N> void cp_async_wait() { emulator::wait_copies(N); }

#else

// d += a b for a [16, 16] in rows and b [16, 8] in columns, in the fragments of mma.m16n8k16.
template <class T>
__device__ __forceinline__ void mma_16816(float (&d)[4], const uint32_t (&a)[4],
                                          const uint32_t (&b)[2]);

#define MMA_16816(type, name)                                                                  \
    template <>                                                                                \
    __device__ __forceinline__ void mma_16816<type>(float (&d)[4], const uint32_t (&a)[4],     \
                                                    const uint32_t (&b)[2]) {                  \
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." name "." name ".f32 "            \
                     "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                   \
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                          \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));      \
    }
MMA_16816(f16, "f16")
MMA_16816(bf16, "bf16")
#undef MMA_16816

__device__ __forceinline__ unsigned shared_address(const void* p) {
    return static_cast<unsigned>(__cvta_generic_to_shared(p));
}

// Four 8x8 matrices of 16-bit elements; lane i gives the address of row i % 8 of matrix i / 8.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// Copies 16 bytes to shared memory, or zeros there where not `valid`.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"(shared_address(shared)), "l"(__cvta_generic_to_global(global)),
                   "r"(valid ? 16 : 0)
                 : "memory");
}

__device__ __forceinline__ void cp_async_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Until at most the N latest groups are under way. Other threads' copies need a barrier as well.
template <int N> __device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

#endif
