// Stand-in for libcublasLt: programs link it, but nothing here uses it.

#include <cstddef>

#pragma GCC visibility push(default)
extern "C" size_t cublasLtGetVersion() {
    return 130000;
}
#pragma GCC visibility pop
