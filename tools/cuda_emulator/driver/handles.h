// Handles of the driver API and what its parts ask of each other.
#pragma once

#pragma GCC visibility push(default)
#include <cuda.h>
#pragma GCC visibility pop

#include <mutex>
#include <set>

#include "device.h"

namespace driver {

constexpr unsigned MAX_THREADS = 1024;
constexpr size_t SHARED_DEFAULT = 48 * 1024;
constexpr size_t SHARED_MOST = 99 * 1024;
constexpr size_t REGISTERS = 65536;

// An object that the API hands out as a pointer and knows again.
template <class T> class Handle {
  public:
    Handle() {
        std::lock_guard<std::mutex> lock(all().mutex);
        all().live.insert(static_cast<T*>(this));
    }
    ~Handle() {
        std::lock_guard<std::mutex> lock(all().mutex);
        all().live.erase(static_cast<T*>(this));
    }
    Handle(const Handle&) = delete;
    Handle& operator=(const Handle&) = delete;

    static bool is_live(const T* handle) {
        std::lock_guard<std::mutex> lock(all().mutex);
        return all().live.count(handle) != 0;
    }

  private:
    struct All {
        std::mutex mutex;
        std::set<const T*> live;
    };
    // Never destroyed: handles are still given back while the process exits.
    static All& all() {
        static All* only = new All;
        return *only;
    }
};

#pragma GCC visibility push(default)
// CUDA_SUCCESS, or what the driver answers where no context is current.
CUresult need_context();
// The same with a stream, which must be live.
CUresult need_stream(CUstream stream);
#pragma GCC visibility pop

} // namespace driver
