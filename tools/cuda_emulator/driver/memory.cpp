// The device's memory.
//
// Two address ranges of equal size are reserved. Device addresses come from
// one that is never mapped, so that the host cannot follow a device pointer;
// the bytes live at the same offset of the other. No address is handed out
// twice. Each allocation ends (up to its 256-byte granule) at an unmapped
// page. Fresh memory has all bits set, which is NaN in every float type. The
// slack around it is filled with a NaN which arithmetic in f32 and bf16 does
// not give back unchanged, and which must be there still when it is freed.

#include "device.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

namespace driver {
namespace {

constexpr size_t RANGE = size_t(16) << 40;
constexpr size_t PAGE = 4096;
constexpr size_t GRANULE = 256;
constexpr unsigned char FRESH = 0xff;
// By the address' parity: 0xffbf.
constexpr unsigned char ZONE[2] = {0xbf, 0xff};
constexpr size_t DEFAULT_LIMIT_MIB = 8192;

struct Allocation {
    size_t bytes;
    uint64_t mapped;
    size_t mapped_bytes;
};

size_t round_up(size_t value, size_t unit) {
    return (value + unit - 1) / unit * unit;
}

size_t limit_from_environment() {
    const char* text = getenv("DS_EMULATOR_MEMORY_MIB");
    if (!text) {
        return DEFAULT_LIMIT_MIB << 20;
    }
    char* end = nullptr;
    unsigned long long mib = strtoull(text, &end, 10);
    if (*text == 0 || *end != 0 || mib == 0 || mib > (RANGE >> 21)) {
        fail("DS_EMULATOR_MEMORY_MIB=%s is not a number of MiB", text);
    }
    return size_t(mib) << 20;
}

class Memory {
  public:
    Memory() : limit(limit_from_environment()) {
        device = reserve();
        store = reserve();
        next = device + PAGE;
    }

    Allocated allocate(size_t bytes, uint64_t& address) {
        size_t granules = std::max(round_up(bytes, GRANULE), GRANULE);
        if (bytes > limit || used + bytes > limit) {
            return Allocated::OutOfMemory;
        }
        Allocation made{bytes, next, round_up(granules, PAGE)};
        if (made.mapped + made.mapped_bytes + PAGE > device + RANGE) {
            fail("the emulated address range of %zu bytes is used up", RANGE);
        }
        unsigned char* bottom = stored(made.mapped);
        if (mprotect(bottom, made.mapped_bytes, PROT_READ | PROT_WRITE) != 0) {
            fail("mprotect of %zu bytes: %s", made.mapped_bytes, strerror(errno));
        }
        next = made.mapped + made.mapped_bytes + PAGE;
        address = made.mapped + made.mapped_bytes - granules;
        unsigned char* start = stored(address);
        fill_zone(bottom, start);
        memset(start, FRESH, bytes);
        fill_zone(start + bytes, bottom + made.mapped_bytes);
        live.emplace(address, made);
        used += bytes;
        peak = std::max(peak, used);
        reserved = std::max(reserved, used);
        reserved_peak = std::max(reserved_peak, reserved);
        count += 1;
        return Allocated::Done;
    }

    void release(uint64_t address) {
        auto found = live.find(address);
        if (found == live.end()) {
            fail("free of 0x%llx, which is not the start of a live allocation", (unsigned long long)address);
        }
        const Allocation made = found->second;
        unsigned char* bottom = stored(made.mapped);
        unsigned char* start = stored(address);
        check_zone(bottom, start, "before", address, made.bytes);
        check_zone(start + made.bytes, bottom + made.mapped_bytes, "after", address, made.bytes);
        void* again = mmap(bottom, made.mapped_bytes, PROT_NONE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
        if (again == MAP_FAILED) {
            fail("unmapping %zu bytes: %s", made.mapped_bytes, strerror(errno));
        }
        used -= made.bytes;
        live.erase(found);
    }

    // The live allocation whose bytes, or whose end, the address is at.
    const Allocation* around(uint64_t address, uint64_t& start) const {
        auto after = live.upper_bound(address);
        if (after == live.begin()) {
            return nullptr;
        }
        auto found = std::prev(after);
        start = found->first;
        return address <= found->first + found->second.bytes ? &found->second : nullptr;
    }

    unsigned char* stored(uint64_t address) const {
        return reinterpret_cast<unsigned char*>(address - device + store);
    }

    bool in_range(uint64_t address) const {
        return address >= device && address < device + RANGE;
    }

    bool in_store(uint64_t address) const {
        return address >= store && address < store + RANGE;
    }

    void trim(size_t keep) {
        reserved = std::max(used, std::min(reserved, keep));
    }

    std::mutex mutex;
    size_t limit;
    size_t used = 0, peak = 0, count = 0, reserved = 0, reserved_peak = 0;
    uint64_t threshold = 0;

  private:
    static uint64_t reserve() {
        void* at = mmap(nullptr, RANGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (at == MAP_FAILED) {
            fail("reserving the emulated address range: %s", strerror(errno));
        }
        return reinterpret_cast<uint64_t>(at);
    }

    static void fill_zone(unsigned char* from, unsigned char* to) {
        for (; from < to; from++) {
            *from = ZONE[reinterpret_cast<uintptr_t>(from) % 2];
        }
    }

    static void check_zone(const unsigned char* from, const unsigned char* to, const char* side,
                           uint64_t address, size_t bytes) {
        for (const unsigned char* at = from; at < to; at++) {
            if (*at != ZONE[reinterpret_cast<uintptr_t>(at) % 2]) {
                fail("the red zone %s the allocation 0x%llx of %zu bytes was written to (byte %td of the zone)", side,
                     (unsigned long long)address, bytes, at - from);
            }
        }
    }

    uint64_t device, store, next;
    std::map<uint64_t, Allocation> live;
};

// Never destroyed: other libraries free memory while the process exits.
Memory& memory() {
    static Memory* only = new Memory;
    return *only;
}

} // namespace

Allocated allocate(size_t bytes, uint64_t& address) {
    std::lock_guard<std::mutex> lock(memory().mutex);
    return memory().allocate(bytes, address);
}

void release(uint64_t address) {
    std::lock_guard<std::mutex> lock(memory().mutex);
    memory().release(address);
}

void* host_from(uint64_t address, size_t& remaining, const char* what) {
    std::lock_guard<std::mutex> lock(memory().mutex);
    uint64_t start = 0;
    const Allocation* made = memory().around(address, start);
    if (!made) {
        fail("%s 0x%llx is not in a live allocation%s", what, (unsigned long long)address,
             memory().in_range(address) ? " (already freed, or out of bounds)" : " (not a device address)");
    }
    remaining = start + made->bytes - address;
    return memory().stored(address);
}

void* host(uint64_t address, size_t bytes, const char* what) {
    size_t remaining = 0;
    void* at = host_from(address, remaining, what);
    if (bytes > remaining) {
        fail("%s: %zu bytes from 0x%llx, but its allocation ends after %zu", what, bytes,
             (unsigned long long)address, remaining);
    }
    return at;
}

bool on_device(const void* address) {
    return memory().in_range(reinterpret_cast<uint64_t>(address));
}

bool in_store(const void* address) {
    return memory().in_store(reinterpret_cast<uint64_t>(address));
}

bool allocation_of(uint64_t address, uint64_t& start, size_t& bytes) {
    std::lock_guard<std::mutex> lock(memory().mutex);
    const Allocation* made = memory().around(address, start);
    if (!made) {
        return false;
    }
    bytes = made->bytes;
    return true;
}

Usage usage() {
    Memory& m = memory();
    std::lock_guard<std::mutex> lock(m.mutex);
    return {m.used, m.peak, m.count, m.reserved, m.reserved_peak, m.limit};
}

void reset_peak() {
    std::lock_guard<std::mutex> lock(memory().mutex);
    memory().peak = memory().used;
}

void reset_reserved_peak() {
    std::lock_guard<std::mutex> lock(memory().mutex);
    memory().reserved_peak = memory().reserved;
}

void set_release_threshold(uint64_t bytes) {
    std::lock_guard<std::mutex> lock(memory().mutex);
    memory().threshold = bytes;
}

uint64_t release_threshold() {
    std::lock_guard<std::mutex> lock(memory().mutex);
    return memory().threshold;
}

void trim_pool(size_t keep) {
    std::lock_guard<std::mutex> lock(memory().mutex);
    memory().trim(keep);
}

} // namespace driver
