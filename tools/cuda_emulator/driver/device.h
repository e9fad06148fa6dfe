// What the stand-in libraries share: the emulated device's memory, its
// counters, and the way to stop on misuse.
#pragma once

#include <cstddef>
#include <cstdint>

// The libraries beside libcuda find these in it.
#pragma GCC visibility push(default)

namespace driver {

// ---- misuse (report.cpp) ----

// Prints the message with the current operation and aborts.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Names the operation in messages while it lives; operations nest.
class Operation {
  public:
    explicit Operation(const char* name);
    ~Operation();
    Operation(const Operation&) = delete;
    Operation& operator=(const Operation&) = delete;

  private:
    const char* outer;
};
const char* operation();

// ---- memory (memory.cpp) ----

enum class Allocated { Done, OutOfMemory };

Allocated allocate(size_t bytes, uint64_t& address);
// Checks the red zones; fails on an address that is not a live allocation's start.
void release(uint64_t address);
// Where the bytes [address, address + bytes) lie on the host; fails unless
// they are inside one live allocation.
void* host(uint64_t address, size_t bytes, const char* what);
inline void* host(const void* address, size_t bytes, const char* what) {
    return host(reinterpret_cast<uint64_t>(address), bytes, what);
}
// As `host` for an operand whose length the caller cannot tell; `remaining`
// gets the bytes from address to the end of its allocation. One past the end
// is allowed, since empty views point there.
void* host_from(uint64_t address, size_t& remaining, const char* what);
// Whether the address is in the device's range, live or not.
bool on_device(const void* address);
// Whether a host address is one where the device's bytes are kept.
bool in_store(const void* address);
// Start and length of the live allocation around the address.
bool allocation_of(uint64_t address, uint64_t& start, size_t& bytes);

struct Usage {
    size_t current, peak, allocations, reserved, reserved_peak, limit;
};
Usage usage();
void reset_peak();
void reset_reserved_peak();
void set_release_threshold(uint64_t bytes);
uint64_t release_threshold();
// Gives back what the pool holds beyond `keep` bytes and what is in use.
void trim_pool(size_t keep);

// ---- counters (report.cpp) ----

enum class Copied { HostToDevice, DeviceToHost, DeviceToDevice, Memset };

// Has the report written at exit and faults explained. Called by cuInit, by
// which time the language's runtime has its own handlers in place.
void install_report();

void count_launch(const char* kernel);
void count_copy(Copied kind, size_t bytes);
void count_gemm(double flop);
void count_convolution(double flop);

} // namespace driver

#pragma GCC visibility pop
