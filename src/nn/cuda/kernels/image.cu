// Convolutions as products: what the output pixels of a window see, as rows of a matrix, and the
// way back. {t} is f32, f16 or bf16; L = 16 / sizeof(T). Block 256, no dynamic shared memory;
// one-dimensional grids of any size >= 1: ceil(values written / (256 L)), at most 65535.
//
//   im2col_{t}(const T* x, T* columns, int batch, int height, int width, int channels, int kh,
//              int kw, int stride, int pad_before, int out_h, int out_w, long long first_row,
//              long long rows)
//     x [batch, height, width, channels]; columns [rows, kh kw channels] (tap, channel), of output
//     pixels first_row and following of [batch, out_h, out_w]; zeros outside the image
//   col2im_{t}(const T* columns, T* dx, int batch, ... int out_w)   the same window
//     columns [batch out_h out_w, kh kw channels] of all output pixels; dx [batch, height, width,
//     channels], each value the sum of the places that saw it
#include "loops.cuh"

struct Window {
    int batch, height, width, channels, kh, kw, stride, pad_before, out_h, out_w;
};

template <class T>
__device__ void im2col(const T* x, T* columns, Window window, long long first_row,
                       long long rows) {
    int taps = window.kh * window.kw, c = window.channels;
    bool aligned = is_aligned(x) && is_aligned(columns);
    // Rows of one tap each.
    over_rows<T>(rows * taps, c, aligned, [&](auto unit, long long i, int channel) {
        constexpr int N = decltype(unit)::value;
        long long row, line, image;
        int tap, ox, oy;
        split(i, taps, row, tap);
        split(first_row + row, window.out_w, line, ox);
        split(line, window.out_h, image, oy);
        int iy = oy * window.stride + tap / window.kw - window.pad_before;
        int ix = ox * window.stride + tap % window.kw - window.pad_before;
        float v[N] = {};
        if (iy >= 0 && iy < window.height && ix >= 0 && ix < window.width) {
            load<N>(x + ((image * window.height + iy) * window.width + ix) * c + channel, v);
        }
        store<N>(columns + i * c + channel, v);
    });
}

// The output places along one side whose window holds input place `at`: those of tap
// at + pad_before − stride · place. Returns the first, and sets `end` behind the last.
__device__ __forceinline__ int first_place(int at, int taps, int stride, int pad_before, int places,
                                           int& end) {
    int last = (at + pad_before) / stride, before = at + pad_before - taps;
    end = last + 1 < places ? last + 1 : places;
    return before < 0 ? 0 : before / stride + 1;
}

template <class T> __device__ void col2im(const T* columns, T* dx, Window window) {
    int c = window.channels;
    long long pixels = static_cast<long long>(window.batch) * window.height * window.width;
    bool aligned = is_aligned(columns) && is_aligned(dx);
    over_rows<T>(pixels, c, aligned, [&](auto unit, long long pixel, int channel) {
        constexpr int N = decltype(unit)::value;
        long long line, image;
        int ix, iy, bottom, right;
        split(pixel, window.width, line, ix);
        split(line, window.height, image, iy);
        int pad = window.pad_before, stride = window.stride;
        int top = first_place(iy, window.kh, stride, pad, window.out_h, bottom);
        int left = first_place(ix, window.kw, stride, pad, window.out_w, right);
        float sum[N] = {};
#pragma unroll 1
        for (int oy = top; oy < bottom; oy++) {
#pragma unroll 1
            for (int ox = left; ox < right; ox++) {
                long long row = (image * window.out_h + oy) * window.out_w + ox;
                int ky = iy + pad - oy * stride, kx = ix + pad - ox * stride;
                float v[N];
                load<N>(columns + ((row * window.kh + ky) * window.kw + kx) * c + channel, v);
#pragma unroll
                for (int j = 0; j < N; j++) sum[j] += v[j];
            }
        }
        store<N>(dx + pixel * c + channel, sum);
    });
}

#define ENTRIES(t, T)                                                                          \
    extern "C" __global__ void __launch_bounds__(THREADS)                                      \
        im2col_##t(const T* x, T* columns, int batch, int height, int width, int channels,     \
                   int kh, int kw, int stride, int pad_before, int out_h, int out_w,           \
                   long long first_row, long long rows) {                                      \
        Window window{batch, height, width, channels, kh, kw, stride, pad_before, out_h, out_w}; \
        im2col<T>(x, columns, window, first_row, rows);                                        \
    }                                                                                          \
    extern "C" __global__ void __launch_bounds__(THREADS)                                      \
        col2im_##t(const T* columns, T* dx, int batch, int height, int width, int channels,    \
                   int kh, int kw, int stride, int pad_before, int out_h, int out_w) {         \
        Window window{batch, height, width, channels, kh, kw, stride, pad_before, out_h, out_w}; \
        col2im<T>(columns, dx, window);                                                        \
    }
FOR_EACH_TYPE(ENTRIES)
