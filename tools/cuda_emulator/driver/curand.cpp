// Stand-in for libcurand: a counter-based generator (SplitMix64), so that a
// seed and an offset give the same numbers each time. They are not cuRAND's.

#include "handles.h"

#pragma GCC visibility push(default)
#include <curand.h>
#pragma GCC visibility pop

#include <cmath>

using namespace driver;

struct curandGenerator_st : Handle<curandGenerator_st> {
    uint64_t seed = 0, position = 0;
    cudaStream_t stream = nullptr;
};

namespace {

uint64_t bits(curandGenerator_t generator) {
    uint64_t z = generator->seed * 0xd1342543de82ef95 + (++generator->position) * 0x9e3779b97f4a7c15;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
}

// In (0, 1], as cuRAND has it.
double uniform(curandGenerator_t generator) {
    return double((bits(generator) >> 11) + 1) * 0x1p-53;
}

float uniform_f32(curandGenerator_t generator) {
    return float((bits(generator) >> 40) + 1) * 0x1p-24f;
}

template <class T, class Draw>
curandStatus_t fill(curandGenerator_t generator, T* out, size_t count, const char* name, Draw draw) {
    Operation operation(name);
    if (!curandGenerator_st::is_live(generator)) {
        return CURAND_STATUS_NOT_INITIALIZED;
    }
    if (need_stream(reinterpret_cast<CUstream>(generator->stream))) {
        return CURAND_STATUS_LAUNCH_FAILURE;
    }
    T* to = static_cast<T*>(host(out, count * sizeof(T), "the output"));
    for (size_t i = 0; i < count; i++) {
        to[i] = draw();
    }
    count_launch(name);
    return CURAND_STATUS_SUCCESS;
}

// The Box-Muller transform makes numbers in pairs, and cuRAND no odd count of them.
template <class T>
curandStatus_t normal(curandGenerator_t generator, T* out, size_t count, T mean, T deviation, const char* name) {
    if (count % 2 != 0) {
        return CURAND_STATUS_LENGTH_NOT_MULTIPLE;
    }
    bool second = false;
    double radius = 0, angle = 0;
    return fill(generator, out, count, name, [&] {
        if (!second) {
            radius = std::sqrt(-2 * std::log(uniform(generator)));
            angle = 2 * M_PI * uniform(generator);
        }
        const double value = radius * (second ? std::sin(angle) : std::cos(angle));
        second = !second;
        return T(mean + deviation * T(value));
    });
}

} // namespace

extern "C" {

curandStatus_t curandCreateGenerator(curandGenerator_t* generator, curandRngType_t) {
    if (need_context()) {
        return CURAND_STATUS_INITIALIZATION_FAILED;
    }
    *generator = new curandGenerator_st;
    return CURAND_STATUS_SUCCESS;
}

curandStatus_t curandDestroyGenerator(curandGenerator_t generator) {
    if (!curandGenerator_st::is_live(generator)) {
        return CURAND_STATUS_NOT_INITIALIZED;
    }
    delete generator;
    return CURAND_STATUS_SUCCESS;
}

curandStatus_t curandSetPseudoRandomGeneratorSeed(curandGenerator_t generator, unsigned long long seed) {
    if (!curandGenerator_st::is_live(generator)) {
        return CURAND_STATUS_NOT_INITIALIZED;
    }
    generator->seed = seed;
    generator->position = 0;
    return CURAND_STATUS_SUCCESS;
}

curandStatus_t curandSetGeneratorOffset(curandGenerator_t generator, unsigned long long offset) {
    if (!curandGenerator_st::is_live(generator)) {
        return CURAND_STATUS_NOT_INITIALIZED;
    }
    generator->position = offset;
    return CURAND_STATUS_SUCCESS;
}

curandStatus_t curandSetStream(curandGenerator_t generator, cudaStream_t stream) {
    if (!curandGenerator_st::is_live(generator)) {
        return CURAND_STATUS_NOT_INITIALIZED;
    }
    generator->stream = stream;
    return CURAND_STATUS_SUCCESS;
}

curandStatus_t curandGenerate(curandGenerator_t generator, unsigned* out, size_t count) {
    return fill(generator, out, count, "curandGenerate", [&] { return unsigned(bits(generator) >> 32); });
}

curandStatus_t curandGenerateUniform(curandGenerator_t generator, float* out, size_t count) {
    return fill(generator, out, count, "curandGenerateUniform", [&] { return uniform_f32(generator); });
}

curandStatus_t curandGenerateUniformDouble(curandGenerator_t generator, double* out, size_t count) {
    return fill(generator, out, count, "curandGenerateUniformDouble", [&] { return uniform(generator); });
}

curandStatus_t curandGenerateNormal(curandGenerator_t generator, float* out, size_t count, float mean,
                                    float deviation) {
    return normal(generator, out, count, mean, deviation, "curandGenerateNormal");
}

curandStatus_t curandGenerateNormalDouble(curandGenerator_t generator, double* out, size_t count, double mean,
                                          double deviation) {
    return normal(generator, out, count, mean, deviation, "curandGenerateNormalDouble");
}

} // extern "C"
