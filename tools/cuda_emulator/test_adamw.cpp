// The kernels of adamw.cu. In f32 they must be src/nn/adamw.rs to the bit, so the reference is that
// arithmetic, and a second one in double precision watches the formula.
#include "../../src/nn/cuda/kernels/adamw.cu"
#include "check.h"

#include <algorithm>

namespace {

using check::Buffer;
using check::NAME;
using check::Random;
using check::ROUNDING;
using std::string;
using std::to_string;

struct Hyper {
    double lr, beta1, beta2, eps, decay, scale;
    int step;
};

template <class T> void updates(size_t n, size_t shift, const Hyper& h, unsigned blocks) {
    Random random(n + h.step);
    Buffer<T> p(n, shift), g(n, shift);
    Buffer<float> m(n, shift), v(n, shift);
    p.fill(random);
    g.fill(random, 0.1f);
    m.fill(random, 0.1f);
    for (size_t i = 0; i < n; i++) v.data[i] = random.normal() * random.normal() * 0.01f;
    for (size_t i = 0; i < n; i++) v.data[i] = std::fabs(v.data[i]);
    Scalars s{float(h.scale),
              float(1 - h.lr * h.decay),
              float(1 - h.beta1),
              float(h.beta2),
              float(1 - h.beta2),
              float(-h.lr / (1 - std::pow(h.beta1, h.step))),
              float(std::sqrt(1 - std::pow(h.beta2, h.step))),
              float(h.eps)};
    std::vector<float> bits_p(n), bits_m(n), bits_v(n);
    std::vector<double> want_p(n), want_m(n), want_v(n);
    for (size_t i = 0; i < n; i++) {
        float gradient = to_float(g.data[i]) * s.scale, first = m.data[i];
        first = s.rest1 < 0.5f ? first + s.rest1 * (gradient - first)
                               : gradient - (gradient - first) * (1.0f - s.rest1);
        float second = v.data[i] * s.beta2 + s.rest2 * gradient * gradient;
        float denominator = std::sqrt(second) / s.root + s.eps;
        bits_p[i] = to_float(p.data[i]) * s.keep + s.step_size * first / denominator;
        bits_m[i] = first;
        bits_v[i] = second;
        double exact = g[i] * h.scale;
        want_m[i] = h.beta1 * m[i] + (1 - h.beta1) * exact;
        want_v[i] = h.beta2 * v[i] + (1 - h.beta2) * exact * exact;
        double mean = want_m[i] / (1 - std::pow(h.beta1, h.step));
        double root = std::sqrt(want_v[i] / (1 - std::pow(h.beta2, h.step)));
        want_p[i] = p[i] * (1 - h.lr * h.decay) - h.lr * mean / (root + h.eps);
    }
    string what = string("adamw_") + NAME<T> + " " + to_string(n) + "+" + to_string(shift) +
                  " step " + to_string(h.step);
    check::launch(what, dim3(blocks), dim3(THREADS), 0, {p.span(), m.span(), v.span()},
                  [&] { adamw<T>(p.data, g.data, m.data, v.data, n, s); });
    bool same = true;
    for (size_t i = 0; i < n; i++) {
        same &= to_float(p.data[i]) == to_float(from_float<T>(bits_p[i]));
        same &= m.data[i] == bits_m[i] && v.data[i] == bits_v[i];
    }
    check::report(same, what + ": not to the bit");
    check::close(what, n, [&](size_t i) { return p[i]; }, [&](size_t i) { return want_p[i]; },
                 1e-6, ROUNDING<T> * 1.01 + 1e-6);
    check::close(what + " m", n, [&](size_t i) { return m[i]; },
                 [&](size_t i) { return want_m[i]; }, 1e-7, 1e-6);
    check::close(what + " v", n, [&](size_t i) { return v[i]; },
                 [&](size_t i) { return want_v[i]; }, 1e-9, 1e-6);
    check::report(p.intact() && m.intact() && v.intact(), what + " writes beyond its outputs");
}

template <class T> void sums(size_t n, size_t shift) {
    Random random(n);
    Buffer<T> x(n, shift), total(n, shift), before(n);
    size_t blocks = (n + SUMMED - 1) / SUMMED;
    Buffer<double> partial(blocks);
    x.fill(random);
    before.fill(random);
    std::copy_n(before.data, n, total.data);
    string what = string(NAME<T>) + " " + to_string(n) + "+" + to_string(shift);
    check::launch("sum_squares_" + what, dim3(unsigned(blocks)), dim3(THREADS), 0, {partial.span()},
                  [&] { sum_squares<T>(x.data, partial.data, n); });
    check::close("sum_squares_" + what, blocks, [&](size_t i) { return partial.data[i]; },
                 [&](size_t i) {
                     double sum = 0;
                     size_t end = std::min(n, (i + 1) * SUMMED);
                     for (size_t j = i * SUMMED; j < end; j++) sum += x[j] * x[j];
                     return sum;
                 },
                 0, 1e-12);
    check::launch("add_scaled_" + what, dim3(2), dim3(THREADS), 0, {total.span()},
                  [&] { add_scaled<T>(total.data, x.data, -0.3f, n); });
    bool same = true;
    for (size_t i = 0; i < n; i++) {
        float sum = to_float(before.data[i]) + -0.3f * to_float(x.data[i]);
        same &= to_float(total.data[i]) == to_float(from_float<T>(sum));
    }
    check::report(same, "add_scaled_" + what);
    check::report(total.intact() && partial.intact(), what + " writes beyond its outputs");
}

template <class T> void all() {
    for (size_t n : {1, 3, 8, 2048, 5003}) {
        for (size_t shift : {0, 1}) {
            updates<T>(n, shift, {1e-3, 0.9, 0.999, 1e-8, 0.01, 1, 1}, 2);
            updates<T>(n, shift, {2e-2, 0.4, 0.95, 1e-6, 0.1, 0.37, 7}, 1);
            updates<T>(n, shift, {1e-4, 0.9, 0.999, 1e-8, 0, 2, 100000}, 3);
        }
    }
    for (size_t n : {1, 5, 16384, 16385, 50001}) {
        sums<T>(n, 0);
        sums<T>(n, 1);
    }
}

// Squares beyond f32's range.
void large_values() {
    Buffer<float> x(10);
    Buffer<double> partial(1);
    for (size_t i = 0; i < x.count; i++) x.data[i] = 1e30f;
    emulator::launch(dim3(1), dim3(THREADS), 0, [&] { sum_squares<float>(x.data, partial.data, 10); });
    check::close("sum_squares of large values", 1, [&](size_t) { return partial.data[0]; },
                 [&](size_t) { return 10 * x[0] * x[0]; }, 0, 1e-12);
}

}  // namespace

int main() {
    all<float>();
    all<f16>();
    all<bf16>();
    large_values();
    return check::finish();
}
