// Activations, the ends of linear layers and convolutions, sums over rows, and nearest-neighbour
// resampling. {t} is f32, f16 or bf16; L = 16 / sizeof(T). Every kernel: block 256, no dynamic
// shared memory; pointers need no alignment, but 16 bytes is fast.
//
// One-dimensional grids, any size >= 1; ceil(n / (256 L)), at most 65535, for n values written:
//   activation_{t}(const T* x, T* y, long long n, int kind)
//   activation_backward_{t}(const T* x, const T* dy, T* dx, long long n, int kind)
//     kind: 0 silu, 1 gelu (erf), 2 quick gelu
//   geglu_{t}(const T* x, T* y, long long rows, int width)
//     x [rows, 2 width], y [rows, width]
//   geglu_backward_{t}(const T* x, const T* dy, T* dx, long long rows, int width)
//   finish_{t}(T* y, const T* bias, const T* shift, const T* residual, long long rows,
//              int channels, long long rows_per_image)
//     y [rows, channels] += bias [channels] + shift [rows / rows_per_image, channels] + residual
//     [rows, channels]; any of the three may be null
//   nearest_{t}(const T* x, T* y, int batch, int h, int w, int c, int height, int width)
//     x [batch, h, w, c], y [batch, height, width, c]
//   nearest_backward_{t}(const T* dy, T* dx, int batch, int h, int w, int c, int height, int width)
//
// Sums over rows:
//   column_sums_{t}(const T* x, float* partial, long long rows, int channels, int pieces)
//     x [images, rows, channels], partial [images, pieces, channels]
//     grid (ceil(channels / (8 L)), pieces, images); pieces = clamp(ceil(rows / 128), 1, 1024)
//   column_sums_finish_{t}(const float* partial, T* out, int pieces, int channels)
//     out [images, channels]; grid (ceil(channels / 32), images)
#include "activation.cuh"
#include "loops.cuh"

template <class T> __device__ void activation(const T* x, T* y, long long n, int kind) {
    over_elements<T>(n, is_aligned(x) && is_aligned(y), [&](auto width, long long i) {
        constexpr int N = decltype(width)::value;
        float v[N];
        load<N>(x + i, v);
#pragma unroll
        for (int j = 0; j < N; j++) v[j] = activate(v[j], kind);
        store<N>(y + i, v);
    });
}

template <class T>
__device__ void activation_backward(const T* x, const T* dy, T* dx, long long n, int kind) {
    bool aligned = is_aligned(x) && is_aligned(dy) && is_aligned(dx);
    over_elements<T>(n, aligned, [&](auto width, long long i) {
        constexpr int N = decltype(width)::value;
        float v[N], d[N];
        load<N>(x + i, v);
        load<N>(dy + i, d);
#pragma unroll
        for (int j = 0; j < N; j++) d[j] *= slope(v[j], kind);
        store<N>(dx + i, d);
    });
}

template <class T> __device__ void geglu(const T* x, T* y, long long rows, int width) {
    bool aligned = is_aligned(x) && is_aligned(y);
    over_rows<T>(rows, width, aligned, [&](auto unit, long long row, int column) {
        constexpr int N = decltype(unit)::value;
        const T* from = x + row * 2 * width + column;
        float value[N], gates[N];
        load<N>(from, value);
        load<N>(from + width, gates);
#pragma unroll
        for (int j = 0; j < N; j++) value[j] *= gelu(gates[j]);
        store<N>(y + row * width + column, value);
    });
}

template <class T>
__device__ void geglu_backward(const T* x, const T* dy, T* dx, long long rows, int width) {
    bool aligned = is_aligned(x) && is_aligned(dy) && is_aligned(dx);
    over_rows<T>(rows, width, aligned, [&](auto unit, long long row, int column) {
        constexpr int N = decltype(unit)::value;
        long long at = row * 2 * width + column;
        float value[N], gates[N], d[N];
        load<N>(x + at, value);
        load<N>(x + at + width, gates);
        load<N>(dy + row * width + column, d);
#pragma unroll
        for (int j = 0; j < N; j++) {
            value[j] *= d[j] * gelu_slope(gates[j]);
            d[j] *= gelu(gates[j]);
        }
        store<N>(dx + at, d);
        store<N>(dx + at + width, value);
    });
}

template <class T>
__device__ void finish(T* y, const T* bias, const T* shift, const T* residual, long long rows,
                       int channels, long long rows_per_image) {
    bool aligned = is_aligned(y) && is_aligned(bias) && is_aligned(shift) && is_aligned(residual);
    over_rows<T>(rows, channels, aligned, [&](auto unit, long long row, int column) {
        constexpr int N = decltype(unit)::value;
        long long at = row * channels + column;
        float sum[N], term[N];
        load<N>(y + at, sum);
        auto add = [&](const T* from) {
            load<N>(from, term);
#pragma unroll
            for (int j = 0; j < N; j++) sum[j] += term[j];
        };
        if (bias) add(bias + column);
        if (shift) add(shift + row / rows_per_image * channels + column);
        if (residual) add(residual + at);
        store<N>(y + at, sum);
    });
}

template <class T>
__device__ void column_sums(const T* x, float* partial, long long rows, int channels, int pieces) {
    SHARED(float, scratch, COLUMN_SCRATCH<T>);
    x += blockIdx.z * rows * channels;
    partial += (static_cast<long long>(blockIdx.z) * pieces + blockIdx.y) * channels;
    Piece piece(rows, pieces, blockIdx.y);
    over_columns<T>(channels, is_aligned(x), [&](auto width, int tile) {
        constexpr int N = decltype(width)::value;
        int column = own_column<N>(tile);
        float sums[N] = {};
        if (column < channels) {
#pragma unroll 4
            for (long long row = piece.first(); row < piece.end; row += TILE_ROWS) {
                float v[N];
                load<N>(x + row * channels + column, v);
#pragma unroll
                for (int j = 0; j < N; j++) sums[j] += v[j];
            }
        }
        float total = sum_columns<N>(sums, &scratch[0]);
        int summed = summed_column<N>(tile, channels);
        if (summed >= 0) partial[summed] = total;
    });
}

// A warp's lanes are columns; every warp adds each eighth piece, then the warps' sums are added.
template <class T>
__device__ void column_sums_finish(const float* partial, T* out, int pieces, int channels) {
    constexpr int WARPS = THREADS / 32;
    SHARED(float, sums, THREADS);
    int column = blockIdx.x * 32 + threadIdx.x % 32;
    partial += static_cast<long long>(blockIdx.y) * pieces * channels;
    float sum = 0.0f;
    if (column < channels) {
#pragma unroll 4
        for (int piece = threadIdx.x / 32; piece < pieces; piece += WARPS) {
            sum += partial[static_cast<long long>(piece) * channels + column];
        }
    }
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.x >= 32 || column >= channels) return;
#pragma unroll
    for (int warp = 1; warp < WARPS; warp++) sum += sums[warp * 32 + threadIdx.x];
    out[static_cast<long long>(blockIdx.y) * channels + column] = from_float<T>(sum);
}

// The input place of an enlarged one, as PyTorch's `nearest` with scale = from / to.
__device__ __forceinline__ int nearest_source(int at, float scale, int from) {
    int source = static_cast<int>(static_cast<float>(at) * scale);
    return source < from ? source : from - 1;
}

// The first place in [0, to] whose source is `source` or beyond.
__device__ __forceinline__ int first_of_source(int source, float scale, int from, int to) {
    if (source >= from) return to;
    int at = static_cast<int>(static_cast<long long>(source) * to / from);
    while (at > 0 && nearest_source(at - 1, scale, from) >= source) at--;
    while (at < to && nearest_source(at, scale, from) < source) at++;
    return at;
}

template <class T>
__device__ void nearest(const T* x, T* y, int batch, int h, int w, int c, int height, int width) {
    float down = static_cast<float>(h) / static_cast<float>(height);
    float across = static_cast<float>(w) / static_cast<float>(width);
    long long pixels = static_cast<long long>(batch) * height * width;
    over_rows<T>(pixels, c, is_aligned(x) && is_aligned(y), [&](auto unit, long long row, int column) {
        constexpr int N = decltype(unit)::value;
        long long line, image;
        int ox, oy;
        split(row, width, line, ox);
        split(line, height, image, oy);
        long long from = image * h + nearest_source(oy, down, h);
        from = from * w + nearest_source(ox, across, w);
        float v[N];
        load<N>(x + from * c + column, v);
        store<N>(y + row * c + column, v);
    });
}

template <class T>
__device__ void nearest_backward(const T* dy, T* dx, int batch, int h, int w, int c, int height,
                                 int width) {
    float down = static_cast<float>(h) / static_cast<float>(height);
    float across = static_cast<float>(w) / static_cast<float>(width);
    long long pixels = static_cast<long long>(batch) * h * w;
    bool aligned = is_aligned(dy) && is_aligned(dx);
    over_rows<T>(pixels, c, aligned, [&](auto unit, long long row, int column) {
        constexpr int N = decltype(unit)::value;
        long long line, image;
        int ix, iy;
        split(row, w, line, ix);
        split(line, h, image, iy);
        int top = first_of_source(iy, down, h, height);
        int bottom = first_of_source(iy + 1, down, h, height);
        int left = first_of_source(ix, across, w, width);
        int right = first_of_source(ix + 1, across, w, width);
        float sum[N] = {};
        for (int oy = top; oy < bottom; oy++) {
            for (int ox = left; ox < right; ox++) {
                float v[N];
                load<N>(dy + ((image * height + oy) * width + ox) * c + column, v);
#pragma unroll
                for (int j = 0; j < N; j++) sum[j] += v[j];
            }
        }
        store<N>(dx + row * c + column, sum);
    });
}

#define ENTRIES(t, T)                                                                             \
    extern "C" __global__ void __launch_bounds__(THREADS)                                         \
        activation_##t(const T* x, T* y, long long n, int kind) {                                 \
        activation<T>(x, y, n, kind);                                                             \
    }                                                                                             \
    extern "C" __global__ void __launch_bounds__(THREADS)                                         \
        activation_backward_##t(const T* x, const T* dy, T* dx, long long n, int kind) {          \
        activation_backward<T>(x, dy, dx, n, kind);                                               \
    }                                                                                             \
    extern "C" __global__ void __launch_bounds__(THREADS)                                         \
        geglu_##t(const T* x, T* y, long long rows, int width) {                                  \
        geglu<T>(x, y, rows, width);                                                              \
    }                                                                                             \
    extern "C" __global__ void __launch_bounds__(THREADS)                                         \
        geglu_backward_##t(const T* x, const T* dy, T* dx, long long rows, int width) {           \
        geglu_backward<T>(x, dy, dx, rows, width);                                                \
    }                                                                                             \
    extern "C" __global__ void __launch_bounds__(THREADS)                                         \
        finish_##t(T* y, const T* bias, const T* shift, const T* residual, long long rows,        \
                   int channels, long long rows_per_image) {                                      \
        finish<T>(y, bias, shift, residual, rows, channels, rows_per_image);                      \
    }                                                                                             \
    extern "C" __global__ void __launch_bounds__(THREADS)                                         \
        column_sums_##t(const T* x, float* partial, long long rows, int channels, int pieces) {   \
        column_sums<T>(x, partial, rows, channels, pieces);                                       \
    }                                                                                             \
    extern "C" __global__ void __launch_bounds__(THREADS)                                         \
        column_sums_finish_##t(const float* partial, T* out, int pieces, int channels) {          \
        column_sums_finish<T>(partial, out, pieces, channels);                                    \
    }                                                                                             \
    extern "C" __global__ void __launch_bounds__(THREADS)                                         \
        nearest_##t(const T* x, T* y, int batch, int h, int w, int c, int height, int width) {    \
        nearest<T>(x, y, batch, h, w, c, height, width);                                          \
    }                                                                                             \
    extern "C" __global__ void __launch_bounds__(THREADS) nearest_backward_##t(                   \
        const T* dy, T* dx, int batch, int h, int w, int c, int height, int width) {              \
        nearest_backward<T>(dy, dx, batch, h, w, c, height, width);                               \
    }
FOR_EACH_TYPE(ENTRIES)
