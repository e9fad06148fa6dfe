#include "image.h"

#include <cctype>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <regex>

namespace driver {
namespace {

constexpr uint32_t FATBIN_MAGIC = 0xba55ed50;

struct FatbinHeader {
    uint32_t magic;
    uint16_t version, header_bytes;
    uint64_t bytes;
};

// `.param .u64 .ptr .align 1 name` or `.param .align 4 .b8 name[12]`.
size_t parameter_bytes(const std::string& declaration) {
    static const std::regex scalar(R"(\.([usbf])(8|16|32|64)\b)");
    static const std::regex array(R"(\[(\d+)\])");
    std::smatch found;
    if (!std::regex_search(declaration, found, scalar)) {
        return 0;
    }
    const size_t element = std::strtoul(found[2].str().c_str(), nullptr, 10) / 8;
    const bool many = std::regex_search(declaration, found, array);
    return element * (many ? std::strtoul(found[1].str().c_str(), nullptr, 10) : 1);
}

void read_ptx(const std::string& text, PtxEntries& entries) {
    const std::string mark = ".entry ";
    for (size_t at = text.find(mark); at != std::string::npos; at = text.find(mark, at)) {
        at += mark.size();
        size_t end = at;
        while (end < text.size() && (isalnum(text[end]) || text[end] == '_' || text[end] == '$')) {
            end += 1;
        }
        PtxEntry& entry = entries[text.substr(at, end - at)];
        const size_t open = text.find_first_not_of(" \t\r\n", end);
        const size_t body = text.find('{', end);
        size_t directives = end;
        if (open != std::string::npos && text[open] == '(') {
            const size_t close = text.find(')', open);
            directives = close;
            for (size_t from = text.find(".param", open); from < close; from = text.find(".param", from + 1)) {
                entry.parameter_bytes.push_back(
                    parameter_bytes(text.substr(from, std::min(text.find(',', from), close) - from)));
            }
        }
        const size_t bound = text.find(".maxntid", directives);
        if (bound < body) {
            unsigned threads = 1;
            const char* number = text.c_str() + bound + strlen(".maxntid");
            for (char* after = nullptr;; number = after + 1) {
                threads *= unsigned(strtoul(number, &after, 10));
                if (*after != ',') {
                    break;
                }
            }
            entry.most_threads = threads;
        }
        at = end;
    }
}

} // namespace

Image read_image(const void* image, PtxEntries& entries) {
    FatbinHeader header;
    memcpy(&header, image, sizeof header.magic);
    if (header.magic == FATBIN_MAGIC) {
        memcpy(&header, image, sizeof header);
        const std::string all(static_cast<const char*>(image), header.header_bytes + header.bytes);
        const size_t text = all.find("\n.version ");
        if (text == std::string::npos) {
            return Image::FatbinWithoutText;
        }
        read_ptx(all.c_str() + text, entries);
        return Image::Fatbin;
    }
    const std::string text(static_cast<const char*>(image));
    if (text.find(".version") == std::string::npos || text.find(".target") == std::string::npos) {
        return Image::Unknown;
    }
    read_ptx(text, entries);
    return Image::Ptx;
}

} // namespace driver
