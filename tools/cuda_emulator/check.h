// What the tests of kernels share.
#pragma once

#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdint>
#include <initializer_list>
#include <string>

#include "../../src/nn/cuda/kernels/common.cuh"

namespace check {

inline int passed = 0, failed = 0;

inline void report(bool good, const std::string& what) {
    (good ? passed : failed)++;
    if (!good) std::printf("FAILED %s\n", what.c_str());
}

inline int finish() {
    std::printf("%d passed, %d failed\n", passed, failed);
    return failed ? 1 : 0;
}

struct Random {
    uint64_t state;
    explicit Random(uint64_t seed) : state(seed * 0x9e3779b97f4a7c15ull + 1) {}
    uint64_t next() {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        return state * 0x2545f4914f6cdd1dull;
    }
    // In [-1, 1).
    float uniform() { return float(int64_t(next()) >> 40) * (1.0f / (1 << 23)); }
    // Roughly normal.
    float normal() {
        float sum = 0;
        for (int i = 0; i < 6; i++) sum += uniform();
        return sum * 0.70710678f;
    }
};

template <class T> constexpr const char* NAME = "f32";
template <> inline constexpr const char* NAME<f16> = "f16";
template <> inline constexpr const char* NAME<bf16> = "bf16";

// Half the distance between neighbours, relative.
template <class T> constexpr double ROUNDING = 1.0 / (1 << 24);
template <> inline constexpr double ROUNDING<f16> = 1.0 / (1 << 11);
template <> inline constexpr double ROUNDING<bf16> = 1.0 / (1 << 8);

template <class T> double to_double(T x) { return double(to_float(x)); }
inline double to_double(double x) { return x; }

// What a kernel writes.
struct Span {
    unsigned char* begin;
    size_t bytes;
};

// Device memory whose end is watched: a page that faults follows, and up to 15 bytes before it that
// must not change. `shift` elements move its start off a multiple of 16 bytes.
template <class T> class Buffer {
    unsigned char* mapping;
    size_t mapped, slack;

public:
    T* data;
    size_t count;

    explicit Buffer(size_t count, size_t shift = 0) : count(count) {
        size_t page = size_t(sysconf(_SC_PAGESIZE)), bytes = (count + shift) * sizeof(T);
        size_t rounded = (bytes + 15) / 16 * 16, body = (rounded + page - 1) / page * page + page;
        mapped = body + page;
        mapping = static_cast<unsigned char*>(
            mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
        if (mapping == MAP_FAILED || mprotect(mapping + body, page, PROT_NONE)) std::abort();
        std::memset(mapping, 0xff, body);
        data = reinterpret_cast<T*>(mapping + body - rounded) + shift;
        slack = rounded - bytes;
    }
    Buffer(const Buffer&) = delete;
    ~Buffer() { munmap(mapping, mapped); }

    Buffer& fill(Random& random, float scale = 1.0f, float mean = 0.0f) {
        for (size_t i = 0; i < count; i++) data[i] = from_float<T>(mean + scale * random.normal());
        return *this;
    }
    Span span() const { return {reinterpret_cast<unsigned char*>(data), count * sizeof(T)}; }
    double operator[](size_t i) const { return to_double(data[i]); }
    // Whether nothing was written just before or behind it.
    bool intact() const {
        auto* first = reinterpret_cast<const unsigned char*>(data);
        auto* end = reinterpret_cast<const unsigned char*>(data + count);
        for (size_t i = 0; i < slack; i++) {
            if (end[i] != 0xff) return false;
        }
        for (const unsigned char* p = first - 64; p < first; p++) {
            if (*p != 0xff) return false;
        }
        return true;
    }
};

// Launches in every order of threads, and requires the same bytes of all of them.
template <class F>
void launch(const std::string& what, dim3 grid, dim3 block, size_t shared,
            std::initializer_list<Span> outputs, F kernel) {
    std::vector<std::vector<unsigned char>> before, first;
    for (const Span& s : outputs) before.emplace_back(s.begin, s.begin + s.bytes);
    bool same = true;
    for (auto order : {emulator::Order::Forward, emulator::Order::Backward, emulator::Order::Shuffled}) {
        size_t i = 0;
        for (const Span& s : outputs) std::memcpy(s.begin, before[i++].data(), s.bytes);
        emulator::launch(grid, block, shared, kernel, {true, order});
        i = 0;
        for (const Span& s : outputs) {
            if (order == emulator::Order::Forward) {
                first.emplace_back(s.begin, s.begin + s.bytes);
            } else {
                same &= !std::memcmp(first[i++].data(), s.begin, s.bytes);
            }
        }
    }
    report(same, what + ": results depend on the order of threads");
}

// |got − want| ≤ absolute + relative · |want| for each of `count`; NaN never passes.
template <class Got, class Want>
void close(const std::string& what, size_t count, Got got, Want want, double absolute,
           double relative) {
    size_t bad = 0, worst_at = 0;
    double worst = 0;
    for (size_t i = 0; i < count; i++) {
        double g = got(i), w = want(i), allowed = absolute + relative * std::fabs(w);
        double excess = std::fabs(g - w) - allowed;
        if (excess <= 0) continue;
        if (bad++ == 0 || !(excess <= worst)) {
            worst = excess;
            worst_at = i;
        }
    }
    std::string detail;
    if (bad) {
        detail = ": " + std::to_string(bad) + " of " + std::to_string(count) + " off, at " +
                 std::to_string(worst_at) + " " + std::to_string(double(got(worst_at))) +
                 " instead of " + std::to_string(double(want(worst_at)));
    }
    report(bad == 0, what + detail);
}

// Whether `f` aborts with a message that contains `text`.
template <class F> void aborts(const std::string& what, const char* text, F f) {
    int ends[2];
    if (pipe(ends)) std::abort();
    std::fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        dup2(ends[1], 2);
        ::close(ends[0]);
        f();
        _exit(0);
    }
    ::close(ends[1]);
    std::string message;
    char part[512];
    for (ssize_t n; (n = read(ends[0], part, sizeof part)) > 0;) message.append(part, size_t(n));
    ::close(ends[0]);
    int status = 0;
    waitpid(child, &status, 0);
    bool good = WIFSIGNALED(status) && message.find(text) != std::string::npos;
    report(good, what + ": " + (message.empty() ? "no message" : message));
}

}  // namespace check
