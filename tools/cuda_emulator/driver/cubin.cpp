// Reads what nvcc notes in a binary about its kernels: the sections
// .nv.info.NAME (parameters, launch bounds), .nv.info (registers) and
// .nv.shared.NAME (static shared memory).

#include <elf.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "device.h"
#include "image.h"

namespace driver {
namespace {

// Notes are a form, a kind and a size or value; those of this form have data.
constexpr uint8_t FORM_SIZED = 4;
constexpr uint8_t KIND_MOST_THREADS = 0x05, KIND_PARAMETER = 0x17, KIND_REGISTERS = 0x2f;

struct Note {
    uint8_t form, kind;
    uint16_t bytes;
};

template <class T> T read_at(const unsigned char* file, size_t bytes, size_t offset) {
    T value;
    if (offset > bytes || sizeof value > bytes - offset) {
        fail("a binary in the module ends early");
    }
    memcpy(&value, file + offset, sizeof value);
    return value;
}

class Cubin {
  public:
    Cubin(const unsigned char* file, size_t bytes) : file(file), bytes(bytes) {
        header = read<Elf64_Ehdr>(0);
        names = section(header.e_shstrndx).sh_offset;
    }

    Elf64_Shdr section(size_t index) const {
        return read<Elf64_Shdr>(header.e_shoff + index * header.e_shentsize);
    }
    size_t sections() const {
        return header.e_shnum;
    }
    std::string name(const Elf64_Shdr& of) const {
        return text(names + of.sh_name);
    }
    std::string symbol(size_t index, const Elf64_Shdr& table) const {
        const auto found = read<Elf64_Sym>(table.sh_offset + index * sizeof(Elf64_Sym));
        return text(section(table.sh_link).sh_offset + found.st_name);
    }
    template <class T> T read(size_t offset) const {
        return read_at<T>(file, bytes, offset);
    }

    // Calls f(kind, offset of the data) for the notes with data.
    template <class F> void notes(const Elf64_Shdr& of, F f) const {
        const size_t end = of.sh_offset + of.sh_size;
        for (size_t at = of.sh_offset; at + sizeof(Note) <= end;) {
            const Note note = read<Note>(at);
            at += sizeof note;
            if (note.form == FORM_SIZED) {
                f(note.kind, at);
                at += note.bytes;
            }
        }
    }

  private:
    std::string text(size_t offset) const {
        std::string made;
        for (char c; (c = read<char>(offset)) != 0; offset++) {
            made += c;
        }
        return made;
    }

    const unsigned char* file;
    size_t bytes;
    Elf64_Ehdr header;
    size_t names = 0;
};

bool after(const std::string& name, const char* prefix, std::string& rest) {
    if (name.rfind(prefix, 0) != 0) {
        return false;
    }
    rest = name.substr(strlen(prefix));
    return true;
}

} // namespace

void read_cubin(const unsigned char* file, size_t bytes, ImageEntries& entries) {
    const Cubin cubin(file, bytes);
    std::map<std::string, std::map<uint16_t, size_t>> parameters;
    std::map<std::string, size_t> shared;
    for (size_t i = 0; i < cubin.sections(); i++) {
        const Elf64_Shdr section = cubin.section(i);
        const std::string name = cubin.name(section);
        std::string kernel;
        if (after(name, ".nv.info.", kernel)) {
            ImageEntry& entry = entries[kernel];
            cubin.notes(section, [&](uint8_t kind, size_t at) {
                if (kind == KIND_PARAMETER) {
                    // Index, ordinal and offset, then the size in the upper bits of a word.
                    parameters[kernel][cubin.read<uint16_t>(at + 4)] = cubin.read<uint32_t>(at + 8) >> 18;
                } else if (kind == KIND_MOST_THREADS) {
                    entry.most_threads =
                        cubin.read<uint32_t>(at) * cubin.read<uint32_t>(at + 4) * cubin.read<uint32_t>(at + 8);
                }
            });
        } else if (after(name, ".nv.shared.", kernel)) {
            shared[kernel] = section.sh_size;
        } else if (name == ".nv.info") {
            const Elf64_Shdr symbols = cubin.section(section.sh_link);
            cubin.notes(section, [&](uint8_t kind, size_t at) {
                if (kind == KIND_REGISTERS) {
                    ImageEntry& entry = entries[cubin.symbol(cubin.read<uint32_t>(at), symbols)];
                    entry.registers = std::max(entry.registers, cubin.read<uint32_t>(at + 4));
                }
            });
        }
    }
    for (auto& [kernel, entry] : entries) {
        entry.static_shared = std::max(entry.static_shared, shared[kernel]);
        if (!parameters[kernel].empty()) {
            entry.parameter_bytes.clear();
        }
        for (const auto& [ordinal, size] : parameters[kernel]) {
            entry.parameter_bytes.push_back(size);
        }
    }
}

} // namespace driver
