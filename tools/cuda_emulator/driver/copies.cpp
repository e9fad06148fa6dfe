// Driver API: memory, its pool, copies and fills.

#include "handles.h"

#include <cstdlib>
#include <cstring>

using namespace driver;

// There is one pool, the device's own.
struct CUmemPoolHandle_st {};

namespace {

CUmemPoolHandle_st the_pool;

std::mutex host_mutex;
std::set<void*> host_blocks;

// The host's side of a copy.
void need_host(const void* address, size_t bytes) {
    if (!address && bytes > 0) {
        fail("null host pointer for %zu bytes", bytes);
    }
    if (on_device(address)) {
        fail("%p is a device address, where the host's was due", address);
    }
}

CUresult allocate_for(CUdeviceptr* address, size_t bytes) {
    uint64_t made = 0;
    if (allocate(bytes, made) == Allocated::OutOfMemory) {
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    *address = made;
    return CUDA_SUCCESS;
}

CUresult fill(CUdeviceptr to, size_t bytes, const void* unit, size_t unit_bytes, CUstream stream) {
    if (CUresult refused = need_stream(stream)) {
        return refused;
    }
    unsigned char* at = static_cast<unsigned char*>(host(to, bytes, "fill of"));
    if (unit_bytes == 1) {
        memset(at, *static_cast<const unsigned char*>(unit), bytes);
    } else {
        for (size_t done = 0; done < bytes; done += unit_bytes) {
            memcpy(at + done, unit, unit_bytes);
        }
    }
    count_copy(Copied::Memset, bytes);
    return CUDA_SUCCESS;
}

} // namespace

extern "C" {

// ---- allocation ----

CUresult CUDAAPI cuMemAlloc(CUdeviceptr* address, size_t bytes) {
    Operation name("cuMemAlloc");
    if (CUresult refused = need_context()) {
        return refused;
    }
    return bytes == 0 ? CUDA_ERROR_INVALID_VALUE : allocate_for(address, bytes);
}

CUresult CUDAAPI cuMemFree(CUdeviceptr address) {
    Operation name("cuMemFree");
    if (CUresult refused = need_context()) {
        return refused;
    }
    if (address != 0) {
        release(address);
    }
    return CUDA_SUCCESS;
}

// Unlike cuMemAlloc, this one takes no bytes for an answer.
CUresult CUDAAPI cuMemAllocAsync(CUdeviceptr* address, size_t bytes, CUstream stream) {
    Operation name("cuMemAllocAsync");
    if (CUresult refused = need_stream(stream)) {
        return refused;
    }
    return allocate_for(address, bytes);
}

CUresult CUDAAPI cuMemFreeAsync(CUdeviceptr address, CUstream stream) {
    Operation name("cuMemFreeAsync");
    if (CUresult refused = need_stream(stream)) {
        return refused;
    }
    release(address);
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuMemAllocManaged(CUdeviceptr*, size_t, unsigned) {
    return CUDA_ERROR_NOT_SUPPORTED;
}

CUresult CUDAAPI cuMemHostAlloc(void** address, size_t bytes, unsigned) {
    if (CUresult refused = need_context()) {
        return refused;
    }
    *address = malloc(bytes ? bytes : 1);
    if (!*address) {
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    std::lock_guard<std::mutex> lock(host_mutex);
    host_blocks.insert(*address);
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuMemFreeHost(void* address) {
    Operation name("cuMemFreeHost");
    std::lock_guard<std::mutex> lock(host_mutex);
    if (host_blocks.erase(address) == 0) {
        fail("%p is not from cuMemHostAlloc", address);
    }
    free(address);
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuMemGetInfo(size_t* available, size_t* total) {
    if (CUresult refused = need_context()) {
        return refused;
    }
    const Usage now = usage();
    *total = now.limit;
    *available = now.limit - now.reserved;
    return CUDA_SUCCESS;
}

// ---- the pool ----

CUresult CUDAAPI cuDeviceGetDefaultMemPool(CUmemoryPool* pool, CUdevice) {
    *pool = &the_pool;
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuDeviceGetMemPool(CUmemoryPool* pool, CUdevice) {
    *pool = &the_pool;
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuMemPoolTrimTo(CUmemoryPool pool, size_t keep) {
    if (pool != &the_pool) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    trim_pool(keep);
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuMemPoolSetAttribute(CUmemoryPool pool, CUmemPool_attribute which, void* value) {
    if (pool != &the_pool) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    switch (which) {
    case CU_MEMPOOL_ATTR_REUSE_FOLLOW_EVENT_DEPENDENCIES:
    case CU_MEMPOOL_ATTR_REUSE_ALLOW_OPPORTUNISTIC:
    case CU_MEMPOOL_ATTR_REUSE_ALLOW_INTERNAL_DEPENDENCIES:
        return CUDA_SUCCESS;
    case CU_MEMPOOL_ATTR_RELEASE_THRESHOLD:
        set_release_threshold(*static_cast<cuuint64_t*>(value));
        return CUDA_SUCCESS;
    case CU_MEMPOOL_ATTR_USED_MEM_HIGH:
    case CU_MEMPOOL_ATTR_RESERVED_MEM_HIGH:
        // These can only be reset.
        if (*static_cast<cuuint64_t*>(value) != 0) {
            return CUDA_ERROR_INVALID_VALUE;
        }
        which == CU_MEMPOOL_ATTR_USED_MEM_HIGH ? reset_peak() : reset_reserved_peak();
        return CUDA_SUCCESS;
    default:
        return CUDA_ERROR_INVALID_VALUE;
    }
}

CUresult CUDAAPI cuMemPoolGetAttribute(CUmemoryPool pool, CUmemPool_attribute which, void* value) {
    if (pool != &the_pool) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    const Usage now = usage();
    cuuint64_t& number = *static_cast<cuuint64_t*>(value);
    switch (which) {
    case CU_MEMPOOL_ATTR_REUSE_FOLLOW_EVENT_DEPENDENCIES:
    case CU_MEMPOOL_ATTR_REUSE_ALLOW_OPPORTUNISTIC:
    case CU_MEMPOOL_ATTR_REUSE_ALLOW_INTERNAL_DEPENDENCIES:
        *static_cast<int*>(value) = 1;
        return CUDA_SUCCESS;
    case CU_MEMPOOL_ATTR_RELEASE_THRESHOLD: number = release_threshold(); return CUDA_SUCCESS;
    case CU_MEMPOOL_ATTR_USED_MEM_CURRENT: number = now.current; return CUDA_SUCCESS;
    case CU_MEMPOOL_ATTR_USED_MEM_HIGH: number = now.peak; return CUDA_SUCCESS;
    case CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT: number = now.reserved; return CUDA_SUCCESS;
    case CU_MEMPOOL_ATTR_RESERVED_MEM_HIGH: number = now.reserved_peak; return CUDA_SUCCESS;
    default: return CUDA_ERROR_INVALID_VALUE;
    }
}

// ---- copies ----

CUresult CUDAAPI cuMemcpyHtoDAsync(CUdeviceptr to, const void* from, size_t bytes, CUstream stream) {
    Operation name("copy from host to device");
    if (CUresult refused = need_stream(stream)) {
        return refused;
    }
    need_host(from, bytes);
    if (bytes > 0) {
        memcpy(host(to, bytes, "copy to"), from, bytes);
    }
    count_copy(Copied::HostToDevice, bytes);
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuMemcpyDtoHAsync(void* to, CUdeviceptr from, size_t bytes, CUstream stream) {
    Operation name("copy from device to host");
    if (CUresult refused = need_stream(stream)) {
        return refused;
    }
    need_host(to, bytes);
    if (bytes > 0) {
        memcpy(to, host(from, bytes, "copy from"), bytes);
    }
    count_copy(Copied::DeviceToHost, bytes);
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuMemcpyDtoDAsync(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream) {
    Operation name("copy from device to device");
    if (CUresult refused = need_stream(stream)) {
        return refused;
    }
    if (bytes > 0) {
        void* target = host(to, bytes, "copy to");
        const void* source = host(from, bytes, "copy from");
        if (to != from && to < from + bytes && from < to + bytes) {
            fail("source and target overlap");
        }
        memcpy(target, source, bytes);
    }
    count_copy(Copied::DeviceToDevice, bytes);
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuMemcpyHtoD(CUdeviceptr to, const void* from, size_t bytes) {
    return cuMemcpyHtoDAsync(to, from, bytes, nullptr);
}

CUresult CUDAAPI cuMemcpyDtoH(void* to, CUdeviceptr from, size_t bytes) {
    return cuMemcpyDtoHAsync(to, from, bytes, nullptr);
}

CUresult CUDAAPI cuMemcpyDtoD(CUdeviceptr to, CUdeviceptr from, size_t bytes) {
    return cuMemcpyDtoDAsync(to, from, bytes, nullptr);
}

// All contexts are the one device's.
CUresult CUDAAPI cuMemcpyPeerAsync(CUdeviceptr to, CUcontext, CUdeviceptr from, CUcontext, size_t bytes,
                                   CUstream stream) {
    return cuMemcpyDtoDAsync(to, from, bytes, stream);
}

// ---- fills ----

CUresult CUDAAPI cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t count, CUstream stream) {
    Operation name("fill with a byte");
    return fill(to, count, &value, 1, stream);
}

CUresult CUDAAPI cuMemsetD16Async(CUdeviceptr to, unsigned short value, size_t count, CUstream stream) {
    Operation name("fill with two bytes");
    return fill(to, count * 2, &value, 2, stream);
}

CUresult CUDAAPI cuMemsetD32Async(CUdeviceptr to, unsigned value, size_t count, CUstream stream) {
    Operation name("fill with four bytes");
    return fill(to, count * 4, &value, 4, stream);
}

CUresult CUDAAPI cuMemsetD8(CUdeviceptr to, unsigned char value, size_t count) {
    return cuMemsetD8Async(to, value, count, nullptr);
}

} // extern "C"
