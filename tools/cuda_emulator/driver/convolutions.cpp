#include "convolutions.h"

#include <algorithm>
#include <vector>

namespace driver {
namespace {

// Output pixels of one image that are taken at a time.
constexpr int64_t CHUNK = 1024;

// The geometry of one group, with what a window covers in the filter's order.
struct Taps {
    const Images& x;
    const Images& y;
    const Filter& w;
    const Window& window;

    int64_t count() const {
        return w.in * w.height * w.width;
    }
    int64_t pixels() const {
        return y.size[2] * y.size[3];
    }
    int64_t group_outputs() const {
        return w.out / window.groups;
    }

    // Calls f(tap, offset in x) for the taps of an output pixel that lie in the image.
    template <class F> void each(int64_t n, int64_t group, int64_t pixel, F f) const {
        const int64_t top = pixel / y.size[3] * window.stride[0] - window.pad[0];
        const int64_t left = pixel % y.size[3] * window.stride[1] - window.pad[1];
        for (int64_t r = 0; r < w.height; r++) {
            const int64_t row = top + (window.turned ? w.height - 1 - r : r) * window.dilation[0];
            for (int64_t s = 0; s < w.width; s++) {
                const int64_t column = left + (window.turned ? w.width - 1 - s : s) * window.dilation[1];
                if (row < 0 || row >= x.size[2] || column < 0 || column >= x.size[3]) {
                    continue;
                }
                for (int64_t c = 0; c < w.in; c++) {
                    const int64_t tap = w.channels_last ? (r * w.width + s) * w.in + c
                                                        : (c * w.height + r) * w.width + s;
                    f(tap, x.at(n, group * w.in + c, row, column));
                }
            }
        }
    }

    int64_t output(int64_t n, int64_t channel, int64_t pixel) const {
        return y.at(n, channel, pixel / y.size[3], pixel % y.size[3]);
    }
};

template <class T> constexpr Type TYPE = std::is_same_v<T, double> ? Type::F64 : Type::F32;

template <class T> T* row_major(std::vector<T>& of, int64_t rows, int64_t columns) {
    of.assign(size_t(rows * columns), T(0));
    return of.data();
}

template <class T> Matrix input(const std::vector<T>& of, int64_t columns) {
    return {of.data(), TYPE<T>, columns, 1};
}

template <class T> Result output(std::vector<T>& of, int64_t columns) {
    return {of.data(), TYPE<T>, columns, 1};
}

Matrix transposed(Matrix m) {
    std::swap(m.row_stride, m.column_stride);
    return m;
}

// The group's weights, [outputs, taps].
Matrix weights(const Taps& taps, const void* data, int64_t group) {
    const int64_t first = group * taps.group_outputs() * taps.count();
    return {static_cast<const char*>(data) + first * int64_t(bytes_of(taps.w.type)), taps.w.type, taps.count(), 1};
}

void blend(void* data, Type type, int64_t at, double alpha, double value, double beta) {
    value *= alpha;
    if (beta != 0) {
        value += beta * load(data, type, at);
    }
    store(data, type, at, value);
}

// Windows of the pixels [first, first + count), [pixels, taps].
template <class T>
void gather_windows(const Taps& taps, const void* x, int64_t n, int64_t group, int64_t first, int64_t count,
                    std::vector<T>& windows) {
    T* to = row_major(windows, count, taps.count());
    for (int64_t p = 0; p < count; p++) {
        taps.each(n, group, first + p, [&](int64_t tap, int64_t at) {
            to[p * taps.count() + tap] = T(load(x, taps.x.type, at));
        });
    }
}

// Output pixels [first, first + count) of the group's channels, [pixels, outputs].
template <class T>
void gather_outputs(const Taps& taps, const void* y, int64_t n, int64_t group, int64_t first, int64_t count,
                    std::vector<T>& values) {
    const int64_t outputs = taps.group_outputs();
    T* to = row_major(values, count, outputs);
    for (int64_t p = 0; p < count; p++) {
        for (int64_t k = 0; k < outputs; k++) {
            to[p * outputs + k] = T(load(y, taps.y.type, taps.output(n, group * outputs + k, first + p)));
        }
    }
}

// Calls f(image, group, first pixel, pixels) for all chunks.
template <class F> void each_chunk(const Taps& taps, F f) {
    for (int64_t n = 0; n < taps.y.size[0]; n++) {
        for (int64_t group = 0; group < taps.window.groups; group++) {
            for (int64_t first = 0; first < taps.pixels(); first += CHUNK) {
                f(n, group, first, std::min(CHUNK, taps.pixels() - first));
            }
        }
    }
}

template <class T>
void forward(const Taps& taps, const void* x, const void* w, void* y, double alpha, double beta) {
    const int64_t outputs = taps.group_outputs();
    std::vector<T> windows, sums;
    each_chunk(taps, [&](int64_t n, int64_t group, int64_t first, int64_t count) {
        gather_windows(taps, x, n, group, first, count, windows);
        row_major(sums, count, outputs);
        multiply(count, outputs, taps.count(), 1, input(windows, taps.count()), transposed(weights(taps, w, group)), 0,
                 output(sums, outputs), taps.window.reduced);
        for (int64_t p = 0; p < count; p++) {
            for (int64_t k = 0; k < outputs; k++) {
                blend(y, taps.y.type, taps.output(n, group * outputs + k, first + p), alpha,
                      sums[size_t(p * outputs + k)], beta);
            }
        }
    });
}

template <class T>
void backward(const Taps& taps, const void* w, const void* dy, void* dx, double alpha, double beta) {
    const int64_t outputs = taps.group_outputs();
    std::vector<T> values, windows, sums(size_t(taps.x.extent()), T(0));
    each_chunk(taps, [&](int64_t n, int64_t group, int64_t first, int64_t count) {
        gather_outputs(taps, dy, n, group, first, count, values);
        row_major(windows, count, taps.count());
        multiply(count, taps.count(), outputs, 1, input(values, outputs), weights(taps, w, group), 0,
                 output(windows, taps.count()), taps.window.reduced);
        for (int64_t p = 0; p < count; p++) {
            taps.each(n, group, first + p, [&](int64_t tap, int64_t at) {
                sums[size_t(at)] += windows[size_t(p * taps.count() + tap)];
            });
        }
    });
    for (int64_t n = 0; n < taps.x.size[0]; n++) {
        for (int64_t c = 0; c < taps.x.size[1]; c++) {
            for (int64_t row = 0; row < taps.x.size[2]; row++) {
                for (int64_t column = 0; column < taps.x.size[3]; column++) {
                    const int64_t at = taps.x.at(n, c, row, column);
                    blend(dx, taps.x.type, at, alpha, sums[size_t(at)], beta);
                }
            }
        }
    }
}

template <class T>
void backward_weights(const Taps& taps, const void* x, const void* dy, void* dw, double alpha, double beta) {
    const int64_t outputs = taps.group_outputs();
    std::vector<T> values, windows, sums(size_t(taps.w.elements()), T(0));
    each_chunk(taps, [&](int64_t n, int64_t group, int64_t first, int64_t count) {
        gather_windows(taps, x, n, group, first, count, windows);
        gather_outputs(taps, dy, n, group, first, count, values);
        T* of_group = sums.data() + group * outputs * taps.count();
        multiply(outputs, taps.count(), count, 1, transposed(input(values, outputs)), input(windows, taps.count()), 1,
                 {of_group, TYPE<T>, taps.count(), 1}, taps.window.reduced);
    });
    for (int64_t i = 0; i < taps.w.elements(); i++) {
        blend(dw, taps.w.type, i, alpha, sums[size_t(i)], beta);
    }
}

} // namespace

void convolve(const Images& x, const void* x_data, const Filter& w, const void* w_data, const Window& window,
              const Images& y, void* y_data, double alpha, double beta) {
    const Taps taps{x, y, w, window};
    (w.type == Type::F64 ? forward<double> : forward<float>)(taps, x_data, w_data, y_data, alpha, beta);
}

void convolve_back(const Filter& w, const void* w_data, const Images& dy, const void* dy_data, const Window& window,
                   const Images& dx, void* dx_data, double alpha, double beta) {
    const Taps taps{dx, dy, w, window};
    (w.type == Type::F64 ? backward<double> : backward<float>)(taps, w_data, dy_data, dx_data, alpha, beta);
}

void convolve_weights(const Images& x, const void* x_data, const Images& dy, const void* dy_data, const Window& window,
                      const Filter& dw, void* dw_data, double alpha, double beta) {
    const Taps taps{x, dy, dw, window};
    (dw.type == Type::F64 ? backward_weights<double> : backward_weights<float>)(taps, x_data, dy_data, dw_data, alpha,
                                                                                  beta);
}

} // namespace driver
