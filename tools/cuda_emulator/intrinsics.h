// Device functions that CUDA's headers give no host implementation of. Approximate intrinsics
// are exact here: kernels must not depend on their last bits.
#pragma once

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
inline float normcdff(float x) { return 0.5f * std::erfc(-x * 0.70710678118654752f); }
inline double normcdf(double x) { return 0.5 * std::erfc(-x * 0.70710678118654752440); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
// These are never contracted into a fused multiply-add, given -ffp-contract=off.
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }

template <class T> T __ldg(const T* p) { return *p; }
template <class T> T __ldcs(const T* p) { return *p; }
template <class T> void __stcs(T* p, T value) { *p = value; }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }

namespace emulator {
template <class To, class From> To bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

// Blocks may run on several OS threads.
struct AtomicLock {
    AtomicLock();
    ~AtomicLock();
};

template <class T, class F> T atomic(T* at, F next) {
    AtomicLock lock;
    T old = *at;
    *at = next(old);
    return old;
}
}  // namespace emulator

inline unsigned __float_as_uint(float x) { return emulator::bits<unsigned>(x); }
inline int __float_as_int(float x) { return emulator::bits<int>(x); }
inline float __uint_as_float(unsigned x) { return emulator::bits<float>(x); }
inline float __int_as_float(int x) { return emulator::bits<float>(x); }
inline long long __double_as_longlong(double x) { return emulator::bits<long long>(x); }
inline double __longlong_as_double(long long x) { return emulator::bits<double>(x); }

// As CUDA's overloads: the wider type, and the unsigned one of two equally wide.
template <class A, class B, class = std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B>>>
constexpr std::common_type_t<A, B> min(A a, B b) {
    using C = std::common_type_t<A, B>;
    return C(b) < C(a) ? C(b) : C(a);
}
template <class A, class B, class = std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B>>>
constexpr std::common_type_t<A, B> max(A a, B b) {
    using C = std::common_type_t<A, B>;
    return C(a) < C(b) ? C(b) : C(a);
}

template <class T> T atomicAdd(T* at, std::common_type_t<T> value) {
    return emulator::atomic(at, [=](T old) { return T(old + value); });
}
template <class T> T atomicSub(T* at, std::common_type_t<T> value) {
    return emulator::atomic(at, [=](T old) { return T(old - value); });
}
template <class T> T atomicMin(T* at, std::common_type_t<T> value) {
    return emulator::atomic(at, [=](T old) { return value < old ? value : old; });
}
template <class T> T atomicMax(T* at, std::common_type_t<T> value) {
    return emulator::atomic(at, [=](T old) { return old < value ? value : old; });
}
template <class T> T atomicExch(T* at, std::common_type_t<T> value) {
    return emulator::atomic(at, [=](T) { return value; });
}
template <class T>
T atomicCAS(T* at, std::common_type_t<T> expected, std::common_type_t<T> value) {
    return emulator::atomic(at, [=](T old) { return old == expected ? value : old; });
}
