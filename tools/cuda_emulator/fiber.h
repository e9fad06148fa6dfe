// Stacks to run a block's threads on, and the way from one to another.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include "emulator.h"

// DS_EMULATOR_UCONTEXT tests what processors other than x86-64 use.
#if defined(__x86_64__) && !defined(DS_EMULATOR_UCONTEXT)
#define DS_EMULATOR_SWITCH 1
#else
#define DS_EMULATOR_SWITCH 0
#include <ucontext.h>
#endif

namespace emulator {

constexpr size_t STACK = 128 * 1024;

inline size_t page_size() {
    static const size_t size = size_t(sysconf(_SC_PAGESIZE));
    return size;
}

inline size_t round_to_pages(size_t bytes) { return (bytes + page_size() - 1) / page_size() * page_size(); }

// Memory between two pages that fault; the first of them is what it returns.
inline unsigned char* map_guarded(size_t bytes) {
    size_t page = page_size();
    void* all = mmap(nullptr, bytes + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (all == MAP_FAILED) fail("out of memory");
    auto* first = static_cast<unsigned char*>(all);
    if (mprotect(first + page, bytes, PROT_READ | PROT_WRITE)) fail("out of memory");
    return first;
}

#if DS_EMULATOR_SWITCH

// Saves the registers that calls preserve, and continues on another stack.
extern "C" void ds_emulator_switch(void** from, void* to);
asm(R"(
    .text
    .globl ds_emulator_switch
    .hidden ds_emulator_switch
    .type ds_emulator_switch, @function
ds_emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size ds_emulator_switch, .-ds_emulator_switch
)");

struct Context {
    void* stack = nullptr;

    void prepare(unsigned char* low, size_t bytes, void (*entry)()) {
        auto* top = reinterpret_cast<void**>(low + bytes);
        // What `ret` leaves is aligned as after a call.
        *--top = nullptr;
        *--top = reinterpret_cast<void*>(entry);
        for (int i = 0; i < 6; i++) *--top = nullptr;
        stack = top;
    }
    void switch_to(Context& to) { ds_emulator_switch(&stack, to.stack); }
};

#else

struct Context {
    ucontext_t context;

    void prepare(unsigned char* low, size_t bytes, void (*entry)()) {
        getcontext(&context);
        context.uc_stack.ss_sp = low;
        context.uc_stack.ss_size = bytes;
        context.uc_link = nullptr;
        makecontext(&context, entry, 0);
    }
    void switch_to(Context& to) { swapcontext(&context, &to.context); }
};

#endif

struct Fiber {
    Context context;
    unsigned char* mapping;

    explicit Fiber(void (*entry)()) : mapping(map_guarded(STACK)) {
        context.prepare(mapping + page_size(), STACK, entry);
    }
    ~Fiber() { munmap(mapping, STACK + 2 * page_size()); }
};

}  // namespace emulator
