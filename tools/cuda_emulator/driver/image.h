// What the text of a PTX module says of its kernels.
#pragma once

#include <cstddef>
#include <map>
#include <string>
#include <vector>

namespace driver {

struct PtxEntry {
    std::vector<size_t> parameter_bytes;
    // Most threads of a block, from __launch_bounds__; 0 for no bound.
    unsigned most_threads = 0;
};

using PtxEntries = std::map<std::string, PtxEntry>;

enum class Image { Ptx, Fatbin, FatbinWithoutText, Unknown };

// Finds out what an image is, and reads its PTX; a fatbin whose parts are
// compressed has none that can be read.
Image read_image(const void* image, PtxEntries& entries);

} // namespace driver
