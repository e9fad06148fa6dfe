// CUDA's execution model on the host, so that the sources of kernels compile with a C++17
// compiler and run here. Every thread of a block is a fiber on one OS thread; blocks run one
// after another. Barriers and warp collectives are rendezvous: their wrong use aborts with a
// message. Shared memory starts out as NaN, and the order in which threads run can be varied
// (`Order`), so that a missing barrier shows.
//
// Compile with -DDS_EMULATED -ffp-contract=off and the CUDA toolkit's include directory, and
// link emulator.cpp. `foreign.h` adds what kernels need that do not know of the emulator.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <type_traits>
#include <utility>
#include <vector>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#undef __device__
#undef __global__
#undef __host__
#undef __shared__
#undef __constant__
#undef __forceinline__
#undef __launch_bounds__
#undef __align__
#define __device__
#define __global__
#define __host__
// Block scope only. `extern __shared__ T name[]` becomes a declaration whose definition the
// includer must give: `thread_local T name[...]`.
#define __shared__ thread_local
#define __constant__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#ifndef __restrict__
#define __restrict__ __restrict
#endif

namespace emulator {

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Forward and backward, each warp runs on until it waits for another; shuffled, all threads run to
// their next rendezvous, in an order that changes at every barrier.
enum class Order { Forward, Backward, Shuffled };

struct Options {
    // Whether what CUDA leaves undefined but GPUs put up with is an error: barriers and
    // collectives that count on threads which have returned.
    bool strict = true;
    // The order in which threads run between two rendezvous; results must not depend on it.
    Order order = Order::Forward;
};

// Options of launches that give none; DS_EMULATOR_ORDER=forward|backward|shuffled presets them.
Options& options();

// Shared memory that every supported GPU can give one block.
constexpr size_t SHARED_LIMIT = 99 * 1024;

struct Fiber;
struct Block;

enum class State { Fresh, Ready, AtBarrier, InCollective, Done };

struct Copy {
    void* to;
    const void* from;
    bool valid;
};

struct Thread {
    uint3 index;
    unsigned linear;
    State state;
    Block* block;
    Fiber* fiber;
    // Asynchronous copies not yet done, and where each committed group ends among them.
    std::vector<Copy> copies;
    std::vector<size_t> groups;
};

struct Range {
    unsigned char* begin;
    size_t bytes;
};

struct Block {
    uint3 index;
    dim3 size, grid;
    unsigned threads;
    unsigned long long serial;
    bool strict;
    Range dynamic;
    std::vector<Range> arrays;
};

extern __attribute__((tls_model("initial-exec"))) thread_local Thread* current;

// Runs `kernel` once for every thread of the grid.
void launch(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel,
            const Options& how = options());

// The same for a kernel and its parameters' addresses, as cuLaunchKernel has them.
template <class... A, size_t... I>
void launch_at(dim3 grid, dim3 block, size_t shared_bytes, void (*kernel)(A...), void** parameters,
               const Options& how, std::index_sequence<I...>) {
    launch(grid, block, shared_bytes, [&] { kernel(*static_cast<A*>(parameters[I])...); }, how);
}

template <class... A>
void launch(dim3 grid, dim3 block, size_t shared_bytes, void (*kernel)(A...), void** parameters,
            const Options& how = options()) {
    launch_at(grid, block, shared_bytes, kernel, parameters, how, std::index_sequence_for<A...>());
}

void barrier(const char* file, int line);

using Operation = void (*)(void** of_lanes, unsigned lanes);

// Waits for the lanes of `mask`; the last one runs `operation` on what all of them brought.
void collective(unsigned mask, const char* name, void* own, Operation operation);

// What went on since the last reset, of all launches.
struct Statistics {
    unsigned long long matrix_loads, matrix_load_conflicts, products;
};
Statistics& statistics();

inline unsigned lane() { return current->linear % 32; }

// Aborts unless [pointer, pointer + bytes) is this block's shared memory.
void check_shared(const void* pointer, size_t bytes, const char* what);

inline void check_aligned(const void* pointer, size_t bytes, const char* what) {
    if (reinterpret_cast<uintptr_t>(pointer) % bytes) fail("%s: %p is not aligned", what, pointer);
}

// An array that checks its indices; converts to a pointer, which does not.
template <class T> class Checked {
    T* data;
    size_t count;

public:
    Checked(T* data, size_t count) : data(data), count(count) {}
    operator T*() const { return data; }
    template <class I, class = std::enable_if_t<std::is_integral_v<I>>> T& operator[](I i) const {
        if (size_t(i) >= count) fail("shared array: index %lld of %zu", (long long)i, count);
        return data[i];
    }
};

// Poisons a shared array at its first use in a block, and has its end watched.
void open_shared(Range range, unsigned long long& serial);
constexpr size_t CANARY = 64;

template <class T, size_t N> struct SharedArray {
    alignas(128) unsigned char bytes[N * sizeof(T) + CANARY];
    unsigned long long serial;
    Checked<T> open() {
        if (serial != current->block->serial) open_shared({bytes, N * sizeof(T)}, serial);
        return {reinterpret_cast<T*>(bytes), N};
    }
};

template <class T> T* dynamic_shared() {
    return reinterpret_cast<T*>(current->block->dynamic.begin);
}

// Asynchronous copies happen when they are waited for; until then their target is NaN.
void copy_async(void* to, const void* from, bool valid);
void commit_copies();
void wait_copies(size_t pending_groups);

void load_matrices(uint32_t (&r)[4], const void* row, bool transposed);

enum class Kind { Half, Brain };
void multiply_accumulate(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Kind kind);

template <class T> struct Shuffle {
    T value, result;
    int from;
};

template <class T> T shuffle(unsigned mask, const char* name, T value, int from) {
    Shuffle<T> own{value, value, from};
    collective(mask, name, &own, [](void** of_lanes, unsigned lanes) {
        for (unsigned i = 0; i < 32; i++) {
            if (!(lanes >> i & 1)) continue;
            auto* to = static_cast<Shuffle<T>*>(of_lanes[i]);
            if (lanes >> to->from & 1) {
                to->result = static_cast<Shuffle<T>*>(of_lanes[to->from])->value;
            } else if (current->block->strict) {
                fail("lane %u shuffles from lane %d, which takes no part", i, to->from);
            }
        }
    });
    return own.result;
}

unsigned vote(unsigned mask, bool predicate);

}  // namespace emulator

#define threadIdx (::emulator::current->index)
#define blockIdx (::emulator::current->block->index)
#define blockDim (::emulator::current->block->size)
#define gridDim (::emulator::current->block->grid)
constexpr int warpSize = 32;

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    emulator::barrier(file, line);
}

inline void __syncwarp(unsigned mask = 0xffffffffu) {
    emulator::collective(mask, "__syncwarp", nullptr, [](void**, unsigned) {});
}

inline void __threadfence() {}
inline void __threadfence_block() {}

template <class T> T __shfl_sync(unsigned mask, T value, int from, int width = 32) {
    int lane = int(emulator::lane()), base = lane & ~(width - 1);
    return emulator::shuffle(mask, "__shfl_sync", value, base | (from & (width - 1)));
}

template <class T> T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
    int lane = int(emulator::lane()), from = lane ^ bits;
    if (from >= (lane & ~(width - 1)) + width) from = lane;
    return emulator::shuffle(mask, "__shfl_xor_sync", value, from);
}

template <class T> T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    int lane = int(emulator::lane()), from = lane + int(delta);
    if (from >= (lane & ~(width - 1)) + width) from = lane;
    return emulator::shuffle(mask, "__shfl_down_sync", value, from);
}

template <class T> T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    int lane = int(emulator::lane()), from = lane - int(delta);
    if (from < (lane & ~(width - 1))) from = lane;
    return emulator::shuffle(mask, "__shfl_up_sync", value, from);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
    return emulator::vote(mask, predicate != 0);
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }

#include "intrinsics.h"
