#include "image.h"

#include <algorithm>
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

constexpr uint16_t PART_PTX = 1, PART_BINARY = 2;

struct PartHeader {
    uint16_t kind, version;
    uint32_t header_bytes;
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

void read_ptx(const std::string& text, ImageEntries& entries) {
    const std::string mark = ".entry ";
    for (size_t at = text.find(mark); at != std::string::npos; at = text.find(mark, at)) {
        at += mark.size();
        size_t end = at;
        while (end < text.size() && (isalnum(text[end]) || text[end] == '_' || text[end] == '$')) {
            end += 1;
        }
        ImageEntry& entry = entries[text.substr(at, end - at)];
        const size_t open = text.find_first_not_of(" \t\r\n", end);
        const size_t body = text.find('{', end);
        if (open != std::string::npos && text[open] == '(' && entry.parameter_bytes.empty()) {
            const size_t close = text.find(')', open);
            for (size_t from = text.find(".param", open); from < close; from = text.find(".param", from + 1)) {
                entry.parameter_bytes.push_back(
                    parameter_bytes(text.substr(from, std::min(text.find(',', from), close) - from)));
            }
        }
        const size_t bound = text.find(".maxntid", end);
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

// Parts that are compressed begin with neither PTX's text nor an ELF header.
void read_fatbin(const unsigned char* at, const unsigned char* end, ImageEntries& entries) {
    PartHeader part;
    while (at + sizeof part <= end) {
        memcpy(&part, at, sizeof part);
        const unsigned char* data = at + part.header_bytes;
        if (part.header_bytes < sizeof part || part.bytes > size_t(end - at) - part.header_bytes) {
            return;
        }
        if (part.kind == PART_BINARY && part.bytes > 4 && memcmp(data, "\177ELF", 4) == 0) {
            read_cubin(data, part.bytes, entries);
        } else if (part.kind == PART_PTX) {
            const std::string text(reinterpret_cast<const char*>(data), part.bytes);
            if (text.find("\n.version ") != std::string::npos) {
                read_ptx(text, entries);
            }
        }
        at = data + part.bytes;
    }
}

} // namespace

bool read_image(const void* image, ImageEntries& entries) {
    FatbinHeader header;
    memcpy(&header, image, sizeof header.magic);
    if (header.magic == FATBIN_MAGIC) {
        memcpy(&header, image, sizeof header);
        const auto* parts = static_cast<const unsigned char*>(image) + header.header_bytes;
        read_fatbin(parts, parts + header.bytes, entries);
        return true;
    }
    const std::string text(static_cast<const char*>(image));
    if (text.find(".version") == std::string::npos || text.find(".target") == std::string::npos) {
        return false;
    }
    read_ptx(text, entries);
    return true;
}

} // namespace driver
