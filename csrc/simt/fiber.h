// SPDX-License-Identifier: Apache-2.0
//
// Fibers: functions with separate stacks, between which an OS thread switches. The switch takes a few instructions on
// x86-64 and aarch64; other architectures use ucontext.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>

#if !defined(__x86_64__) && !defined(__aarch64__)
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__x86_64__)
// Save the callee-saved registers on the stack and the stack pointer in *save, then switch to the stack at `target`.
extern "C" void spatialflow_simt_switch(void** save, void* target) __attribute__((visibility("hidden")));
asm(R"(
.pushsection .text.spatialflow_simt_switch,"axG",@progbits,spatialflow_simt_switch,comdat
.weak spatialflow_simt_switch
.hidden spatialflow_simt_switch
.type spatialflow_simt_switch, @function
spatialflow_simt_switch:
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
.size spatialflow_simt_switch, .-spatialflow_simt_switch
.popsection
)");
#elif defined(__aarch64__)
extern "C" void spatialflow_simt_switch(void** save, void* target) __attribute__((visibility("hidden")));
asm(R"(
.pushsection .text.spatialflow_simt_switch,"axG",%progbits,spatialflow_simt_switch,comdat
.weak spatialflow_simt_switch
.hidden spatialflow_simt_switch
.type spatialflow_simt_switch, %function
spatialflow_simt_switch:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
.size spatialflow_simt_switch, .-spatialflow_simt_switch
.popsection
)");
#endif

namespace spatialflow {
namespace simt {

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStackBytes = 512 * 1024;
#else
constexpr size_t kStackBytes = 128 * 1024;
#endif

// Execution context: a fiber, or the scheduler on the stack of the OS thread.
class Fiber {
public:
    // Prepare a fiber that will run `entry` on [stack, stack + kStackBytes). `entry` must not return.
    void prepare(char* stack, void (*entry)()) {
        stack_ = stack;
#if defined(__SANITIZE_ADDRESS__)
        __asan_unpoison_memory_region(stack, kStackBytes);  // memory that an abandoned fiber left poisoned
        fake_stack_ = nullptr;
#endif
#if defined(__x86_64__)
        // `ret` pops the address of `entry`. The unused slot above it stands for a return address, so that the stack is
        // aligned as after a call.
        void** top = reinterpret_cast<void**>(stack + kStackBytes) - 2;
        *top = reinterpret_cast<void*>(entry);
        top -= 6;
        std::memset(top, 0, 6 * sizeof(void*));
        pointer_ = top;
#elif defined(__aarch64__)
        char* top = stack + kStackBytes - 160;
        std::memset(top, 0, 160);
        reinterpret_cast<void**>(top)[11] = reinterpret_cast<void*>(entry);  // x30
        pointer_ = top;
#else
        getcontext(&context_);
        context_.uc_stack.ss_sp = stack;
        context_.uc_stack.ss_size = kStackBytes;
        makecontext(&context_, entry, 0);
#endif
    }

    // Switch from the running context `from` to `to`. Return when another context switches back to `from`.
    static void swap(Fiber& from, Fiber& to) {
#if defined(__SANITIZE_ADDRESS__)
        __sanitizer_start_switch_fiber(&from.fake_stack_, to.bottom(), to.bytes());
#endif
#if defined(__x86_64__) || defined(__aarch64__)
        spatialflow_simt_switch(&from.pointer_, to.pointer_);
#else
        swapcontext(&from.context_, &to.context_);
#endif
#if defined(__SANITIZE_ADDRESS__)
        __sanitizer_finish_switch_fiber(from.fake_stack_, nullptr, nullptr);
#endif
    }

    // Record the stack of the OS thread; must be called first in `entry`.
    static void entered([[maybe_unused]] Fiber& scheduler) {
#if defined(__SANITIZE_ADDRESS__)
        __sanitizer_finish_switch_fiber(nullptr, &scheduler.thread_stack_bottom_, &scheduler.thread_stack_bytes_);
#endif
    }

private:
#if defined(__SANITIZE_ADDRESS__)
    const void* bottom() const { return stack_ ? stack_ : thread_stack_bottom_; }
    size_t bytes() const { return stack_ ? kStackBytes : thread_stack_bytes_; }
    void* fake_stack_ = nullptr;
    const void* thread_stack_bottom_ = nullptr;
    size_t thread_stack_bytes_ = 0;
#endif
#if defined(__x86_64__) || defined(__aarch64__)
    void* pointer_ = nullptr;
#else
    ucontext_t context_;
#endif
    char* stack_ = nullptr;
};

// Stacks for the threads of a block, kept for the next block. The lowest page of each is not accessible, so that a
// stack overflow faults.
class Stacks {
public:
    Stacks() = default;
    Stacks(const Stacks&) = delete;
    Stacks& operator=(const Stacks&) = delete;
    ~Stacks() { release(); }

    char* at(unsigned index) { return memory_ + index * kStackBytes; }

    void reserve(unsigned count) {
        if (count <= count_) {
            return;
        }
        release();
        void* memory = mmap(
            nullptr, count * kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) {
            throw std::runtime_error("simt: no memory for the stacks of a block");
        }
        memory_ = static_cast<char*>(memory);
        count_ = count;
        const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
        for (unsigned i = 0; i < count; ++i) {
            mprotect(at(i), page, PROT_NONE);
        }
    }

private:
    void release() {
        if (memory_) {
#if defined(__SANITIZE_ADDRESS__)
            __asan_unpoison_memory_region(memory_, count_ * kStackBytes);
#endif
            munmap(memory_, count_ * kStackBytes);
            memory_ = nullptr;
            count_ = 0;
        }
    }

    char* memory_ = nullptr;
    unsigned count_ = 0;
};

}  // namespace simt
}  // namespace spatialflow
