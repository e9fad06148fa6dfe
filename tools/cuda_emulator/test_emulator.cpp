// The emulator itself: collectives, barriers, matrix operations, copies, and what it refuses.
#include "check.h"

namespace {

using emulator::Options;
using emulator::Order;

template <class F> void run(unsigned threads, size_t shared, F kernel, Options how = {}) {
    emulator::launch(dim3(1), dim3(threads), shared, kernel, how);
}

void reductions() {
    check::Buffer<float> x(1024), y(1024);
    check::Random random(1);
    x.fill(random);
    double sum = 0;
    for (int i = 0; i < 1024; i++) sum += x[i];
    check::launch("block_sum", dim3(1), dim3(1024), 0, {y.span()}, [&] {
        SHARED(float, scratch, 32);
        float total = 0;
        // Twice, since the second must wait for the first.
        for (int i = 0; i < 2; i++) total = block_sum(x.data[threadIdx.x] + total * 0, scratch);
        y.data[threadIdx.x] = total;
    });
    check::close("block_sum", 1024, [&](size_t i) { return y[i]; }, [&](size_t) { return sum; }, 1e-4, 0);
}

void shuffles() {
    check::Buffer<float> y(32 * 6);
    check::launch("shuffles", dim3(1), dim3(32), 0, {y.span()}, [&] {
        int lane = threadIdx.x;
        float x = float(lane);
        float* to = y.data + lane * 6;
        to[0] = __shfl_xor_sync(ALL_LANES, x, 5);
        to[1] = __shfl_down_sync(ALL_LANES, x, 3, 16);
        to[2] = __shfl_up_sync(ALL_LANES, x, 3, 8);
        to[3] = __shfl_sync(ALL_LANES, x, 9, 4);
        // Halves of a warp apart.
        unsigned half = lane < 16 ? 0xffffu : 0xffff0000u;
        to[4] = lane < 16 ? __shfl_xor_sync(half, x, 1) : __shfl_xor_sync(half, x, 2);
        to[5] = float(__popc(__ballot_sync(ALL_LANES, lane % 3 == 0))) +
                100.0f * float(__any_sync(ALL_LANES, lane == 7)) +
                1000.0f * float(__all_sync(ALL_LANES, lane != 7));
    });
    check::close("shuffles", 32 * 6, [&](size_t i) { return y[i]; },
                 [](size_t at) {
                     int i = int(at / 6);
                     switch (at % 6) {
                     case 0: return double(i ^ 5);
                     case 1: return double(i % 16 + 3 < 16 ? i + 3 : i);
                     case 2: return double(i % 8 >= 3 ? i - 3 : i);
                     case 3: return double(i / 4 * 4 + 1);
                     case 4: return double(i < 16 ? i ^ 1 : i ^ 2);
                     default: return 111.0;
                     }
                 },
                 0, 0);
}

// C [16, 16] = A [16, 16] B [16, 16], both read as a kernel would: A by rows, and B once as it
// stands (transposed by ldmatrix) and once from its transpose.
template <class T> void products(bool from_transpose) {
    check::Random random(2);
    check::Buffer<T> a(256), b(256);
    check::Buffer<float> c(256);
    a.fill(random);
    b.fill(random);
    auto what = std::string("mma ") + check::NAME<T> + (from_transpose ? " transposed" : "");
    check::launch(what, dim3(1), dim3(32), 1024, {c.span()}, [&] {
        DYNAMIC_SHARED(T, tile);
        int lane = threadIdx.x;
        for (int i = lane; i < 32; i += 32) {
            cp_async_16(tile + i * 8, a.data + i * 8, true);
        }
        for (int i = lane; i < 256; i += 32) {
            int k = i / 16, n = i % 16;
            tile[256 + (from_transpose ? n * 16 + k : i)] = b.data[i];
        }
        cp_async_commit();
        cp_async_wait<0>();
        __syncthreads();
        uint32_t left[4], right[4];
        ldmatrix_x4(left, tile + lane % 16 * 16 + lane / 16 * 8);
        if (from_transpose) {
            // Matrices (n low, k low), (n low, k high), (n high, k low), (n high, k high).
            int n = lane % 8 + lane / 16 * 8, k = lane / 8 % 2 * 8;
            ldmatrix_x4(right, tile + 256 + n * 16 + k);
        } else {
            ldmatrix_x4_trans(right, tile + 256 + lane % 16 * 16 + lane / 16 * 8);
        }
        for (int half = 0; half < 2; half++) {
            float d[4] = {1, 1, 1, 1};
            const uint32_t column[2] = {right[half * 2], right[half * 2 + 1]};
            mma_16816<T>(d, left, column);
            for (int i = 0; i < 4; i++) {
                int row = lane / 4 + i / 2 * 8, n = half * 8 + lane % 4 * 2 + i % 2;
                c.data[row * 16 + n] = d[i];
            }
        }
    });
    check::close(what, 256, [&](size_t i) { return c[i]; },
                 [&](size_t i) {
                     double sum = 1;
                     for (size_t k = 0; k < 16; k++) sum += a[i / 16 * 16 + k] * b[k * 16 + i % 16];
                     return sum;
                 },
                 1e-5, 0);
}

void copies() {
    check::Buffer<float> x(8), y(16);
    check::Random random(3);
    x.fill(random);
    run(1, 48, [&] {
        DYNAMIC_SHARED(float, s);
        cp_async_16(s, x.data, true);
        cp_async_commit();
        cp_async_16(s + 4, x.data + 4, true);
        cp_async_commit();
        cp_async_16(s + 8, nullptr, false);
        cp_async_commit();
        y.data[0] = s[0];
        cp_async_wait<2>();
        y.data[1] = s[0];
        y.data[2] = s[4];
        cp_async_wait<0>();
        y.data[3] = s[7];
        y.data[4] = s[8];
    });
    check::report(std::isnan(y[0]) && std::isnan(y[2]), "copies are not visible before their wait");
    check::report(y[1] == x[0] && y[3] == x[7] && y[4] == 0, "copies are visible after their wait");
}

// Two threads that pass values without a barrier: some order must show it.
void races() {
    check::Buffer<float> y(64);
    auto race = [&] {
        SHARED(float, s, 64);
        s[threadIdx.x] = 1.0f;
        y.data[threadIdx.x] = s[threadIdx.x ^ 1];
    };
    bool seen = false;
    for (Order order : {Order::Forward, Order::Backward, Order::Shuffled}) {
        run(64, 0, race, {true, order});
        for (int i = 0; i < 64; i++) seen |= !(y[i] == 1.0);
    }
    check::report(seen, "a missing barrier shows as NaN");
}

void refusals() {
    using check::aborts;
    aborts("divergent barrier", "while others wait at", [] {
        run(64, 0, [] {
            if (threadIdx.x < 32) __syncthreads();
            else
                __syncthreads();
        });
    });
    aborts("return before a barrier", "after threads have returned", [] {
        run(64, 0, [] {
            if (threadIdx.x >= 3) __syncthreads();
        });
    });
    aborts("return after others reached a barrier", "returns while others wait", [] {
        run(64, 0, [] {
            if (threadIdx.x < 60) __syncthreads();
        });
    });
    aborts("a shuffle of part of a warp", "no thread of a block can go on", [] {
        run(32, 0, [] {
            if (threadIdx.x < 16) __syncwarp();
            else
                __syncthreads();
        });
    });
    aborts("mixed collectives", "while its warp waits in", [] {
        run(32, 0, [] {
            if (threadIdx.x < 16) __syncwarp();
            else
                __shfl_xor_sync(ALL_LANES, 1.0f, 1);
        });
    });
    aborts("a full mask in a short warp", "never were", [] { run(16, 0, [] { __syncwarp(); }); });
    aborts("an index beyond a shared array", "index 8 of 8", [] {
        run(1, 0, [] {
            SHARED(float, s, 8);
            for (int i = 0; i < 9; i++) s[i] = 0;
        });
    });
    aborts("a pointer beyond a shared array", "beyond its end", [] {
        run(1, 0, [] {
            SHARED(float, s, 8);
            float* p = &s[0];
            p[9] = 1;
        });
    });
    aborts("too much shared memory", "dynamic shared memory", [] { run(1, 1 << 20, [] {}); });
    aborts("a misaligned vector", "not aligned", [] {
        run(1, 64, [] {
            DYNAMIC_SHARED(float, s);
            load_vector(s + 1);
        });
    });
    aborts("a matrix outside shared memory", "outside shared memory", [] {
        run(32, 256, [] {
            DYNAMIC_SHARED(f16, s);
            uint32_t r[4];
            ldmatrix_x4(r, s + threadIdx.x * 8);
        });
    });
}

// Kernels that are not ours may count on threads that have returned.
void leniency() {
    check::Buffer<float> y(48);
    run(48, 0, [&] {
        SHARED(float, s, 48);
        if (threadIdx.x == 5) return;
        s[threadIdx.x] = float(threadIdx.x);
        __syncthreads();
        y.data[threadIdx.x] = s[47 - (threadIdx.x == 42 ? 0 : threadIdx.x)] +
                              __shfl_xor_sync(ALL_LANES, 100.0f, 1);
    }, {false, Order::Shuffled});
    bool good = true;
    for (int i = 0; i < 48; i++) {
        if (i != 5) good &= y[i] == 100.0 + 47 - (i == 42 ? 0 : i);
    }
    check::report(good, "lenient launches");
}

void indices() {
    check::Buffer<float> y(2 * 3 * 4 * 2 * 3 * 5);
    auto kernel = [](float* y, int stride) {
        auto b = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
        auto t = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
        y[b * stride + t] = float(b * stride + t);
    };
    float* pointer = y.data;
    int stride = 30;
    void* parameters[] = {&pointer, &stride};
    void (*entry)(float*, int) = kernel;
    emulator::launch(dim3(2, 3, 4), dim3(5, 3, 2), 0, entry, parameters);
    check::close("indices", y.count, [&](size_t i) { return y[i]; },
                 [](size_t i) { return double(i); }, 0, 0);
}

}  // namespace

int main() {
    reductions();
    shuffles();
    products<f16>(false);
    products<f16>(true);
    products<bf16>(false);
    products<bf16>(true);
    copies();
    races();
    refusals();
    leniency();
    indices();
    return check::finish();
}
