// The optimizer's passes over memory, in the operations and the order of src/nn/adamw.rs: in f32
// to the bit. {t} is f32, f16 or bf16; L = 16 / sizeof(T). Block 256, no dynamic shared memory.
//
//   adamw_{t}(T* parameter, const T* gradient, float* m, float* v, long long n, float scale,
//             float keep, float rest1, float beta2, float rest2, float step_size, float root,
//             float eps)
//     the scalars are the fields of `Scalars`, in its order; grid ceil(n / (256 L)), at most 65535,
//     any >= 1 will do
//   add_scaled_{t}(T* total, const T* gradient, float scale, long long n)
//     total += scale gradient; the same grid
//   sum_squares_{t}(const T* x, double* partial, long long n)
//     partial [ceil(n / 16384)]: one block and one value for each 16384 elements; finite wherever
//     all of x is; grid ceil(n / 16384)
#include "loops.cuh"

// Never contracted into a fused multiply-add, so that every device gives the same.
__device__ __forceinline__ float times(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ float plus(float a, float b) { return __fadd_rn(a, b); }

struct Scalars {
    float scale, keep, rest1, beta2, rest2, step_size, root, eps;

    __device__ __forceinline__ void update(float& p, float g, float& m, float& v) const {
        g = times(g, scale);
        // PyTorch's `lerp` leaves from the nearer end.
        m = rest1 < 0.5f ? plus(m, times(rest1, g - m)) : plus(g, -times(g - m, 1.0f - rest1));
        v = plus(times(v, beta2), times(times(rest2, g), g));
        float denominator = plus(__fdiv_rn(__fsqrt_rn(v), root), eps);
        p = plus(times(p, keep), __fdiv_rn(times(step_size, m), denominator));
    }
};

// Of f32 next to N values of T, in as many accesses as it takes.
template <int N> __device__ __forceinline__ void load_wide(const float* p, float (&to)[N]) {
    if constexpr (N == 1) {
        to[0] = *p;
    } else {
#pragma unroll
        for (int i = 0; i < N; i += 4) {
            Vec<float> part = load_vector(p + i);
#pragma unroll
            for (int j = 0; j < 4; j++) to[i + j] = part.v[j];
        }
    }
}

template <int N> __device__ __forceinline__ void store_wide(float* p, const float (&from)[N]) {
    if constexpr (N == 1) {
        *p = from[0];
    } else {
#pragma unroll
        for (int i = 0; i < N; i += 4) {
            store_vector(p + i, Vec<float>{{from[i], from[i + 1], from[i + 2], from[i + 3]}});
        }
    }
}

template <class T>
__device__ void adamw(T* parameter, const T* gradient, float* m, float* v, long long n,
                      const Scalars& scalars) {
    bool aligned =
        is_aligned(parameter) && is_aligned(gradient) && is_aligned(m) && is_aligned(v);
    over_elements<T>(n, aligned, [&](auto width, long long i) {
        constexpr int N = decltype(width)::value;
        float p[N], g[N], first[N], second[N];
        load<N>(parameter + i, p);
        load<N>(gradient + i, g);
        load_wide<N>(m + i, first);
        load_wide<N>(v + i, second);
#pragma unroll
        for (int j = 0; j < N; j++) scalars.update(p[j], g[j], first[j], second[j]);
        store<N>(parameter + i, p);
        store_wide<N>(m + i, first);
        store_wide<N>(v + i, second);
    });
}

template <class T>
__device__ void add_scaled(T* total, const T* gradient, float scale, long long n) {
    over_elements<T>(n, is_aligned(total) && is_aligned(gradient), [&](auto width, long long i) {
        constexpr int N = decltype(width)::value;
        float sum[N], g[N];
        load<N>(total + i, sum);
        load<N>(gradient + i, g);
#pragma unroll
        for (int j = 0; j < N; j++) sum[j] = plus(sum[j], times(scale, g[j]));
        store<N>(total + i, sum);
    });
}

constexpr int SUMMED = 16384;

template <class T> __device__ void sum_squares(const T* x, double* partial, long long n) {
    SHARED(double, sums, THREADS);
    long long begin = static_cast<long long>(blockIdx.x) * SUMMED;
    int count = static_cast<int>(n - begin < SUMMED ? n - begin : SUMMED);
    x += begin;
    int vectors = is_aligned(x) ? count / LANES<T> : 0;
    double sum = 0.0;
    for (int i = threadIdx.x; i < vectors; i += THREADS) {
        float v[LANES<T>];
        load<LANES<T>>(x + i * LANES<T>, v);
#pragma unroll
        for (int j = 0; j < LANES<T>; j++) sum += static_cast<double>(v[j]) * v[j];
    }
    for (int i = vectors * LANES<T> + threadIdx.x; i < count; i += THREADS) {
        double v = to_float(x[i]);
        sum += v * v;
    }
    sums[threadIdx.x] = sum;
    for (int half = THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (static_cast<int>(threadIdx.x) < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    }
    if (threadIdx.x == 0) partial[blockIdx.x] = sums[0];
}

#define ENTRIES(t, T)                                                                             \
    extern "C" __global__ void __launch_bounds__(THREADS)                                         \
        adamw_##t(T* parameter, const T* gradient, float* m, float* v, long long n, float scale,  \
                  float keep, float rest1, float beta2, float rest2, float step_size, float root, \
                  float eps) {                                                                    \
        adamw<T>(parameter, gradient, m, v, n,                                                    \
                 Scalars{scale, keep, rest1, beta2, rest2, step_size, root, eps});                \
    }                                                                                             \
    extern "C" __global__ void __launch_bounds__(THREADS)                                         \
        add_scaled_##t(T* total, const T* gradient, float scale, long long n) {                   \
        add_scaled<T>(total, gradient, scale, n);                                                 \
    }                                                                                             \
    extern "C" __global__ void __launch_bounds__(THREADS)                                         \
        sum_squares_##t(const T* x, double* partial, long long n) {                               \
        sum_squares<T>(x, partial, n);                                                            \
    }
FOR_EACH_TYPE(ENTRIES)
