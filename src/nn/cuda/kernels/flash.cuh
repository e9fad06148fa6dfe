// What the attention kernels on matrix units share: tiles in shared memory, their
// fragments, and where a head lies in [batch, tokens, heads * D].
//
// A tile is rows of D 16-bit values without padding. The 16-byte chunks of a row are
// permuted by the row's index, so that the eight rows that one 8x8 matrix is read from,
// and the eight chunks that are written at once, lie in different banks.
#pragma once

#include "common.cuh"

namespace flash {

constexpr int WARPS = 4;
constexpr int THREADS = 32 * WARPS;
constexpr float LOG2E = 1.4426950408889634f;
constexpr float LN2 = 0.6931471805599453f;

// 2^x to about two units in the last place; 0 below the normal numbers.
__device__ __forceinline__ float exp2_fast(float x) {
#ifdef DS_EMULATED
    return exp2f(x);
#else
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

__device__ __forceinline__ __half2 round_pair(float low, float high, f16) {
    return __floats2half2_rn(low, high);
}
__device__ __forceinline__ __nv_bfloat162 round_pair(float low, float high, bf16) {
    return __floats2bfloat162_rn(low, high);
}

template <class T> __device__ __forceinline__ uint32_t pack(float low, float high) {
    const auto pair = round_pair(low, high, T());
    uint32_t bits;
    memcpy(&bits, &pair, sizeof bits);
    return bits;
}

// Offset of a chunk of eight values in a tile.
template <int D> __device__ __forceinline__ int swizzled(int row, int chunk) {
    static_assert(D == 32 || D == 64, "");
    int mask = D == 64 ? row & 7 : (row >> 1) & 3;
    return row * D + (chunk ^ mask) * 8;
}

// Rows of D values, `stride` apart, in global memory, as this thread takes part in copying them.
template <int D, class T> struct Source {
    static constexpr int CHUNKS = D / 8, ROWS = THREADS / CHUNKS;
    // This thread's first chunk.
    const T* at;
    int stride;

    __device__ __forceinline__ Source(const T* from, int stride)
        : at(from + static_cast<long long>(threadIdx.x / CHUNKS) * stride +
             threadIdx.x % CHUNKS * 8),
          stride(stride) {}

    __device__ __forceinline__ void advance(int rows) {
        at += static_cast<long long>(rows) * stride;
    }

    // Copies the next N rows into a tile; those from `valid` on become zero and are not read.
    template <int N> __device__ __forceinline__ void copy(T* tile, int valid) const {
        static_assert(N % ROWS == 0 && ROWS % 8 == 0, "");
        const int row = threadIdx.x / CHUNKS;
        T* to = tile + swizzled<D>(row, threadIdx.x % CHUNKS);
#pragma unroll
        for (int i = 0; i < N; i += ROWS) {
            cp_async_16(to + i * D, at + static_cast<long long>(i) * stride, row + i < valid);
        }
    }
};

// Part of shared memory: a tile, or a tile from a multiple of 16 rows on. `offset` is what changes
// at run time, so that the rest of an address becomes an instruction's constant.
template <class T> struct Place {
    const T* base;
    int offset;
};

// Where a lane reads its row of the 8x8 matrices of 16 rows, the first 16 columns. As the
// swizzle is an exclusive or, columns 16k.. are at the offset ^ 16k.
template <int D> struct Lanes {
    // Matrices in the order (rows 0.., columns 0..), (8, 0), (0, 8), (8, 8).
    int down;
    // In the order (0, 0), (0, 8), (8, 0), (8, 8).
    int across;

    __device__ __forceinline__ Lanes() {
        const int lane = threadIdx.x % 32;
        down = swizzled<D>(lane % 16, lane / 16);
        across = swizzled<D>(lane % 8 + lane / 16 * 8, lane / 8 % 2);
    }

    // Rows row..row+16 and columns 16k..16k+16 of a tile as a left operand.
    template <class T>
    __device__ __forceinline__ void left(uint32_t (&a)[4], Place<T> tile, int row, int k) const {
        ldmatrix_x4(a, tile.base + ((down + tile.offset) ^ 16 * k) + row * D);
    }

    // The same, transposed, as two right operands of 8 columns each: the tile's rows are the columns.
    template <class T>
    __device__ __forceinline__ void right_transposed(uint32_t (&b)[2][2], Place<T> tile, int row,
                                                     int k) const {
        uint32_t r[4];
        ldmatrix_x4(r, tile.base + ((across + tile.offset) ^ 16 * k) + row * D);
        b[0][0] = r[0], b[0][1] = r[1], b[1][0] = r[2], b[1][1] = r[3];
    }

    // The same as two right operands of 8 of the tile's columns each.
    template <class T>
    __device__ __forceinline__ void right(uint32_t (&b)[2][2], Place<T> tile, int row,
                                          int k) const {
        uint32_t r[4];
        ldmatrix_x4_trans(r, tile.base + ((down + tile.offset) ^ 16 * k) + row * D);
        b[0][0] = r[0], b[0][1] = r[1], b[1][0] = r[2], b[1][1] = r[3];
    }
};

// Accumulators of two neighbouring 16x8 products as one 16x16 left operand.
template <class T>
__device__ __forceinline__ void as_left(uint32_t (&a)[4], const float (&x)[4],
                                        const float (&y)[4]) {
    a[0] = pack<T>(x[0], x[1]);
    a[1] = pack<T>(x[2], x[3]);
    a[2] = pack<T>(y[0], y[1]);
    a[3] = pack<T>(y[2], y[3]);
}

// Writes a warp's 16 rows of D accumulators, times `low` (rows 0..8) or `high` (rows 8..16),
// to global rows `stride` apart, of which `valid` exist. `rows` is 16 rows of a tile, from a
// multiple of 16, that belong to this warp alone.
template <int D, class T>
__device__ __forceinline__ void store_rows(T* rows, const float (&x)[D / 8][4], float low,
                                           float high, T* to, int stride, int valid) {
    const int lane = threadIdx.x % 32;
    const int row = lane / 4, column = lane % 4 * 2;
    uint32_t* words = reinterpret_cast<uint32_t*>(rows);
    __syncwarp();
#pragma unroll
    for (int n = 0; n < D / 8; n++) {
        words[(swizzled<D>(row, n) + column) / 2] = pack<T>(x[n][0] * low, x[n][1] * low);
        words[(swizzled<D>(row + 8, n) + column) / 2] = pack<T>(x[n][2] * high, x[n][3] * high);
    }
    __syncwarp();
    constexpr int CHUNKS = D / 8;
#pragma unroll
    for (int i = 0; i < 16 * CHUNKS / 32; i++) {
        const int r = (lane + 32 * i) / CHUNKS, chunk = lane % CHUNKS;
        if (r < valid) {
            store_vector(to + static_cast<long long>(r) * stride + chunk * 8,
                         load_vector(rows + swizzled<D>(r, chunk)));
        }
    }
}

} // namespace flash
