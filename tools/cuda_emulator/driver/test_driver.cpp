// Tests of the stand-in driver: what it computes, what it refuses as a driver
// would, and what it stops the program for.

#include "test.h"

#include <fstream>
#include <iterator>

using namespace test;

namespace {

// As nvcc writes it, as far as the driver reads it.
const char* PTX = R"(
.version 9.0
.target sm_80
.address_size 64

.visible .entry add_scaled_f32(
	.param .u64 .ptr .align 1 add_scaled_f32_param_0,
	.param .u64 .ptr .align 1 add_scaled_f32_param_1,
	.param .f32 add_scaled_f32_param_2,
	.param .u64 add_scaled_f32_param_3
)
.maxntid 256
{
	ret;
}
.visible .entry nowhere_f32(
	.param .u64 nowhere_f32_param_0
)
{
	ret;
}
.visible .entry add_scaled_f16(
	.param .u32 add_scaled_f16_param_0
)
{
	ret;
}
)";

CUfunction function_of(const char* name) {
    CUmodule module = nullptr;
    must(cuModuleLoadData(&module, PTX));
    CUfunction function = nullptr;
    must(cuModuleGetFunction(&function, module, name));
    return function;
}

// total[i] += scale * gradient[i]
CUresult add_scaled(CUfunction function, CUdeviceptr total, CUdeviceptr gradient, float scale, long long count,
                    unsigned grid = 1, unsigned block = 256, unsigned shared = 0) {
    void* parameters[] = {&total, &gradient, &scale, &count};
    return cuLaunchKernel(function, grid, 1, 1, block, 1, 1, shared, nullptr, parameters, nullptr);
}

void memory() {
    size_t before = 0, after = 0, total = 0;
    must(cuMemGetInfo(&before, &total));
    report(total == size_t(64) << 20, "the limit from the environment");
    CUdeviceptr address = 0;
    report(cuMemAlloc(&address, total + 1) == CUDA_ERROR_OUT_OF_MEMORY, "more than there is");
    report(cuMemAlloc(&address, 0) == CUDA_ERROR_INVALID_VALUE, "no bytes from cuMemAlloc");
    report(cuMemAllocAsync(&address, 0, nullptr) == CUDA_SUCCESS, "no bytes from cuMemAllocAsync");
    must(cuMemFreeAsync(address, nullptr));
    address = allocated(total - 1000);
    must(cuMemGetInfo(&after, &total));
    report(after == 1000, "what is left");
    CUdeviceptr more = 0;
    report(cuMemAlloc(&more, 1001) == CUDA_ERROR_OUT_OF_MEMORY, "more than is left");
    must(cuMemFree(address));
    must(cuCtxSynchronize());
    must(cuMemGetInfo(&after, &total));
    report(after == before, "all back");

    const CUdeviceptr fresh = allocated(1001);
    bool nan = true;
    for (float x : downloaded<float>(fresh, 250)) {
        nan = nan && std::isnan(x);
    }
    report(nan && fresh % 256 == 0, "fresh memory is NaN, and aligned");
    must(cuMemsetD8(fresh, 7, 1001));
    report(downloaded<unsigned char>(fresh + 1000, 1)[0] == 7, "fill");
    must(cuMemFree(fresh));
}

void pool() {
    CUmemoryPool pool = nullptr;
    must(cuDeviceGetDefaultMemPool(&pool, 0));
    const auto get = [&](CUmemPool_attribute which) {
        cuuint64_t value = 0;
        must(cuMemPoolGetAttribute(pool, which, &value));
        return value;
    };
    cuuint64_t threshold = ~cuuint64_t(0), zero = 0;
    must(cuMemPoolSetAttribute(pool, CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, &threshold));
    must(cuMemPoolSetAttribute(pool, CU_MEMPOOL_ATTR_USED_MEM_HIGH, &zero));
    const cuuint64_t used = get(CU_MEMPOOL_ATTR_USED_MEM_CURRENT);
    must(cuMemFree(allocated(5000)));
    must(cuCtxSynchronize());
    report(get(CU_MEMPOOL_ATTR_USED_MEM_CURRENT) == used && get(CU_MEMPOOL_ATTR_USED_MEM_HIGH) == used + 5000 &&
               get(CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT) >= used + 5000,
           "the pool keeps what its threshold allows");
    must(cuMemPoolTrimTo(pool, 0));
    report(get(CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT) == used, "a trimmed pool");
    must(cuMemPoolSetAttribute(pool, CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, &zero));
}

void launches() {
    CUfunction function = function_of("add_scaled_f32");
    const CUdeviceptr total = uploaded<float>({1, 2, 3}), gradient = uploaded<float>({10, 20, 30});
    must(add_scaled(function, total, gradient, 0.5f, 3));
    report(downloaded<float>(total, 3) == std::vector<float>{6, 12, 18}, "a kernel's result");
    report(add_scaled(function, total, gradient, 0, 3, 0) == CUDA_ERROR_INVALID_VALUE, "an empty grid");
    report(add_scaled(function, total, gradient, 0, 3, 1, 512) == CUDA_ERROR_INVALID_VALUE, "beyond the launch bounds");
    const unsigned shared = 60 * 1024;
    report(add_scaled(function, total, gradient, 0, 3, 1, 256, shared) == CUDA_ERROR_INVALID_VALUE, "shared memory");
    report(cuFuncSetAttribute(function, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, 100 * 1024) ==
               CUDA_ERROR_INVALID_VALUE,
           "more shared memory than a block can have");
    must(cuFuncSetAttribute(function, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, int(shared)));
    report(add_scaled(function, total, gradient, 0, 3, 1, 256, shared) == CUDA_SUCCESS, "shared memory, opted in");

    CUmodule module = nullptr;
    must(cuModuleLoadData(&module, PTX));
    report(cuModuleGetFunction(&function, module, "geglu_f32") == CUDA_ERROR_NOT_FOUND, "a name not in the module");
    report(cuModuleLoadData(&module, "not a module") == CUDA_ERROR_INVALID_IMAGE, "not a module");
    stops("other parameters", "has other parameters", [] { function_of("add_scaled_f16"); });
    stops("no such kernel", "no emulated kernel", [] {
        CUdeviceptr a = allocated(4);
        void* parameters[] = {&a};
        cuLaunchKernel(function_of("nowhere_f32"), 1, 1, 1, 1, 1, 1, 0, nullptr, parameters, nullptr);
    });
}

void misuse() {
    stops("copy out of bounds", "its allocation ends after 16", [] {
        float values[5] = {};
        cuMemcpyHtoD(allocated(16), values, 20);
    });
    stops("read after free", "not in a live allocation", [] {
        const CUdeviceptr address = allocated(16);
        must(cuMemFree(address));
        downloaded<float>(address, 1);
    });
    stops("double free", "not the start of a live allocation", [] {
        const CUdeviceptr address = allocated(16);
        must(cuMemFree(address));
        cuMemFree(address);
    });
    stops("overlapping copy", "overlap", [] {
        const CUdeviceptr address = allocated(16);
        cuMemcpyDtoD(address, address + 4, 8);
    });
    stops("device pointer for the host's", "where the host's was due", [] {
        const CUdeviceptr address = allocated(16);
        cuMemcpyHtoD(address, reinterpret_cast<void*>(address), 16);
    });
    stops("a device pointer followed", "the host followed a device pointer", [] {
        *reinterpret_cast<volatile int*>(allocated(16)) = 1;
    });
    stops("host pointer for a parameter", "not a device address", [] {
        float on_host = 0;
        add_scaled(function_of("add_scaled_f32"), CUdeviceptr(&on_host), allocated(4), 1, 1);
    });
    stops("misaligned pointer", "not aligned to 4 bytes", [] {
        add_scaled(function_of("add_scaled_f32"), allocated(16) + 2, allocated(16), 1, 1);
    });
    stops("red zone", "the red zone after the allocation", [] {
        const CUdeviceptr total = allocated(16);
        const CUdeviceptr gradient = uploaded<float>(std::vector<float>(8, 1));
        must(cuMemsetD8(total, 0, 16));
        must(add_scaled(function_of("add_scaled_f32"), total, gradient, 1, 8));
        cuMemFree(total);
    });
    stops("far out of bounds", "outside every allocation of the device", [] {
        add_scaled(function_of("add_scaled_f32"), allocated(16), allocated(16), 1, 1 << 20, 64);
    });
    stops("a parameter with a smaller type", "one has a smaller type", [] {
        struct {
            CUdeviceptr total = allocated(4), gradient = allocated(4);
            int count = 1;
            float scale = 1;
        } given;
        void* parameters[] = {&given.total, &given.gradient, &given.scale, &given.count};
        cuLaunchKernel(function_of("add_scaled_f32"), 1, 1, 1, 32, 1, 1, 0, nullptr, parameters, nullptr);
    });
    stops("a destroyed stream", "not a live stream", [] {
        CUstream stream = nullptr;
        must(cuStreamCreate(&stream, 0));
        must(cuStreamDestroy(stream));
        cuMemsetD8Async(allocated(1), 0, 1, stream);
    });
}

void written_report() {
    char path[] = "/tmp/emulator_report_XXXXXX";
    close(mkstemp(path));
    bool crashed = false;
    child(
        [&] {
            setenv("DS_EMULATOR_REPORT", path, 1);
            const CUdeviceptr a = uploaded<float>({1, 2}), b = uploaded<float>({1, 2});
            must(add_scaled(function_of("add_scaled_f32"), a, b, 1, 2));
            must(add_scaled(function_of("add_scaled_f32"), a, b, 1, 2));
        },
        crashed);
    std::ifstream file(path);
    const std::string text((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
    report(!crashed && text.find("\"launches_total\": 2,") != std::string::npos &&
               text.find("\"add_scaled_f32\": 2") != std::string::npos &&
               text.find("\"host_to_device\": {\"calls\": 2, \"bytes\": 16}") != std::string::npos,
           "the report: " + text);
    unlink(path);
}

void events() {
    CUstream stream = nullptr;
    must(cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING));
    CUevent first = nullptr, second = nullptr, untimed = nullptr;
    must(cuEventCreate(&first, 0));
    must(cuEventCreate(&second, 0));
    must(cuEventCreate(&untimed, CU_EVENT_DISABLE_TIMING));
    must(cuEventRecord(first, stream));
    must(cuEventRecord(second, stream));
    must(cuEventRecord(untimed, stream));
    must(cuStreamWaitEvent(stream, second, 0));
    float milliseconds = -1;
    must(cuEventElapsedTime(&milliseconds, first, second));
    report(milliseconds >= 0, "time between events");
    report(cuEventElapsedTime(&milliseconds, first, untimed) == CUDA_ERROR_INVALID_HANDLE, "an event without time");
    must(cuStreamDestroy(stream));
}

} // namespace

int main() {
    setenv("DS_EMULATOR_MEMORY_MIB", "64", 1);
    CUdeviceptr address = 0;
    int count = 0;
    report(cuDeviceGetCount(&count) == CUDA_ERROR_NOT_INITIALIZED, "before cuInit");
    must(cuInit(0));
    report(cuMemAlloc(&address, 4) == CUDA_ERROR_INVALID_CONTEXT, "without a context");
    start();
    written_report();
    CUdevice device = 0;
    report(cuDeviceGet(&device, 1) == CUDA_ERROR_INVALID_DEVICE, "a second device");
    memory();
    pool();
    events();
    launches();
    misuse();
    return finish();
}
