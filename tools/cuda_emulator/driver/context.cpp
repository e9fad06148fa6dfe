// Driver API: start, the one device, contexts, streams and events. Every
// operation has finished when its call returns, so streams and events only
// have to be told apart.

#include "handles.h"

#include <chrono>
#include <cstdio>
#include <cstring>

using namespace driver;

struct CUctx_st : Handle<CUctx_st> {
    unsigned flags = 0;
};

struct CUstream_st : Handle<CUstream_st> {
    int priority = 0;
    unsigned flags = 0;
};

struct CUevent_st : Handle<CUevent_st> {
    explicit CUevent_st(unsigned flags) : timed(!(flags & CU_EVENT_DISABLE_TIMING)) {}
    bool timed, recorded = false;
    std::chrono::steady_clock::time_point at;
};

namespace {

bool initialised = false;
thread_local CUcontext current_context = nullptr;
CUcontext primary = nullptr;
int primary_users = 0;
std::mutex primary_mutex;

constexpr int CUDA_MAJOR = 13;
constexpr const char* NAME = "Emulated device";

bool known(CUdevice device) {
    return device == 0;
}

// The attributes of a GPU with compute capability 8.0 that programs ask for;
// shared memory as compute capability 8.6 has it, which is the least.
int attribute(CUdevice_attribute which) {
    switch (which) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: return 8;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: return 0;
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK: return MAX_THREADS;
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X: return 1024;
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Y: return 1024;
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Z: return 64;
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X: return 0x7fffffff;
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y: return 65535;
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z: return 65535;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK: return int(SHARED_DEFAULT);
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: return int(SHARED_MOST);
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: return 100 * 1024;
    case CU_DEVICE_ATTRIBUTE_RESERVED_SHARED_MEMORY_PER_BLOCK: return 1024;
    case CU_DEVICE_ATTRIBUTE_TOTAL_CONSTANT_MEMORY: return 65536;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: return 32;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: return int(REGISTERS);
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_MULTIPROCESSOR: return int(REGISTERS);
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: return 8;
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR: return 1536;
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCKS_PER_MULTIPROCESSOR: return 16;
    case CU_DEVICE_ATTRIBUTE_CLOCK_RATE: return 1000000;
    case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE: return 1000000;
    case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH: return 256;
    case CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE: return 4 << 20;
    case CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED: return 1;
    case CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING: return 1;
    case CU_DEVICE_ATTRIBUTE_COOPERATIVE_LAUNCH: return 0;
    default: return 0;
    }
}

} // namespace

namespace driver {

CUresult need_context() {
    if (!initialised) {
        return CUDA_ERROR_NOT_INITIALIZED;
    }
    return CUctx_st::is_live(current_context) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CONTEXT;
}

CUresult need_stream(CUstream stream) {
    if (CUresult refused = need_context()) {
        return refused;
    }
    // The default stream, and the names of the legacy and the per-thread one.
    if (reinterpret_cast<uintptr_t>(stream) <= 2 || CUstream_st::is_live(stream)) {
        return CUDA_SUCCESS;
    }
    fail("0x%zx is not a live stream", reinterpret_cast<size_t>(stream));
}

} // namespace driver

extern "C" {

// ---- start and errors ----

CUresult CUDAAPI cuInit(unsigned flags) {
    if (flags != 0) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    install_report();
    initialised = true;
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuDriverGetVersion(int* version) {
    *version = CUDA_MAJOR * 1000;
    return CUDA_SUCCESS;
}

struct ErrorText {
    CUresult code;
    const char *name, *text;
};

static const ErrorText ERRORS[] = {
    {CUDA_SUCCESS, "CUDA_SUCCESS", "no error"},
    {CUDA_ERROR_INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {CUDA_ERROR_OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {CUDA_ERROR_NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {CUDA_ERROR_NO_DEVICE, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {CUDA_ERROR_INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {CUDA_ERROR_INVALID_IMAGE, "CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"},
    {CUDA_ERROR_INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {CUDA_ERROR_FILE_NOT_FOUND, "CUDA_ERROR_FILE_NOT_FOUND", "file not found"},
    {CUDA_ERROR_INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {CUDA_ERROR_NOT_FOUND, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES", "too many resources requested for launch"},
    {CUDA_ERROR_NOT_READY, "CUDA_ERROR_NOT_READY", "device not ready"},
    {CUDA_ERROR_NOT_SUPPORTED, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
};

CUresult CUDAAPI cuGetErrorName(CUresult error, const char** text) {
    for (const ErrorText& known : ERRORS) {
        if (known.code == error) {
            *text = known.name;
            return CUDA_SUCCESS;
        }
    }
    *text = nullptr;
    return CUDA_ERROR_INVALID_VALUE;
}

CUresult CUDAAPI cuGetErrorString(CUresult error, const char** text) {
    for (const ErrorText& known : ERRORS) {
        if (known.code == error) {
            *text = known.text;
            return CUDA_SUCCESS;
        }
    }
    *text = nullptr;
    return CUDA_ERROR_INVALID_VALUE;
}

CUresult CUDAAPI cuProfilerStart(void) {
    return need_context();
}

CUresult CUDAAPI cuProfilerStop(void) {
    return need_context();
}

// ---- device ----

CUresult CUDAAPI cuDeviceGetCount(int* count) {
    if (!initialised) {
        return CUDA_ERROR_NOT_INITIALIZED;
    }
    *count = 1;
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuDeviceGet(CUdevice* device, int ordinal) {
    if (!initialised) {
        return CUDA_ERROR_NOT_INITIALIZED;
    }
    if (!known(ordinal)) {
        return CUDA_ERROR_INVALID_DEVICE;
    }
    *device = ordinal;
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuDeviceGetName(char* name, int length, CUdevice device) {
    if (!known(device)) {
        return CUDA_ERROR_INVALID_DEVICE;
    }
    snprintf(name, size_t(length), "%s", NAME);
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuDeviceGetUuid(CUuuid* uuid, CUdevice device) {
    if (!known(device)) {
        return CUDA_ERROR_INVALID_DEVICE;
    }
    memset(uuid->bytes, 0xe0, sizeof uuid->bytes);
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuDeviceTotalMem(size_t* bytes, CUdevice device) {
    if (!known(device)) {
        return CUDA_ERROR_INVALID_DEVICE;
    }
    *bytes = usage().limit;
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuDeviceGetAttribute(int* value, CUdevice_attribute which, CUdevice device) {
    if (!known(device)) {
        return CUDA_ERROR_INVALID_DEVICE;
    }
    *value = attribute(which);
    return CUDA_SUCCESS;
}

// ---- contexts ----

CUresult CUDAAPI cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
    if (!initialised) {
        return CUDA_ERROR_NOT_INITIALIZED;
    }
    if (!known(device)) {
        return CUDA_ERROR_INVALID_DEVICE;
    }
    std::lock_guard<std::mutex> lock(primary_mutex);
    if (!primary) {
        primary = new CUctx_st;
    }
    primary_users += 1;
    *context = primary;
    return CUDA_SUCCESS;
}

// The primary context stays as it is when nobody uses it, with its handle.
CUresult CUDAAPI cuDevicePrimaryCtxRelease(CUdevice device) {
    std::lock_guard<std::mutex> lock(primary_mutex);
    if (!known(device) || primary_users == 0) {
        return CUDA_ERROR_INVALID_CONTEXT;
    }
    primary_users -= 1;
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuDevicePrimaryCtxGetState(CUdevice device, unsigned* flags, int* active) {
    if (!known(device)) {
        return CUDA_ERROR_INVALID_DEVICE;
    }
    std::lock_guard<std::mutex> lock(primary_mutex);
    *flags = primary ? primary->flags : 0;
    *active = primary_users > 0;
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuCtxCreate(CUcontext* context, CUctxCreateParams*, unsigned flags, CUdevice device) {
    if (!known(device)) {
        return CUDA_ERROR_INVALID_DEVICE;
    }
    *context = new CUctx_st;
    (*context)->flags = flags;
    current_context = *context;
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuCtxDestroy(CUcontext context) {
    if (!CUctx_st::is_live(context) || context == primary) {
        return CUDA_ERROR_INVALID_CONTEXT;
    }
    delete context;
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuCtxSetCurrent(CUcontext context) {
    if (context && !CUctx_st::is_live(context)) {
        return CUDA_ERROR_INVALID_CONTEXT;
    }
    current_context = context;
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuCtxGetCurrent(CUcontext* context) {
    if (!initialised) {
        return CUDA_ERROR_NOT_INITIALIZED;
    }
    *context = current_context;
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuCtxGetDevice(CUdevice* device) {
    *device = 0;
    return need_context();
}

CUresult CUDAAPI cuCtxGetFlags(unsigned* flags) {
    if (CUresult refused = need_context()) {
        return refused;
    }
    *flags = current_context->flags;
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuCtxSetFlags(unsigned flags) {
    if (CUresult refused = need_context()) {
        return refused;
    }
    current_context->flags = flags;
    return CUDA_SUCCESS;
}

// The pool gives back what it holds beyond its threshold when the host waits.
CUresult CUDAAPI cuCtxSynchronize(void) {
    if (CUresult refused = need_context()) {
        return refused;
    }
    trim_pool(release_threshold());
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuCtxGetStreamPriorityRange(int* least, int* greatest) {
    *least = *greatest = 0;
    return need_context();
}

// ---- streams ----

CUresult CUDAAPI cuStreamCreate(CUstream* stream, unsigned flags) {
    return cuStreamCreateWithPriority(stream, flags, 0);
}

CUresult CUDAAPI cuStreamCreateWithPriority(CUstream* stream, unsigned flags, int priority) {
    if (CUresult refused = need_context()) {
        return refused;
    }
    *stream = new CUstream_st;
    (*stream)->flags = flags;
    (*stream)->priority = priority;
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuStreamDestroy(CUstream stream) {
    if (!CUstream_st::is_live(stream)) {
        fail("cuStreamDestroy of what is not a live stream");
    }
    delete stream;
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuStreamSynchronize(CUstream stream) {
    if (CUresult refused = need_stream(stream)) {
        return refused;
    }
    trim_pool(release_threshold());
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuStreamQuery(CUstream stream) {
    return need_stream(stream);
}

CUresult CUDAAPI cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus* status) {
    *status = CU_STREAM_CAPTURE_STATUS_NONE;
    return need_stream(stream);
}

CUresult CUDAAPI cuStreamBeginCapture(CUstream, CUstreamCaptureMode) {
    return CUDA_ERROR_NOT_SUPPORTED;
}

CUresult CUDAAPI cuStreamWaitEvent(CUstream stream, CUevent event, unsigned) {
    if (!CUevent_st::is_live(event)) {
        fail("cuStreamWaitEvent on what is not a live event");
    }
    return need_stream(stream);
}

CUresult CUDAAPI cuLaunchHostFunc(CUstream stream, CUhostFn function, void* data) {
    if (CUresult refused = need_stream(stream)) {
        return refused;
    }
    function(data);
    return CUDA_SUCCESS;
}

// ---- events ----

CUresult CUDAAPI cuEventCreate(CUevent* event, unsigned flags) {
    if (CUresult refused = need_context()) {
        return refused;
    }
    *event = new CUevent_st(flags);
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuEventDestroy(CUevent event) {
    if (!CUevent_st::is_live(event)) {
        fail("cuEventDestroy of what is not a live event");
    }
    delete event;
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuEventRecord(CUevent event, CUstream stream) {
    if (!CUevent_st::is_live(event)) {
        fail("cuEventRecord of what is not a live event");
    }
    event->recorded = true;
    event->at = std::chrono::steady_clock::now();
    return need_stream(stream);
}

CUresult CUDAAPI cuEventQuery(CUevent event) {
    return CUevent_st::is_live(event) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}

CUresult CUDAAPI cuEventSynchronize(CUevent event) {
    return CUevent_st::is_live(event) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}

CUresult CUDAAPI cuEventElapsedTime(float* milliseconds, CUevent start, CUevent end) {
    if (!CUevent_st::is_live(start) || !CUevent_st::is_live(end) || !start->timed || !end->timed ||
        !start->recorded || !end->recorded) {
        return CUDA_ERROR_INVALID_HANDLE;
    }
    *milliseconds = std::chrono::duration<float, std::milli>(end->at - start->at).count();
    return CUDA_SUCCESS;
}

} // extern "C"
