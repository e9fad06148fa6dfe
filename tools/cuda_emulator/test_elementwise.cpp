// The kernels of elementwise.cu against double precision.
#include "../../src/nn/cuda/kernels/elementwise.cu"
#include "check.h"

#include <algorithm>

namespace {

using check::Buffer;
using check::NAME;
using check::Random;
using check::ROUNDING;
using std::string;
using std::to_string;

template <class T> constexpr double RELATIVE = ROUNDING<T> * 1.01 + 8e-7;
constexpr double ABSOLUTE = 5e-7;

// As the head comment of elementwise.cu; small ones make threads take several turns.
template <class T> unsigned grid(long long values, unsigned most) {
    long long per_block = THREADS * LANES<T>;
    return unsigned(std::clamp((values + per_block - 1) / per_block, 1ll, (long long)most));
}

double cdf(double x) { return 0.5 * std::erfc(-x / std::sqrt(2.0)); }
double density(double x) { return std::exp(-x * x / 2) / std::sqrt(2 * M_PI); }
double logistic(double x) { return 1 / (1 + std::exp(-x)); }

double value(double x, int kind) {
    if (kind == GELU) return x * cdf(x);
    return x * logistic((kind == SILU ? 1 : 1.702) * x);
}

double derivative(double x, int kind) {
    if (kind == GELU) return cdf(x) + x * density(x);
    double k = kind == SILU ? 1 : 1.702, s = logistic(k * x);
    return s * (1 + k * x * (1 - s));
}

template <class T> void activations(size_t n, size_t shift, unsigned most) {
    Random random(n + shift);
    Buffer<T> x(n, shift), dy(n, shift), y(n, shift), dx(n, shift);
    x.fill(random, 3);
    dy.fill(random);
    const float extremes[] = {0.0f, -0.0f, 30.0f, -30.0f, 100.0f, -100.0f, 6e4f, -6e4f};
    for (size_t i = 0; i < std::min<size_t>(n, 8); i++) x.data[n - 1 - i] = from_float<T>(extremes[i]);
    for (int kind = 0; kind < 3; kind++) {
        string what = string("activation_") + NAME<T> + " " + to_string(n) + "+" +
                      to_string(shift) + " kind " + to_string(kind);
        check::launch(what, dim3(grid<T>(n, most)), dim3(THREADS), 0, {y.span()},
                      [&] { activation<T>(x.data, y.data, n, kind); });
        check::launch(what, dim3(grid<T>(n, most)), dim3(THREADS), 0, {dx.span()},
                      [&] { activation_backward<T>(x.data, dy.data, dx.data, n, kind); });
        check::close(what, n, [&](size_t i) { return y[i]; },
                     [&](size_t i) { return value(x[i], kind); }, ABSOLUTE, RELATIVE<T>);
        check::close(what + " backward", n, [&](size_t i) { return dx[i]; },
                     [&](size_t i) { return dy[i] * derivative(x[i], kind); }, ABSOLUTE, RELATIVE<T>);
        check::report(y.intact() && dx.intact(), what + " writes beyond its output");
    }
}

template <class T> void gated(size_t rows, int width, size_t shift) {
    Random random(rows + width);
    Buffer<T> x(rows * 2 * width, shift), dy(rows * width), y(rows * width), dx(rows * 2 * width);
    x.fill(random, 2);
    dy.fill(random);
    string what = string("geglu_") + NAME<T> + " " + to_string(rows) + "x" + to_string(width) + "+" +
                  to_string(shift);
    check::launch(what, dim3(grid<T>(y.count, 3)), dim3(THREADS), 0, {y.span()},
                  [&] { geglu<T>(x.data, y.data, rows, width); });
    check::launch(what, dim3(grid<T>(dx.count, 3)), dim3(THREADS), 0, {dx.span()},
                  [&] { geglu_backward<T>(x.data, dy.data, dx.data, rows, width); });
    auto at = [&](size_t i) { return i / width * 2 * width + i % width; };
    check::close(what, y.count, [&](size_t i) { return y[i]; },
                 [&](size_t i) { return x[at(i)] * value(x[at(i) + width], GELU); }, 2e-6, RELATIVE<T>);
    check::close(what + " backward", y.count, [&](size_t i) { return dx[at(i)]; },
                 [&](size_t i) { return dy[i] * value(x[at(i) + width], GELU); }, 2e-6, RELATIVE<T>);
    check::close(what + " backward of gates", y.count, [&](size_t i) { return dx[at(i) + width]; },
                 [&](size_t i) { return dy[i] * x[at(i)] * derivative(x[at(i) + width], GELU); },
                 2e-6, RELATIVE<T>);
    check::report(y.intact() && dx.intact(), what + " writes beyond its output");
}

template <class T> void finishes(int images, int per_image, int channels, int which, size_t shift) {
    Random random(channels + which);
    size_t rows = size_t(images) * per_image;
    Buffer<T> before(rows * channels), y(rows * channels, shift), bias(channels),
        offset(size_t(images) * channels), residual(rows * channels);
    before.fill(random);
    bias.fill(random);
    offset.fill(random);
    residual.fill(random);
    std::copy_n(before.data, before.count, y.data);
    string what = string("finish_") + NAME<T> + " " + to_string(rows) + "x" + to_string(channels) +
                  " of " + to_string(which) + "+" + to_string(shift);
    check::launch(what, dim3(grid<T>(y.count, 4)), dim3(THREADS), 0, {y.span()}, [&] {
        finish<T>(y.data, which & 1 ? bias.data : nullptr, which & 2 ? offset.data : nullptr,
                  which & 4 ? residual.data : nullptr, rows, channels, per_image);
    });
    check::close(what, y.count, [&](size_t i) { return y[i]; },
                 [&](size_t i) {
                     size_t row = i / channels, c = i % channels;
                     return before[i] + (which & 1 ? bias[c] : 0) +
                            (which & 2 ? offset[row / per_image * channels + c] : 0) +
                            (which & 4 ? residual[i] : 0);
                 },
                 1e-6, RELATIVE<T>);
    check::report(y.intact(), what + " writes beyond its output");
}

template <class T> void sums(int images, int rows, int channels, int pieces, size_t shift) {
    Random random(rows + channels);
    Buffer<T> x(size_t(images) * rows * channels, shift), out(size_t(images) * channels);
    Buffer<float> partial(size_t(images) * pieces * channels);
    x.fill(random, 1, 0.25f);
    string what = string("column_sums_") + NAME<T> + " " + to_string(images) + "x" +
                  to_string(rows) + "x" + to_string(channels) + " in " + to_string(pieces) + "+" +
                  to_string(shift);
    unsigned tiles = unsigned((channels + 8 * LANES<T> - 1) / (8 * LANES<T>));
    check::launch(what, dim3(tiles, pieces, images), dim3(THREADS), 0, {partial.span()},
                  [&] { column_sums<T>(x.data, partial.data, rows, channels, pieces); });
    check::launch(what, dim3((channels + 31) / 32, images), dim3(THREADS), 0, {out.span()},
                  [&] { column_sums_finish<T>(partial.data, out.data, pieces, channels); });
    check::close(what, out.count, [&](size_t i) { return out[i]; },
                 [&](size_t i) {
                     double sum = 0;
                     for (int r = 0; r < rows; r++) {
                         sum += x[(i / channels * rows + r) * channels + i % channels];
                     }
                     return sum;
                 },
                 1e-6 * rows, RELATIVE<T>);
    check::report(partial.intact() && out.intact(), what + " writes beyond its output");
}

int source(int at, int from, int to) {
    float scale = float(from) / float(to);
    return std::min(int(unsigned(float(at) * scale)), from - 1);
}

template <class T> void resampling(int batch, int h, int w, int c, int height, int width) {
    Random random(h * w);
    Buffer<T> x(size_t(batch) * h * w * c), dx(x.count);
    Buffer<T> y(size_t(batch) * height * width * c), dy(y.count);
    x.fill(random);
    dy.fill(random);
    string what = string("nearest_") + NAME<T> + " " + to_string(h) + "x" + to_string(w) + "x" +
                  to_string(c) + " to " + to_string(height) + "x" + to_string(width);
    check::launch(what, dim3(grid<T>(y.count, 3)), dim3(THREADS), 0, {y.span()},
                  [&] { nearest<T>(x.data, y.data, batch, h, w, c, height, width); });
    check::launch(what, dim3(grid<T>(dx.count, 3)), dim3(THREADS), 0, {dx.span()},
                  [&] { nearest_backward<T>(dy.data, dx.data, batch, h, w, c, height, width); });
    std::vector<double> want(x.count), weight(x.count);
    auto from = [&](size_t i) {
        size_t pixel = i / c, ox = pixel % width, oy = pixel / width % height;
        size_t image = pixel / width / height;
        return ((image * h + source(int(oy), h, height)) * w + source(int(ox), w, width)) * c + i % c;
    };
    for (size_t i = 0; i < y.count; i++) want[from(i)] += dy[i];
    check::close(what, y.count, [&](size_t i) { return y[i]; },
                 [&](size_t i) { return x[from(i)]; }, 0, 0);
    check::close(what + " backward", x.count, [&](size_t i) { return dx[i]; },
                 [&](size_t i) { return want[i]; }, 5e-6, RELATIVE<T>);
    check::report(y.intact() && dx.intact(), what + " writes beyond its output");
}

// Indices beyond 32 bits take another path.
void large_indices() {
    bool good = true;
    for (long long i : {0ll, 4294967295ll, 4294967296ll, 123456789012345ll}) {
        for (int n : {1, 3, 320, 2147483647}) {
            long long quotient;
            int rest;
            split(i, n, quotient, rest);
            good &= quotient == i / n && rest == i % n;
        }
    }
    check::report(good, "split");
}

template <class T> void all() {
    for (size_t n : {1, 7, 8, 2048, 2049, 4103, 20000}) activations<T>(n, 0, 65535);
    activations<T>(20003, 0, 2);
    activations<T>(5001, 1, 3);
    for (int width : {1, 5, 24, 256, 1280}) gated<T>(width > 1000 ? 5 : 37, width, 0);
    gated<T>(9, 64, 1);
    gated<T>(9, 60, 0);
    for (int which = 0; which < 8; which++) {
        finishes<T>(3, 35, 64, which, 0);
        finishes<T>(2, 18, 36, which, 0);
        finishes<T>(2, 5, 320, which, 0);
        finishes<T>(2, 77, 3, which, 0);
        finishes<T>(2, 11, 64, which, 3);
    }
    for (int channels : {1, 3, 16, 36, 64, 96, 320, 1280}) {
        sums<T>(2, 97, channels, 1, 0);
        sums<T>(1, 300, channels, 3, 0);
        // More pieces than rows fill.
        sums<T>(2, 33, channels, 20, 0);
    }
    sums<T>(3, 50, 64, 2, 1);
    sums<T>(1, 2000, 64, 16, 0);
    for (int c : {4, 16, 3, 40}) {
        resampling<T>(2, 5, 7, c, 10, 14);
        resampling<T>(1, 5, 7, c, 13, 9);
        resampling<T>(2, 9, 11, c, 4, 3);
        resampling<T>(1, 3, 49, c, 7, 101);
        resampling<T>(1, 6, 6, c, 6, 6);
    }
}

}  // namespace

int main() {
    all<float>();
    all<f16>();
    all<bf16>();
    large_indices();
    return check::finish();
}
