// Activations and their slopes, as src/nn/activation.rs.
#pragma once

#include "common.cuh"

// In the order of `Activation`.
enum Activation { SILU = 0, GELU = 1, QUICK_GELU = 2 };

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// x · sigmoid(k x) and its slope.
__device__ __forceinline__ float gate(float x, float k) { return x * sigmoid(k * x); }
__device__ __forceinline__ float gate_slope(float x, float k) {
    float s = sigmoid(k * x);
    return s * (1.0f + k * x * (1.0f - s));
}

// Φ(x)
__device__ __forceinline__ float normal_cdf(float x) {
    return 0.5f + 0.5f * erff(x * 0.70710678118654752f);
}
__device__ __forceinline__ float gelu(float x) { return x * normal_cdf(x); }
// Φ(x) + x φ(x)
__device__ __forceinline__ float gelu_slope(float x) {
    return normal_cdf(x) + x * (expf(-0.5f * x * x) * 0.39894228040143268f);
}

__device__ __forceinline__ float silu(float x) { return gate(x, 1.0f); }
__device__ __forceinline__ float silu_slope(float x) { return gate_slope(x, 1.0f); }

__device__ __forceinline__ float activate(float x, int kind) {
    return kind == GELU ? gelu(x) : gate(x, kind == SILU ? 1.0f : 1.702f);
}
__device__ __forceinline__ float slope(float x, int kind) {
    return kind == GELU ? gelu_slope(x) : gate_slope(x, kind == SILU ? 1.0f : 1.702f);
}
