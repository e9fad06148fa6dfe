// Group and layer normalisation of channels-last tensors and their backward. {t} is f32, f16 or
// bf16; L = 16 / sizeof(T). Every kernel: block 256 unless another is given, no dynamic shared
// memory; pointers need no alignment, but 16 bytes is fast.
//
// Group normalisation of x [batch, positions, channels]; pieces = clamp(ceil(positions / 128), 1,
// 1024), the same in all of them; "tiles" is ceil(channels / (8 L)):
//   group_norm_moments_{t}(const T* x, float* partial, int positions, int channels, int pieces)
//     partial [batch, pieces, 2, channels] = mean and sum of squares about it, of each piece;
//     grid (tiles, pieces, batch)
//   group_norm_statistics(const float* partial, float* statistics, int positions, int channels,
//                         int groups, int pieces, float eps)
//     statistics [batch, groups, 2] = mean, 1/sigma; grid (groups, batch)
//   group_norm_apply_{t}(const T* x, const T* w, const T* b, const float* statistics, T* y,
//                        int positions, int channels, int groups, int silu, int pieces)
//     grid (tiles, pieces, batch)
//   group_norm_backward_sums_{t}(const T* x, const T* dy, const T* w, const T* b,
//                                const float* statistics, float* partial, int positions,
//                                int channels, int groups, int silu, int pieces)
//     partial [batch, pieces, 2, channels] = sum of dz, sum of dz xhat; grid (tiles, pieces, batch)
//   column_sums_finish_f32(partial, sums, pieces, 2 channels)   [elementwise.cu]
//     sums [batch, 2, channels]; grid (ceil(2 channels / 32), batch)
//   group_norm_backward_finish_{t}(const float* sums, const T* w, float* means, T* dw, T* db,
//                                  int batch, int positions, int channels, int groups)
//     means [batch, groups, 2] of w dz and w dz xhat; dw, db [channels], both or neither null;
//     grid (groups), block 32
//   group_norm_backward_apply_{t}(const T* x, const T* dy, const T* w, const T* b,
//                                 const float* statistics, const float* means, T* dx,
//                                 int positions, int channels, int groups, int silu, int pieces)
//     grid (tiles, pieces, batch)
//
// Layer normalisation of x [rows, width]:
//   layer_norm_{t}(const T* x, const T* w, const T* b, T* y, long long rows, int width, float eps)
//     grid ceil(rows / 8)
//   layer_norm_backward_{t}(const T* x, const T* w, const T* dy, T* dx, float* statistics,
//                           long long rows, int width, float eps)
//     statistics [rows, 2] = mean, 1/sigma, or null; grid ceil(rows / 8)
//   layer_norm_weights_{t}(const T* x, const T* dy, const float* statistics, float* partial,
//                          long long rows, int width, int pieces)
//     partial [pieces, 2, width] = sum of dy xhat (for dw), sum of dy (for db); grid
//     (ceil(width / (8 L)), pieces), pieces = clamp(ceil(rows / 128), 1, 1024). Then
//     column_sums_finish_{t}(partial, out, pieces, 2 width) with grid (ceil(2 width / 32), 1)
//     gives out [2, width] = dw, db.
#include "activation.cuh"
#include "loops.cuh"

// --- Group normalisation --------------------------------------------------------------------

// Running means, then squares about the piece's mean: no outlier makes squares cancel.
template <class T>
__device__ void group_norm_moments(const T* x, float* partial, int positions, int channels,
                                   int pieces) {
    SHARED(float, scratch, COLUMN_SCRATCH<T>);
    x += static_cast<long long>(blockIdx.z) * positions * channels;
    partial += (static_cast<long long>(blockIdx.z) * pieces + blockIdx.y) * 2 * channels;
    Piece piece(positions, pieces, blockIdx.y);
    float inverse = 1.0f / static_cast<float>(piece.count() > 0 ? piece.count() : 1);
    over_columns<T>(channels, is_aligned(x), [&](auto width, int tile) {
        constexpr int N = decltype(width)::value;
        int column = own_column<N>(tile);
        float mean[N] = {}, squares[N] = {}, middle[N] = {};
        int count = 0;
        if (column < channels) {
#pragma unroll 4
            for (long long row = piece.first(); row < piece.end; row += TILE_ROWS) {
                float v[N], weight = 1.0f / static_cast<float>(++count);
                load<N>(x + row * channels + column, v);
#pragma unroll
                for (int j = 0; j < N; j++) {
                    float difference = v[j] - mean[j];
                    mean[j] += difference * weight;
                    squares[j] += difference * (v[j] - mean[j]);
                }
            }
        }
#pragma unroll
        for (int j = 0; j < N; j++) middle[j] = mean[j] * (static_cast<float>(count) * inverse);
        share_columns<N>(middle, &scratch[0]);
#pragma unroll
        for (int j = 0; j < N; j++) {
            float difference = mean[j] - middle[j];
            squares[j] += static_cast<float>(count) * difference * difference;
        }
        float total = sum_columns<N>(squares, &scratch[0]);
        if (column < channels && threadIdx.x < TILE_UNITS) {
#pragma unroll
            for (int j = 0; j < N; j++) partial[column + j] = middle[j];
        }
        int summed = summed_column<N>(tile, channels);
        if (summed >= 0) partial[channels + summed] = total;
    });
}

// What the pieces and channels of a group say of all of it.
__device__ __forceinline__ void group_statistics(const float* partial, float* statistics,
                                                 int positions, int channels, int groups,
                                                 int pieces, float eps) {
    SHARED(float, scratch, 32);
    int width = channels / groups, entries = pieces * width;
    partial += static_cast<long long>(blockIdx.y) * pieces * 2 * channels + blockIdx.x * width;
    float total = static_cast<float>(positions) * static_cast<float>(width);
    auto each = [&](auto add) {
        float sum = 0.0f;
        for (int i = threadIdx.x; i < entries; i += THREADS) {
            int piece = i / width;
            const float* at = partial + static_cast<long long>(piece) * 2 * channels + i % width;
            float count = static_cast<float>(Piece(positions, pieces, piece).count());
            sum += add(count, at[0], at[channels]);
        }
        return block_sum(sum, &scratch[0]);
    };
    // About one of the means, so that a mean far from zero keeps its digits.
    float near = partial[0];
    float mean = near + each([&](float n, float m, float) { return n * (m - near); }) / total;
    float variance = each([&](float n, float m, float squares) {
        return squares + n * (m - mean) * (m - mean);
    }) / total;
    if (threadIdx.x == 0) {
        statistics += (static_cast<long long>(blockIdx.y) * groups + blockIdx.x) * 2;
        statistics[0] = mean;
        statistics[1] = 1.0f / sqrtf(variance + eps);
    }
}

// Of N neighbouring channels: xhat = (x - mean) scale, z = xhat w + b.
template <int N> struct Affine {
    float mean[N], scale[N], w[N], b[N];

    template <class T>
    __device__ __forceinline__ Affine(const T* weights, const T* biases, const float* statistics,
                                      int column, int width) {
#pragma unroll
        for (int j = 0; j < N; j++) {
            const float* own = statistics + (column + j) / width * 2;
            mean[j] = own[0];
            scale[j] = own[1];
            w[j] = to_float(weights[column + j]);
            b[j] = to_float(biases[column + j]);
        }
    }
};

template <class T>
__device__ void group_norm_apply(const T* x, const T* w, const T* b, const float* statistics, T* y,
                                 int positions, int channels, int groups, int silu_too,
                                 int pieces) {
    long long image = static_cast<long long>(blockIdx.z) * positions * channels;
    x += image;
    y += image;
    statistics += static_cast<long long>(blockIdx.z) * groups * 2;
    Piece piece(positions, pieces, blockIdx.y);
    over_columns<T>(channels, is_aligned(x) && is_aligned(y), [&](auto width, int tile) {
        constexpr int N = decltype(width)::value;
        int column = own_column<N>(tile);
        if (column >= channels) return;
        Affine<N> affine(w, b, statistics, column, channels / groups);
#pragma unroll
        for (int j = 0; j < N; j++) affine.w[j] *= affine.scale[j];
#pragma unroll 2
        for (long long row = piece.first(); row < piece.end; row += TILE_ROWS) {
            float v[N];
            load<N>(x + row * channels + column, v);
#pragma unroll
            for (int j = 0; j < N; j++) {
                float z = (v[j] - affine.mean[j]) * affine.w[j] + affine.b[j];
                v[j] = silu_too ? silu(z) : z;
            }
            store<N>(y + row * channels + column, v);
        }
    });
}

// each(row, x̂, dz) for the rows of this thread; `affine` holds its channels.
template <int N, class T, class F>
__device__ __forceinline__ void over_gradients(const T* x, const T* dy, const Affine<N>& affine,
                                               const Piece& piece, int channels, int column,
                                               int silu_too, F each) {
#pragma unroll 2
    for (long long row = piece.first(); row < piece.end; row += TILE_ROWS) {
        float standard[N], dz[N];
        load<N>(x + row * channels + column, standard);
        load<N>(dy + row * channels + column, dz);
#pragma unroll
        for (int j = 0; j < N; j++) {
            standard[j] = (standard[j] - affine.mean[j]) * affine.scale[j];
            if (silu_too) dz[j] *= silu_slope(standard[j] * affine.w[j] + affine.b[j]);
        }
        each(row, standard, dz);
    }
}

template <class T>
__device__ void group_norm_backward_sums(const T* x, const T* dy, const T* w, const T* b,
                                         const float* statistics, float* partial, int positions,
                                         int channels, int groups, int silu_too, int pieces) {
    SHARED(float, scratch, COLUMN_SCRATCH<T>);
    long long image = static_cast<long long>(blockIdx.z) * positions * channels;
    x += image;
    dy += image;
    statistics += static_cast<long long>(blockIdx.z) * groups * 2;
    partial += (static_cast<long long>(blockIdx.z) * pieces + blockIdx.y) * 2 * channels;
    Piece piece(positions, pieces, blockIdx.y);
    over_columns<T>(channels, is_aligned(x) && is_aligned(dy), [&](auto width, int tile) {
        constexpr int N = decltype(width)::value;
        int column = own_column<N>(tile);
        float sums[N] = {}, dots[N] = {};
        if (column < channels) {
            Affine<N> affine(w, b, statistics, column, channels / groups);
            auto add = [&](long long, float (&standard)[N], float (&dz)[N]) {
#pragma unroll
                for (int j = 0; j < N; j++) {
                    sums[j] += dz[j];
                    dots[j] += dz[j] * standard[j];
                }
            };
            over_gradients(x, dy, affine, piece, channels, column, silu_too, add);
        }
        float sum = sum_columns<N>(sums, &scratch[0]), dot = sum_columns<N>(dots, &scratch[0]);
        int summed = summed_column<N>(tile, channels);
        if (summed >= 0) {
            partial[summed] = sum;
            partial[channels + summed] = dot;
        }
    });
}

// One warp per group: the means of every image's group, and the weights' gradients.
template <class T>
__device__ void group_norm_backward_finish(const float* sums, const T* w, float* means, T* dw,
                                           T* db, int batch, int positions, int channels,
                                           int groups) {
    int width = channels / groups, first = blockIdx.x * width, lane = threadIdx.x;
    float inverse = 1.0f / (static_cast<float>(positions) * static_cast<float>(width));
    for (int image = 0; image < batch; image++) {
        const float* own = sums + static_cast<long long>(image) * 2 * channels;
        float sum = 0.0f, dot = 0.0f;
        for (int c = first + lane; c < first + width; c += 32) {
            sum += to_float(w[c]) * own[c];
            dot += to_float(w[c]) * own[channels + c];
        }
        sum = warp_sum(sum);
        dot = warp_sum(dot);
        if (lane == 0) {
            float* to = means + (static_cast<long long>(image) * groups + blockIdx.x) * 2;
            to[0] = sum * inverse;
            to[1] = dot * inverse;
        }
    }
    if (!dw) return;
    for (int c = first + lane; c < first + width; c += 32) {
        float sum = 0.0f, dot = 0.0f;
        for (int image = 0; image < batch; image++) {
            const float* own = sums + static_cast<long long>(image) * 2 * channels;
            sum += own[c];
            dot += own[channels + c];
        }
        dw[c] = from_float<T>(dot);
        db[c] = from_float<T>(sum);
    }
}

// dx = (w dz − mean(w dz) − x̂ mean(w dz x̂)) / σ
template <class T>
__device__ void group_norm_backward_apply(const T* x, const T* dy, const T* w, const T* b,
                                          const float* statistics, const float* means, T* dx,
                                          int positions, int channels, int groups, int silu_too,
                                          int pieces) {
    long long image = static_cast<long long>(blockIdx.z) * positions * channels;
    x += image;
    dy += image;
    dx += image;
    statistics += static_cast<long long>(blockIdx.z) * groups * 2;
    means += static_cast<long long>(blockIdx.z) * groups * 2;
    Piece piece(positions, pieces, blockIdx.y);
    bool aligned = is_aligned(x) && is_aligned(dy) && is_aligned(dx);
    over_columns<T>(channels, aligned, [&](auto width, int tile) {
        constexpr int N = decltype(width)::value;
        int column = own_column<N>(tile);
        if (column >= channels) return;
        Affine<N> affine(w, b, statistics, column, channels / groups);
        float sum[N], dot[N];
#pragma unroll
        for (int j = 0; j < N; j++) {
            const float* own = means + (column + j) / (channels / groups) * 2;
            sum[j] = own[0];
            dot[j] = own[1];
        }
        auto write = [&](long long row, float (&standard)[N], float (&dz)[N]) {
#pragma unroll
            for (int j = 0; j < N; j++) {
                float centred = affine.w[j] * dz[j] - sum[j] - standard[j] * dot[j];
                dz[j] = centred * affine.scale[j];
            }
            store<N>(dx + row * channels + column, dz);
        };
        over_gradients(x, dy, affine, piece, channels, column, silu_too, write);
    });
}

// --- Layer normalisation --------------------------------------------------------------------

// The sum over a row of what `each(Width<N>, column)` gives, by a warp.
template <int N, class F> __device__ __forceinline__ float row_sum(int width, F each) {
    float sum = 0.0f;
    for (int column = threadIdx.x % 32 * N; column < width; column += 32 * N) {
        sum += each(Width<N>(), column);
    }
    return warp_sum(sum);
}

struct Moments {
    float mean, scale;
};

template <int N, class T>
__device__ __forceinline__ Moments row_moments(const T* x, int width, float eps) {
    float inverse = 1.0f / static_cast<float>(width);
    float mean = inverse * row_sum<N>(width, [&](auto, int column) {
        float v[N], sum = 0.0f;
        load<N>(x + column, v);
#pragma unroll
        for (int j = 0; j < N; j++) sum += v[j];
        return sum;
    });
    float variance = inverse * row_sum<N>(width, [&](auto, int column) {
        float v[N], sum = 0.0f;
        load<N>(x + column, v);
#pragma unroll
        for (int j = 0; j < N; j++) sum += (v[j] - mean) * (v[j] - mean);
        return sum;
    });
    return {mean, 1.0f / sqrtf(variance + eps)};
}

// The row of this warp; -1 beyond the last.
__device__ __forceinline__ long long own_row(long long rows) {
    long long row = blockIdx.x * static_cast<long long>(THREADS / 32) + threadIdx.x / 32;
    return row < rows ? row : -1;
}

template <int N, class T>
__device__ __forceinline__ void layer_norm_row(const T* x, const T* w, const T* b, T* y, int width,
                                               float eps) {
    Moments row = row_moments<N>(x, width, eps);
    for (int column = threadIdx.x % 32 * N; column < width; column += 32 * N) {
        float v[N], factor[N], summand[N];
        load<N>(x + column, v);
        load<N>(w + column, factor);
        load<N>(b + column, summand);
#pragma unroll
        for (int j = 0; j < N; j++) v[j] = (v[j] - row.mean) * row.scale * factor[j] + summand[j];
        store<N>(y + column, v);
    }
}

template <class T>
__device__ void layer_norm(const T* x, const T* w, const T* b, T* y, long long rows, int width,
                           float eps) {
    bool aligned = is_aligned(x) && is_aligned(w) && is_aligned(b) && is_aligned(y);
    long long row = own_row(rows);
    if (row < 0) return;
    if (aligned && width % LANES<T> == 0) {
        layer_norm_row<LANES<T>>(x + row * width, w, b, y + row * width, width, eps);
    } else {
        layer_norm_row<1>(x + row * width, w, b, y + row * width, width, eps);
    }
}

// dx = (w dy − mean(w dy) − x̂ mean(w dy x̂)) / σ
template <int N, class T>
__device__ __forceinline__ Moments layer_norm_backward_row(const T* x, const T* w, const T* dy,
                                                           T* dx, int width, float eps) {
    Moments row = row_moments<N>(x, width, eps);
    float inverse = 1.0f / static_cast<float>(width), v[N], factor[N], d[N];
    auto read = [&](int column) {
        load<N>(x + column, v);
        load<N>(w + column, factor);
        load<N>(dy + column, d);
#pragma unroll
        for (int j = 0; j < N; j++) {
            v[j] = (v[j] - row.mean) * row.scale;
            d[j] *= factor[j];
        }
    };
    float dot = 0.0f;
    float sum = inverse * row_sum<N>(width, [&](auto, int column) {
        float part = 0.0f;
        read(column);
#pragma unroll
        for (int j = 0; j < N; j++) {
            part += d[j];
            dot += d[j] * v[j];
        }
        return part;
    });
    dot = inverse * warp_sum(dot);
    for (int column = threadIdx.x % 32 * N; column < width; column += 32 * N) {
        read(column);
#pragma unroll
        for (int j = 0; j < N; j++) d[j] = (d[j] - sum - v[j] * dot) * row.scale;
        store<N>(dx + column, d);
    }
    return row;
}

template <class T>
__device__ void layer_norm_backward(const T* x, const T* w, const T* dy, T* dx, float* statistics,
                                    long long rows, int width, float eps) {
    bool aligned = is_aligned(x) && is_aligned(w) && is_aligned(dy) && is_aligned(dx);
    long long row = own_row(rows);
    if (row < 0) return;
    long long at = row * width;
    Moments moments =
        aligned && width % LANES<T> == 0
            ? layer_norm_backward_row<LANES<T>>(x + at, w, dy + at, dx + at, width, eps)
            : layer_norm_backward_row<1>(x + at, w, dy + at, dx + at, width, eps);
    if (statistics && threadIdx.x % 32 == 0) {
        statistics[row * 2] = moments.mean;
        statistics[row * 2 + 1] = moments.scale;
    }
}

template <class T>
__device__ void layer_norm_weights(const T* x, const T* dy, const float* statistics, float* partial,
                                   long long rows, int width, int pieces) {
    SHARED(float, scratch, COLUMN_SCRATCH<T>);
    partial += static_cast<long long>(blockIdx.y) * 2 * width;
    Piece piece(rows, pieces, blockIdx.y);
    over_columns<T>(width, is_aligned(x) && is_aligned(dy), [&](auto unit, int tile) {
        constexpr int N = decltype(unit)::value;
        int column = own_column<N>(tile);
        float sums[N] = {}, dots[N] = {};
        if (column < width) {
#pragma unroll 4
            for (long long row = piece.first(); row < piece.end; row += TILE_ROWS) {
                float v[N], d[N], mean = statistics[row * 2], scale = statistics[row * 2 + 1];
                load<N>(x + row * width + column, v);
                load<N>(dy + row * width + column, d);
#pragma unroll
                for (int j = 0; j < N; j++) {
                    sums[j] += d[j];
                    dots[j] += d[j] * ((v[j] - mean) * scale);
                }
            }
        }
        float sum = sum_columns<N>(sums, &scratch[0]), dot = sum_columns<N>(dots, &scratch[0]);
        int summed = summed_column<N>(tile, width);
        if (summed >= 0) {
            partial[summed] = dot;
            partial[width + summed] = sum;
        }
    });
}

// --- Entry points ---------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(THREADS)
    group_norm_statistics(const float* partial, float* statistics, int positions, int channels,
                          int groups, int pieces, float eps) {
    group_statistics(partial, statistics, positions, channels, groups, pieces, eps);
}

#define ENTRIES(t, T)                                                                            \
    extern "C" __global__ void __launch_bounds__(THREADS) group_norm_moments_##t(                \
        const T* x, float* partial, int positions, int channels, int pieces) {                   \
        group_norm_moments<T>(x, partial, positions, channels, pieces);                          \
    }                                                                                            \
    extern "C" __global__ void __launch_bounds__(THREADS)                                        \
        group_norm_apply_##t(const T* x, const T* w, const T* b, const float* statistics, T* y,  \
                             int positions, int channels, int groups, int silu, int pieces) {    \
        group_norm_apply<T>(x, w, b, statistics, y, positions, channels, groups, silu, pieces);  \
    }                                                                                            \
    extern "C" __global__ void __launch_bounds__(THREADS) group_norm_backward_sums_##t(          \
        const T* x, const T* dy, const T* w, const T* b, const float* statistics,                \
        float* partial, int positions, int channels, int groups, int silu, int pieces) {         \
        group_norm_backward_sums<T>(x, dy, w, b, statistics, partial, positions, channels,       \
                                    groups, silu, pieces);                                       \
    }                                                                                            \
    extern "C" __global__ void __launch_bounds__(32) group_norm_backward_finish_##t(             \
        const float* sums, const T* w, float* means, T* dw, T* db, int batch, int positions,     \
        int channels, int groups) {                                                              \
        group_norm_backward_finish<T>(sums, w, means, dw, db, batch, positions, channels,        \
                                      groups);                                                   \
    }                                                                                            \
    extern "C" __global__ void __launch_bounds__(THREADS) group_norm_backward_apply_##t(         \
        const T* x, const T* dy, const T* w, const T* b, const float* statistics,                \
        const float* means, T* dx, int positions, int channels, int groups, int silu,            \
        int pieces) {                                                                            \
        group_norm_backward_apply<T>(x, dy, w, b, statistics, means, dx, positions, channels,    \
                                     groups, silu, pieces);                                      \
    }                                                                                            \
    extern "C" __global__ void __launch_bounds__(THREADS)                                        \
        layer_norm_##t(const T* x, const T* w, const T* b, T* y, long long rows, int width,      \
                       float eps) {                                                              \
        layer_norm<T>(x, w, b, y, rows, width, eps);                                             \
    }                                                                                            \
    extern "C" __global__ void __launch_bounds__(THREADS)                                        \
        layer_norm_backward_##t(const T* x, const T* w, const T* dy, T* dx, float* statistics,   \
                                long long rows, int width, float eps) {                          \
        layer_norm_backward<T>(x, w, dy, dx, statistics, rows, width, eps);                      \
    }                                                                                            \
    extern "C" __global__ void __launch_bounds__(THREADS)                                        \
        layer_norm_weights_##t(const T* x, const T* dy, const float* statistics, float* partial, \
                               long long rows, int width, int pieces) {                          \
        layer_norm_weights<T>(x, dy, statistics, partial, rows, width, pieces);                  \
    }
FOR_EACH_TYPE(ENTRIES)
