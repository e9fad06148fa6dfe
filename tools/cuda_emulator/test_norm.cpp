// The kernels of norm.cu against double precision.
#include "../../src/nn/cuda/kernels/elementwise.cu"
#undef ENTRIES
#include "../../src/nn/cuda/kernels/norm.cu"
#include "check.h"

#include <algorithm>

namespace {

using check::Buffer;
using check::NAME;
using check::Random;
using check::ROUNDING;
using std::string;
using std::to_string;

// As the head comment of norm.cu.
template <class T> unsigned tiles(int channels) {
    return unsigned((channels + 8 * LANES<T> - 1) / (8 * LANES<T>));
}

struct Shape {
    int batch, positions, channels, groups, pieces;
    bool silu;
    // Of the input, in standard deviations; and elements that pointers are off by.
    float mean = 0.5f;
    size_t shift = 0;

    string name(const char* type) const {
        return string("group_norm ") + type + " " + to_string(batch) + "x" + to_string(positions) +
               "x" + to_string(channels) + " of " + to_string(groups) + " in " +
               to_string(pieces) + (silu ? " silu" : "") + " mean " + to_string(mean) + "+" +
               to_string(shift);
    }
    size_t count() const { return size_t(batch) * positions * channels; }
};

// Group normalisation in double precision.
struct Reference {
    std::vector<double> standard, scale, y, dx, dw, db;

    template <class T>
    Reference(const Shape& s, double eps, const Buffer<T>& x, const Buffer<T>& dy,
              const Buffer<T>& w, const Buffer<T>& b)
        : standard(s.count()), scale(size_t(s.batch) * s.groups), y(s.count()), dx(s.count()),
          dw(s.channels), db(s.channels) {
        int width = s.channels / s.groups;
        double n = double(s.positions) * width;
        for (int g = 0; g < s.batch * s.groups; g++) {
            auto each = [&](auto f) {
                for (int p = 0; p < s.positions; p++) {
                    for (int c = g % s.groups * width; c < (g % s.groups + 1) * width; c++) {
                        f((size_t(g / s.groups) * s.positions + p) * s.channels + c, c);
                    }
                }
            };
            double mean = 0, variance = 0, sum = 0, dot = 0;
            each([&](size_t i, int) { mean += x[i] / n; });
            each([&](size_t i, int) { variance += (x[i] - mean) * (x[i] - mean) / n; });
            double factor = scale[g] = 1 / std::sqrt(variance + eps);
            each([&](size_t i, int c) {
                standard[i] = (x[i] - mean) * factor;
                double z = standard[i] * w[c] + b[c], sigmoid = 1 / (1 + std::exp(-z));
                y[i] = s.silu ? z * sigmoid : z;
                dx[i] = dy[i] * (s.silu ? sigmoid * (1 + z * (1 - sigmoid)) : 1);
                dw[c] += dx[i] * standard[i];
                db[c] += dx[i];
                dx[i] *= w[c];
                sum += dx[i] / n;
                dot += dx[i] * standard[i] / n;
            });
            each([&](size_t i, int) { dx[i] = (dx[i] - sum - standard[i] * dot) * factor; });
        }
    }
};

template <class T> void group_norm(const Shape& s) {
    constexpr float EPS = 1e-5f;
    Random random(s.positions * 31 + s.channels);
    Buffer<T> x(s.count(), s.shift), dy(s.count(), s.shift), y(s.count(), s.shift), dx(s.count());
    Buffer<T> w(s.channels), b(s.channels), dw(s.channels), db(s.channels);
    x.fill(random, 1, s.mean);
    // Channels and images that differ.
    for (size_t i = 0; i < s.count(); i++) {
        float factor = 0.5f + float(i % s.channels % 5) * 0.4f;
        float image = float(i / s.channels / s.positions);
        x.data[i] = from_float<T>(float(x[i]) * factor + image);
    }
    dy.fill(random);
    w.fill(random, 0.5f, 1);
    b.fill(random);
    size_t pairs = size_t(s.batch) * s.groups * 2;
    Buffer<float> partial(size_t(s.batch) * s.pieces * 2 * s.channels), statistics(pairs);
    Buffer<float> sums(size_t(s.batch) * 2 * s.channels), means(pairs);
    dim3 tiled(tiles<T>(s.channels), s.pieces, s.batch), block(THREADS);
    string what = s.name(NAME<T>);

    check::launch(what + " moments", tiled, block, 0, {partial.span()}, [&] {
        group_norm_moments<T>(x.data, partial.data, s.positions, s.channels, s.pieces);
    });
    check::launch(what + " statistics", dim3(s.groups, s.batch), block, 0, {statistics.span()}, [&] {
        group_norm_statistics(partial.data, statistics.data, s.positions, s.channels, s.groups,
                              s.pieces, EPS);
    });
    check::launch(what + " apply", tiled, block, 0, {y.span()}, [&] {
        group_norm_apply<T>(x.data, w.data, b.data, statistics.data, y.data, s.positions,
                            s.channels, s.groups, s.silu, s.pieces);
    });
    check::launch(what + " backward sums", tiled, block, 0, {partial.span()}, [&] {
        group_norm_backward_sums<T>(x.data, dy.data, w.data, b.data, statistics.data, partial.data,
                                    s.positions, s.channels, s.groups, s.silu, s.pieces);
    });
    dim3 columns((2 * s.channels + 31) / 32, s.batch);
    check::launch(what + " totals", columns, block, 0, {sums.span()}, [&] {
        column_sums_finish<float>(partial.data, sums.data, s.pieces, 2 * s.channels);
    });
    check::launch(what + " finish", dim3(s.groups), dim3(32), 0,
                  {means.span(), dw.span(), db.span()}, [&] {
                      group_norm_backward_finish<T>(sums.data, w.data, means.data, dw.data, db.data,
                                                    s.batch, s.positions, s.channels, s.groups);
                  });
    check::launch(what + " backward", tiled, block, 0, {dx.span()}, [&] {
        group_norm_backward_apply<T>(x.data, dy.data, w.data, b.data, statistics.data, means.data,
                                     dx.data, s.positions, s.channels, s.groups, s.silu, s.pieces);
    });

    Reference want(s, double(EPS), x, dy, w, b);
    double relative = ROUNDING<T> * 1.01 + 2e-6;
    // What f32 keeps of a value at this mean.
    double lost = 4e-6 + 4e-7 * std::fabs(s.mean), n = double(s.positions) * s.batch;
    check::close(what, s.count(), [&](size_t i) { return y[i]; },
                 [&](size_t i) { return want.y[i]; }, lost, relative);
    check::close(what + " 1/sigma", pairs / 2, [&](size_t i) { return statistics[2 * i + 1]; },
                 [&](size_t i) { return want.scale[i]; }, 0, 2e-6 + lost);
    check::close(what + " dx", s.count(), [&](size_t i) { return dx[i]; },
                 [&](size_t i) { return want.dx[i]; }, 4 * lost, relative);
    check::close(what + " dw", s.channels, [&](size_t i) { return dw[i]; },
                 [&](size_t i) { return want.dw[i]; }, lost * std::sqrt(n) * 4, relative);
    check::close(what + " db", s.channels, [&](size_t i) { return db[i]; },
                 [&](size_t i) { return want.db[i]; }, lost * std::sqrt(n) * 4, relative);
    check::report(y.intact() && dx.intact() && dw.intact() && db.intact() && partial.intact() &&
                      statistics.intact() && sums.intact() && means.intact(),
                  what + " writes beyond its outputs");
}

template <class T> void layers(size_t rows, int width, int pieces, float mean, size_t shift) {
    constexpr float EPS = 1e-5f;
    Random random(rows * 7 + width);
    size_t n = rows * width;
    Buffer<T> x(n, shift), dy(n, shift), y(n, shift), dx(n, shift), w(width), b(width);
    Buffer<T> weights(2 * width);
    Buffer<float> statistics(2 * rows), partial(size_t(pieces) * 2 * width);
    x.fill(random, 1.5f, mean);
    dy.fill(random);
    w.fill(random, 0.5f, 1);
    b.fill(random);
    string what = string("layer_norm ") + NAME<T> + " " + to_string(rows) + "x" + to_string(width) +
                  " mean " + to_string(mean) + "+" + to_string(shift);
    dim3 by_rows(unsigned((rows + 7) / 8)), block(THREADS);
    check::launch(what, by_rows, block, 0, {y.span()},
                  [&] { ::layer_norm<T>(x.data, w.data, b.data, y.data, rows, width, EPS); });
    check::launch(what + " backward", by_rows, block, 0, {dx.span()}, [&] {
        layer_norm_backward<T>(x.data, w.data, dy.data, dx.data, nullptr, rows, width, EPS);
    });
    check::launch(what + " backward", by_rows, block, 0, {dx.span(), statistics.span()}, [&] {
        layer_norm_backward<T>(x.data, w.data, dy.data, dx.data, statistics.data, rows, width, EPS);
    });
    check::launch(what + " weights", dim3(tiles<T>(width), pieces), block, 0, {partial.span()}, [&] {
        layer_norm_weights<T>(x.data, dy.data, statistics.data, partial.data, rows, width, pieces);
    });
    check::launch(what + " finish", dim3((2 * width + 31) / 32), block, 0, {weights.span()}, [&] {
        column_sums_finish<T>(partial.data, weights.data, pieces, 2 * width);
    });

    std::vector<double> want_y(n), want_dx(n), want(2 * width);
    for (size_t row = 0; row < rows; row++) {
        size_t at = row * width;
        double average = 0, variance = 0, sum = 0, dot = 0;
        for (int i = 0; i < width; i++) average += x[at + i] / width;
        for (int i = 0; i < width; i++) {
            variance += (x[at + i] - average) * (x[at + i] - average) / width;
        }
        double scale = 1 / std::sqrt(variance + double(EPS));
        for (int i = 0; i < width; i++) {
            double standard = (x[at + i] - average) * scale, d = dy[at + i];
            want_y[at + i] = standard * w[i] + b[i];
            want[i] += d * standard;
            want[width + i] += d;
            sum += d * w[i] / width;
            dot += d * w[i] * standard / width;
        }
        for (int i = 0; i < width; i++) {
            double standard = (x[at + i] - average) * scale;
            want_dx[at + i] = (dy[at + i] * w[i] - sum - standard * dot) * scale;
        }
    }
    // A row of equal values divides by sqrt(eps).
    double most = width == 1 ? 300 : 1, lost = (4e-6 + 4e-7 * std::fabs(mean)) * most;
    double relative = ROUNDING<T> * 1.01 + 2e-6;
    check::close(what, n, [&](size_t i) { return y[i]; }, [&](size_t i) { return want_y[i]; }, lost,
                 relative);
    check::close(what + " dx", n, [&](size_t i) { return dx[i]; },
                 [&](size_t i) { return want_dx[i]; }, 4 * lost, relative);
    check::close(what + " dw, db", 2 * width, [&](size_t i) { return weights[i]; },
                 [&](size_t i) { return want[i]; }, lost * std::sqrt(double(rows)) * 4, relative);
    check::report(y.intact() && dx.intact() && statistics.intact() && partial.intact() &&
                      weights.intact(),
                  what + " writes beyond its outputs");
}

// x̂ of f16 and bf16 is exact only near zero, so large means are for f32.
template <class T> void all() {
    for (bool silu : {false, true}) {
        // SDXL's widths, the small model's, the VAE's, and some that are not whole vectors.
        group_norm<T>({2, 60, 320, 32, 1, silu});
        group_norm<T>({1, 300, 320, 32, 3, silu});
        group_norm<T>({1, 40, 1280, 32, 1, silu});
        group_norm<T>({1, 33, 2560, 32, 2, silu});
        group_norm<T>({1, 40, 960, 32, 1, silu});
        group_norm<T>({2, 256, 64, 32, 2, silu});
        group_norm<T>({2, 130, 96, 32, 2, silu});
        group_norm<T>({2, 70, 128, 32, 5, silu});
        group_norm<T>({3, 200, 16, 8, 2, silu});
        group_norm<T>({1, 513, 32, 8, 5, silu});
        group_norm<T>({2, 31, 36, 4, 1, silu});
        group_norm<T>({2, 50, 15, 5, 3, silu});
        group_norm<T>({2, 50, 7, 1, 20, silu});
        group_norm<T>({1, 1, 64, 4, 1, silu});
        group_norm<T>({2, 45, 64, 16, 1, silu, 0.5f, 1});
    }
    for (int width : {8, 64, 96, 128, 320, 640, 768, 1280, 2048}) {
        layers<T>(width > 500 ? 9 : 77, width, 2, 0.5f, 0);
    }
    for (int width : {1, 3, 36, 75, 333}) layers<T>(19, width, 3, 0.5f, 0);
    layers<T>(300, 64, 3, -1, 0);
    layers<T>(10, 64, 2, 0.5f, 1);
    layers<T>(1, 640, 1, 0.5f, 0);
}

}  // namespace

int main() {
    all<float>();
    all<f16>();
    all<bf16>();
    for (float mean : {30.0f, -300.0f, 3000.0f}) {
        group_norm<float>({2, 300, 64, 16, 3, true, mean});
        layers<float>(20, 320, 1, mean, 0);
    }
    return check::finish();
}
