// How the memory-bound kernels go through their tensors. All of them run with blocks of 256
// threads, at any grid.
#pragma once

#include "common.cuh"

constexpr int THREADS = 256;

__device__ __forceinline__ long long first_index() {
    return blockIdx.x * static_cast<long long>(THREADS) + threadIdx.x;
}
__device__ __forceinline__ long long all_threads() {
    return gridDim.x * static_cast<long long>(THREADS);
}

// i / n and i mod n; in 32 bits, which is several times faster, where that will do.
__device__ __forceinline__ void split(long long i, int n, long long& quotient, int& rest) {
    if (i <= 0xffffffffll) {
        quotient = static_cast<unsigned>(i) / static_cast<unsigned>(n);
        rest = static_cast<int>(static_cast<unsigned>(i) % static_cast<unsigned>(n));
    } else {
        quotient = i / n;
        rest = static_cast<int>(i % n);
    }
}

// Elements that a thread takes at a time: LANES<T> where all rows are whole vectors, else 1.
template <int N> struct Width {
    static constexpr int value = N;
};

template <int N, class T> __device__ __forceinline__ void load(const T* p, float (&to)[N]) {
    if constexpr (N == 1) {
        to[0] = to_float(*p);
    } else {
        load_floats(p, to);
    }
}

template <int N, class T> __device__ __forceinline__ void store(T* p, const float (&from)[N]) {
    if constexpr (N == 1) {
        *p = from_float<T>(from[0]);
    } else {
        store_floats(p, from);
    }
}

// each(Width<N>, i) for all of n elements, N at a time where the pointers are `aligned`.
template <class T, class F>
__device__ __forceinline__ void over_elements(long long n, bool aligned, F each) {
    long long vectors = aligned ? n / LANES<T> : 0;
    for (long long i = first_index(); i < vectors; i += all_threads()) {
        each(Width<LANES<T>>(), i * LANES<T>);
    }
    for (long long i = vectors * LANES<T> + first_index(); i < n; i += all_threads()) {
        each(Width<1>(), i);
    }
}

template <int N, class F>
__device__ __forceinline__ void over_row_units(long long rows, int channels, F each) {
    int units = channels / N;
    for (long long i = first_index(); i < rows * units; i += all_threads()) {
        long long row;
        int unit;
        split(i, units, row, unit);
        each(Width<N>(), row, unit * N);
    }
}

// each(Width<N>, row, column) for all of [rows, channels].
template <class T, class F>
__device__ __forceinline__ void over_rows(long long rows, int channels, bool aligned, F each) {
    if (aligned && channels % LANES<T> == 0) {
        over_row_units<LANES<T>>(rows, channels, each);
    } else {
        over_row_units<1>(rows, channels, each);
    }
}

// --- Tiles of columns -----------------------------------------------------------------------
//
// For work per channel: a block takes tiles of 8 N neighbouring columns (128 bytes of a row), each
// thread N columns of every 32nd row of the block's piece of rows.

constexpr int TILE_UNITS = 8, TILE_ROWS = THREADS / TILE_UNITS;

// A piece of `rows` rows: [begin, end), which may be empty.
struct Piece {
    long long begin, end;
    __device__ Piece(long long rows, int pieces, int piece) {
        long long length = (rows + pieces - 1) / pieces;
        begin = piece * length < rows ? piece * length : rows;
        end = begin + length < rows ? begin + length : rows;
    }
    __device__ int count() const { return static_cast<int>(end - begin); }
    // The first row of this thread.
    __device__ long long first() const { return begin + threadIdx.x / TILE_UNITS; }
};

template <int N, class F> __device__ __forceinline__ void over_tiles(int channels, F each) {
    for (int tile = blockIdx.x; tile * TILE_UNITS * N < channels; tile += gridDim.x) {
        each(Width<N>(), tile * TILE_UNITS * N);
    }
}

// each(Width<N>, the tile's first column) for this block's share of the tiles, by whole blocks.
// A thread's own columns start at `own_column`, perhaps beyond the channels.
template <class T, class F>
__device__ __forceinline__ void over_columns(int channels, bool aligned, F each) {
    if (aligned && channels % LANES<T> == 0) {
        over_tiles<LANES<T>>(channels, each);
    } else {
        over_tiles<1>(channels, each);
    }
}

template <int N> __device__ __forceinline__ int own_column(int tile) {
    return tile + static_cast<int>(threadIdx.x) % TILE_UNITS * N;
}

// Shared floats that `sum_columns` needs.
template <class T> constexpr int COLUMN_SCRATCH = THREADS / 32 * TILE_UNITS * LANES<T>;

// The column whose total `sum_columns` gives this thread, or -1.
template <int N> __device__ __forceinline__ int summed_column(int tile, int channels) {
    int slot = threadIdx.x, column = tile + slot % TILE_UNITS * N + slot / TILE_UNITS;
    return slot < TILE_UNITS * N && column < channels ? column : -1;
}

// Totals of the threads' columns over the block's rows, always in the same order.
template <int N> __device__ __forceinline__ float sum_columns(float (&own)[N], float* scratch) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int i = 0; i < N; i++) {
        own[i] += __shfl_xor_sync(ALL_LANES, own[i], 8);
        own[i] += __shfl_xor_sync(ALL_LANES, own[i], 16);
    }
    __syncthreads();
    if (lane < TILE_UNITS) {
#pragma unroll
        for (int i = 0; i < N; i++) scratch[(warp * N + i) * TILE_UNITS + lane] = own[i];
    }
    __syncthreads();
    float total = 0.0f;
    if (threadIdx.x < TILE_UNITS * N) {
#pragma unroll
        for (int w = 0; w < THREADS / 32; w++) total += scratch[w * N * TILE_UNITS + threadIdx.x];
    }
    return total;
}

// The same, in every thread for its own columns.
template <int N> __device__ __forceinline__ void share_columns(float (&own)[N], float* scratch) {
    float total = sum_columns<N>(own, scratch);
    // A column's first summand, which nobody else reads.
    if (threadIdx.x < TILE_UNITS * N) scratch[threadIdx.x] = total;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < N; i++) own[i] = scratch[i * TILE_UNITS + threadIdx.x % TILE_UNITS];
}
