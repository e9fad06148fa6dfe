// Tests of the stand-ins for cuBLAS, cuDNN and cuRAND against plain loops.

#include <cublas_v2.h>
#include <curand.h>

#include "cudnn_api.h"
#include "products.h"
#include "test.h"

using namespace driver;
using namespace test;

// The calls that cudnn_api.h has no declarations of.
extern "C" {
cudnnStatus_t cudnnCreate(cudnnHandle_t*);
cudnnStatus_t cudnnCreateTensorDescriptor(cudnnTensorDescriptor_t*);
cudnnStatus_t cudnnCreateFilterDescriptor(cudnnFilterDescriptor_t*);
cudnnStatus_t cudnnCreateConvolutionDescriptor(cudnnConvolutionDescriptor_t*);
cudnnStatus_t cudnnSetTensor4dDescriptorEx(cudnnTensorDescriptor_t, cudnnDataType_t, int, int, int, int, int, int, int,
                                           int);
cudnnStatus_t cudnnSetFilter4dDescriptor(cudnnFilterDescriptor_t, cudnnDataType_t, cudnnTensorFormat_t, int, int, int,
                                         int);
cudnnStatus_t cudnnSetConvolution2dDescriptor(cudnnConvolutionDescriptor_t, int, int, int, int, int, int,
                                              cudnnConvolutionMode_t, cudnnDataType_t);
cudnnStatus_t cudnnSetConvolutionMathType(cudnnConvolutionDescriptor_t, cudnnMathType_t);
cudnnStatus_t cudnnSetConvolutionGroupCount(cudnnConvolutionDescriptor_t, int);
cudnnStatus_t cudnnConvolutionForward(cudnnHandle_t, const void*, cudnnTensorDescriptor_t, const void*,
                                      cudnnFilterDescriptor_t, const void*, cudnnConvolutionDescriptor_t, int, void*,
                                      size_t, const void*, cudnnTensorDescriptor_t, void*);
cudnnStatus_t cudnnConvolutionBackwardData(cudnnHandle_t, const void*, cudnnFilterDescriptor_t, const void*,
                                           cudnnTensorDescriptor_t, const void*, cudnnConvolutionDescriptor_t, int,
                                           void*, size_t, const void*, cudnnTensorDescriptor_t, void*);
cudnnStatus_t cudnnConvolutionBackwardFilter(cudnnHandle_t, const void*, cudnnTensorDescriptor_t, const void*,
                                             cudnnTensorDescriptor_t, const void*, cudnnConvolutionDescriptor_t, int,
                                             void*, size_t, const void*, cudnnFilterDescriptor_t, void*);
}

namespace {

void* pointer(CUdeviceptr address) {
    return reinterpret_cast<void*>(address);
}

// ---- products ----

size_t place(bool flip, int64_t row, int64_t column, int64_t ld) {
    return size_t(flip ? column + row * ld : row + column * ld);
}

// Strided products of every transposition, with gaps between columns and batches.
void products(cublasHandle_t handle, cudaDataType type, Type stored, double tolerance) {
    const int m = 37, n = 19, k = 300, batch = 2, gap = 3;
    Random random;
    for (int which = 0; which < 4; which++) {
        const bool a_flip = which & 1, b_flip = which & 2;
        const int lda = (a_flip ? k : m) + gap, ldb = (b_flip ? n : k) + gap, ldc = m + gap;
        const size_t a_step = size_t(lda) * size_t(a_flip ? m : k) + 5, b_step = size_t(ldb) * size_t(b_flip ? k : n);
        const size_t c_step = size_t(ldc) * n;
        const auto raw = [&](size_t count) {
            std::vector<unsigned char> bytes(count * bytes_of(stored));
            for (size_t i = 0; i < count; i++) {
                store(bytes.data(), stored, int64_t(i), random.next());
            }
            return bytes;
        };
        const auto a = raw(a_step * batch), b = raw(b_step * batch), c = raw(c_step * batch);
        const CUdeviceptr on_a = uploaded(a), on_b = uploaded(b), on_c = uploaded(c);
        const float alpha = 0.5f, beta = -2;
        const cublasStatus_t status = cublasGemmStridedBatchedEx(
            handle, a_flip ? CUBLAS_OP_T : CUBLAS_OP_N, b_flip ? CUBLAS_OP_T : CUBLAS_OP_N, m, n, k, &alpha,
            pointer(on_a), type, lda, (long long)a_step, pointer(on_b), type, ldb, (long long)b_step, &beta,
            pointer(on_c), type, ldc, (long long)c_step, batch, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
        const auto got = downloaded<unsigned char>(on_c, c.size());
        double worst = 0;
        bool gaps = true;
        for (size_t i = 0; i < batch; i++) {
            for (int column = 0; column < n; column++) {
                for (int row = 0; row < ldc; row++) {
                    const int64_t at = int64_t(i * c_step) + row + int64_t(column) * ldc;
                    const double old = load(c.data(), stored, at), made = load(got.data(), stored, at);
                    if (row >= m) {
                        gaps = gaps && made == old;
                        continue;
                    }
                    double sum = 0;
                    for (int p = 0; p < k; p++) {
                        sum += load(a.data(), stored, int64_t(i * a_step + place(a_flip, row, p, lda))) *
                               load(b.data(), stored, int64_t(i * b_step + place(b_flip, p, column, ldb)));
                    }
                    worst = std::max(worst, std::fabs(made - (0.5 * sum - 2 * old)));
                }
            }
        }
        report(status == CUBLAS_STATUS_SUCCESS && worst < tolerance && gaps,
               "product of type " + std::to_string(type) + ", transposition " + std::to_string(which) + ": " +
                   std::to_string(worst));
    }
}

void product_rules(cublasHandle_t handle) {
    const float one = 1, zero = 0;
    const CUdeviceptr a = uploaded<float>({1 + 0x1p-12f, 0, 0, 1}), b = uploaded<float>({1, 2, 3, 4}), c = allocated(16);
    const auto multiply = [&](CUdeviceptr to, int ld) {
        return cublasSgemm(handle, CUBLAS_OP_N, CUBLAS_OP_N, 2, 2, 2, &one, static_cast<float*>(pointer(a)), ld,
                           static_cast<float*>(pointer(b)), 2, &zero, static_cast<float*>(pointer(to)), 2);
    };
    report(multiply(c, 2) == CUBLAS_STATUS_SUCCESS &&
               downloaded<float>(c, 4) == std::vector<float>{1 + 0x1p-12f, 2, 3 + 3 * 0x1p-12f, 4},
           "with beta 0 the output is not read");
    must(CUresult(cublasSetMathMode(handle, CUBLAS_TF32_TENSOR_OP_MATH)));
    multiply(c, 2);
    report(downloaded<float>(c, 4) == std::vector<float>{1, 2, 3, 4}, "TF32 drops low bits");
    must(CUresult(cublasSetMathMode(handle, CUBLAS_DEFAULT_MATH)));
    report(multiply(c, 1) == CUBLAS_STATUS_INVALID_VALUE, "a leading dimension that is too small");
    stops("output over an input", "the output is an input too", [&] { multiply(a, 2); });
    stops("operand out of bounds", "A: 20 bytes from", [&] { multiply(c, 3); });
}

// ---- convolutions ----

struct Shape {
    int n, c, h, w, k, r, s, pad, stride, dilation, groups;
    bool turned, last;
    int out_h() const {
        return (h + 2 * pad - dilation * (r - 1) - 1) / stride + 1;
    }
    int out_w() const {
        return (w + 2 * pad - dilation * (s - 1) - 1) / stride + 1;
    }
    size_t image(bool output, int b, int channel, int y, int x) const {
        const int C = output ? k : c, H = output ? out_h() : h, W = output ? out_w() : w;
        return size_t(last ? ((b * H + y) * W + x) * C + channel : ((b * C + channel) * H + y) * W + x);
    }
    size_t filter(int out, int in, int y, int x) const {
        const int I = c / groups;
        return size_t(last ? ((out * r + y) * s + x) * I + in : ((out * I + in) * r + y) * s + x);
    }
    // f(x's index, w's, y's) for every product.
    template <class F> void each(F f) const {
        for (int b = 0; b < n; b++) {
            for (int out = 0; out < k; out++) {
                for (int y = 0; y < out_h(); y++) {
                    for (int x = 0; x < out_w(); x++) {
                        for (int in = 0; in < c / groups; in++) {
                            for (int i = 0; i < r; i++) {
                                for (int j = 0; j < s; j++) {
                                    const int from_y = y * stride - pad + (turned ? r - 1 - i : i) * dilation;
                                    const int from_x = x * stride - pad + (turned ? s - 1 - j : j) * dilation;
                                    if (from_y < 0 || from_y >= h || from_x < 0 || from_x >= w) {
                                        continue;
                                    }
                                    const int channel = out / (k / groups) * (c / groups) + in;
                                    f(image(false, b, channel, from_y, from_x), filter(out, in, i, j),
                                      image(true, b, out, y, x));
                                }
                            }
                        }
                    }
                }
            }
        }
    }
};

bool close_to(CUdeviceptr got, const std::vector<double>& expected) {
    const std::vector<float> values = downloaded<float>(got, expected.size());
    for (size_t i = 0; i < values.size(); i++) {
        if (!(std::fabs(values[i] - expected[i]) < 1e-4)) {
            return false;
        }
    }
    return true;
}

void convolution(cudnnHandle_t handle, const Shape& q, const std::string& what) {
    cudnnTensorDescriptor_t x = nullptr, y = nullptr;
    cudnnFilterDescriptor_t w = nullptr;
    cudnnConvolutionDescriptor_t c = nullptr;
    cudnnCreateTensorDescriptor(&x);
    cudnnCreateTensorDescriptor(&y);
    cudnnCreateFilterDescriptor(&w);
    cudnnCreateConvolutionDescriptor(&c);
    const auto strides = [&](cudnnTensorDescriptor_t t, int C, int H, int W) {
        return cudnnSetTensor4dDescriptorEx(t, CUDNN_DATA_FLOAT, q.n, C, H, W, C * H * W, q.last ? 1 : H * W,
                                            q.last ? W * C : W, q.last ? C : 1);
    };
    bool good = strides(x, q.c, q.h, q.w) == 0 && strides(y, q.k, q.out_h(), q.out_w()) == 0;
    good = good && cudnnSetFilter4dDescriptor(w, CUDNN_DATA_FLOAT, q.last ? CUDNN_TENSOR_NHWC : CUDNN_TENSOR_NCHW, q.k,
                                              q.c / q.groups, q.r, q.s) == 0;
    good = good && cudnnSetConvolution2dDescriptor(c, q.pad, q.pad, q.stride, q.stride, q.dilation, q.dilation,
                                                   q.turned ? CUDNN_CONVOLUTION : CUDNN_CROSS_CORRELATION,
                                                   CUDNN_DATA_FLOAT) == 0;
    cudnnSetConvolutionGroupCount(c, q.groups);
    cudnnSetConvolutionMathType(c, CUDNN_FMA_MATH);

    Random random;
    const size_t x_count = size_t(q.n * q.c * q.h * q.w), y_count = size_t(q.n * q.k * q.out_h() * q.out_w());
    const size_t w_count = size_t(q.k * (q.c / q.groups) * q.r * q.s);
    const auto xs = random.numbers(x_count), ws = random.numbers(w_count), ys = random.numbers(y_count);
    std::vector<double> forward(y_count), back(x_count), weights(w_count);
    for (size_t i = 0; i < y_count; i++) {
        forward[i] = 0.25 * ys[i];
    }
    q.each([&](size_t at_x, size_t at_w, size_t at_y) {
        forward[at_y] += 2.0 * xs[at_x] * ws[at_w];
        back[at_x] += 2.0 * ys[at_y] * ws[at_w];
        weights[at_w] += 2.0 * ys[at_y] * xs[at_x];
    });
    const CUdeviceptr on_x = uploaded(xs), on_w = uploaded(ws), on_y = uploaded(ys), to_y = uploaded(ys);
    const CUdeviceptr to_x = allocated(x_count * 4), to_w = allocated(w_count * 4), space = allocated(1 << 16);
    const float two = 2, quarter = 0.25f, zero = 0;
    good = good && cudnnConvolutionForward(handle, &two, x, pointer(on_x), w, pointer(on_w), c, 1, pointer(space),
                                           1 << 16, &quarter, y, pointer(to_y)) == 0;
    good = good && cudnnConvolutionBackwardData(handle, &two, w, pointer(on_w), y, pointer(on_y), c, 0, nullptr, 0,
                                                &zero, x, pointer(to_x)) == 0;
    good = good && cudnnConvolutionBackwardFilter(handle, &two, x, pointer(on_x), y, pointer(on_y), c, 1,
                                                  pointer(space), 1 << 16, &zero, w, pointer(to_w)) == 0;
    report(good, what + ": calls");
    report(close_to(to_y, forward), what + ": forward");
    report(close_to(to_x, back), what + ": data");
    report(close_to(to_w, weights), what + ": filter");
    const auto without = [&](void* workspace, size_t bytes) {
        return cudnnConvolutionForward(handle, &two, x, pointer(on_x), w, pointer(on_w), c, 1, workspace, bytes, &zero,
                                       y, pointer(to_y));
    };
    report(without(nullptr, 0) == CUDNN_STATUS_BAD_PARAM, what + ": no workspace");
    // The other layout of the filter: only a plain one goes with any tensor.
    cudnnSetFilter4dDescriptor(w, CUDNN_DATA_FLOAT, q.last ? CUDNN_TENSOR_NCHW : CUDNN_TENSOR_NHWC, q.k,
                               q.c / q.groups, q.r, q.s);
    report(without(pointer(space), 1 << 16) == (q.last ? CUDNN_STATUS_SUCCESS : CUDNN_STATUS_NOT_SUPPORTED),
           what + ": the other layout");
    cudnnSetFilter4dDescriptor(w, CUDNN_DATA_FLOAT, CUDNN_TENSOR_NCHW, q.k, q.c / q.groups + 1, q.r, q.s);
    report(without(pointer(space), 1 << 16) == CUDNN_STATUS_BAD_PARAM, what + ": other channels");
}

// ---- random numbers ----

void numbers() {
    curandGenerator_t generator = nullptr;
    const size_t count = 100000;
    const CUdeviceptr to = allocated(count * 4);
    bool good = curandCreateGenerator(&generator, CURAND_RNG_PSEUDO_DEFAULT) == CURAND_STATUS_SUCCESS;
    curandSetPseudoRandomGeneratorSeed(generator, 7);
    good = good && curandGenerateNormal(generator, static_cast<float*>(pointer(to)), count, 1, 2) == 0;
    const auto first = downloaded<float>(to, count);
    double mean = 0, square = 0;
    for (float x : first) {
        mean += x / double(count);
        square += double(x) * x / double(count);
    }
    report(good && std::fabs(mean - 1) < 0.03 && std::fabs(square - mean * mean - 4) < 0.1, "normal numbers");
    curandSetPseudoRandomGeneratorSeed(generator, 7);
    curandGenerateNormal(generator, static_cast<float*>(pointer(to)), count, 1, 2);
    report(downloaded<float>(to, count) == first, "a seed gives the same numbers");
    report(curandGenerateNormal(generator, static_cast<float*>(pointer(to)), 3, 1, 2) ==
               CURAND_STATUS_LENGTH_NOT_MULTIPLE,
           "an odd count");
}

} // namespace

int main() {
    start();
    cublasHandle_t blas = nullptr;
    report(cublasCreate(&blas) == CUBLAS_STATUS_SUCCESS, "cublasCreate");
    products(blas, CUDA_R_32F, Type::F32, 1e-4);
    products(blas, CUDA_R_16F, Type::F16, 0.02);
    products(blas, CUDA_R_16BF, Type::BF16, 0.15);
    product_rules(blas);
    cudnnHandle_t dnn = nullptr;
    report(cudnnCreate(&dnn) == CUDNN_STATUS_SUCCESS, "cudnnCreate");
    convolution(dnn, {2, 4, 9, 7, 6, 3, 3, 1, 1, 1, 1, false, true}, "channels last");
    convolution(dnn, {2, 4, 9, 7, 6, 3, 3, 1, 2, 1, 1, false, false}, "channels first, every other");
    convolution(dnn, {1, 4, 9, 8, 6, 3, 2, 2, 1, 2, 2, false, false}, "groups, dilated");
    convolution(dnn, {1, 4, 9, 8, 6, 3, 2, 0, 2, 1, 2, true, true}, "turned, in groups, channels last");
    convolution(dnn, {1, 2, 40, 41, 3, 1, 1, 0, 1, 1, 1, false, true}, "one by one, several chunks");
    numbers();
    return finish();
}
