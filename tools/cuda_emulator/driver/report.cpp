// Counters, the report of them at exit, and messages on misuse.

#include "device.h"

#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <unistd.h>

namespace driver {
namespace {

thread_local const char* current = "start";

struct Copies {
    size_t calls = 0, bytes = 0;
};

struct Counters {
    std::mutex mutex;
    std::map<std::string, size_t> launches;
    Copies copies[4];
    size_t gemms = 0, convolutions = 0;
    double gemm_flop = 0, convolution_flop = 0;
};

Counters& counters() {
    static Counters* only = new Counters;
    return *only;
}

void write_report(FILE* to) {
    Counters& c = counters();
    std::lock_guard<std::mutex> lock(c.mutex);
    const Usage memory = usage();
    size_t total = 0;
    for (const auto& [name, count] : c.launches) {
        total += count;
    }
    fprintf(to, "{\n  \"launches\": {");
    const char* separator = "\n";
    for (const auto& [name, count] : c.launches) {
        fprintf(to, "%s    \"%s\": %zu", separator, name.c_str(), count);
        separator = ",\n";
    }
    fprintf(to, "\n  },\n  \"launches_total\": %zu,\n", total);
    const char* names[4] = {"host_to_device", "device_to_host", "device_to_device", "memset"};
    for (int kind = 0; kind < 4; kind++) {
        fprintf(to, "  \"%s\": {\"calls\": %zu, \"bytes\": %zu},\n", names[kind], c.copies[kind].calls,
                c.copies[kind].bytes);
    }
    fprintf(to, "  \"gemm\": {\"calls\": %zu, \"flop\": %.0f},\n", c.gemms, c.gemm_flop);
    fprintf(to, "  \"convolution\": {\"calls\": %zu, \"flop\": %.0f},\n", c.convolutions, c.convolution_flop);
    fprintf(to, "  \"memory\": {\"allocations\": %zu, \"current_bytes\": %zu, \"peak_bytes\": %zu}\n}\n",
            memory.allocations, memory.current, memory.peak);
}

void report_at_exit() {
    const char* path = getenv("DS_EMULATOR_REPORT");
    if (!path || !*path) {
        return;
    }
    FILE* to = fopen(path, "w");
    if (!to) {
        perror(path);
        return;
    }
    write_report(to);
    fclose(to);
}

// A fault at an address of the device's memory is a kernel out of bounds:
// say which. Other faults go to the handler that was there before.
struct sigaction previous;

void on_fault(int signal, siginfo_t* info, void* context) {
    char line[256];
    const char* cause = on_device(info->si_addr)  ? "the host followed a device pointer"
                        : in_store(info->si_addr) ? "outside every allocation of the device"
                                                  : "neither a host nor a device address";
    int length = snprintf(line, sizeof line, "cuda emulator: fault at %p in %s: %s\n", info->si_addr, current, cause);
    if (write(STDERR_FILENO, line, size_t(length)) < 0) {
        _exit(134);
    }
    if (previous.sa_flags & SA_SIGINFO) {
        previous.sa_sigaction(signal, info, context);
    } else {
        sigaction(signal, &previous, nullptr);
    }
}

struct Install {
    Install() {
        atexit(report_at_exit);
        struct sigaction action = {};
        action.sa_sigaction = on_fault;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK;
        sigaction(SIGSEGV, &action, &previous);
    }
};

} // namespace

void install_report() {
    static Install once;
}

void fail(const char* format, ...) {
    char message[1024];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(message, sizeof message, format, arguments);
    va_end(arguments);
    fprintf(stderr, "cuda emulator: %s: %s\n", current, message);
    fflush(stderr);
    abort();
}

Operation::Operation(const char* name) : outer(current) {
    current = name;
}

Operation::~Operation() {
    current = outer;
}

const char* operation() {
    return current;
}

void count_launch(const char* kernel) {
    std::lock_guard<std::mutex> lock(counters().mutex);
    counters().launches[kernel] += 1;
}

void count_copy(Copied kind, size_t bytes) {
    std::lock_guard<std::mutex> lock(counters().mutex);
    Copies& copies = counters().copies[int(kind)];
    copies.calls += 1;
    copies.bytes += bytes;
}

void count_gemm(double flop) {
    std::lock_guard<std::mutex> lock(counters().mutex);
    counters().gemms += 1;
    counters().gemm_flop += flop;
}

void count_convolution(double flop) {
    std::lock_guard<std::mutex> lock(counters().mutex);
    counters().convolutions += 1;
    counters().convolution_flop += flop;
}

} // namespace driver
