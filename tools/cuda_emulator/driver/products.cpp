#include "products.h"

#include <algorithm>
#include <vector>

namespace driver {
namespace {

constexpr int64_t DEPTH = 256;
constexpr int COLUMNS = 6;

// Rows of a tile: one vector of 64 bytes, which the compiler splits as the
// processor needs.
template <class T> using Vector __attribute__((vector_size(64))) = T;
template <class T> constexpr int ROWS = 64 / sizeof(T);

template <class T> T reduce(T value, Reduced reduced) {
    if constexpr (std::is_same_v<T, float>) {
        switch (reduced) {
        case Reduced::Tf32: {
            const uint32_t bits = round_low_bits(value, 13);
            memcpy(&value, &bits, sizeof value);
            return value;
        }
        case Reduced::F16: return from_f16(to_f16(value));
        case Reduced::BF16: return from_bf16(to_bf16(value));
        case Reduced::No: return value;
        }
    }
    return value;
}

// Reads `count` elements from `from`, `stride` apart, into `to`, `step` apart.
template <class T>
void gather(const Matrix& m, int64_t from, int64_t stride, int64_t count, Reduced reduced, T* to, int64_t step) {
    switch (m.type) {
    case Type::F64:
    case Type::F32:
        for (int64_t i = 0; i < count; i++) {
            to[i * step] = reduce(T(load(m.data, m.type, from + i * stride)), reduced);
        }
        return;
    case Type::F16:
        for (int64_t i = 0; i < count; i++) {
            to[i * step] = T(from_f16(static_cast<const uint16_t*>(m.data)[from + i * stride]));
        }
        return;
    case Type::BF16:
        for (int64_t i = 0; i < count; i++) {
            to[i * step] = T(from_bf16(static_cast<const uint16_t*>(m.data)[from + i * stride]));
        }
        return;
    }
}

// sums[j][i] += a[p][i] b[p][j] over p, for one tile.
template <class T> void tile(int64_t depth, const T* a, const T* b, Vector<T> (&sums)[COLUMNS]) {
    for (int64_t p = 0; p < depth; p++) {
        Vector<T> column;
        memcpy(&column, a + p * ROWS<T>, sizeof column);
        for (int j = 0; j < COLUMNS; j++) {
            sums[j] += column * b[p * COLUMNS + j];
        }
    }
}

// Sums of a b in `sums`, column after column with `height` rows, which are
// m rounded up to tiles.
template <class T>
void sum(int64_t m, int64_t n, int64_t k, const Matrix& a, const Matrix& b, Reduced reduced, int64_t height,
         std::vector<T>& sums) {
    const int64_t strips = (n + COLUMNS - 1) / COLUMNS;
    std::vector<T> left(DEPTH * ROWS<T>), right(size_t(strips * DEPTH * COLUMNS));
    for (int64_t first = 0; first < k; first += DEPTH) {
        const int64_t depth = std::min(DEPTH, k - first);
        std::fill(right.begin(), right.end(), T(0));
        for (int64_t j = 0; j < n; j++) {
            gather(b, first * b.row_stride + j * b.column_stride, b.row_stride, depth, reduced,
                   right.data() + j / COLUMNS * DEPTH * COLUMNS + j % COLUMNS, COLUMNS);
        }
        for (int64_t i = 0; i < m; i += ROWS<T>) {
            std::fill(left.begin(), left.end(), T(0));
            for (int64_t row = i; row < std::min(m, i + ROWS<T>); row++) {
                gather(a, row * a.row_stride + first * a.column_stride, a.column_stride, depth, reduced,
                       left.data() + (row - i), ROWS<T>);
            }
            for (int64_t strip = 0; strip < strips; strip++) {
                Vector<T> part[COLUMNS] = {};
                tile<T>(depth, left.data(), right.data() + strip * DEPTH * COLUMNS, part);
                for (int64_t j = strip * COLUMNS; j < std::min(n, (strip + 1) * COLUMNS); j++) {
                    T* to = sums.data() + j * height + i;
                    for (int row = 0; row < ROWS<T>; row++) {
                        to[row] += part[j % COLUMNS][row];
                    }
                }
            }
        }
    }
}

template <class T>
void multiply_in(int64_t m, int64_t n, int64_t k, T alpha, const Matrix& a, const Matrix& b, T beta, const Result& c,
                 Reduced reduced) {
    const int64_t height = (m + ROWS<T> - 1) / ROWS<T> * ROWS<T>;
    std::vector<T> sums(size_t(height * n), T(0));
    if (alpha != 0) {
        sum<T>(m, n, k, a, b, reduced, height, sums);
    }
    for (int64_t j = 0; j < n; j++) {
        for (int64_t i = 0; i < m; i++) {
            const int64_t at = i * c.row_stride + j * c.column_stride;
            T value = alpha * sums[size_t(j * height + i)];
            if (beta != 0) {
                value += beta * T(load(c.data, c.type, at));
            }
            store(c.data, c.type, at, value);
        }
    }
}

} // namespace

void multiply(int64_t m, int64_t n, int64_t k, double alpha, const Matrix& a, const Matrix& b, double beta,
              const Result& c, Reduced reduced) {
    if (a.type == Type::F64) {
        multiply_in<double>(m, n, k, alpha, a, b, beta, c, Reduced::No);
    } else {
        multiply_in<float>(m, n, k, float(alpha), a, b, float(beta), c, reduced);
    }
}

} // namespace driver
