// Matrix products as the GPU's libraries make them: inputs of any float type,
// sums in f32 (f64 for f64), one rounding to the output's type.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace driver {

enum class Type { F64, F32, F16, BF16 };

inline size_t bytes_of(Type type) {
    return type == Type::F64 ? 8 : type == Type::F32 ? 4 : 2;
}

// What f32 inputs are rounded to before they are multiplied.
enum class Reduced { No, Tf32, F16, BF16 };

struct Matrix {
    const void* data;
    Type type;
    // Elements from row to row and from column to column.
    int64_t row_stride, column_stride;
};

struct Result {
    void* data;
    Type type;
    int64_t row_stride, column_stride;
};

// c = alpha * a b + beta * c, where a has m rows, b has n columns, and k is
// summed over. With beta 0, c is not read; with alpha 0, nor are a and b.
void multiply(int64_t m, int64_t n, int64_t k, double alpha, const Matrix& a, const Matrix& b, double beta,
              const Result& c, Reduced reduced);

// ---- conversions ----

inline float from_bf16(uint16_t bits) {
    const uint32_t wide = uint32_t(bits) << 16;
    float value;
    memcpy(&value, &wide, sizeof value);
    return value;
}

// Drops the low bits of an f32's mantissa, rounding to nearest, ties to even.
inline uint32_t round_low_bits(float value, int low) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if ((bits & 0x7fffffff) > 0x7f800000) {
        return bits | 0x00400000;
    }
    const uint32_t odd = bits >> low & 1;
    bits += (uint32_t(1) << (low - 1)) - 1 + odd;
    return bits >> low << low;
}

inline uint16_t to_bf16(float value) {
    return uint16_t(round_low_bits(value, 16) >> 16);
}

inline float from_f16(uint16_t bits) {
    _Float16 half;
    memcpy(&half, &bits, sizeof half);
    return float(half);
}

inline uint16_t to_f16(float value) {
    const _Float16 half = _Float16(value);
    uint16_t bits;
    memcpy(&bits, &half, sizeof bits);
    return bits;
}

inline double load(const void* data, Type type, int64_t at) {
    switch (type) {
    case Type::F64: return static_cast<const double*>(data)[at];
    case Type::F32: return static_cast<const float*>(data)[at];
    case Type::F16: return from_f16(static_cast<const uint16_t*>(data)[at]);
    default: return from_bf16(static_cast<const uint16_t*>(data)[at]);
    }
}

// A value goes to 16 bits through f32, in which it was summed.
inline void store(void* data, Type type, int64_t at, double value) {
    switch (type) {
    case Type::F64: static_cast<double*>(data)[at] = value; return;
    case Type::F32: static_cast<float*>(data)[at] = float(value); return;
    case Type::F16: static_cast<uint16_t*>(data)[at] = to_f16(float(value)); return;
    default: static_cast<uint16_t*>(data)[at] = to_bf16(float(value)); return;
    }
}

} // namespace driver
