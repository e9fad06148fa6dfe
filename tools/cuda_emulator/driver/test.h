// What the tests of the libraries share.
#pragma once

#include <cuda.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <sys/wait.h>
#include <unistd.h>
#include <vector>

namespace test {

inline int passed = 0, failed = 0;

inline void report(bool good, const std::string& what) {
    (good ? passed : failed)++;
    if (!good) {
        printf("FAILED %s\n", what.c_str());
    }
}

inline int finish() {
    printf("%d passed, %d failed\n", passed, failed);
    return failed ? 1 : 0;
}

// Runs it in a child, and gives what that wrote to stderr; `crashed` says whether a signal ended it.
inline std::string child(const std::function<void()>& run, bool& crashed) {
    int ends[2];
    if (pipe(ends) != 0) {
        abort();
    }
    fflush(nullptr);
    const pid_t pid = fork();
    if (pid == 0) {
        dup2(ends[1], STDERR_FILENO);
        run();
        exit(0);
    }
    close(ends[1]);
    std::string text;
    char buffer[512];
    for (ssize_t n; (n = read(ends[0], buffer, sizeof buffer)) > 0;) {
        text.append(buffer, size_t(n));
    }
    close(ends[0]);
    int status = 0;
    waitpid(pid, &status, 0);
    crashed = WIFSIGNALED(status);
    return text;
}

// The process must end with a message that has `message` in it.
inline void stops(const std::string& what, const std::string& message, const std::function<void()>& run) {
    bool crashed = false;
    const std::string text = child(run, crashed);
    report(crashed && text.find(message) != std::string::npos,
           what + ": " + (crashed ? "stopped with: " + text : "went on"));
}

inline void must(CUresult result) {
    if (result != CUDA_SUCCESS) {
        fprintf(stderr, "a call failed: %d\n", int(result));
        exit(2);
    }
}

inline CUdeviceptr allocated(size_t bytes) {
    CUdeviceptr address = 0;
    must(cuMemAlloc(&address, bytes));
    return address;
}

template <class T> CUdeviceptr uploaded(const std::vector<T>& values) {
    const CUdeviceptr address = allocated(values.size() * sizeof(T));
    must(cuMemcpyHtoD(address, values.data(), values.size() * sizeof(T)));
    return address;
}

template <class T> std::vector<T> downloaded(CUdeviceptr address, size_t count) {
    std::vector<T> values(count);
    must(cuMemcpyDtoH(values.data(), address, count * sizeof(T)));
    return values;
}

// In [-1, 1).
struct Random {
    uint64_t state = 0x9e3779b97f4a7c15;
    double next() {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        return double(int64_t(state * 0x2545f4914f6cdd1d) >> 11) * 0x1p-52;
    }
    std::vector<float> numbers(size_t count) {
        std::vector<float> made(count);
        for (float& x : made) {
            x = float(next());
        }
        return made;
    }
};

inline void start() {
    must(cuInit(0));
    CUdevice device = 0;
    must(cuDeviceGet(&device, 0));
    CUcontext context = nullptr;
    must(cuDevicePrimaryCtxRetain(&context, device));
    must(cuCtxSetCurrent(context));
}

} // namespace test
