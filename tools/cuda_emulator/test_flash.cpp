// Attention's kernels against double precision: against the exact result within what rounding the
// probabilities to the element type can do to it, and against a reference that rounds where the
// kernels round, within little more than the rounding of the result.
#include "check.h"

#include "../../src/nn/cuda/kernels/flash_backward.cu"
#include "../../src/nn/cuda/kernels/flash_f32.cu"
#include "../../src/nn/cuda/kernels/flash_forward.cu"

namespace {

template <class T, int D> struct Kernels;
#define KERNELS(T, D, FORWARD_BLOCK, FORWARD_ROWS, BACKWARD_BLOCK, KV_ROWS, Q_ROWS)      \
    template <> struct Kernels<T, D> {                                                   \
        static constexpr auto forward = flash_forward_##T##_##D;                         \
        static constexpr auto delta = flash_delta_##T##_##D;                             \
        static constexpr auto keys = flash_backward_kv_##T##_##D;                        \
        static constexpr auto queries = flash_backward_q_##T##_##D;                      \
        static constexpr int forward_block = FORWARD_BLOCK, forward_rows = FORWARD_ROWS, \
                             backward_block = BACKWARD_BLOCK, key_rows = KV_ROWS,        \
                             query_rows = Q_ROWS;                                        \
    };
KERNELS(f32, 32, 256, 64, 128, 32, 32)
KERNELS(f32, 64, 256, 64, 128, 32, 32)
KERNELS(f16, 32, 128, 128, 128, 64, 128)
KERNELS(f16, 64, 128, 128, 128, 64, 128)
KERNELS(bf16, 32, 128, 128, 128, 64, 128)
KERNELS(bf16, 64, 128, 128, 128, 64, 128)
#undef KERNELS

struct Shape {
    int batch, heads, targets, sources;
    // Standard deviations of queries and keys are this: how sharp the probabilities are.
    float spread;
};

// [batch, tokens, heads * D] with `stride` values from token to token; what is between is NaN.
template <class T, int D> struct Tokens {
    int heads, count, stride;
    check::Buffer<T> buffer;

    Tokens(int batch, int heads, int count, int padding)
        : heads(heads),
          count(count),
          stride(heads * D + padding),
          buffer(size_t(batch) * count * stride) {}

    size_t at(int b, int h, int t) const { return (size_t(b) * count + t) * stride + h * D; }
    const T* row(int b, int h, int t) const { return buffer.data + at(b, h, t); }
    void fill(check::Random& random, float scale) {
        for (size_t i = 0; i < buffer.count; i++) {
            if (int(i % stride) < heads * D)
                buffer.data[i] = from_float<T>(scale * random.normal());
        }
    }
};

template <class T, int D> double dot(const T* a, const T* b) {
    double sum = 0;
    for (int d = 0; d < D; d++) sum += double(to_float(a[d])) * double(to_float(b[d]));
    return sum;
}

template <class T> double rounded(double x) { return double(to_float(from_float<T>(float(x)))); }

// One wanted result: exactly, what its rounded summands may make of that, and with those rounded.
struct Wanted {
    std::vector<double> exact, allowed, rounded;
    explicit Wanted(size_t count) : exact(count), allowed(count), rounded(count) {}
};

// The greater, where NaN is the greatest.
void raise(double& most, double x) {
    if (!std::isnan(most) && !(x <= most)) most = x;
}

struct Figures {
    // Greatest |error| / allowed; and against the rounded reference, the greatest |error| and the
    // greatest root mean square error in units of the element type's rounding.
    double exact = 0, most = 0, rounded = 0;

    void print(const char* name) const {
        std::printf("; %s %.2f %.1e %.2f", name, exact, most, rounded);
    }
};

// What arithmetic in f32 may do to a probability, relative. Scores are of the order of spread^2.
double arithmetic(const Shape& shape) {
    return (16 + 24 * shape.spread * shape.spread) / (1 << 24);
}

// Half's least numbers have an absolute error, in up to 256 summands; and where gradients cancel,
// arithmetic decides which way something small is rounded.
template <class T> constexpr double LEAST = std::is_same_v<T, float> ? 1e-6 : 2e-5;

template <class T>
void compare(const std::string& what, const check::Buffer<T>& got, const Wanted& want,
             Figures& figures, double noise) {
    const double unit = check::ROUNDING<T>;
    double worst = 0, error = 0, size = 0;
    for (size_t i = 0; i < want.exact.size(); i++) {
        double allowed = want.allowed[i] + unit * std::fabs(want.exact[i]) + LEAST<T>;
        double off = std::fabs(got[i] - want.exact[i]) / allowed;
        raise(worst, off);
        double rough = std::fabs(got[i] - want.rounded[i]);
        raise(figures.most, rough);
        error += rough * rough;
        size += want.rounded[i] * want.rounded[i];
    }
    check::report(worst <= 1, what + ": " + std::to_string(worst) + " of the allowed error");
    raise(figures.exact, worst);
    if (!std::is_same_v<T, float>) {
        // Rounding x alone gives a root mean square error of at most unit * |x| / sqrt(3).
        double count = double(want.exact.size()), scale = unit * std::sqrt(size / count);
        double rms = std::sqrt(error / count);
        check::report(rms <= 0.65 * scale + LEAST<T> / 4 + noise,
                      what + ": rms " + std::to_string(rms / scale));
        if (scale > 0) raise(figures.rounded, rms / scale);
    }
    check::report(got.intact(), what + ": wrote outside");
}

// The forward kernel's tiles decide which maximum a probability is rounded against.
template <class T, int D>
void want_forward(const Shape& shape, const Tokens<T, D>& q, const Tokens<T, D>& k,
                  const Tokens<T, D>& v, double scale, int tile, Wanted& out,
                  std::vector<double>& lse) {
    const int sources = shape.sources;
    std::vector<double> s(sources);
    for (int b = 0; b < shape.batch; b++)
        for (int h = 0; h < shape.heads; h++)
            for (int t = 0; t < shape.targets; t++) {
                double all = -INFINITY, running = -INFINITY, sum = 0, total = 0;
                std::vector<double> exact(D), allowed(D), tiled(D);
                for (int j = 0; j < sources; j++) {
                    s[j] = dot<T, D>(q.row(b, h, t), k.row(b, h, j)) * scale;
                    all = std::fmax(all, s[j]);
                }
                for (int j = 0; j < sources; j++) {
                    if (j % tile == 0) {
                        double next = running;
                        for (int i = j; i < std::min(j + tile, sources); i++)
                            next = std::fmax(next, s[i]);
                        for (double& x : tiled) x *= std::exp(running - next);
                        total *= std::exp(running - next);
                        running = next;
                    }
                    double p = std::exp(s[j] - all), of_tile = std::exp(s[j] - running);
                    sum += p;
                    total += of_tile;
                    for (int d = 0; d < D; d++) {
                        double value = double(to_float(v.row(b, h, j)[d]));
                        exact[d] += p * value;
                        allowed[d] +=
                            (check::ROUNDING<T> + arithmetic(shape)) * p * std::fabs(value);
                        tiled[d] += rounded<T>(of_tile) * value;
                    }
                }
                lse[(size_t(b) * shape.heads + h) * shape.targets + t] = all + std::log(sum);
                size_t at = (size_t(b) * shape.targets + t) * shape.heads * D + size_t(h) * D;
                for (int d = 0; d < D; d++) {
                    out.exact[at + d] = exact[d] / sum;
                    out.allowed[at + d] = allowed[d] / sum;
                    out.rounded[at + d] = tiled[d] / total;
                }
            }
}

// Given the forward kernel's out, since delta is of that.
template <class T, int D>
void want_backward(const Shape& shape, const Tokens<T, D>& q, const Tokens<T, D>& k,
                   const Tokens<T, D>& v, const Tokens<T, D>& out, const Tokens<T, D>& dout,
                   const std::vector<double>& lse, double scale, Wanted& dq, Wanted& dk, Wanted& dv,
                   std::vector<double>& deltas) {
    auto add = [&](Wanted& to, size_t at, double exact, double parts, double by) {
        to.exact[at] += exact * by;
        to.allowed[at] +=
            (check::ROUNDING<T> * std::fabs(exact) + arithmetic(shape) * parts) * std::fabs(by);
        to.rounded[at] += rounded<T>(exact) * by;
    };
    for (int b = 0; b < shape.batch; b++)
        for (int h = 0; h < shape.heads; h++)
            for (int t = 0; t < shape.targets; t++) {
                size_t row = (size_t(b) * shape.heads + h) * shape.targets + t;
                double delta = dot<T, D>(out.row(b, h, t), dout.row(b, h, t));
                deltas[row] = delta;
                for (int j = 0; j < shape.sources; j++) {
                    double p =
                        std::exp(dot<T, D>(q.row(b, h, t), k.row(b, h, j)) * scale - lse[row]);
                    double dp = dot<T, D>(dout.row(b, h, t), v.row(b, h, j)), ds = p * (dp - delta);
                    // What dp and delta are sums of is of the order of 1.
                    double parts = p * (1 + std::fabs(dp) + std::fabs(delta));
                    for (int d = 0; d < D; d++) {
                        add(dq, out.at(b, h, t) + d, ds, parts,
                            scale * to_float(k.row(b, h, j)[d]));
                        size_t at =
                            (size_t(b) * shape.sources + j) * shape.heads * D + size_t(h) * D + d;
                        add(dk, at, ds, parts, scale * to_float(q.row(b, h, t)[d]));
                        add(dv, at, p, p, to_float(dout.row(b, h, t)[d]));
                    }
                }
            }
}

struct Summary {
    Figures out, dq, dk, dv;
    double lse = 0, delta = 0;
};

template <class T>
void small(const std::string& what, const check::Buffer<float>& got,
           const std::vector<double>& want, double relative, double& worst) {
    double most = 0;
    for (size_t i = 0; i < want.size(); i++) {
        double off = std::fabs(got[i] - want[i]) / (1 + std::fabs(want[i]));
        raise(most, off);
    }
    check::report(most <= relative && got.intact(), what + ": off by " + std::to_string(most));
    raise(worst, most);
}

template <class T, int D> void attention(const Shape& shape, Summary& summary) {
    using K = Kernels<T, D>;
    const auto [batch, heads, targets, sources, spread] = shape;
    const std::string name = std::string(check::NAME<T>) + " head " + std::to_string(D) + ", " +
                             std::to_string(heads) + " heads, " + std::to_string(targets) + " on " +
                             std::to_string(sources) + " ";
    check::Random random(uint64_t(targets) * 1000 + sources);
    Tokens<T, D> q(batch, heads, targets, 8), k(batch, heads, sources, 24),
        v(batch, heads, sources, D);
    Tokens<T, D> out(batch, heads, targets, 0), dout(batch, heads, targets, 0),
        bare(batch, heads, targets, 0);
    q.fill(random, spread), k.fill(random, spread), v.fill(random, 1), dout.fill(random, 1);
    const size_t rows = size_t(batch) * heads * targets;
    check::Buffer<float> lse(rows), delta(rows);
    const float scale = 1.0f / std::sqrt(float(D));
    const double noise = arithmetic(shape);

    auto tiles = [&](int count, int rows) { return dim3((count + rows - 1) / rows, heads, batch); };
    auto forward = [&](Tokens<T, D>& to, float* lse) {
        K::forward(q.buffer.data, k.buffer.data, v.buffer.data, to.buffer.data, lse, heads, targets,
                   sources, q.stride, k.stride, v.stride, scale);
    };
    dim3 grid = tiles(targets, K::forward_rows), block(K::forward_block);
    check::launch(name + "forward", grid, block, 0, {out.buffer.span(), lse.span()},
                  [&] { forward(out, lse.data); });
    emulator::launch(grid, block, 0, [&] { forward(bare, nullptr); });
    check::report(!std::memcmp(out.buffer.data, bare.buffer.data, out.buffer.span().bytes),
                  name + "without lse");

    Wanted wanted(out.buffer.count);
    std::vector<double> want_lse(rows), want_delta(rows);
    want_forward(shape, q, k, v, double(scale), std::is_same_v<T, float> ? 32 : 64, wanted,
                 want_lse);
    compare(name + "out", out.buffer, wanted, summary.out, noise);
    small<T>(name + "lse", lse, want_lse, noise, summary.lse);

    const size_t chunks = size_t(targets) * heads * D * sizeof(T);
    check::launch(name + "delta", dim3((chunks + 4095) / 4096, 1, batch), dim3(256), 0,
                  {delta.span()},
                  [&] { K::delta(out.buffer.data, dout.buffer.data, delta.data, heads, targets); });
    Tokens<T, D> dq(batch, heads, targets, 0), dk(batch, heads, sources, 0),
        dv(batch, heads, sources, 0);
    check::launch(name + "backward of keys and values", tiles(sources, K::key_rows),
                  dim3(K::backward_block), 0, {dk.buffer.span(), dv.buffer.span()}, [&] {
                      K::keys(q.buffer.data, k.buffer.data, v.buffer.data, dout.buffer.data,
                              lse.data, delta.data, dk.buffer.data, dv.buffer.data, heads, targets,
                              sources, q.stride, k.stride, v.stride, scale);
                  });
    check::launch(name + "backward of queries", tiles(targets, K::query_rows),
                  dim3(K::backward_block), 0, {dq.buffer.span()}, [&] {
                      K::queries(q.buffer.data, k.buffer.data, v.buffer.data, dout.buffer.data,
                                 lse.data, delta.data, dq.buffer.data, heads, targets, sources,
                                 q.stride, k.stride, v.stride, scale);
                  });
    Wanted want_q(dq.buffer.count), want_k(dk.buffer.count), want_v(dv.buffer.count);
    want_backward(shape, q, k, v, out, dout, want_lse, double(scale), want_q, want_k, want_v,
                  want_delta);
    small<T>(name + "delta", delta, want_delta, 2e-6, summary.delta);
    compare(name + "dq", dq.buffer, want_q, summary.dq, noise);
    compare(name + "dk", dk.buffer, want_k, summary.dk, noise);
    compare(name + "dv", dv.buffer, want_v, summary.dv, noise);
}

template <class T, int D> void all() {
    Summary summary;
    int number = 0;
    for (int targets : {1, 16, 63, 64, 65, 77, 130, 256}) {
        for (int sources : {1, 16, 63, 64, 65, 77, 130, 256}) {
            float spread = number % 5 == 3 ? 3.0f : 1.0f;
            attention<T, D>({2, 1 + number++ % 3, targets, sources, spread}, summary);
        }
    }
    std::printf("%-4s %d", check::NAME<T>, D);
    summary.out.print("out"), summary.dq.print("dq"), summary.dk.print("dk");
    summary.dv.print("dv");
    std::printf("; lse %.1e, delta %.1e\n", summary.lse, summary.delta);
}

} // namespace

int main() {
    std::printf(
        "each: of the allowed error; greatest error and rms in roundings, if rounded alike\n");
    all<f16, 64>();
    all<f16, 32>();
    all<bf16, 64>();
    all<bf16, 32>();
    all<f32, 64>();
    all<f32, 32>();
    const auto& counts = emulator::statistics();
    check::report(counts.matrix_loads > 0 && counts.matrix_load_conflicts == 0,
                  "bank conflicts: " + std::to_string(counts.matrix_load_conflicts));
    return check::finish();
}
