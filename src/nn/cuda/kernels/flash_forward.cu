// Attention forward on matrix units: FlashAttention-2 (arXiv 2307.08691), algorithm 1.
//
// flash_forward_{f16,bf16}_{32,64}: block 128, grid (ceil(targets / 128), heads, batch),
//   dynamic shared 0.
//
// q [batch, targets, ...], k and v [batch, sources, ...], where a token's heads * D values
// are together and tokens are q_stride, k_stride, v_stride values apart; out
// [batch, targets, heads * D]; lse [batch, heads, targets], the natural logarithm of each
// row's sum of exp(score * scale), or null. Pointers are multiples of 16 bytes, strides of
// 8 values; sources >= 1; scale > 0.
//
// A warp has 32 queries, in registers as are their scores, probabilities and outputs. Keys
// and values come in tiles of 64, the next while this one is used.
#include "flash.cuh"

namespace flash {

constexpr int FORWARD_M = 2;
constexpr int FORWARD_ROWS = 16 * FORWARD_M * WARPS;
constexpr int FORWARD_COLUMNS = 64;

// What a thread has of its warp's rows: rows lane / 4 and lane / 4 + 8 of each group of 16.
template <int D> struct Rows {
    float out[FORWARD_M][D / 8][4];
    // Of the raw scores so far.
    float maximum[FORWARD_M][2];
    // This thread's part of the sum of exp2((score - maximum) * log2_scale).
    float sum[FORWARD_M][2];
};

// Takes in a tile of keys and values; in the LAST one only `valid` are real.
template <bool LAST, int D, class T>
__device__ __forceinline__ void forward_tile(Rows<D>& rows, const Lanes<D>& lanes,
                                             const uint32_t (&q)[D / 16][FORWARD_M][4],
                                             Place<T> keys, Place<T> values, int valid,
                                             float log2_scale) {
    constexpr int N = FORWARD_COLUMNS / 8;
    float s[FORWARD_M][N][4] = {};
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            if (LAST && n * 8 >= valid) break;
            uint32_t b[2][2];
            lanes.right_transposed(b, keys, n * 8, k);
#pragma unroll
            for (int m = 0; m < FORWARD_M; m++) {
                mma_16816<T>(s[m][n], q[k][m], b[0]);
                mma_16816<T>(s[m][n + 1], q[k][m], b[1]);
            }
        }
    }
    if (LAST) {
        const int column = threadIdx.x % 4 * 2;
#pragma unroll
        for (int i = 0; i < FORWARD_M * N * 4; i++) {
            const int m = i / (N * 4), n = i / 4 % N, e = i % 4;
            if (n * 8 + column + e % 2 >= valid) s[m][n][e] = -INFINITY;
        }
    }
#pragma unroll
    for (int i = 0; i < FORWARD_M * 2; i++) {
        const int m = i / 2, half = i % 2;
        float maximum = rows.maximum[m][half];
#pragma unroll
        for (int n = 0; n < N; n++) {
            maximum = fmaxf(maximum, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
        }
        maximum = fmaxf(maximum, __shfl_xor_sync(ALL_LANES, maximum, 1));
        maximum = fmaxf(maximum, __shfl_xor_sync(ALL_LANES, maximum, 2));
        const float factor = exp2_fast((rows.maximum[m][half] - maximum) * log2_scale);
        const float shift = maximum * log2_scale;
        rows.maximum[m][half] = maximum;
        float sum = rows.sum[m][half] * factor;
#pragma unroll
        for (int n = 0; n < N; n++) {
            float &x = s[m][n][2 * half], &y = s[m][n][2 * half + 1];
            x = exp2_fast(fmaf(x, log2_scale, -shift));
            y = exp2_fast(fmaf(y, log2_scale, -shift));
            sum += x + y;
        }
        rows.sum[m][half] = sum;
#pragma unroll
        for (int n = 0; n < D / 8; n++) {
            rows.out[m][n][2 * half] *= factor;
            rows.out[m][n][2 * half + 1] *= factor;
        }
    }
#pragma unroll
    for (int k = 0; k < N / 2; k++) {
        if (LAST && k * 16 >= valid) break;
        uint32_t p[FORWARD_M][4];
#pragma unroll
        for (int m = 0; m < FORWARD_M; m++) as_left<T>(p[m], s[m][2 * k], s[m][2 * k + 1]);
#pragma unroll
        for (int n = 0; n < D / 16; n++) {
            uint32_t b[2][2];
            lanes.right(b, values, k * 16, n);
#pragma unroll
            for (int m = 0; m < FORWARD_M; m++) {
                mma_16816<T>(rows.out[m][2 * n], p[m], b[0]);
                mma_16816<T>(rows.out[m][2 * n + 1], p[m], b[1]);
            }
        }
    }
}

template <class T, int D>
__device__ __forceinline__ void forward(const T* q, const T* k, const T* v, T* out, float* lse,
                                        int heads, int targets, int sources, int q_stride,
                                        int k_stride, int v_stride, float scale) {
    constexpr int TILE = FORWARD_COLUMNS * D;
    // Two stages, each a tile of keys and one of values.
    SHARED(uint4, space, 4 * TILE / 8);
    T* shared = reinterpret_cast<T*>(&space[0]);
    static_assert(FORWARD_ROWS * D <= 2 * TILE, "the queries fit a stage");

    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int head = blockIdx.y, batch = blockIdx.z;
    const int first = blockIdx.x * FORWARD_ROWS, remaining = targets - first;
    q += (static_cast<long long>(batch) * targets + first) * q_stride + head * D;
    k += static_cast<long long>(batch) * sources * k_stride + head * D;
    v += static_cast<long long>(batch) * sources * v_stride + head * D;
    Source<D, T> keys(k, k_stride), values(v, v_stride);

    Source<D, T>(q, q_stride).template copy<FORWARD_ROWS>(shared + 2 * TILE, remaining);
    cp_async_commit();
    keys.template copy<FORWARD_COLUMNS>(shared, sources);
    values.template copy<FORWARD_COLUMNS>(shared + TILE, sources);
    cp_async_commit();
    cp_async_wait<1>();
    __syncthreads();
    const Lanes<D> lanes;
    uint32_t left[D / 16][FORWARD_M][4];
#pragma unroll
    for (int i = 0; i < D / 16 * FORWARD_M; i++) {
        const int m = i % FORWARD_M, c = i / FORWARD_M;
        lanes.left(left[c][m], Place<T>{shared + 2 * TILE, warp * FORWARD_M * 16 * D}, m * 16, c);
    }

    Rows<D> rows = {};
#pragma unroll
    for (int i = 0; i < FORWARD_M * 2; i++) rows.maximum[i / 2][i % 2] = -INFINITY;
    const float log2_scale = scale * LOG2E;
    int stage = 0;
    for (int at = 0; at < sources; at += FORWARD_COLUMNS) {
        // This tile has come, and no warp reads the other stage any more.
        cp_async_wait<0>();
        __syncthreads();
        const int valid = sources - at, next = valid - FORWARD_COLUMNS;
        const Place<T> tile = {shared, stage * 2 * TILE}, tile2 = {shared + TILE, stage * 2 * TILE};
        if (next > 0) {
            T* other = shared + (stage ^ 1) * 2 * TILE;
            keys.advance(FORWARD_COLUMNS);
            values.advance(FORWARD_COLUMNS);
            keys.template copy<FORWARD_COLUMNS>(other, next);
            values.template copy<FORWARD_COLUMNS>(other + TILE, next);
            cp_async_commit();
        }
        if (next >= 0) {
            forward_tile<false, D>(rows, lanes, left, tile, tile2, valid, log2_scale);
        } else {
            forward_tile<true, D>(rows, lanes, left, tile, tile2, valid, log2_scale);
        }
        stage ^= 1;
    }

    __syncthreads();
    const int width = heads * D;
    out += (static_cast<long long>(batch) * targets + first) * width + head * D;
#pragma unroll
    for (int m = 0; m < FORWARD_M; m++) {
        const int row = (warp * FORWARD_M + m) * 16;
        float inverse[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float sum = rows.sum[m][half];
            sum += __shfl_xor_sync(ALL_LANES, sum, 1);
            sum += __shfl_xor_sync(ALL_LANES, sum, 2);
            inverse[half] = 1.0f / sum;
            const int r = row + half * 8 + lane / 4;
            if (lse != nullptr && lane % 4 == 0 && r < remaining) {
                lse[(static_cast<long long>(batch) * heads + head) * targets + first + r] =
                    fmaf(rows.maximum[m][half], scale, logf(sum));
            }
        }
        store_rows<D>(shared + row * D, rows.out[m], inverse[0], inverse[1],
                      out + static_cast<long long>(row) * width, width, remaining - row);
    }
}

} // namespace flash

#define FLASH_FORWARD(T, D)                                                                  \
    extern "C" __global__ void __launch_bounds__(flash::THREADS, 2) flash_forward_##T##_##D( \
        const T* q, const T* k, const T* v, T* out, float* lse, int heads, int targets,      \
        int sources, int q_stride, int k_stride, int v_stride, float scale) {                \
        flash::forward<T, D>(q, k, v, out, lse, heads, targets, sources, q_stride, k_stride, \
                             v_stride, scale);                                               \
    }
FLASH_FORWARD(f16, 32)
FLASH_FORWARD(f16, 64)
FLASH_FORWARD(bf16, 32)
FLASH_FORWARD(bf16, 64)
#undef FLASH_FORWARD
