// Kernels compiled for the host, registered under their names.
#pragma once

#include "emulator.h"

#include <cstddef>

namespace driver {

struct Parameter {
    size_t bytes;
    bool pointer;
    // What a pointer's target must be aligned to.
    size_t target_alignment;
};

struct Kernel {
    const char* name;
    // Not written for the emulator: its barriers may count on returned threads.
    bool foreign;
    // Most threads of a block, from __launch_bounds__; 0 for no bound.
    unsigned most_threads;
    const Parameter* parameters;
    size_t count;
    void (*run)(dim3 grid, dim3 block, size_t shared_bytes, void** values);
};

// Fails on a name that is there already.
void add(const Kernel& kernel);

template <class T> constexpr size_t target_alignment() {
    using Target = std::remove_cv_t<std::remove_pointer_t<T>>;
    if constexpr (!std::is_pointer_v<T> || std::is_void_v<Target>) {
        return 1;
    } else {
        return alignof(Target);
    }
}

template <auto Function> struct Entry;

template <class... A, void (*Function)(A...)> struct Entry<Function> {
    static constexpr Parameter parameters[] = {{sizeof(A), std::is_pointer_v<A>, target_alignment<A>()}...};

    template <bool FOREIGN> static void run(dim3 grid, dim3 block, size_t shared_bytes, void** values) {
        emulator::Options how = emulator::options();
        how.strict = !FOREIGN;
        emulator::launch(grid, block, shared_bytes, Function, values, how);
    }

    template <bool FOREIGN> static Kernel named(const char* name, unsigned most_threads) {
        return {name, FOREIGN, most_threads, parameters, sizeof...(A), run<FOREIGN>};
    }
};

} // namespace driver
