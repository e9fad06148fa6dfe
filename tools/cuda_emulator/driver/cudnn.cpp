// Stand-in for libcudnn: two-dimensional convolutions through the descriptors
// of its version 7 interface.

#include "cudnn_api.h"
#include "handles.h"

#include <algorithm>
#include <initializer_list>

#include "convolutions.h"

using namespace driver;

struct cudnnContext : Handle<cudnnContext> {
    cudaStream_t stream = nullptr;
};

struct cudnnTensorStruct : Handle<cudnnTensorStruct> {
    bool set = false;
    cudnnDataType_t type = CUDNN_DATA_FLOAT;
    Images images = {};
};

struct cudnnFilterStruct : Handle<cudnnFilterStruct> {
    bool set = false;
    cudnnDataType_t type = CUDNN_DATA_FLOAT;
    Filter filter = {};
};

struct cudnnConvolutionStruct : Handle<cudnnConvolutionStruct> {
    bool set = false;
    Window window = {};
    cudnnDataType_t compute = CUDNN_DATA_FLOAT;
    cudnnMathType_t math = CUDNN_DEFAULT_MATH;
    int groups = 1;
};

namespace {

constexpr size_t VERSION = 92100, RUNTIME_VERSION = 13000;

bool type_of(cudnnDataType_t from, Type& to) {
    switch (from) {
    case CUDNN_DATA_FLOAT: to = Type::F32; return true;
    case CUDNN_DATA_DOUBLE: to = Type::F64; return true;
    case CUDNN_DATA_HALF: to = Type::F16; return true;
    case CUDNN_DATA_BFLOAT16: to = Type::BF16; return true;
    default: return false;
    }
}

bool positive(std::initializer_list<int> numbers) {
    return std::all_of(numbers.begin(), numbers.end(), [](int n) { return n > 0; });
}

// Batch, height, width and channels without gaps, in this order.
bool packed_channels_last(const Images& t) {
    return t.stride[1] == 1 && t.stride[3] == t.size[1] && t.stride[2] == t.size[3] * t.stride[3] &&
           t.stride[0] == t.size[2] * t.stride[2];
}

// The size of the output along one side, 0 or less where the window does not fit.
int64_t output_size(int64_t size, int64_t taps, const Window& w, int side) {
    return (size + 2 * w.pad[side] - w.dilation[side] * (taps - 1) - 1) / w.stride[side] + 1;
}

enum Direction { FORWARD, BACK, WEIGHTS };

// The algorithms that are here, best first; others are not supported.
struct Algorithms {
    int count, best, second;
};
constexpr Algorithms ALGORITHMS[3] = {{8, 1, 0}, {6, 1, 0}, {7, 1, 0}};

struct Convolution {
    Images x, y;
    Filter w;
    Window window;

    double flop() const {
        return 2.0 * double(y.size[0] * y.size[2] * y.size[3]) * double(w.elements());
    }
    // Algorithm 0 needs none; the other as much as an index for each output pixel.
    size_t workspace(int algorithm) const {
        return algorithm == 0 ? 0 : size_t(y.size[2] * y.size[3]) * 8 + 256;
    }
};

// Whether the descriptors agree with each other, as cuDNN checks it.
cudnnStatus_t agree(cudnnHandle_t handle, cudnnTensorDescriptor_t x, cudnnFilterDescriptor_t w,
                    cudnnConvolutionDescriptor_t c, cudnnTensorDescriptor_t y, Convolution& made) {
    if (!cudnnContext::is_live(handle)) {
        return CUDNN_STATUS_NOT_INITIALIZED;
    }
    if (!cudnnTensorStruct::is_live(x) || !cudnnFilterStruct::is_live(w) || !cudnnConvolutionStruct::is_live(c) ||
        !cudnnTensorStruct::is_live(y) || !x->set || !w->set || !c->set || !y->set) {
        return CUDNN_STATUS_BAD_PARAM;
    }
    made = {x->images, y->images, w->filter, c->window};
    made.window.groups = c->groups;
    const int64_t(&from)[4] = made.x.size;
    const int64_t(&to)[4] = made.y.size;
    if (from[1] != made.w.in * c->groups || to[1] != made.w.out || made.w.out % c->groups != 0 || from[0] != to[0] ||
        to[2] != output_size(from[2], made.w.height, c->window, 0) ||
        to[3] != output_size(from[3], made.w.width, c->window, 1)) {
        return CUDNN_STATUS_BAD_PARAM;
    }
    if (x->type != w->type || x->type != y->type) {
        return CUDNN_STATUS_BAD_PARAM;
    }
    // What may be summed in what: a type in itself, and 16 bits in f32; but bfloat16 only so.
    const bool sixteen = x->type == CUDNN_DATA_HALF || x->type == CUDNN_DATA_BFLOAT16;
    if (!(sixteen && c->compute == CUDNN_DATA_FLOAT) && (c->compute != x->type || x->type == CUDNN_DATA_BFLOAT16)) {
        return CUDNN_STATUS_NOT_SUPPORTED;
    }
    if (made.w.channels_last && (!packed_channels_last(made.x) || !packed_channels_last(made.y) ||
                                 x->type == CUDNN_DATA_DOUBLE || c->compute == CUDNN_DATA_HALF)) {
        return CUDNN_STATUS_NOT_SUPPORTED;
    }
    // Unless told to use FMA only, cuDNN multiplies f32 in TF32.
    made.window.reduced = x->type != CUDNN_DATA_FLOAT || c->math == CUDNN_FMA_MATH ? Reduced::No
                          : c->math == CUDNN_TENSOR_OP_MATH_ALLOW_CONVERSION       ? Reduced::F16
                                                                                   : Reduced::Tf32;
    return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t list_algorithms(Direction direction, const Convolution& convolution, int requested, int* returned,
                              AlgorithmRecord* records) {
    if (requested < 1) {
        return CUDNN_STATUS_BAD_PARAM;
    }
    const Algorithms& have = ALGORITHMS[direction];
    std::initializer_list<int> supported = {have.best, have.second};
    *returned = 0;
    const auto put = [&](int algorithm, cudnnStatus_t status) {
        if (*returned < requested) {
            const bool good = status == CUDNN_STATUS_SUCCESS;
            records[(*returned)++] = {algorithm,
                                      status,
                                      good ? float(*returned) : -1,
                                      good ? convolution.workspace(algorithm) : 0,
                                      CUDNN_DETERMINISTIC,
                                      CUDNN_DEFAULT_MATH,
                                      {}};
        }
    };
    for (int algorithm : supported) {
        put(algorithm, CUDNN_STATUS_SUCCESS);
    }
    for (int algorithm = 0; algorithm < have.count; algorithm++) {
        if (std::find(supported.begin(), supported.end(), algorithm) == supported.end()) {
            put(algorithm, CUDNN_STATUS_NOT_SUPPORTED);
        }
    }
    return CUDNN_STATUS_SUCCESS;
}

bool offered(Direction direction, int algorithm) {
    return algorithm == ALGORITHMS[direction].best || algorithm == ALGORITHMS[direction].second;
}

cudnnStatus_t workspace_bytes(Direction direction, const Convolution& convolution, int algorithm, size_t* bytes) {
    if (!offered(direction, algorithm)) {
        return CUDNN_STATUS_NOT_SUPPORTED;
    }
    *bytes = convolution.workspace(algorithm);
    return CUDNN_STATUS_SUCCESS;
}

// An operand of a launch.
struct Data {
    const void* at;
    int64_t elements;
    const char* what;
};

struct Scaling {
    const void *alpha, *beta;
};

// What a launch of any direction has in common: finds the operands, spoils the
// workspace as the library would, counts, and calls `run(a, b, out, alpha, beta)`.
template <class F>
cudnnStatus_t execute(cudnnHandle_t handle, Direction direction, const Convolution& convolution, int algorithm,
                      void* workspace, size_t workspace_bytes, Scaling scaling, Data a, Data b, Data out, F run) {
    if (need_stream(reinterpret_cast<CUstream>(handle->stream))) {
        return CUDNN_STATUS_EXECUTION_FAILED;
    }
    if (!offered(direction, algorithm)) {
        return CUDNN_STATUS_NOT_SUPPORTED;
    }
    const size_t needed = convolution.workspace(algorithm);
    if (workspace_bytes < needed || !a.at || !b.at || !out.at || !scaling.alpha || !scaling.beta) {
        return CUDNN_STATUS_BAD_PARAM;
    }
    if (needed > 0) {
        memset(host(workspace, workspace_bytes, "the workspace"), 0xff, needed);
    }
    if (out.at == a.at || out.at == b.at) {
        fail("the output is an input too");
    }
    const Type type = convolution.w.type;
    const auto place = [&](const Data& data) {
        return host(data.at, size_t(data.elements) * bytes_of(type), data.what);
    };
    const Type scale = type == Type::F64 ? Type::F64 : Type::F32;
    run(place(a), place(b), place(out), load(scaling.alpha, scale, 0), load(scaling.beta, scale, 0));
    count_convolution(convolution.flop());
    return CUDNN_STATUS_SUCCESS;
}

template <class T> cudnnStatus_t create(T** made) {
    *made = new T;
    return CUDNN_STATUS_SUCCESS;
}

template <class T> cudnnStatus_t destroy(T* handle) {
    if (!T::is_live(handle)) {
        return CUDNN_STATUS_BAD_PARAM;
    }
    delete handle;
    return CUDNN_STATUS_SUCCESS;
}

} // namespace

#pragma GCC visibility push(default)
extern "C" {

// ---- the library and its handle ----

size_t cudnnGetVersion() {
    return VERSION;
}

size_t cudnnGetCudartVersion() {
    return RUNTIME_VERSION;
}

cudnnStatus_t cudnnAdvVersionCheck() {
    return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t cudnnCnnVersionCheck() {
    return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t cudnnOpsVersionCheck() {
    return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t cudnnCreate(cudnnHandle_t* handle) {
    return need_context() ? CUDNN_STATUS_NOT_INITIALIZED : create(handle);
}

cudnnStatus_t cudnnDestroy(cudnnHandle_t handle) {
    return destroy(handle);
}

cudnnStatus_t cudnnSetStream(cudnnHandle_t handle, cudaStream_t stream) {
    if (!cudnnContext::is_live(handle)) {
        return CUDNN_STATUS_BAD_PARAM;
    }
    handle->stream = stream;
    return CUDNN_STATUS_SUCCESS;
}

// ---- descriptors ----

cudnnStatus_t cudnnCreateTensorDescriptor(cudnnTensorDescriptor_t* made) {
    return create(made);
}

cudnnStatus_t cudnnDestroyTensorDescriptor(cudnnTensorDescriptor_t tensor) {
    return destroy(tensor);
}

cudnnStatus_t cudnnSetTensor4dDescriptorEx(cudnnTensorDescriptor_t tensor, cudnnDataType_t type, int n, int c, int h,
                                           int w, int n_stride, int c_stride, int h_stride, int w_stride) {
    Images images{Type::F32, {n, c, h, w}, {n_stride, c_stride, h_stride, w_stride}};
    if (!cudnnTensorStruct::is_live(tensor) || !positive({n, c, h, w, n_stride, c_stride, h_stride, w_stride})) {
        return CUDNN_STATUS_BAD_PARAM;
    }
    if (!type_of(type, images.type)) {
        return CUDNN_STATUS_NOT_SUPPORTED;
    }
    tensor->set = true;
    tensor->type = type;
    tensor->images = images;
    return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t cudnnSetTensor4dDescriptor(cudnnTensorDescriptor_t tensor, cudnnTensorFormat_t format,
                                         cudnnDataType_t type, int n, int c, int h, int w) {
    switch (format) {
    case CUDNN_TENSOR_NCHW: return cudnnSetTensor4dDescriptorEx(tensor, type, n, c, h, w, c * h * w, h * w, w, 1);
    case CUDNN_TENSOR_NHWC: return cudnnSetTensor4dDescriptorEx(tensor, type, n, c, h, w, h * w * c, 1, w * c, c);
    default: return CUDNN_STATUS_NOT_SUPPORTED;
    }
}

cudnnStatus_t cudnnSetTensorNdDescriptor(cudnnTensorDescriptor_t tensor, cudnnDataType_t type, int dimensions,
                                         const int* d, const int* s) {
    return dimensions != 4 ? CUDNN_STATUS_NOT_SUPPORTED
                           : cudnnSetTensor4dDescriptorEx(tensor, type, d[0], d[1], d[2], d[3], s[0], s[1], s[2], s[3]);
}

cudnnStatus_t cudnnCreateFilterDescriptor(cudnnFilterDescriptor_t* made) {
    return create(made);
}

cudnnStatus_t cudnnDestroyFilterDescriptor(cudnnFilterDescriptor_t filter) {
    return destroy(filter);
}

cudnnStatus_t cudnnSetFilter4dDescriptor(cudnnFilterDescriptor_t filter, cudnnDataType_t type,
                                         cudnnTensorFormat_t format, int k, int c, int h, int w) {
    Filter made{Type::F32, format == CUDNN_TENSOR_NHWC, k, c, h, w};
    if (!cudnnFilterStruct::is_live(filter) || !positive({k, c, h, w})) {
        return CUDNN_STATUS_BAD_PARAM;
    }
    if (!type_of(type, made.type) || (format != CUDNN_TENSOR_NCHW && format != CUDNN_TENSOR_NHWC)) {
        return CUDNN_STATUS_NOT_SUPPORTED;
    }
    filter->set = true;
    filter->type = type;
    filter->filter = made;
    return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t cudnnSetFilterNdDescriptor(cudnnFilterDescriptor_t filter, cudnnDataType_t type,
                                         cudnnTensorFormat_t format, int dimensions, const int* d) {
    return dimensions != 4 ? CUDNN_STATUS_NOT_SUPPORTED
                           : cudnnSetFilter4dDescriptor(filter, type, format, d[0], d[1], d[2], d[3]);
}

cudnnStatus_t cudnnCreateConvolutionDescriptor(cudnnConvolutionDescriptor_t* made) {
    return create(made);
}

cudnnStatus_t cudnnDestroyConvolutionDescriptor(cudnnConvolutionDescriptor_t convolution) {
    return destroy(convolution);
}

cudnnStatus_t cudnnSetConvolution2dDescriptor(cudnnConvolutionDescriptor_t convolution, int pad_h, int pad_w,
                                              int stride_h, int stride_w, int dilation_h, int dilation_w,
                                              cudnnConvolutionMode_t mode, cudnnDataType_t compute) {
    if (!cudnnConvolutionStruct::is_live(convolution) || pad_h < 0 || pad_w < 0 ||
        !positive({stride_h, stride_w, dilation_h, dilation_w})) {
        return CUDNN_STATUS_BAD_PARAM;
    }
    convolution->set = true;
    convolution->window = {{pad_h, pad_w}, {stride_h, stride_w},      {dilation_h, dilation_w},
                           1,              mode == CUDNN_CONVOLUTION, Reduced::No};
    convolution->compute = compute;
    return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t cudnnSetConvolutionNdDescriptor(cudnnConvolutionDescriptor_t convolution, int dimensions,
                                              const int* pad, const int* stride, const int* dilation,
                                              cudnnConvolutionMode_t mode, cudnnDataType_t compute) {
    return dimensions != 2 ? CUDNN_STATUS_NOT_SUPPORTED
                           : cudnnSetConvolution2dDescriptor(convolution, pad[0], pad[1], stride[0], stride[1],
                                                             dilation[0], dilation[1], mode, compute);
}

cudnnStatus_t cudnnSetConvolutionMathType(cudnnConvolutionDescriptor_t convolution, cudnnMathType_t math) {
    if (!cudnnConvolutionStruct::is_live(convolution)) {
        return CUDNN_STATUS_BAD_PARAM;
    }
    convolution->math = math;
    return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t cudnnSetConvolutionGroupCount(cudnnConvolutionDescriptor_t convolution, int groups) {
    if (!cudnnConvolutionStruct::is_live(convolution) || groups < 1) {
        return CUDNN_STATUS_BAD_PARAM;
    }
    convolution->groups = groups;
    return CUDNN_STATUS_SUCCESS;
}

// ---- forward ----

cudnnStatus_t cudnnGetConvolutionForwardAlgorithm_v7(cudnnHandle_t handle, cudnnTensorDescriptor_t x,
                                                     cudnnFilterDescriptor_t w, cudnnConvolutionDescriptor_t c,
                                                     cudnnTensorDescriptor_t y, int requested, int* returned,
                                                     AlgorithmRecord* records) {
    Convolution made;
    const cudnnStatus_t status = agree(handle, x, w, c, y, made);
    return status ? status : list_algorithms(FORWARD, made, requested, returned, records);
}

cudnnStatus_t cudnnGetConvolutionForwardWorkspaceSize(cudnnHandle_t handle, cudnnTensorDescriptor_t x,
                                                      cudnnFilterDescriptor_t w, cudnnConvolutionDescriptor_t c,
                                                      cudnnTensorDescriptor_t y, int algorithm, size_t* bytes) {
    Convolution made;
    const cudnnStatus_t status = agree(handle, x, w, c, y, made);
    return status ? status : workspace_bytes(FORWARD, made, algorithm, bytes);
}

cudnnStatus_t cudnnConvolutionForward(cudnnHandle_t handle, const void* alpha, cudnnTensorDescriptor_t x,
                                      const void* x_data, cudnnFilterDescriptor_t w, const void* w_data,
                                      cudnnConvolutionDescriptor_t c, int algorithm, void* workspace, size_t bytes,
                                      const void* beta, cudnnTensorDescriptor_t y, void* y_data) {
    Operation operation("cudnnConvolutionForward");
    Convolution made;
    if (const cudnnStatus_t status = agree(handle, x, w, c, y, made)) {
        return status;
    }
    return execute(handle, FORWARD, made, algorithm, workspace, bytes, {alpha, beta}, {x_data, made.x.extent(), "x"},
                   {w_data, made.w.elements(), "w"}, {y_data, made.y.extent(), "y"},
                   [&](const void* from, const void* by, void* to, double a, double b) {
                       convolve(made.x, from, made.w, by, made.window, made.y, to, a, b);
                   });
}

// ---- backward, for the input ----

cudnnStatus_t cudnnGetConvolutionBackwardDataAlgorithm_v7(cudnnHandle_t handle, cudnnFilterDescriptor_t w,
                                                          cudnnTensorDescriptor_t dy, cudnnConvolutionDescriptor_t c,
                                                          cudnnTensorDescriptor_t dx, int requested, int* returned,
                                                          AlgorithmRecord* records) {
    Convolution made;
    const cudnnStatus_t status = agree(handle, dx, w, c, dy, made);
    return status ? status : list_algorithms(BACK, made, requested, returned, records);
}

cudnnStatus_t cudnnGetConvolutionBackwardDataWorkspaceSize(cudnnHandle_t handle, cudnnFilterDescriptor_t w,
                                                           cudnnTensorDescriptor_t dy, cudnnConvolutionDescriptor_t c,
                                                           cudnnTensorDescriptor_t dx, int algorithm, size_t* bytes) {
    Convolution made;
    const cudnnStatus_t status = agree(handle, dx, w, c, dy, made);
    return status ? status : workspace_bytes(BACK, made, algorithm, bytes);
}

cudnnStatus_t cudnnConvolutionBackwardData(cudnnHandle_t handle, const void* alpha, cudnnFilterDescriptor_t w,
                                           const void* w_data, cudnnTensorDescriptor_t dy, const void* dy_data,
                                           cudnnConvolutionDescriptor_t c, int algorithm, void* workspace,
                                           size_t bytes, const void* beta, cudnnTensorDescriptor_t dx, void* dx_data) {
    Operation operation("cudnnConvolutionBackwardData");
    Convolution made;
    if (const cudnnStatus_t status = agree(handle, dx, w, c, dy, made)) {
        return status;
    }
    return execute(handle, BACK, made, algorithm, workspace, bytes, {alpha, beta}, {w_data, made.w.elements(), "w"},
                   {dy_data, made.y.extent(), "dy"}, {dx_data, made.x.extent(), "dx"},
                   [&](const void* by, const void* from, void* to, double a, double b) {
                       convolve_back(made.w, by, made.y, from, made.window, made.x, to, a, b);
                   });
}

// ---- backward, for the filter ----

cudnnStatus_t cudnnGetConvolutionBackwardFilterAlgorithm_v7(cudnnHandle_t handle, cudnnTensorDescriptor_t x,
                                                            cudnnTensorDescriptor_t dy, cudnnConvolutionDescriptor_t c,
                                                            cudnnFilterDescriptor_t dw, int requested, int* returned,
                                                            AlgorithmRecord* records) {
    Convolution made;
    const cudnnStatus_t status = agree(handle, x, dw, c, dy, made);
    return status ? status : list_algorithms(WEIGHTS, made, requested, returned, records);
}

cudnnStatus_t cudnnGetConvolutionBackwardFilterWorkspaceSize(cudnnHandle_t handle, cudnnTensorDescriptor_t x,
                                                             cudnnTensorDescriptor_t dy,
                                                             cudnnConvolutionDescriptor_t c,
                                                             cudnnFilterDescriptor_t dw, int algorithm,
                                                             size_t* bytes) {
    Convolution made;
    const cudnnStatus_t status = agree(handle, x, dw, c, dy, made);
    return status ? status : workspace_bytes(WEIGHTS, made, algorithm, bytes);
}

cudnnStatus_t cudnnConvolutionBackwardFilter(cudnnHandle_t handle, const void* alpha, cudnnTensorDescriptor_t x,
                                             const void* x_data, cudnnTensorDescriptor_t dy, const void* dy_data,
                                             cudnnConvolutionDescriptor_t c, int algorithm, void* workspace,
                                             size_t bytes, const void* beta, cudnnFilterDescriptor_t dw,
                                             void* dw_data) {
    Operation operation("cudnnConvolutionBackwardFilter");
    Convolution made;
    if (const cudnnStatus_t status = agree(handle, x, dw, c, dy, made)) {
        return status;
    }
    return execute(handle, WEIGHTS, made, algorithm, workspace, bytes, {alpha, beta}, {x_data, made.x.extent(), "x"},
                   {dy_data, made.y.extent(), "dy"}, {dw_data, made.w.elements(), "dw"},
                   [&](const void* from, const void* back, void* to, double a, double b) {
                       convolve_weights(made.x, from, made.y, back, made.window, made.w, to, a, b);
                   });
}

} // extern "C"
#pragma GCC visibility pop
