// What a module's image says of its kernels: the text of PTX, or the tables of
// the binaries in a fatbin.
#pragma once

#include <cstddef>
#include <map>
#include <string>
#include <vector>

namespace driver {

struct ImageEntry {
    std::vector<size_t> parameter_bytes;
    // Most threads of a block, from __launch_bounds__; 0 for no bound.
    unsigned most_threads = 0;
    // Of the binaries, the most that one of them takes; 0 in PTX.
    unsigned registers = 0;
    size_t static_shared = 0;
};

using ImageEntries = std::map<std::string, ImageEntry>;

// Reads PTX text or a fatbin with its uncompressed parts; false for anything
// else. A fatbin with nothing but compressed parts has no entries.
bool read_image(const void* image, ImageEntries& entries);

// The kernels of one binary for the device, an ELF file.
void read_cubin(const unsigned char* file, size_t bytes, ImageEntries& entries);

} // namespace driver
