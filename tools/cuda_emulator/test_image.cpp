// The kernels of image.cu against indices taken one by one.
#include "../../src/nn/cuda/kernels/image.cu"
#include "check.h"

#include <algorithm>

namespace {

using check::Buffer;
using std::string;
using std::to_string;

struct Columns {
    Window w;
    // For each value of the columns, the image's value that it is, or -1.
    std::vector<long long> from;

    explicit Columns(const Window& w) : w(w) {
        for (int b = 0; b < w.batch; b++)
            for (int oy = 0; oy < w.out_h; oy++)
                for (int ox = 0; ox < w.out_w; ox++)
                    for (int ky = 0; ky < w.kh; ky++)
                        for (int kx = 0; kx < w.kw; kx++)
                            for (int c = 0; c < w.channels; c++) {
                                int y = oy * w.stride + ky - w.pad_before;
                                int x = ox * w.stride + kx - w.pad_before;
                                bool inside = y >= 0 && x >= 0 && y < w.height && x < w.width;
                                long long at = (b * w.height + y) * w.width + x;
                                from.push_back(inside ? at * w.channels + c : -1);
                            }
    }
};

template <class T> void window(const Window& w, size_t shift) {
    check::Random random(w.height * w.channels + w.kh);
    Columns wanted(w);
    size_t depth = size_t(w.kh) * w.kw * w.channels, all = wanted.from.size() / depth;
    Buffer<T> x(size_t(w.batch) * w.height * w.width * w.channels, shift), dx(x.count, shift);
    Buffer<T> columns(wanted.from.size()), gradients(columns.count);
    x.fill(random);
    gradients.fill(random);
    string what = string(check::NAME<T>) + " " + to_string(w.batch) + "x" + to_string(w.height) +
                  "x" + to_string(w.width) + "x" + to_string(w.channels) + " kernel " +
                  to_string(w.kh) + "x" + to_string(w.kw) + "/" + to_string(w.stride) + " pad " +
                  to_string(w.pad_before) + "+" + to_string(shift);
    // In two parts, as if memory were short.
    size_t first = 0, part = all * 2 / 3 + 1;
    for (; first < all; first += part) {
        size_t rows = std::min(part, all - first);
        T* to = columns.data + first * depth;
        check::launch("im2col " + what, dim3(3), dim3(THREADS), 0,
                      {{reinterpret_cast<unsigned char*>(to), rows * depth * sizeof(T)}},
                      [&] { im2col<T>(x.data, to, w, first, rows); });
    }
    check::launch("col2im " + what, dim3(3), dim3(THREADS), 0, {dx.span()},
                  [&] { col2im<T>(gradients.data, dx.data, w); });
    check::close("im2col " + what, columns.count, [&](size_t i) { return columns[i]; },
                 [&](size_t i) { return wanted.from[i] < 0 ? 0.0 : x[wanted.from[i]]; }, 0, 0);
    std::vector<double> sums(x.count);
    for (size_t i = 0; i < columns.count; i++) {
        if (wanted.from[i] >= 0) sums[wanted.from[i]] += gradients[i];
    }
    check::close("col2im " + what, x.count, [&](size_t i) { return dx[i]; },
                 [&](size_t i) { return sums[i]; }, 2e-6, check::ROUNDING<T> * 1.01);
    check::report(columns.intact() && dx.intact(), what + " writes beyond its outputs");
}

template <class T> void all() {
    for (int c : {3, 4, 8, 36, 64, 320}) {
        // As in SDXL: 3x3, pointwise, downsampling, and the VAE's, padded below and right only.
        window<T>({2, 7, 6, c, 3, 3, 1, 1, 7, 6}, 0);
        window<T>({1, 4, 5, c, 1, 1, 1, 0, 4, 5}, 0);
        window<T>({1, 8, 6, c, 3, 3, 2, 1, 4, 3}, 0);
        window<T>({2, 8, 6, c, 3, 3, 2, 0, 4, 3}, 0);
    }
    window<T>({1, 9, 11, 5, 2, 4, 3, 2, 4, 4}, 0);
    window<T>({1, 14, 14, 3, 7, 7, 7, 0, 2, 2}, 0);
    // Pixels that no window sees.
    window<T>({1, 9, 9, 8, 2, 2, 4, 0, 2, 2}, 0);
    window<T>({1, 6, 6, 64, 3, 3, 1, 1, 6, 6}, 1);
    // Windows that see no pixel.
    window<T>({1, 3, 3, 8, 2, 2, 1, 3, 8, 8}, 0);
}

}  // namespace

int main() {
    all<float>();
    all<f16>();
    all<bf16>();
    return check::finish();
}
