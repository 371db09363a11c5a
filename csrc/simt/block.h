// SPDX-License-Identifier: Apache-2.0
//
// Execution of one block: its threads as fibers, barriers, warp collectives and shared memory. A block runs on one OS
// thread. A fiber yields only where its thread waits for others, fails or exits, so execution is deterministic.
#pragma once

#include <atomic>
#include <cstdio>
#include <functional>
#include <memory>
#include <mutex>

#include "simt/async.h"
#include "simt/fiber.h"
#include "simt/shadow.h"

struct uint3 {
    unsigned x, y, z;
};

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace spatialflow {
namespace simt {

class Block;

struct Thread {
    enum State : uint8_t { kReady, kAtBarrier, kInCollective, kInWarpgroup, kWaiting, kExited };

    Fiber fiber;
    uint3 index;
    unsigned linear = 0;
    Block* block = nullptr;
    State state = kReady;
    // What the thread waits for, in all states except kReady and kExited.
    const char* waits_in = nullptr;
    const void* slot_type = nullptr;
    void* slot = nullptr;
    const void* object = nullptr;  // kWaiting: the object that wakes it
    uint32_t mask = 0;
    int predicate = 0;
    SourceLocation location;
    // Copy by a cp.async that is in flight.
    struct Copy {
        size_t target;
        unsigned bytes;
        alignas(16) char data[16];
        SourceLocation location;
    };
    std::vector<std::vector<Copy>> copies;  // by group, the open one last
    uint32_t wgmma_fences = 0;              // wgmma.fence instructions of the thread, plus one
};

// State of a launch, shared by the OS threads that run its blocks.
struct Launch {
    std::string kernel;
    dim3 grid, block;
    size_t dynamic_shared_bytes;
    std::function<void()> body;
    std::atomic<uint64_t> next_block{0};
    std::atomic<bool> failed{false};
    std::mutex mutex;
    std::string report_text;

    void report(const std::string& text) {
        const std::lock_guard<std::mutex> lock(mutex);
        if (!failed.exchange(true)) {
            report_text = text;
        }
    }
};

inline __attribute__((tls_model("initial-exec"))) thread_local Thread* current_thread = nullptr;

class Block {
public:
    uint3 index = {};

    const Launch& launch() const { return *launch_; }
    unsigned num_threads() const { return num_threads_; }

    // Run all threads of block `block_index`. A failure is reported to the launch, and false is returned.
    bool run(Launch& launch, uint3 block_index) {
        start(launch, block_index);
        while (exited_ < num_threads_ && !failed_) {
            const uint64_t switches_before = switches_;
            for (unsigned warp = 0; warp * kLanes < num_threads_ && !failed_; ++warp) {
                run_warp(warp * kLanes, std::min(num_threads_, (warp + 1) * kLanes));
            }
            if (switches_ == switches_before && !failed_ && !async.deliver_latest(*this)) {
                const Thread& cause = cause_of_deadlock();
                report_at(cause, cause.location, describe_deadlock(cause));
            }
        }
        if (!failed_) {
            async.check_end(*this);
        }
        current_thread = nullptr;
        return !failed_;
    }

    AsyncUnits async;

    // Report a failure of `thread`, which need not be the running thread.
    void report(unsigned thread, SourceLocation location, const std::string& what) {
        report_at(threads_[thread], location, what);
    }
    // Wake the threads that wait for `object`.
    void wake(const void* object) {
        for (unsigned i = 0; i < num_threads_; ++i) {
            if (threads_[i].state == Thread::kWaiting && threads_[i].object == object) {
                threads_[i].state = Thread::kReady;
            }
        }
    }
    Clocks& clocks() { return clocks_; }
    Shadow& shadow() { return shadow_; }
    Accessor accessor(unsigned thread) const {
        return {epoch_, first_epoch_, clocks_.tracks_all() ? tracking_epoch_ : epoch_, thread, &clocks_};
    }
    // Text of a report about offset `at`: the conflict, the other thread, and the array.
    std::string describe(const Shadow::Conflict& conflict, size_t at) const {
        std::string text = concatenate(conflict.what);
        if (conflict.location.packed != 0) {
            text += concatenate(" ", conflict.location.text(), " by ", name_of(threads_[conflict.thread]));
        }
        return concatenate(text, " (shared array '", array_name(at), "')");
    }

    // ---- called from fibers ----

    // Track the actors of all warps from here on (clocks.h).
    void track_all() {
        if (!clocks_.tracks_all()) {
            clocks_.track_all();
            tracking_epoch_ = epoch_;
        }
    }

    // Wait until wake(object) is called.
    void wait(const char* name, const void* object, SourceLocation location) {
        Thread& self = *current_thread;
        self.state = Thread::kWaiting;
        self.waits_in = name;
        self.object = object;
        self.location = location;
        yield();
    }

    // bar.sync: wait for `count` threads at barrier `id`.
    void named_barrier(unsigned id, unsigned count, SourceLocation location) {
        track_all();
        NamedBarrier& barrier = named_[id];
        if (count % kLanes != 0 || count == 0 || count > num_threads_) {
            fail(
                location,
                concatenate(
                    "bar.sync: ", count, " threads; must be a multiple of 32 up to the block size ", num_threads_));
        }
        if (!barrier.threads.empty() && barrier.count != count) {
            fail(
                location, concatenate(
                              "bar.sync: barrier ", id, " has a count of ", count, " here and of ", barrier.count,
                              " at ", threads_[barrier.threads[0]].location.text()));
        }
        barrier.count = count;
        barrier.threads.push_back(current_thread->linear);
        if (barrier.threads.size() < count) {
            wait("bar.sync", &barrier, location);
            return;
        }
        uint32_t warps = 0;
        for (const unsigned thread : barrier.threads) {
            warps |= 1u << thread / kLanes;
        }
        if (static_cast<unsigned>(__builtin_popcount(warps)) != count / kLanes) {
            fail(
                location, concatenate(
                              "bar.sync: ", count, " threads of ", __builtin_popcount(warps),
                              " warps have arrived; all lanes of a warp must"));
        }
        clocks_.synchronize(barrier.threads);
        barrier.threads.clear();
        wake(&barrier);
    }

    // Wait for the 128 threads of the warpgroup at the same line; the last thread calls complete(slots).
    template <typename Slot, typename Complete>
    void warpgroup_collective(const char* name, Slot& slot, SourceLocation location, Complete complete) {
        constexpr unsigned kThreads = 4 * kLanes;
        Thread& self = *current_thread;
        const unsigned first = self.linear / kThreads * kThreads;
        self.state = Thread::kInWarpgroup;
        self.waits_in = name;
        self.slot = &slot;
        self.location = location;
        if (first + kThreads > num_threads_) {
            fail(location, concatenate(name, ": the block has no whole warpgroup from thread ", first, " on"));
        }
        Slot* slots[kThreads];
        for (unsigned i = 0; i < kThreads; ++i) {
            const Thread& member = threads_[first + i];
            if (member.state == Thread::kExited) {
                fail(
                    location,
                    concatenate(
                        name, " needs all four warps of a warpgroup, and ", name_of(member), " of it has exited"));
            }
            if (member.state != Thread::kInWarpgroup) {
                yield();
                return;
            }
            if (member.location.packed != location.packed || member.waits_in != name) {
                fail(
                    location, concatenate(
                                  name, ": ", name_of(member), " of the same warpgroup is in ", member.waits_in, " at ",
                                  member.location.text()));
            }
            slots[i] = static_cast<Slot*>(member.slot);
        }
        complete(slots);
        for (unsigned i = 0; i < kThreads; ++i) {
            threads_[first + i].state = Thread::kReady;
        }
    }

    // Convert an address, as returned by shared_address, to an offset in the block's shared memory. `bytes` bytes from
    // there must be inside one array.
    size_t locate(int64_t address, size_t bytes, const char* what, SourceLocation location) {
        const int64_t at = address - kSharedWindow;
        for (const Array& array : arrays_) {
            if (at >= static_cast<int64_t>(array.begin) &&
                at + static_cast<int64_t>(bytes) <= static_cast<int64_t>(array.end)) {
                return static_cast<size_t>(at);
            }
        }
        fail(
            location, concatenate(
                          "out of bounds: ", what, ", ", bytes, " bytes at byte ", at,
                          " of the block's shared memory, is not inside one of its arrays"));
    }

    [[noreturn]] void fail(SourceLocation location, const std::string& what) {
        report_at(*current_thread, location, what);
        yield();
        __builtin_unreachable();
    }

    // Wait for all threads of the block; return the number of threads with a nonzero predicate.
    int barrier(const char* name, int predicate, SourceLocation location) {
        Thread& self = *current_thread;
        self.state = Thread::kAtBarrier;
        self.waits_in = name;
        self.location = location;
        self.predicate = predicate;
        if (++at_barrier_ < num_threads_) {
            yield();
        } else {
            release_barrier();
        }
        return barrier_nonzero_;
    }

    // Wait for the lanes in `mask`; the last lane calls complete(slots). slots[lane] points to the `slot` of a lane; it
    // is null outside the mask.
    template <typename Slot, typename Complete>
    void collective(const char* name, uint32_t mask, Slot& slot, SourceLocation location, Complete complete) {
        static const char slot_type = 0;
        Thread& self = *current_thread;
        const unsigned lane = self.linear % kLanes;
        if ((mask >> lane & 1u) == 0) {
            fail(location, concatenate(name, ": lane ", lane, " is not in its own mask ", hexadecimal(mask)));
        }
        self.state = Thread::kInCollective;
        self.waits_in = name;
        self.slot_type = &slot_type;
        self.slot = &slot;
        self.mask = mask;
        self.location = location;
        Thread* warp = threads_.get() + (self.linear - lane);
        const unsigned lanes = std::min<unsigned>(kLanes, num_threads_ - warp->linear);
        for (unsigned i = 0; i < kLanes; ++i) {
            if ((mask >> i & 1u) == 0) {
                continue;
            }
            if (i >= lanes || warp[i].state == Thread::kExited) {
                fail(
                    location, concatenate(
                                  name, ": mask ", hexadecimal(mask), " includes lane ", i, ", which ",
                                  i >= lanes ? "the block does not have" : "has exited"));
            }
            if (warp[i].state != Thread::kInCollective || warp[i].mask != mask || warp[i].slot_type != &slot_type) {
                yield();  // the last lane completes the collective for all
                return;
            }
        }
        Slot* slots[kLanes] = {};
        for (unsigned i = 0; i < lanes; ++i) {
            if (mask >> i & 1u) {
                slots[i] = static_cast<Slot*>(warp[i].slot);
            }
        }
        complete(slots);
        for (unsigned i = 0; i < lanes; ++i) {
            if (mask >> i & 1u) {
                warp[i].state = Thread::kReady;
            }
        }
    }

    void synchronize_warp(uint32_t mask) { clocks_.synchronize_warp(current_thread->linear / kLanes, mask); }

    // ---- shared memory, addressed by the offset from its first byte ----

    struct Array {
        const void* tag;
        const char* name;
        size_t begin, end;
    };

    // Return the array declared at `tag`, the same array for all threads. The first thread that calls allocates it.
    Array declare(const void* tag, const char* name, size_t bytes, SourceLocation location) {
        for (const Array& array : arrays_) {
            if (array.tag == tag) {
                return array;
            }
        }
        const size_t begin = (arrays_.back().end + 127) / 128 * 128;
        if (begin + bytes > kMaxSharedBytes) {
            fail(
                location,
                concatenate("shared memory: ", begin + bytes, " bytes in total, a block has ", kMaxSharedBytes));
        }
        arrays_.push_back({tag, name, begin, begin + bytes});
        return arrays_.back();
    }
    Array dynamic_array() const { return arrays_.front(); }

    char* shared_memory(size_t offset) { return shared_.get() + offset; }

    void check_shared(size_t begin, int64_t at, size_t end, size_t bytes, size_t alignment, SourceLocation location) {
        const int64_t after = at + static_cast<int64_t>(bytes);
        if (__builtin_expect(at < static_cast<int64_t>(begin) || after > static_cast<int64_t>(end), 0)) {
            fail(
                location, concatenate(
                              "out of bounds: ", bytes, " bytes at byte ", at - static_cast<int64_t>(begin),
                              " of shared array '", array_name(begin), "' of ", end - begin, " bytes"));
        }
        if (__builtin_expect(at % static_cast<int64_t>(alignment) != 0, 0)) {
            fail(
                location, concatenate(
                              "misaligned: ", bytes, " bytes at byte ", at - static_cast<int64_t>(begin),
                              " of shared array '", array_name(begin), "'"));
        }
    }
    void note_read(size_t at, size_t bytes, Shadow::Kind kind, SourceLocation location) {
        report_conflict(shadow_.read(at, bytes, accessor(current_thread->linear), kind, location), at, location);
    }
    void note_write(size_t at, size_t bytes, Shadow::Kind kind, SourceLocation location) {
        report_conflict(shadow_.write(at, bytes, accessor(current_thread->linear), kind, location), at, location);
    }
    void report_conflict(const Shadow::Conflict& conflict, size_t at, SourceLocation location) {
        if (__builtin_expect(conflict.what != nullptr, 0)) {
            fail(location, describe(conflict, at));
        }
    }

    static std::string hexadecimal(uint32_t mask) {
        char text[16];
        std::snprintf(text, sizeof(text), "0x%08x", mask);
        return text;
    }

private:
    void start(Launch& launch, uint3 block_index) {
        launch_ = &launch;
        index = block_index;
        const unsigned block_threads = launch.block.x * launch.block.y * launch.block.z;
        if (block_threads > capacity_) {
            threads_.reset(new Thread[block_threads]);
            capacity_ = block_threads;
        }
        stacks_.reserve(block_threads);
        if (!shared_) {
            shared_.reset(new char[kMaxSharedBytes]);
        }
        num_threads_ = block_threads;
        clocks_.reset(block_threads);
        first_epoch_ = tracking_epoch_ = ++epoch_;
        shadow_.forget_readers();
        async.reset();
        for (NamedBarrier& barrier : named_) {
            barrier.threads.clear();
        }
        arrays_.assign(1, {nullptr, "dynamic shared memory", 0, launch.dynamic_shared_bytes});
        exited_ = at_barrier_ = 0;
        failed_ = false;
        for (unsigned i = 0; i < block_threads; ++i) {
            Thread& thread = threads_[i];
            thread.index = {
                i % launch.block.x, i / launch.block.x % launch.block.y, i / (launch.block.x * launch.block.y)};
            thread.linear = i;
            thread.block = this;
            thread.state = Thread::kReady;
            thread.copies.clear();
            thread.wgmma_fences = 1;
            thread.fiber.prepare(stacks_.at(i), &Block::enter);
        }
    }

    void run_warp(unsigned begin, unsigned end) {
        for (bool progress = true; progress && !failed_;) {
            progress = false;
            for (unsigned i = begin; i < end && !failed_; ++i) {
                if (threads_[i].state == Thread::kReady) {
                    progress = true;
                    ++switches_;
                    current_thread = &threads_[i];
                    Fiber::swap(scheduler_, threads_[i].fiber);
                }
            }
        }
    }

    void yield() { Fiber::swap(current_thread->fiber, scheduler_); }

    static void enter() {
        Thread& self = *current_thread;
        Fiber::entered(self.block->scheduler_);
        self.block->launch_->body();
        self.block->exit();
    }

    void exit() {
        current_thread->state = Thread::kExited;
        ++exited_;
        yield();
        __builtin_unreachable();
    }

    void release_barrier() {
        barrier_nonzero_ = 0;
        for (unsigned i = 0; i < num_threads_; ++i) {
            if (threads_[i].location.packed != current_thread->location.packed) {
                const Thread& divergent = threads_[i];
                fail(
                    current_thread->location,
                    concatenate(
                        "divergent barrier: ", name_of(divergent), " waits in ", divergent.waits_in, " at ",
                        divergent.location.text(), ", other threads in ", current_thread->waits_in, " here"));
            }
            barrier_nonzero_ += threads_[i].predicate != 0;
        }
        for (unsigned i = 0; i < num_threads_; ++i) {
            threads_[i].state = Thread::kReady;
        }
        at_barrier_ = 0;
        clocks_.synchronize_block();
        ++epoch_;
    }

    const char* array_name(size_t at) const {
        const char* name = arrays_.front().name;
        for (const Array& array : arrays_) {
            if (array.begin <= at && at < array.end) {
                name = array.name;
            }
        }
        return name;
    }

    static std::string name_of(const Thread& thread) {
        return concatenate("thread (", thread.index.x, ", ", thread.index.y, ", ", thread.index.z, ")");
    }

    void report_at(const Thread& thread, SourceLocation location, const std::string& what) {
        failed_ = true;
        launch_->report(concatenate(
            "simt: kernel ", launch_->kernel, ", block (", index.x, ", ", index.y, ", ", index.z, "), ",
            name_of(thread), ", ", location.text(), ": ", what));
    }
    // Return a thread that is missing from the block barrier, collective or warpgroup in which `waiting` waits; or
    // null.
    const Thread* absent_for(const Thread& waiting) const {
        unsigned first = 0, last = num_threads_;
        if (waiting.state != Thread::kAtBarrier) {
            const unsigned count = waiting.state == Thread::kInCollective ? kLanes : 4 * kLanes;
            first = waiting.linear / count * count;
            last = std::min(num_threads_, first + count);
        }
        for (unsigned i = first; i < last; ++i) {
            const Thread& thread = threads_[i];
            const bool in_collective = waiting.state == Thread::kInCollective;
            if (in_collective && (waiting.mask >> (i - first) & 1u) == 0) {
                continue;
            }
            if (thread.state != waiting.state ||
                (in_collective && (thread.mask != waiting.mask || thread.slot_type != waiting.slot_type))) {
                return &thread;
            }
        }
        return nullptr;
    }

    // Return the thread to report for a deadlock: one in a collective, else at a block barrier, else in wait(). If the
    // thread missing from a collective or barrier is in wait(), that wait is nearer to the cause.
    const Thread& cause_of_deadlock() const {
        const Thread* cause = nullptr;
        for (unsigned i = 0; i < num_threads_; ++i) {
            const Thread& thread = threads_[i];
            if (thread.state == Thread::kInCollective || thread.state == Thread::kInWarpgroup ||
                thread.state == Thread::kAtBarrier) {
                const Thread* absent = absent_for(thread);
                if (!absent || absent->state != Thread::kWaiting) {
                    const bool better = !cause || cause->state == Thread::kWaiting ||
                                        (cause->state == Thread::kAtBarrier && thread.state != Thread::kAtBarrier);
                    cause = better ? &thread : cause;
                }
            } else if (thread.state == Thread::kWaiting && !cause) {
                cause = &thread;
            }
        }
        return *cause;
    }

    std::string describe_deadlock(const Thread& waiting) const {
        std::string barriers = async.describe();
        for (const NamedBarrier& barrier : named_) {
            if (!barrier.threads.empty()) {
                barriers += concatenate(
                    "\n  barrier ", &barrier - named_, ": ", barrier.threads.size(), " of ", barrier.count,
                    " threads have arrived");
            }
        }
        if (waiting.state == Thread::kWaiting) {
            return concatenate("deadlock: ", waiting.waits_in, " never returns", barriers);
        }
        const bool in_collective = waiting.state == Thread::kInCollective;
        const std::string mask = in_collective ? concatenate(" with mask ", hexadecimal(waiting.mask)) : std::string();
        const Thread* absent = absent_for(waiting);
        if (!absent) {
            return concatenate(waiting.waits_in, mask, " never completes", barriers);
        }
        std::string absent_state = " has exited";
        if (absent->state != Thread::kExited) {
            absent_state = concatenate(
                " waits in ", absent->waits_in,
                absent->state == Thread::kInCollective ? concatenate(" with mask ", hexadecimal(absent->mask))
                                                       : std::string(),
                " at ", absent->location.text());
        }
        const char* group_name = in_collective                           ? "its lanes"
                                 : waiting.state == Thread::kInWarpgroup ? "threads of the warpgroup"
                                                                         : "threads";
        return concatenate(
            waiting.waits_in, mask, " is not reached by all ", group_name, ": ", name_of(*absent), absent_state,
            barriers);
    }

    Launch* launch_ = nullptr;
    Stacks stacks_;
    Fiber scheduler_;
    std::unique_ptr<Thread[]> threads_;
    unsigned capacity_ = 0, num_threads_ = 0, exited_ = 0, at_barrier_ = 0;
    int barrier_nonzero_ = 0;
    uint64_t switches_ = 0;
    bool failed_ = false;
    Clocks clocks_;
    struct NamedBarrier {
        unsigned count = 0;
        std::vector<unsigned> threads;  // that have arrived
    };
    NamedBarrier named_[16];
    std::vector<Array> arrays_;
    std::unique_ptr<char[]> shared_;
    Shadow shadow_;
    uint32_t epoch_ = 0, first_epoch_ = 0, tracking_epoch_ = 0;
};

inline Block& current_block() { return *current_thread->block; }

}  // namespace simt
}  // namespace spatialflow
