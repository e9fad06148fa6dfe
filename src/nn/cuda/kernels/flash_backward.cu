// Attention backward on matrix units: FlashAttention-2 (arXiv 2307.08691), algorithm 2, as one
// kernel for the gradients of keys and values and one for those of queries. Each output has
// one block that sums in a fixed order, so there are no atomics and no partial results.
//
// flash_delta_{f32,f16,bf16}_{32,64}: block 256,
//   grid (ceil(targets * heads * D * sizeof(T) / 4096), 1, batch), dynamic shared 0.
// flash_backward_kv_{f16,bf16}_{32,64}: block 128, grid (ceil(sources / 64), heads, batch),
//   dynamic shared 0.
// flash_backward_q_{f16,bf16}_{32,64}: block 128, grid (ceil(targets / 128), heads, batch),
//   dynamic shared 0.
//
// q, k, v, strides, lse and scale are those of flash_forward.cu; out, dout, dq
// [batch, targets, heads * D] and dk, dv [batch, sources, heads * D] are contiguous; delta
// [batch, heads, targets], each row's sum of out * dout. targets, sources >= 1.
//
// Both kernels keep their own rows' two inputs as left operands in registers (keys and values,
// or queries and output gradients) and go through the other side's in tiles of 64. The scores'
// accumulators, made probabilities p and gradients p * (dp - delta), are in turn the left
// operands of the products with those same tiles, so they never leave the registers:
//   kv: s = k q^T, dp = v dout^T;  dk += ds q, dv += p dout
//   q:  s = q k^T, dp = dout v^T;  dq += ds k
#include "flash.cuh"

namespace flash {

constexpr int BACKWARD_COLUMNS = 64;

// One input: where its first token is, and how far apart tokens are.
template <class T> struct Side {
    const T* data;
    int stride;
};

// Sums over the 16-byte chunks of a head's row, one chunk a thread.
template <class T, int D>
__device__ __forceinline__ void row_products(const T* out, const T* dout, float* delta, int heads,
                                             int targets) {
    constexpr int VALUES = LANES<T>, THREADS_A_ROW = D / VALUES;
    const long long chunks = static_cast<long long>(targets) * heads * THREADS_A_ROW;
    const long long chunk = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    float sum = 0.0f;
    if (chunk < chunks) {
        const long long at = (blockIdx.z * chunks + chunk) * VALUES;
        const Vec<T> x = load_vector(out + at), y = load_vector(dout + at);
#pragma unroll
        for (int i = 0; i < VALUES; i++) sum = fmaf(to_float(x.v[i]), to_float(y.v[i]), sum);
    }
#pragma unroll
    for (int lanes = THREADS_A_ROW / 2; lanes > 0; lanes /= 2) {
        sum += __shfl_xor_sync(ALL_LANES, sum, lanes);
    }
    if (chunk < chunks && threadIdx.x % THREADS_A_ROW == 0) {
        const long long row = chunk / THREADS_A_ROW, target = row / heads, head = row % heads;
        delta[(static_cast<long long>(blockIdx.z) * heads + head) * targets + target] = sum;
    }
}

// A warp's share: 16 * M rows, and for each thread the same rows of every 16 as in `Rows` of
// the forward pass.
template <int M, int D> struct Gradients {
    // dk or dq without the scale.
    float first[M][D / 8][4];
    float dv[M][D / 8][4];
    // In the kernel of queries: lse * log2(e) and delta of this thread's rows.
    float lse[M][2], delta[M][2];
};

// Takes in N * 8 rows of the tiles b1 (queries or keys) and b2 (output gradients or values).
// `statistics` are those of queries: lse * log2(e), and a tile's length on delta. In the LAST
// rows of keys only `valid` are real.
template <bool KV, bool LAST, int M, int N, int D, class T>
__device__ __forceinline__ void backward_rows(Gradients<M, D>& sums, const Lanes<D>& lanes,
                                              const uint32_t (&a1)[D / 16][M][4],
                                              const uint32_t (&a2)[D / 16][M][4], Place<T> b1,
                                              Place<T> b2, const float* statistics, int valid,
                                              float log2_scale) {
    float s[M][N][4] = {}, dp[M][N][4] = {};
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            uint32_t b[2][2];
            lanes.right_transposed(b, b1, n * 8, k);
#pragma unroll
            for (int m = 0; m < M; m++) {
                mma_16816<T>(s[m][n], a1[k][m], b[0]);
                mma_16816<T>(s[m][n + 1], a1[k][m], b[1]);
            }
            lanes.right_transposed(b, b2, n * 8, k);
#pragma unroll
            for (int m = 0; m < M; m++) {
                mma_16816<T>(dp[m][n], a2[k][m], b[0]);
                mma_16816<T>(dp[m][n + 1], a2[k][m], b[1]);
            }
        }
    }
#pragma unroll
    for (int n = 0; n < N; n++) {
        const int column = n * 8 + threadIdx.x % 4 * 2;
#pragma unroll
        for (int i = 0; i < M * 4; i++) {
            const int m = i / 4, half = i / 2 % 2, odd = i % 2;
            const float lse = KV ? statistics[column + odd] : sums.lse[m][half];
            const float delta =
                KV ? statistics[BACKWARD_COLUMNS + column + odd] : sums.delta[m][half];
            float &p = s[m][n][i % 4], &ds = dp[m][n][i % 4];
            p = exp2_fast(fmaf(p, log2_scale, -lse));
            if (LAST && column + odd >= valid) p = 0.0f;
            ds = p * (ds - delta);
        }
    }
#pragma unroll
    for (int k = 0; k < N / 2; k++) {
        uint32_t p[M][4], ds[M][4];
#pragma unroll
        for (int m = 0; m < M; m++) {
            if (KV) as_left<T>(p[m], s[m][2 * k], s[m][2 * k + 1]);
            as_left<T>(ds[m], dp[m][2 * k], dp[m][2 * k + 1]);
        }
#pragma unroll
        for (int n = 0; n < D / 16; n++) {
            uint32_t b[2][2];
            lanes.right(b, b1, k * 16, n);
#pragma unroll
            for (int m = 0; m < M; m++) {
                mma_16816<T>(sums.first[m][2 * n], ds[m], b[0]);
                mma_16816<T>(sums.first[m][2 * n + 1], ds[m], b[1]);
            }
            if (!KV) continue;
            lanes.right(b, b2, k * 16, n);
#pragma unroll
            for (int m = 0; m < M; m++) {
                mma_16816<T>(sums.dv[m][2 * n], p[m], b[0]);
                mma_16816<T>(sums.dv[m][2 * n + 1], p[m], b[1]);
            }
        }
    }
}

// A block's rows of dk and dv, or of dq into `first`. `own` are the two sides in rows (keys and
// values, or queries and output gradients), `other` the two in columns.
template <bool KV, int M, int N, class T, int D>
__device__ __forceinline__ void backward(Side<T> own1, Side<T> own2, Side<T> other1, Side<T> other2,
                                         const float* lse, const float* delta, T* first, T* dv,
                                         int heads, int targets, int sources, float scale) {
    constexpr int TILE = BACKWARD_COLUMNS * D, ROWS = 16 * M * WARPS;
    static_assert(M <= 2, "a side's rows fit a stage");
    // Two stages, each a tile of either other side.
    SHARED(uint4, space, 4 * TILE / 8);
    T* shared = reinterpret_cast<T*>(&space[0]);
    // lse * log2(e) and delta of a tile of queries, for each stage.
    SHARED(float, statistics, KV ? 4 * BACKWARD_COLUMNS : 1);

    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int head = blockIdx.y;
    const long long batch = blockIdx.z;
    const int count = KV ? sources : targets, columns = KV ? targets : sources;
    const int start = blockIdx.x * ROWS, remaining = count - start;
    auto source = [&](Side<T> side, long long token) {
        return Source<D, T>(side.data + token * side.stride + head * D, side.stride);
    };
    lse += (batch * heads + head) * targets;
    delta += (batch * heads + head) * targets;

    source(own1, batch * count + start).template copy<ROWS>(shared, remaining);
    source(own2, batch * count + start).template copy<ROWS>(shared + 2 * TILE, remaining);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    const Lanes<D> lanes;
    uint32_t a1[D / 16][M][4], a2[D / 16][M][4];
#pragma unroll
    for (int i = 0; i < D / 16 * M; i++) {
        const int m = i % M, c = i / M, own = warp * M * 16 * D;
        lanes.left(a1[c][m], Place<T>{shared, own}, m * 16, c);
        lanes.left(a2[c][m], Place<T>{shared + 2 * TILE, own}, m * 16, c);
    }
    __syncthreads();

    // Thread i brings lse, or from the middle on delta, of query i. What is past the end gets
    // probability 0.
    static_assert(THREADS == 2 * BACKWARD_COLUMNS, "");
    const int query = threadIdx.x % BACKWARD_COLUMNS;
    const bool of_lse = threadIdx.x < BACKWARD_COLUMNS;
    const float* brought = (of_lse ? lse : delta) + query;
    const int limit = targets - query;
    auto statistic = [&](int at) {
        const float past = of_lse ? INFINITY : 0.0f, factor = of_lse ? LOG2E : 1.0f;
        return at < limit ? brought[at] * factor : past;
    };

    Gradients<M, D> sums = {};
    if (KV) {
        statistics[threadIdx.x] = statistic(0);
    } else {
#pragma unroll
        for (int i = 0; i < M * 2; i++) {
            const int row = start + (warp * M + i / 2) * 16 + i % 2 * 8 + lane / 4;
            sums.lse[i / 2][i % 2] = row < targets ? lse[row] * LOG2E : INFINITY;
            sums.delta[i / 2][i % 2] = row < targets ? delta[row] : 0.0f;
        }
    }
    Source<D, T> from1 = source(other1, batch * columns), from2 = source(other2, batch * columns);
    from1.template copy<BACKWARD_COLUMNS>(shared, columns);
    from2.template copy<BACKWARD_COLUMNS>(shared + TILE, columns);
    cp_async_commit();

    const float log2_scale = scale * LOG2E;
    int stage = 0;
    for (int at = 0; at < columns; at += BACKWARD_COLUMNS) {
        // This tile has come, and no warp reads the other stage any more.
        cp_async_wait<0>();
        __syncthreads();
        const int valid = columns - at, next = valid - BACKWARD_COLUMNS;
        const float* known = &statistics[KV ? stage * 2 * BACKWARD_COLUMNS : 0];
        float coming = 0.0f;
        if (next > 0) {
            T* free = shared + (stage ^ 1) * 2 * TILE;
            from1.advance(BACKWARD_COLUMNS);
            from2.advance(BACKWARD_COLUMNS);
            from1.template copy<BACKWARD_COLUMNS>(free, next);
            from2.template copy<BACKWARD_COLUMNS>(free + TILE, next);
            cp_async_commit();
            if (KV) coming = statistic(at + BACKWARD_COLUMNS);
        }
#pragma unroll 1
        for (int row = 0; row < min(valid, BACKWARD_COLUMNS); row += N * 8) {
            const int offset = stage * 2 * TILE + row * D;
            const Place<T> b1 = {shared, offset}, b2 = {shared + TILE, offset};
            if (KV || row + N * 8 <= valid) {
                backward_rows<KV, false, M, N, D>(sums, lanes, a1, a2, b1, b2, known + row, 0,
                                                  log2_scale);
            } else {
                backward_rows<KV, true, M, N, D>(sums, lanes, a1, a2, b1, b2, known + row,
                                                 valid - row, log2_scale);
            }
        }
        stage ^= 1;
        if (KV && next > 0) statistics[stage * 2 * BACKWARD_COLUMNS + threadIdx.x] = coming;
    }

    __syncthreads();
    const int width = heads * D;
    const long long offset = (batch * count + start) * width + head * D;
#pragma unroll
    for (int m = 0; m < M; m++) {
        const int row = (warp * M + m) * 16;
        const long long at = offset + static_cast<long long>(row) * width;
        store_rows<D>(shared + row * D, sums.first[m], scale, scale, first + at, width,
                      remaining - row);
        if (KV) {
            store_rows<D>(shared + row * D, sums.dv[m], 1.0f, 1.0f, dv + at, width,
                          remaining - row);
        }
    }
}

} // namespace flash

#define FLASH_DELTA(T, D)                                                                          \
    extern "C" __global__ void __launch_bounds__(256)                                              \
        flash_delta_##T##_##D(const T* out, const T* dout, float* delta, int heads, int targets) { \
        flash::row_products<T, D>(out, dout, delta, heads, targets);                               \
    }
FLASH_DELTA(f32, 32)
FLASH_DELTA(f32, 64)
FLASH_DELTA(f16, 32)
FLASH_DELTA(f16, 64)
FLASH_DELTA(bf16, 32)
FLASH_DELTA(bf16, 64)
#undef FLASH_DELTA

#define FLASH_BACKWARD(T, D)                                                                       \
    extern "C" __global__ void __launch_bounds__(flash::THREADS, 3) flash_backward_kv_##T##_##D(   \
        const T* q, const T* k, const T* v, const T* dout, const float* lse, const float* delta,   \
        T* dk, T* dv, int heads, int targets, int sources, int q_stride, int k_stride,             \
        int v_stride, float scale) {                                                               \
        flash::backward<true, 1, 4, T, D>({k, k_stride}, {v, v_stride}, {q, q_stride},             \
                                          {dout, heads * D}, lse, delta, dk, dv, heads, targets,   \
                                          sources, scale);                                         \
    }                                                                                              \
    extern "C" __global__ void __launch_bounds__(flash::THREADS, 2) flash_backward_q_##T##_##D(    \
        const T* q, const T* k, const T* v, const T* dout, const float* lse, const float* delta,   \
        T* dq, int heads, int targets, int sources, int q_stride, int k_stride, int v_stride,      \
        float scale) {                                                                             \
        flash::backward<false, 2, 4, T, D>({q, q_stride}, {dout, heads * D}, {k, k_stride},        \
                                           {v, v_stride}, lse, delta, dq, nullptr, heads, targets, \
                                           sources, scale);                                        \
    }
FLASH_BACKWARD(f16, 32)
FLASH_BACKWARD(f16, 64)
FLASH_BACKWARD(bf16, 32)
FLASH_BACKWARD(bf16, 64)
#undef FLASH_BACKWARD
