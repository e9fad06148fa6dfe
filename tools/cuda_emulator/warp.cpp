// The warp's matrix operations, asynchronous copies and votes of emulator.h.
#include "emulator.h"

namespace emulator {

void check_shared(const void* pointer, size_t bytes, const char* what) {
    auto* p = static_cast<const unsigned char*>(pointer);
    auto holds = [&](const Range& r) { return p >= r.begin && p + bytes <= r.begin + r.bytes; };
    const Block& block = *current->block;
    if (holds(block.dynamic)) return;
    for (const Range& r : block.arrays) {
        if (holds(r)) return;
    }
    fail("%s: %zu bytes at %p are outside shared memory", what, bytes, pointer);
}

void copy_async(void* to, const void* from, bool valid) {
    check_aligned(to, 16, "cp.async to shared memory");
    check_shared(to, 16, "cp.async");
    if (valid) check_aligned(from, 16, "cp.async from global memory");
    std::memset(to, 0xff, 16);
    current->copies.push_back({to, from, valid});
}

void commit_copies() { current->groups.push_back(current->copies.size()); }

void wait_copies(size_t pending_groups) {
    auto& copies = current->copies;
    auto& groups = current->groups;
    if (groups.size() <= pending_groups) return;
    size_t finished = groups.size() - pending_groups, count = groups[finished - 1];
    for (size_t i = 0; i < count; i++) {
        if (copies[i].valid) {
            std::memcpy(copies[i].to, copies[i].from, 16);
        } else {
            std::memset(copies[i].to, 0, 16);
        }
    }
    copies.erase(copies.begin(), copies.begin() + count);
    groups.erase(groups.begin(), groups.begin() + finished);
    for (size_t& end : groups) end -= count;
}

namespace {

struct MatrixLoad {
    const unsigned char* row;
    uint32_t r[4];
};

void load(void** of_lanes, bool transposed) {
    auto lane = [&](int i) { return static_cast<MatrixLoad*>(of_lanes[i]); };
    auto& counts = statistics();
    for (int m = 0; m < 4; m++) {
        uint16_t matrix[8][8];
        unsigned banks = 0;
        for (int row = 0; row < 8; row++) {
            const unsigned char* from = lane(m * 8 + row)->row;
            std::memcpy(matrix[row], from, 16);
            banks |= 1u << (reinterpret_cast<uintptr_t>(from) / 16 % 8);
        }
        counts.matrix_loads++;
        counts.matrix_load_conflicts += banks != 0xff;
        for (int i = 0; i < 32; i++) {
            int major = i / 4, minor = i % 4 * 2;
            uint32_t low = transposed ? matrix[minor][major] : matrix[major][minor];
            uint32_t high = transposed ? matrix[minor + 1][major] : matrix[major][minor + 1];
            lane(i)->r[m] = low | high << 16;
        }
    }
}

}  // namespace

void load_matrices(uint32_t (&r)[4], const void* row, bool transposed) {
    check_aligned(row, 16, "ldmatrix");
    check_shared(row, 16, "ldmatrix");
    MatrixLoad own{static_cast<const unsigned char*>(row), {}};
    if (transposed) {
        collective(~0u, "ldmatrix.trans", &own, [](void** all, unsigned) { load(all, true); });
    } else {
        collective(~0u, "ldmatrix", &own, [](void** all, unsigned) { load(all, false); });
    }
    std::memcpy(r, own.r, sizeof own.r);
}

namespace {

struct Product {
    float* d;
    const uint32_t *a, *b;
};

template <Kind KIND> void unpack(uint32_t pair, float& low, float& high) {
    if constexpr (KIND == Kind::Brain) {
        low = bits<float>(pair << 16);
        high = bits<float>(pair & 0xffff0000u);
    } else {
        low = __half2float(__ushort_as_half(static_cast<unsigned short>(pair)));
        high = __half2float(__ushort_as_half(static_cast<unsigned short>(pair >> 16)));
    }
}

// d [16, 8] += a [16, 16] b [16, 8], the fragments as PTX documents for mma.m16n8k16.
template <Kind KIND> void multiply(void** of_lanes, unsigned) {
    float a[16][16], b[16][8], d[16][8];
    for (int i = 0; i < 32; i++) {
        auto* own = static_cast<Product*>(of_lanes[i]);
        int group = i / 4, pair = i % 4 * 2;
        for (int r = 0; r < 4; r++) {
            float* to = &a[group + r % 2 * 8][pair + r / 2 * 8];
            unpack<KIND>(own->a[r], to[0], to[1]);
        }
        for (int r = 0; r < 2; r++) {
            unpack<KIND>(own->b[r], b[pair + r * 8][group], b[pair + r * 8 + 1][group]);
        }
        for (int r = 0; r < 4; r++) d[group + r / 2 * 8][pair + r % 2] = own->d[r];
    }
    for (int row = 0; row < 16; row++) {
        for (int k = 0; k < 16; k++) {
            for (int column = 0; column < 8; column++) d[row][column] += a[row][k] * b[k][column];
        }
    }
    for (int i = 0; i < 32; i++) {
        auto* own = static_cast<Product*>(of_lanes[i]);
        int group = i / 4, pair = i % 4 * 2;
        for (int r = 0; r < 4; r++) own->d[r] = d[group + r / 2 * 8][pair + r % 2];
    }
    statistics().products++;
}

}  // namespace

void multiply_accumulate(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Kind kind) {
    Product own{d, a, b};
    if (kind == Kind::Brain) {
        collective(~0u, "mma.bf16", &own, multiply<Kind::Brain>);
    } else {
        collective(~0u, "mma.f16", &own, multiply<Kind::Half>);
    }
}

unsigned vote(unsigned mask, bool predicate) {
    struct Vote {
        bool predicate;
        unsigned result;
    } own{predicate, 0};
    collective(mask, "vote", &own, [](void** of_lanes, unsigned lanes) {
        unsigned result = 0;
        for (unsigned i = 0; i < 32; i++) {
            if (lanes >> i & 1 && static_cast<Vote*>(of_lanes[i])->predicate) result |= 1u << i;
        }
        for (unsigned i = 0; i < 32; i++) {
            if (lanes >> i & 1) static_cast<Vote*>(of_lanes[i])->result = result;
        }
    });
    return own.result;
}

}  // namespace emulator
