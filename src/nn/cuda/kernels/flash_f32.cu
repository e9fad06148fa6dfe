// Attention in single precision, forward and backward, on the multiply-add units: the recurrences
// of flash_forward.cu and flash_backward.cu, with their parameters (delta is flash_delta_f32_{32,64}
// there). Pointers are multiples of 16 bytes, strides of 4 values.
//
// flash_forward_f32_{32,64}: block 256, grid (ceil(targets / 64), heads, batch), dynamic shared 0.
// flash_backward_kv_f32_{32,64}: block 128, grid (ceil(sources / 32), heads, batch),
//   dynamic shared 0.
// flash_backward_q_f32_{32,64}: block 128, grid (ceil(targets / 32), heads, batch),
//   dynamic shared 0.
//
// 16 threads, half a warp, have four rows of scores: thread x of them columns x and x + 16 of 32,
// and of the outputs the x-th D / 16 columns. Probabilities change hands in shared memory, within
// the half warp.
#include "common.cuh"

namespace flash_f32 {

constexpr float LOG2E = 1.4426950408889634f;
constexpr int COLUMNS = 32;
// Between rows in shared memory: eight rows' 16-byte pieces are in different banks.
template <int D> constexpr int PITCH = D + 4;

template <int N> struct alignas(4 * N) Pack {
    float v[N];
};

template <int N> __device__ __forceinline__ const Pack<N>& pack(const float* p) {
    return *reinterpret_cast<const Pack<N>*>(p);
}

// Copies ROWS rows of D values, `stride` apart; those from `valid` on become zero. To be waited for.
template <int D, int ROWS, int THREADS>
__device__ __forceinline__ void copy_rows(float* to, const float* from, int stride, int valid) {
#pragma unroll
    for (int step = 0; step < ROWS * D / 4; step += THREADS) {
        const int i = step + threadIdx.x;
        const int row = i / (D / 4), column = i % (D / 4) * 4;
        cp_async_16(to + row * PITCH<D> + column,
                    from + static_cast<long long>(row) * stride + column, row < valid);
    }
}

__device__ __forceinline__ void wait_for_rows() {
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
}

// s[i][j] = row y + i of a times row x + 16j of b.
template <int D>
__device__ __forceinline__ void scores(float (&s)[4][2], const float* a, const float* b, int x,
                                       int y) {
#pragma unroll
    for (int i = 0; i < 8; i++) s[i / 2][i % 2] = 0.0f;
#pragma unroll 4
    for (int d = 0; d < D; d += 4) {
        Pack<4> left[4], right[2];
#pragma unroll
        for (int i = 0; i < 4; i++) left[i] = pack<4>(a + (y + i) * PITCH<D> + d);
#pragma unroll
        for (int j = 0; j < 2; j++) right[j] = pack<4>(b + (x + 16 * j) * PITCH<D> + d);
#pragma unroll
        for (int i = 0; i < 32; i++) {
            float& sum = s[i / 2 % 4][i % 2];
            sum = fmaf(left[i / 2 % 4].v[i / 8], right[i % 2].v[i / 8], sum);
        }
    }
}

// Hands this thread's scores to its half warp; `p` has COLUMNS + 4 values a row.
__device__ __forceinline__ void share(float* p, const float (&s)[4][2], int x, int y) {
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 8; i++)
        p[(y + i / 2) * PITCH<COLUMNS> + x + 16 * (i % 2)] = s[i / 2][i % 2];
    __syncwarp();
}

// sums[i] += row y + i of p times the x-th D / 16 columns of b.
template <int D>
__device__ __forceinline__ void accumulate(float (&sums)[4][D / 16], const float* p, const float* b,
                                           int x, int y) {
    constexpr int W = D / 16;
#pragma unroll 2
    for (int c = 0; c < COLUMNS; c += 4) {
        Pack<4> left[4];
#pragma unroll
        for (int i = 0; i < 4; i++) left[i] = pack<4>(p + (y + i) * PITCH<COLUMNS> + c);
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const Pack<W> right = pack<W>(b + (c + e) * PITCH<D> + x * W);
#pragma unroll
            for (int i = 0; i < 4 * W; i++) {
                sums[i / W][i % W] = fmaf(left[i / W].v[e], right.v[i % W], sums[i / W][i % W]);
            }
        }
    }
}

// Writes sums[i] * factor[i] to the rows from `to` on, of which `valid` exist.
template <int D>
__device__ __forceinline__ void store(float* to, const float (&sums)[4][D / 16],
                                      const float (&factor)[4], int stride, int valid, int x) {
    constexpr int W = D / 16;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if (i >= valid) break;
        Pack<W> row;
#pragma unroll
        for (int c = 0; c < W; c++) row.v[c] = sums[i][c] * factor[i];
        *reinterpret_cast<Pack<W>*>(to + static_cast<long long>(i) * stride + x * W) = row;
    }
}

template <int D>
__device__ __forceinline__ void forward(const float* q, const float* k, const float* v, float* out,
                                        float* lse, int heads, int targets, int sources,
                                        int q_stride, int k_stride, int v_stride, float scale) {
    constexpr int ROWS = 64, THREADS = 256;
    SHARED(float, queries, ROWS* PITCH<D>);
    SHARED(float, keys, COLUMNS* PITCH<D>);
    SHARED(float, values, COLUMNS* PITCH<D>);
    SHARED(float, probabilities, ROWS* PITCH<COLUMNS>);
    const int x = threadIdx.x % 16, y = threadIdx.x / 16 * 4;
    const int head = blockIdx.y, first = blockIdx.x * ROWS;
    const long long batch = blockIdx.z;
    copy_rows<D, ROWS, THREADS>(queries, q + (batch * targets + first) * q_stride + head * D,
                                q_stride, targets - first);
    k += batch * sources * k_stride + head * D;
    v += batch * sources * v_stride + head * D;

    float sums[4][D / 16] = {}, maximum[4], total[4] = {};
#pragma unroll
    for (int i = 0; i < 4; i++) maximum[i] = -INFINITY;
    const float log2_scale = scale * LOG2E;
    for (int at = 0; at < sources; at += COLUMNS) {
        __syncthreads();
        copy_rows<D, COLUMNS, THREADS>(keys, k + static_cast<long long>(at) * k_stride, k_stride,
                                       sources - at);
        copy_rows<D, COLUMNS, THREADS>(values, v + static_cast<long long>(at) * v_stride, v_stride,
                                       sources - at);
        wait_for_rows();
        float s[4][2];
        scores<D>(s, queries, keys, x, y);
#pragma unroll
        for (int i = 0; i < 4; i++) {
#pragma unroll
            for (int j = 0; j < 2; j++) {
                if (at + x + 16 * j >= sources) s[i][j] = -INFINITY;
            }
            float greatest = fmaxf(maximum[i], fmaxf(s[i][0], s[i][1]));
#pragma unroll
            for (int lanes = 8; lanes > 0; lanes /= 2) {
                greatest = fmaxf(greatest, __shfl_xor_sync(ALL_LANES, greatest, lanes));
            }
            const float factor = exp2f((maximum[i] - greatest) * log2_scale);
            const float shift = greatest * log2_scale;
            maximum[i] = greatest;
#pragma unroll
            for (int j = 0; j < 2; j++) s[i][j] = exp2f(fmaf(s[i][j], log2_scale, -shift));
            total[i] = fmaf(total[i], factor, s[i][0] + s[i][1]);
#pragma unroll
            for (int c = 0; c < D / 16; c++) sums[i][c] *= factor;
        }
        share(probabilities, s, x, y);
        accumulate<D>(sums, probabilities, values, x, y);
    }

    const int row = first + y;
    float inverse[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
#pragma unroll
        for (int lanes = 8; lanes > 0; lanes /= 2)
            total[i] += __shfl_xor_sync(ALL_LANES, total[i], lanes);
        inverse[i] = 1.0f / total[i];
        if (lse != nullptr && x == 0 && row + i < targets) {
            lse[(batch * heads + head) * targets + row + i] =
                fmaf(maximum[i], scale, logf(total[i]));
        }
    }
    const int width = heads * D;
    store<D>(out + (batch * targets + row) * width + head * D, sums, inverse, width, targets - row,
             x);
}

// dk into `first` and dv, or dq into `first`, as in flash_backward.cu: `own` are a block's rows of keys
// and values, or of queries and output gradients; `other` the other two.
template <bool KV, int D>
__device__ __forceinline__ void backward(const float* own1, const float* own2, const float* other1,
                                         const float* other2, int own1_stride, int own2_stride,
                                         int other1_stride, int other2_stride, const float* lse,
                                         const float* delta, float* first, float* dv, int heads,
                                         int targets, int sources, float scale) {
    constexpr int ROWS = 32, THREADS = 128;
    SHARED(float, a1, ROWS* PITCH<D>);
    SHARED(float, a2, ROWS* PITCH<D>);
    SHARED(float, b1, COLUMNS* PITCH<D>);
    SHARED(float, b2, COLUMNS* PITCH<D>);
    SHARED(float, ds_shared, ROWS* PITCH<COLUMNS>);
    SHARED(float, p_shared, KV ? ROWS * PITCH<COLUMNS> : 1);
    const int x = threadIdx.x % 16, y = threadIdx.x / 16 * 4;
    const int head = blockIdx.y, start = blockIdx.x * ROWS;
    const long long batch = blockIdx.z;
    const int count = KV ? sources : targets, columns = KV ? targets : sources;
    copy_rows<D, ROWS, THREADS>(a1, own1 + (batch * count + start) * own1_stride + head * D,
                                own1_stride, count - start);
    copy_rows<D, ROWS, THREADS>(a2, own2 + (batch * count + start) * own2_stride + head * D,
                                own2_stride, count - start);
    other1 += batch * columns * other1_stride + head * D;
    other2 += batch * columns * other2_stride + head * D;
    lse += (batch * heads + head) * targets;
    delta += (batch * heads + head) * targets;

    float sums1[4][D / 16] = {}, sums2[4][D / 16] = {};
    const float log2_scale = scale * LOG2E;
    for (int at = 0; at < columns; at += COLUMNS) {
        __syncthreads();
        const int valid = columns - at;
        copy_rows<D, COLUMNS, THREADS>(b1, other1 + static_cast<long long>(at) * other1_stride,
                                       other1_stride, valid);
        copy_rows<D, COLUMNS, THREADS>(b2, other2 + static_cast<long long>(at) * other2_stride,
                                       other2_stride, valid);
        wait_for_rows();
        float s[4][2], dp[4][2];
        scores<D>(s, a1, b1, x, y);
        scores<D>(dp, a2, b2, x, y);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const int column = at + x + 16 * (i % 2), row = start + y + i / 2,
                      query = KV ? column : row;
            float &p = s[i / 2][i % 2], &ds = dp[i / 2][i % 2];
            const bool inside = row < count && column < columns;
            p = inside ? exp2f(fmaf(p, log2_scale, -lse[query] * LOG2E)) : 0.0f;
            ds = inside ? p * (ds - delta[query]) : 0.0f;
        }
        share(ds_shared, dp, x, y);
        accumulate<D>(sums1, ds_shared, b1, x, y);
        if (KV) {
            share(p_shared, s, x, y);
            accumulate<D>(sums2, p_shared, b2, x, y);
        }
    }

    const int row = start + y, width = heads * D;
    const long long at = (batch * count + row) * width + head * D;
    store<D>(first + at, sums1, {scale, scale, scale, scale}, width, count - row, x);
    if (KV) store<D>(dv + at, sums2, {1.0f, 1.0f, 1.0f, 1.0f}, width, count - row, x);
}

} // namespace flash_f32

#define FLASH_F32(D)                                                                               \
    extern "C" __global__ void __launch_bounds__(256) flash_forward_f32_##D(                       \
        const float* q, const float* k, const float* v, float* out, float* lse, int heads,         \
        int targets, int sources, int q_stride, int k_stride, int v_stride, float scale) {         \
        flash_f32::forward<D>(q, k, v, out, lse, heads, targets, sources, q_stride, k_stride,      \
                              v_stride, scale);                                                    \
    }                                                                                              \
    extern "C" __global__ void __launch_bounds__(128, 3) flash_backward_kv_f32_##D(                \
        const float* q, const float* k, const float* v, const float* dout, const float* lse,       \
        const float* delta, float* dk, float* dv, int heads, int targets, int sources,             \
        int q_stride, int k_stride, int v_stride, float scale) {                                   \
        flash_f32::backward<true, D>(k, v, q, dout, k_stride, v_stride, q_stride, heads * D, lse,  \
                                     delta, dk, dv, heads, targets, sources, scale);               \
    }                                                                                              \
    extern "C" __global__ void __launch_bounds__(128, 3) flash_backward_q_f32_##D(                 \
        const float* q, const float* k, const float* v, const float* dout, const float* lse,       \
        const float* delta, float* dq, int heads, int targets, int sources, int q_stride,          \
        int k_stride, int v_stride, float scale) {                                                 \
        flash_f32::backward<false, D>(q, dout, k, v, q_stride, heads * D, k_stride, v_stride, lse, \
                                      delta, dq, nullptr, heads, targets, sources, scale);         \
    }
FLASH_F32(32)
FLASH_F32(64)
#undef FLASH_F32
