// Driver API: modules, their functions, and launches.

#include "handles.h"

#include <algorithm>
#include <cinttypes>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iterator>
#include <memory>
#include <string>
#include <vector>

#include "image.h"
#include "kernel.h"

using namespace driver;

struct CUfunc_st : Handle<CUfunc_st> {
    std::string name;
    CUmodule module = nullptr;
    // Null where the image has the entry but the libraries have no kernel of that name.
    const Kernel* kernel = nullptr;
    ImageEntry entry;
    size_t dynamic_limit = 0;

    unsigned most_threads() const {
        return entry.most_threads ? entry.most_threads : MAX_THREADS;
    }
    // Of dynamic shared memory: what static leaves of the default, or what was asked for.
    size_t shared_limit() const {
        return std::max(dynamic_limit, SHARED_DEFAULT - std::min(SHARED_DEFAULT, entry.static_shared));
    }
};

struct CUmod_st : Handle<CUmod_st> {
    ImageEntries entries;
    bool foreign = false;
    std::mutex mutex;
    std::map<std::string, std::unique_ptr<CUfunc_st>> functions;
};

namespace {

using Kernels = std::map<std::string, Kernel>;

// Our kernels and the foreign ones: both may have one of the same name.
Kernels& registry(bool foreign) {
    static auto* ours = new Kernels;
    static auto* others = new Kernels;
    return foreign ? *others : *ours;
}

const Kernel* find(bool foreign, const std::string& name) {
    const auto found = registry(foreign).find(name);
    return found == registry(foreign).end() ? nullptr : &found->second;
}

// Whether the names of a module's entries are rather those of foreign kernels.
// A fatbin with nothing readable is ours.
bool is_foreign(const ImageEntries& entries) {
    size_t ours = 0, others = 0;
    for (const auto& entry : entries) {
        ours += find(false, entry.first) != nullptr;
        others += find(true, entry.first) != nullptr;
    }
    return others > ours;
}

// The emulated kernel takes what the image's entry takes.
void compare(const Kernel& kernel, const ImageEntry& entry) {
    bool same = kernel.count == entry.parameter_bytes.size();
    for (size_t i = 0; same && i < kernel.count; i++) {
        same = kernel.parameters[i].bytes == entry.parameter_bytes[i];
    }
    if (!same) {
        fail("the module's %s has other parameters than the emulated one: were they built from the same sources?",
             kernel.name);
    }
}

CUresult refuse(const char* kernel, const std::string& why) {
    fprintf(stderr, "cuda emulator: launch of %s refused: %s\n", kernel, why.c_str());
    return CUDA_ERROR_INVALID_VALUE;
}

std::string dimensions(dim3 d) {
    return std::to_string(d.x) + " x " + std::to_string(d.y) + " x " + std::to_string(d.z);
}

// Two parameters share bytes without being one and the same variable: one of
// them was passed with a smaller type than the kernel reads.
void check_overlap(const Kernel& kernel, void** values) {
    std::vector<size_t> order(kernel.count);
    for (size_t i = 0; i < order.size(); i++) {
        order[i] = i;
    }
    std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return values[a] < values[b]; });
    for (size_t i = 1; i < order.size(); i++) {
        const size_t a = order[i - 1], b = order[i];
        const char* start = static_cast<const char*>(values[a]);
        const char* next = static_cast<const char*>(values[b]);
        const bool same = start == next && kernel.parameters[a].bytes == kernel.parameters[b].bytes;
        if (!same && next < start + kernel.parameters[a].bytes) {
            fail("parameters %zu (%zu bytes) and %zu (%zu bytes) overlap on the host: one has a smaller type", a,
                 kernel.parameters[a].bytes, b, kernel.parameters[b].bytes);
        }
    }
}

void run(const Kernel& kernel, dim3 grid, dim3 block, size_t shared_bytes, void** given) {
    if (kernel.count > 0 && !given) {
        fail("no parameters, where the kernel has %zu", kernel.count);
    }
    for (size_t i = 0; i < kernel.count; i++) {
        if (!given[i]) {
            fail("null address for parameter %zu of %zu", i, kernel.count);
        }
    }
    check_overlap(kernel, given);
    // Device pointers are replaced by where their bytes lie.
    std::vector<uint64_t> places(kernel.count);
    std::vector<void*> values(given, given + kernel.count);
    for (size_t i = 0; i < kernel.count; i++) {
        const Parameter& parameter = kernel.parameters[i];
        if (!parameter.pointer) {
            continue;
        }
        uint64_t address = 0;
        memcpy(&address, given[i], sizeof address);
        if (address % parameter.target_alignment != 0) {
            fail("pointer parameter %zu, 0x%" PRIx64 ", is not aligned to %zu bytes", i, address,
                 parameter.target_alignment);
        }
        if (address != 0) {
            const std::string what = "pointer parameter " + std::to_string(i);
            size_t remaining = 0;
            places[i] = reinterpret_cast<uint64_t>(host_from(address, remaining, what.c_str()));
        }
        values[i] = &places[i];
    }
    kernel.run(grid, block, shared_bytes, values.data());
}

CUresult launch(CUfunction function, dim3 grid, dim3 block, size_t shared_bytes, CUstream stream, void** parameters) {
    if (CUresult refused = need_stream(stream)) {
        return refused;
    }
    if (!CUfunc_st::is_live(function)) {
        fail("launch of what is not a live function");
    }
    const char* name = function->name.c_str();
    Operation operation(name);
    const size_t threads = size_t(block.x) * block.y * block.z;
    const unsigned most = function->most_threads();
    if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535) {
        return refuse(name, "a grid of " + dimensions(grid));
    }
    if (threads == 0 || threads > most || block.z > 64) {
        return refuse(name, "a block of " + dimensions(block) + " threads, of at most " + std::to_string(most));
    }
    if (shared_bytes > function->shared_limit()) {
        return refuse(name, std::to_string(shared_bytes) + " bytes of dynamic shared memory, of at most " +
                                std::to_string(function->shared_limit()));
    }
    // Registers are given to warps in units of 256.
    const size_t of_warp = (size_t(function->entry.registers) * 32 + 255) / 256 * 256;
    if ((threads + 31) / 32 * of_warp > REGISTERS) {
        refuse(name, std::to_string(threads) + " threads with " + std::to_string(function->entry.registers) +
                         " registers each");
        return CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES;
    }
    if (!function->kernel) {
        fail("no emulated kernel of this name");
    }
    count_launch(name);
    run(*function->kernel, grid, block, shared_bytes, parameters);
    return CUDA_SUCCESS;
}

CUresult load(CUmodule* module, const void* image) {
    Operation name("module load");
    if (CUresult refused = need_context()) {
        return refused;
    }
    if (!image) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    auto made = std::make_unique<CUmod_st>();
    if (!read_image(image, made->entries)) {
        return CUDA_ERROR_INVALID_IMAGE;
    }
    made->foreign = is_foreign(made->entries);
    *module = made.release();
    return CUDA_SUCCESS;
}

} // namespace

namespace driver {

void add(const Kernel& kernel) {
    if (!registry(kernel.foreign).emplace(kernel.name, kernel).second) {
        fail("two kernels are called %s", kernel.name);
    }
}

} // namespace driver

extern "C" {

// ---- modules ----

CUresult CUDAAPI cuModuleLoadData(CUmodule* module, const void* image) {
    return load(module, image);
}

CUresult CUDAAPI cuModuleLoadDataEx(CUmodule* module, const void* image, unsigned, CUjit_option*, void**) {
    return load(module, image);
}

CUresult CUDAAPI cuModuleLoadFatBinary(CUmodule* module, const void* image) {
    return load(module, image);
}

CUresult CUDAAPI cuModuleLoad(CUmodule* module, const char* path) {
    std::ifstream file(path, std::ios::binary);
    if (!file) {
        return CUDA_ERROR_FILE_NOT_FOUND;
    }
    // Ends with a null byte, as PTX must.
    const std::string image((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
    return load(module, image.c_str());
}

CUresult CUDAAPI cuModuleUnload(CUmodule module) {
    if (!CUmod_st::is_live(module)) {
        return CUDA_ERROR_INVALID_HANDLE;
    }
    delete module;
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
    Operation operation(name);
    if (CUresult refused = need_context()) {
        return refused;
    }
    if (!CUmod_st::is_live(module)) {
        return CUDA_ERROR_INVALID_HANDLE;
    }
    std::lock_guard<std::mutex> lock(module->mutex);
    std::unique_ptr<CUfunc_st>& slot = module->functions[name];
    if (!slot) {
        const Kernel* kernel = find(module->foreign, name);
        const bool readable = !module->entries.empty();
        if (!kernel && readable) {
            kernel = find(!module->foreign, name);
        }
        const auto entry = module->entries.find(name);
        if (readable ? entry == module->entries.end() : !kernel) {
            module->functions.erase(name);
            return CUDA_ERROR_NOT_FOUND;
        }
        auto made = std::make_unique<CUfunc_st>();
        made->name = name;
        made->module = module;
        made->kernel = kernel;
        if (readable) {
            made->entry = entry->second;
        } else {
            made->entry.most_threads = kernel->most_threads;
        }
        if (readable && kernel) {
            compare(*kernel, made->entry);
        }
        slot = std::move(made);
    }
    *function = slot.get();
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuModuleGetGlobal(CUdeviceptr*, size_t*, CUmodule, const char*) {
    return CUDA_ERROR_NOT_FOUND;
}

// ---- functions ----

CUresult CUDAAPI cuFuncGetAttribute(int* value, CUfunction_attribute which, CUfunction function) {
    if (!CUfunc_st::is_live(function)) {
        return CUDA_ERROR_INVALID_HANDLE;
    }
    switch (which) {
    case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
        *value = int(function->most_threads());
        return CUDA_SUCCESS;
    case CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES:
        *value = int(function->shared_limit());
        return CUDA_SUCCESS;
    case CU_FUNC_ATTRIBUTE_PTX_VERSION:
    case CU_FUNC_ATTRIBUTE_BINARY_VERSION:
        *value = 80;
        return CUDA_SUCCESS;
    // These are 0 where the module has only PTX.
    case CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES: *value = int(function->entry.static_shared); return CUDA_SUCCESS;
    case CU_FUNC_ATTRIBUTE_NUM_REGS: *value = int(function->entry.registers); return CUDA_SUCCESS;
    default: return CUDA_ERROR_INVALID_VALUE;
    }
}

CUresult CUDAAPI cuFuncSetAttribute(CUfunction function, CUfunction_attribute which, int value) {
    if (!CUfunc_st::is_live(function)) {
        return CUDA_ERROR_INVALID_HANDLE;
    }
    switch (which) {
    case CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES:
        if (value < 0 || size_t(value) + function->entry.static_shared > SHARED_MOST) {
            return refuse(function->name.c_str(), "a limit of " + std::to_string(value) + " shared bytes");
        }
        function->dynamic_limit = size_t(value);
        return CUDA_SUCCESS;
    case CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT: return CUDA_SUCCESS;
    default: return CUDA_ERROR_INVALID_VALUE;
    }
}

CUresult CUDAAPI cuFuncSetCacheConfig(CUfunction function, CUfunc_cache) {
    return CUfunc_st::is_live(function) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}

CUresult CUDAAPI cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, CUfunction, int threads, size_t shared_bytes) {
    return cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, nullptr, threads, shared_bytes, 0);
}

// By threads and shared memory alone: registers are not known.
CUresult CUDAAPI cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, CUfunction, int threads,
                                                                      size_t shared_bytes, unsigned) {
    if (threads < 1 || unsigned(threads) > MAX_THREADS) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    const int by_shared = int(100 * 1024 / (shared_bytes + 1024));
    *blocks = std::min({16, 1536 / threads, by_shared});
    return CUDA_SUCCESS;
}

// ---- launches ----

CUresult CUDAAPI cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                                unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared_bytes,
                                CUstream stream, void** parameters, void** extra) {
    if (extra) {
        return CUDA_ERROR_NOT_SUPPORTED;
    }
    return launch(function, {grid_x, grid_y, grid_z}, {block_x, block_y, block_z}, shared_bytes, stream, parameters);
}

CUresult CUDAAPI cuLaunchCooperativeKernel(CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                                           unsigned, CUstream, void**) {
    return CUDA_ERROR_NOT_SUPPORTED;
}

} // extern "C"
