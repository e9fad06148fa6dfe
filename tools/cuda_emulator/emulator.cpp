// The scheduler of a block's threads and their rendezvous, and launches.
#include "emulator.h"
#include "fiber.h"

#include <atomic>
#include <cstdarg>
#include <memory>

namespace emulator {

thread_local Thread* current;

// --- One block ------------------------------------------------------------------------------

namespace {

struct Pending {
    unsigned mask, arrived;
    const char* name;
    Operation operation;
    void* of_lanes[32];
};

struct Warp {
    unsigned alive;
    // The collectives that some lanes have reached.
    std::vector<Pending> pending;
};

// Everything that one OS thread needs to run blocks.
struct Worker {
    Block block{};
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    std::vector<unsigned> order;
    std::vector<std::unique_ptr<Fiber>> fibers;
    std::vector<Fiber*> idle;
    Fiber* started = nullptr;
    Context scheduler;
    const std::function<void()>* kernel = nullptr;
    Options how;
    unsigned next_fresh = 0, done = 0, at_barrier = 0;
    const char* barrier_file = nullptr;
    int barrier_line = 0;
    unsigned char* dynamic;
    uint64_t random = 88172645463325252ull;

    Worker() : dynamic(map_guarded(round_to_pages(SHARED_LIMIT))) {}
    ~Worker() { munmap(dynamic, round_to_pages(SHARED_LIMIT) + 2 * page_size()); }

    void run(uint3 index, dim3 grid, dim3 size, size_t shared_bytes);
    void prepare(uint3 index, dim3 grid, dim3 size, size_t shared_bytes);
    void arrange();
    unsigned next_group(unsigned begin) const;
    bool run_group(unsigned begin, unsigned end);
    Thread* take_fresh();
    void start_fiber();
    void suspend(State state);
    void finish();
    void arrive(const char* file, int line);
    void release_barrier();
    void reach(unsigned mask, const char* name, void* own, Operation operation);
    void complete(Warp& warp, size_t i);
    [[noreturn]] void stuck() const;
    void check_canaries() const;
};

thread_local Worker worker;

std::atomic<unsigned long long> next_serial{1};

// The body of every fiber: threads, one after another, until none is left to start.
void fiber_main() {
    Worker& w = worker;
    Fiber* self = w.started;
    for (;;) {
        while (Thread* thread = w.take_fresh()) {
            thread->fiber = self;
            thread->state = State::Ready;
            current = thread;
            (*w.kernel)();
            w.finish();
        }
        w.idle.push_back(self);
        self->context.switch_to(w.scheduler);
    }
}

void Worker::arrange() {
    unsigned n = block.threads;
    if (how.order != Order::Shuffled) {
        for (unsigned i = 0; i < n; i++) order[i] = how.order == Order::Forward ? i : n - 1 - i;
        return;
    }
    for (unsigned i = n; i > 1; i--) {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        std::swap(order[i - 1], order[random % i]);
    }
}

void Worker::prepare(uint3 index, dim3 grid, dim3 size, size_t shared_bytes) {
    unsigned n = size.x * size.y * size.z;
    // At the end of its mapping, so that an access beyond it faults.
    size_t rounded = (shared_bytes + 15) / 16 * 16;
    unsigned char* end = dynamic + page_size() + round_to_pages(SHARED_LIMIT);
    block.index = index;
    block.grid = grid;
    block.size = size;
    block.serial = next_serial++;
    block.strict = how.strict;
    block.dynamic = {end - rounded, rounded};
    block.arrays.clear();
    std::memset(block.dynamic.begin, 0xff, rounded);
    if (block.threads != n) {
        block.threads = n;
        threads.resize(n);
        warps.resize((n + 31) / 32);
        order.resize(n);
        for (unsigned i = 0; i < n; i++) order[i] = i;
    }
    for (unsigned i = 0; i < n; i++) {
        Thread& t = threads[i];
        t.index = {i % size.x, i / size.x % size.y, i / (size.x * size.y)};
        t.linear = i;
        t.state = State::Fresh;
        t.block = &block;
        t.copies.clear();
        t.groups.clear();
    }
    for (unsigned i = 0; i < warps.size(); i++) {
        unsigned lanes = min(n - 32 * i, 32u);
        warps[i].alive = lanes == 32 ? ~0u : (1u << lanes) - 1;
        warps[i].pending.clear();
    }
    arrange();
    next_fresh = done = at_barrier = 0;
}

void Worker::run(uint3 index, dim3 grid, dim3 size, size_t shared_bytes) {
    prepare(index, grid, size, shared_bytes);
    while (done < block.threads) {
        bool progress = false;
        for (unsigned begin = 0; begin < block.threads;) {
            // What runs ahead of the others until it waits for them.
            unsigned end = next_group(begin);
            while (run_group(begin, end)) progress = true;
            begin = end;
        }
        if (!progress) stuck();
    }
    check_canaries();
    current = nullptr;
}

// Whole warps, but all threads together where the order is shuffled.
unsigned Worker::next_group(unsigned begin) const {
    unsigned n = block.threads, first = n % 32 ? n % 32 : 32;
    if (how.order == Order::Shuffled) return n;
    if (how.order == Order::Forward) return min(begin + 32, n);
    return begin == 0 ? first : begin + 32;
}

bool Worker::run_group(unsigned begin, unsigned end) {
    bool progress = false;
    for (unsigned i = begin; i < end; i++) {
        Thread& thread = threads[order[i]];
        if (thread.state == State::Fresh) {
            start_fiber();
        } else if (thread.state == State::Ready) {
            current = &thread;
            scheduler.switch_to(thread.fiber->context);
        } else {
            continue;
        }
        progress = true;
    }
    return progress;
}

Thread* Worker::take_fresh() {
    return next_fresh < block.threads ? &threads[order[next_fresh++]] : nullptr;
}

void Worker::start_fiber() {
    if (idle.empty()) {
        fibers.push_back(std::make_unique<Fiber>(fiber_main));
        idle.push_back(fibers.back().get());
    }
    started = idle.back();
    idle.pop_back();
    scheduler.switch_to(started->context);
}

void Worker::suspend(State state) {
    Thread* self = current;
    self->state = state;
    self->fiber->context.switch_to(scheduler);
}

void Worker::finish() {
    Thread& thread = *current;
    thread.state = State::Done;
    done++;
    unsigned lane = thread.linear % 32;
    Warp& warp = warps[thread.linear / 32];
    warp.alive &= ~(1u << lane);
    if (how.strict) {
        if (at_barrier) {
            fail("returns while others wait at %s:%d", barrier_file, barrier_line);
        }
        for (const Pending& p : warp.pending) {
            if (p.mask >> lane & 1) fail("returns while its warp waits in %s", p.name);
        }
        return;
    }
    if (at_barrier && at_barrier == block.threads - done) release_barrier();
    for (size_t i = warp.pending.size(); i-- > 0;) {
        Pending& p = warp.pending[i];
        if ((p.mask & warp.alive & ~p.arrived) == 0) complete(warp, i);
    }
}

void Worker::arrive(const char* file, int line) {
    if (how.strict && done) fail("__syncthreads at %s:%d after threads have returned", file, line);
    if (at_barrier == 0) {
        barrier_file = file;
        barrier_line = line;
    } else if (how.strict && (barrier_line != line || std::strcmp(barrier_file, file) != 0)) {
        fail("at barrier %s:%d while others wait at %s:%d", file, line, barrier_file, barrier_line);
    }
    if (++at_barrier == block.threads - done) {
        current->state = State::AtBarrier;
        release_barrier();
    } else {
        suspend(State::AtBarrier);
    }
}

void Worker::release_barrier() {
    for (Thread& t : threads) {
        if (t.state == State::AtBarrier) t.state = State::Ready;
    }
    at_barrier = 0;
    if (how.order == Order::Shuffled && next_fresh == block.threads) arrange();
}

void Worker::reach(unsigned mask, const char* name, void* own, Operation operation) {
    unsigned lane = current->linear % 32;
    Warp& warp = warps[current->linear / 32];
    if (!(mask >> lane & 1)) fail("%s: mask %08x without the calling lane", name, mask);
    if (how.strict && (mask & ~warp.alive)) {
        fail("%s: mask %08x names lanes that have returned or never were", name, mask);
    }
    size_t i = 0;
    while (i < warp.pending.size() && warp.pending[i].mask != mask) i++;
    if (i == warp.pending.size()) warp.pending.push_back({mask, 0, name, operation, {}});
    Pending& p = warp.pending[i];
    if (p.operation != operation) fail("%s while its warp waits in %s", name, p.name);
    p.arrived |= 1u << lane;
    p.of_lanes[lane] = own;
    if (p.arrived == (mask & warp.alive)) {
        complete(warp, i);
    } else {
        suspend(State::InCollective);
    }
}

void Worker::complete(Warp& warp, size_t i) {
    Pending p = warp.pending[i];
    warp.pending.erase(warp.pending.begin() + i);
    p.operation(p.of_lanes, p.arrived);
    unsigned first = unsigned(&warp - warps.data()) * 32;
    for (unsigned lane = 0; lane < 32; lane++) {
        if (p.arrived >> lane & 1) threads[first + lane].state = State::Ready;
    }
}

void Worker::stuck() const {
    for (const Thread& t : threads) {
        if (t.state == State::AtBarrier) {
            std::fprintf(stderr, "thread %u waits at %s:%d\n", t.linear, barrier_file, barrier_line);
        } else if (t.state == State::InCollective) {
            for (const Pending& p : warps[t.linear / 32].pending) {
                if (!(p.arrived >> t.linear % 32 & 1)) continue;
                std::fprintf(stderr, "thread %u waits in %s, mask %08x\n", t.linear, p.name, p.mask);
            }
        }
    }
    current = nullptr;
    fail("no thread of a block can go on");
}

constexpr unsigned char CANARY_BYTE = 0xa5;

void Worker::check_canaries() const {
    for (const Range& range : block.arrays) {
        for (size_t i = 0; i < CANARY; i++) {
            if (range.begin[range.bytes + i] != CANARY_BYTE) {
                fail("a shared array of %zu bytes was written beyond its end", range.bytes);
            }
        }
    }
}

}  // namespace

void barrier(const char* file, int line) { worker.arrive(file, line); }

void collective(unsigned mask, const char* name, void* own, Operation operation) {
    worker.reach(mask, name, own, operation);
}

void open_shared(Range range, unsigned long long& serial) {
    Block& block = *current->block;
    serial = block.serial;
    std::memset(range.begin, 0xff, range.bytes);
    std::memset(range.begin + range.bytes, CANARY_BYTE, CANARY);
    block.arrays.push_back(range);
    size_t total = block.dynamic.bytes;
    for (const Range& r : block.arrays) total += r.bytes;
    if (total > SHARED_LIMIT) fail("%zu bytes of shared memory", total);
}

// --- Launches -------------------------------------------------------------------------------

namespace {

Options preset() {
    Options preset;
    const char* name = std::getenv("DS_EMULATOR_ORDER");
    if (!name || !std::strcmp(name, "forward")) return preset;
    if (!std::strcmp(name, "backward")) {
        preset.order = Order::Backward;
    } else if (!std::strcmp(name, "shuffled")) {
        preset.order = Order::Shuffled;
    } else {
        fail("DS_EMULATOR_ORDER=%s", name);
    }
    return preset;
}

}  // namespace

Options& options() {
    static Options current = preset();
    return current;
}

Statistics& statistics() {
    static Statistics all;
    return all;
}

void launch(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel,
            const Options& how) {
    if (current) fail("a launch inside a kernel");
    size_t threads = size_t(block.x) * block.y * block.z;
    if (threads == 0 || threads > 1024 || block.z > 64) {
        fail("a block of %u x %u x %u threads", block.x, block.y, block.z);
    }
    if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535) {
        fail("a grid of %u x %u x %u blocks", grid.x, grid.y, grid.z);
    }
    if (shared_bytes > SHARED_LIMIT) fail("%zu bytes of dynamic shared memory", shared_bytes);
    worker.kernel = &kernel;
    worker.how = how;
    for (unsigned z = 0; z < grid.z; z++) {
        for (unsigned y = 0; y < grid.y; y++) {
            for (unsigned x = 0; x < grid.x; x++) worker.run({x, y, z}, grid, block, shared_bytes);
        }
    }
}

void fail(const char* format, ...) {
    std::fprintf(stderr, "cuda emulator: ");
    if (current) {
        const uint3& t = current->index;
        const uint3& b = current->block->index;
        std::fprintf(stderr, "thread (%u, %u, %u) of block (%u, %u, %u): ", t.x, t.y, t.z, b.x, b.y,
                     b.z);
    }
    va_list arguments;
    va_start(arguments, format);
    std::vfprintf(stderr, format, arguments);
    va_end(arguments);
    std::fprintf(stderr, "\n");
    std::abort();
}

namespace {
std::atomic_flag atomic_flag = ATOMIC_FLAG_INIT;
}

AtomicLock::AtomicLock() {
    while (atomic_flag.test_and_set(std::memory_order_acquire)) {
    }
}

AtomicLock::~AtomicLock() { atomic_flag.clear(std::memory_order_release); }

}  // namespace emulator
