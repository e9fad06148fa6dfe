// Stand-in for libnvrtc: programs link it, but nothing here compiles at run time.

#pragma GCC visibility push(default)
extern "C" int nvrtcVersion(int* major, int* minor) {
    *major = 13;
    *minor = 0;
    return 0;
}
#pragma GCC visibility pop
