// SPDX-License-Identifier: Apache-2.0
//
// One block: its threads as fibers, its barriers and warp collectives, its shared memory. A block runs on one OS
// thread. Fibers give way only where CUDA threads wait for one another, so a run is repeatable.
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
    // What it waits for; valid while the state says so.
    const char* waits_in = nullptr;
    const void* slot_type = nullptr;
    void* slot = nullptr;
    const void* object = nullptr;  // kWaiting: what may wake it
    uint32_t mask = 0;
    int predicate = 0;
    Site site;
    // Copies that cp.async has started: done when waited for.
    struct Copy {
        size_t target;
        unsigned bytes;
        alignas(16) char data[16];
        Site site;
    };
    std::vector<std::vector<Copy>> copies;  // by group, the open one last
    uint32_t wgmma_fences = 0;              // counted from one on
};

// The launch that a block belongs to, shared by the OS threads that run its blocks.
struct Launch {
    std::string kernel;
    dim3 grid, block;
    size_t dynamic_shared_bytes;
    std::function<void()> body;
    std::atomic<uint64_t> next_block{0};
    std::atomic<bool> failed{false};
    std::mutex mutex;
    std::string fault;

    void report(const std::string& text) {
        const std::lock_guard<std::mutex> lock(mutex);
        if (!failed.exchange(true)) {
            fault = text;
        }
    }
};

inline __attribute__((tls_model("initial-exec"))) thread_local Thread* current_thread = nullptr;

class Block {
public:
    uint3 index = {};

    const Launch& launch() const { return *launch_; }
    unsigned num_threads() const { return num_threads_; }

    // Runs all threads of block `block_index`; false after a fault, which the launch then holds.
    bool run(Launch& launch, uint3 block_index) {
        start(launch, block_index);
        while (exited_ < num_threads_ && !faulted_) {
            const uint64_t switches_before = switches_;
            for (unsigned warp = 0; warp * kLanes < num_threads_ && !faulted_; ++warp) {
                run_warp(warp * kLanes, std::min(num_threads_, (warp + 1) * kLanes));
            }
            if (switches_ == switches_before && !faulted_ && !async.deliver_latest(*this)) {
                const Thread& cause = cause_of_deadlock();
                report_at(cause, cause.site, describe_deadlock(cause));
            }
        }
        if (!faulted_) {
            async.check_end(*this);
        }
        current_thread = nullptr;
        return !faulted_;
    }

    AsyncUnits async;

    // A fault that no running thread has: `thread` has started what went wrong.
    void report(unsigned thread, Site site, const std::string& what) { report_at(threads_[thread], site, what); }
    // Lets the threads go on that wait for `object`.
    void wake(const void* object) {
        for (unsigned i = 0; i < num_threads_; ++i) {
            if (threads_[i].state == Thread::kWaiting && threads_[i].object == object) {
                threads_[i].state = Thread::kReady;
            }
        }
    }
    Clocks& clocks() { return clocks_; }
    Shadow& shadow() { return shadow_; }
    Toucher toucher(unsigned thread) const {
        return {epoch_, first_epoch_, clocks_.tracks_all() ? tracking_epoch_ : epoch_, thread, &clocks_};
    }
    // Of a report about place `at`: what `conflict` says, with the other thread and the array.
    std::string describe(const Shadow::Conflict& conflict, size_t at) const {
        std::string text = concatenate(conflict.what);
        if (conflict.other.packed != 0) {
            text += concatenate(" ", conflict.other.text(), " by ", name_of(threads_[conflict.other_thread]));
        }
        return concatenate(text, " (shared array '", array_name(at), "')");
    }

    // ---- called from fibers ----

    // Actors of all warps matter from here on (clocks.h).
    void track_all() {
        if (!clocks_.tracks_all()) {
            clocks_.track_all();
            tracking_epoch_ = epoch_;
        }
    }

    // Until wake(object).
    void wait(const char* name, const void* object, Site site) {
        Thread& self = *current_thread;
        self.state = Thread::kWaiting;
        self.waits_in = name;
        self.object = object;
        self.site = site;
        yield();
    }

    // bar.sync: waits for `count` threads at barrier `id`.
    void named_barrier(unsigned id, unsigned count, Site site) {
        track_all();
        NamedBarrier& barrier = named_[id];
        if (count % kLanes != 0 || count == 0 || count > num_threads_) {
            fault(
                site, concatenate("bar.sync: ", count, " threads; a multiple of 32 up to the block's ", num_threads_));
        }
        if (!barrier.threads.empty() && barrier.count != count) {
            fault(
                site, concatenate(
                          "bar.sync: barrier ", id, " is for ", count, " threads here and for ", barrier.count, " at ",
                          threads_[barrier.threads[0]].site.text()));
        }
        barrier.count = count;
        barrier.threads.push_back(current_thread->linear);
        if (barrier.threads.size() < count) {
            wait("bar.sync", &barrier, site);
            return;
        }
        uint32_t warps = 0;
        for (const unsigned thread : barrier.threads) {
            warps |= 1u << thread / kLanes;
        }
        if (static_cast<unsigned>(__builtin_popcount(warps)) != count / kLanes) {
            fault(
                site, concatenate(
                          "bar.sync: ", count, " threads of ", __builtin_popcount(warps),
                          " warps have come: it is for whole warps"));
        }
        clocks_.synchronize(barrier.threads);
        barrier.threads.clear();
        wake(&barrier);
    }

    // Waits for the 128 threads of the warpgroup, at the same line; the last one to come calls complete(slots).
    template <typename Slot, typename Complete>
    void warpgroup_collective(const char* name, Slot& slot, Site site, Complete complete) {
        constexpr unsigned kThreads = 4 * kLanes;
        Thread& self = *current_thread;
        const unsigned first = self.linear / kThreads * kThreads;
        self.state = Thread::kInWarpgroup;
        self.waits_in = name;
        self.slot = &slot;
        self.site = site;
        if (first + kThreads > num_threads_) {
            fault(site, concatenate(name, ": the block has no whole warpgroup from thread ", first, " on"));
        }
        Slot* slots[kThreads];
        for (unsigned i = 0; i < kThreads; ++i) {
            const Thread& other = threads_[first + i];
            if (other.state == Thread::kExited) {
                fault(
                    site,
                    concatenate(
                        name, " is for all four warps of a warpgroup, and ", name_of(other), " of it has exited"));
            }
            if (other.state != Thread::kInWarpgroup) {
                yield();
                return;
            }
            if (other.site.packed != site.packed || other.waits_in != name) {
                fault(
                    site, concatenate(
                              name, ": ", name_of(other), " of the same warpgroup is in ", other.waits_in, " at ",
                              other.site.text()));
            }
            slots[i] = static_cast<Slot*>(other.slot);
        }
        complete(slots);
        for (unsigned i = 0; i < kThreads; ++i) {
            threads_[first + i].state = Thread::kReady;
        }
    }

    // Offset in the block's memory of `bytes` bytes at an address of the shared window, which lie in one array.
    size_t locate(int64_t address, size_t bytes, const char* what, Site site) {
        const int64_t at = address - kSharedWindow;
        for (const Array& array : arrays_) {
            if (at >= static_cast<int64_t>(array.begin) &&
                at + static_cast<int64_t>(bytes) <= static_cast<int64_t>(array.end)) {
                return static_cast<size_t>(at);
            }
        }
        fault(
            site, concatenate(
                      "out of bounds: ", what, ", ", bytes, " bytes at byte ", at,
                      " of the block's shared memory, lies in none of its arrays"));
    }

    [[noreturn]] void fault(Site site, const std::string& what) {
        report_at(*current_thread, site, what);
        yield();
        __builtin_unreachable();
    }

    // Waits for all threads of the block; returns how many of them brought a predicate that is not zero.
    int barrier(const char* name, int predicate, Site site) {
        Thread& self = *current_thread;
        self.state = Thread::kAtBarrier;
        self.waits_in = name;
        self.site = site;
        self.predicate = predicate;
        if (++at_barrier_ < num_threads_) {
            yield();
        } else {
            release_barrier();
        }
        return barrier_nonzero_;
    }

    // Waits for the lanes in `mask`; the last one to come calls complete(slots), slots[lane] being each lane's `slot`
    // (null for lanes outside the mask).
    template <typename Slot, typename Complete>
    void collective(const char* name, uint32_t mask, Slot& slot, Site site, Complete complete) {
        static const char slot_type = 0;
        Thread& self = *current_thread;
        const unsigned lane = self.linear % kLanes;
        if ((mask >> lane & 1u) == 0) {
            fault(site, concatenate(name, ": lane ", lane, " is not in its own mask ", hexadecimal(mask)));
        }
        self.state = Thread::kInCollective;
        self.waits_in = name;
        self.slot_type = &slot_type;
        self.slot = &slot;
        self.mask = mask;
        self.site = site;
        Thread* warp = threads_.get() + (self.linear - lane);
        const unsigned lanes = std::min<unsigned>(kLanes, num_threads_ - warp->linear);
        for (unsigned other = 0; other < kLanes; ++other) {
            if ((mask >> other & 1u) == 0) {
                continue;
            }
            if (other >= lanes || warp[other].state == Thread::kExited) {
                fault(
                    site, concatenate(
                              name, ": mask ", hexadecimal(mask), " names lane ", other, ", which ",
                              other >= lanes ? "the block does not have" : "has exited"));
            }
            if (warp[other].state != Thread::kInCollective || warp[other].mask != mask ||
                warp[other].slot_type != &slot_type) {
                yield();  // not all are here: the last one completes for all
                return;
            }
        }
        Slot* slots[kLanes] = {};
        for (unsigned other = 0; other < lanes; ++other) {
            if (mask >> other & 1u) {
                slots[other] = static_cast<Slot*>(warp[other].slot);
            }
        }
        complete(slots);
        for (unsigned other = 0; other < lanes; ++other) {
            if (mask >> other & 1u) {
                warp[other].state = Thread::kReady;
            }
        }
    }

    void synchronize_warp(uint32_t mask) { clocks_.synchronize_warp(current_thread->linear / kLanes, mask); }

    // ---- shared memory: offsets into the block's own ----

    struct Array {
        const void* tag;
        const char* name;
        size_t begin, end;
    };

    // The array declared at `tag`: the same for all threads, laid out by the first one that gets there.
    Array declare(const void* tag, const char* name, size_t bytes, Site site) {
        for (const Array& array : arrays_) {
            if (array.tag == tag) {
                return array;
            }
        }
        const size_t begin = (arrays_.back().end + 127) / 128 * 128;
        if (begin + bytes > kMaxSharedBytes) {
            fault(site, concatenate("shared memory: ", begin + bytes, " bytes in all, a block has ", kMaxSharedBytes));
        }
        arrays_.push_back({tag, name, begin, begin + bytes});
        return arrays_.back();
    }
    Array dynamic_array() const { return arrays_.front(); }

    char* shared_memory(size_t offset) { return shared_.get() + offset; }

    void check_shared(size_t begin, int64_t at, size_t end, size_t bytes, size_t alignment, Site site) {
        const int64_t after = at + static_cast<int64_t>(bytes);
        if (__builtin_expect(at < static_cast<int64_t>(begin) || after > static_cast<int64_t>(end), 0)) {
            fault(
                site, concatenate(
                          "out of bounds: ", bytes, " bytes at byte ", at - static_cast<int64_t>(begin),
                          " of shared array '", array_name(begin), "' of ", end - begin, " bytes"));
        }
        if (__builtin_expect(at % static_cast<int64_t>(alignment) != 0, 0)) {
            fault(
                site, concatenate(
                          "misaligned: ", bytes, " bytes at byte ", at - static_cast<int64_t>(begin),
                          " of shared array '", array_name(begin), "'"));
        }
    }
    void note_read(size_t at, size_t bytes, Shadow::Kind kind, Site site) {
        complain(shadow_.read(at, bytes, toucher(current_thread->linear), kind, site), at, site);
    }
    void note_write(size_t at, size_t bytes, Shadow::Kind kind, Site site) {
        complain(shadow_.write(at, bytes, toucher(current_thread->linear), kind, site), at, site);
    }
    void complain(const Shadow::Conflict& conflict, size_t at, Site site) {
        if (__builtin_expect(conflict.what != nullptr, 0)) {
            fault(site, describe(conflict, at));
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
        const unsigned wanted = launch.block.x * launch.block.y * launch.block.z;
        if (wanted > capacity_) {
            threads_.reset(new Thread[wanted]);
            capacity_ = wanted;
        }
        stacks_.reserve(wanted);
        if (!shared_) {
            shared_.reset(new char[kMaxSharedBytes]);
        }
        num_threads_ = wanted;
        clocks_.reset(wanted);
        first_epoch_ = tracking_epoch_ = ++epoch_;
        shadow_.forget_readers();
        async.reset();
        for (NamedBarrier& barrier : named_) {
            barrier.threads.clear();
        }
        arrays_.assign(1, {nullptr, "dynamic shared memory", 0, launch.dynamic_shared_bytes});
        exited_ = at_barrier_ = 0;
        faulted_ = false;
        for (unsigned i = 0; i < wanted; ++i) {
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
        for (bool progress = true; progress && !faulted_;) {
            progress = false;
            for (unsigned i = begin; i < end && !faulted_; ++i) {
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
            if (threads_[i].site.packed != current_thread->site.packed) {
                const Thread& other = threads_[i];
                fault(
                    current_thread->site,
                    concatenate(
                        "divergent barrier: ", name_of(other), " waits in ", other.waits_in, " at ", other.site.text(),
                        ", other threads in ", current_thread->waits_in, " here"));
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

    void report_at(const Thread& thread, Site site, const std::string& what) {
        faulted_ = true;
        launch_->report(concatenate(
            "simt: kernel ", launch_->kernel, ", block (", index.x, ", ", index.y, ", ", index.z, "), ",
            name_of(thread), ", ", site.text(), ": ", what));
    }
    // Of those that `waiting` waits for in a barrier of the block, a collective or a warpgroup: one that does not come.
    const Thread* absent_for(const Thread& waiting) const {
        unsigned first = 0, last = num_threads_;
        if (waiting.state != Thread::kAtBarrier) {
            const unsigned count = waiting.state == Thread::kInCollective ? kLanes : 4 * kLanes;
            first = waiting.linear / count * count;
            last = std::min(num_threads_, first + count);
        }
        for (unsigned i = first; i < last; ++i) {
            const Thread& other = threads_[i];
            const bool in_collective = waiting.state == Thread::kInCollective;
            if (in_collective && (waiting.mask >> (i - first) & 1u) == 0) {
                continue;
            }
            if (other.state != waiting.state ||
                (in_collective && (other.mask != waiting.mask || other.slot_type != waiting.slot_type))) {
                return &other;
            }
        }
        return nullptr;
    }

    // No thread can go on: one that is the cause, as others wait for it or it for none of them.
    const Thread& cause_of_deadlock() const {
        const Thread* found = nullptr;
        for (unsigned i = 0; i < num_threads_; ++i) {
            const Thread& thread = threads_[i];
            if (thread.state == Thread::kInCollective || thread.state == Thread::kInWarpgroup ||
                thread.state == Thread::kAtBarrier) {
                const Thread* absent = absent_for(thread);
                if (!absent || absent->state != Thread::kWaiting) {
                    const bool better = !found || found->state == Thread::kWaiting ||
                                        (found->state == Thread::kAtBarrier && thread.state != Thread::kAtBarrier);
                    found = better ? &thread : found;
                }
            } else if (thread.state == Thread::kWaiting && !found) {
                found = &thread;
            }
        }
        return *found;
    }

    std::string describe_deadlock(const Thread& waiting) const {
        std::string barriers = async.describe();
        for (const NamedBarrier& barrier : named_) {
            if (!barrier.threads.empty()) {
                barriers += concatenate(
                    "\n  barrier ", &barrier - named_, ": ", barrier.threads.size(), " of ", barrier.count,
                    " threads have come");
            }
        }
        if (waiting.state == Thread::kWaiting) {
            return concatenate("deadlock: ", waiting.waits_in, " never ends", barriers);
        }
        const bool in_collective = waiting.state == Thread::kInCollective;
        const std::string mask = in_collective ? concatenate(" with mask ", hexadecimal(waiting.mask)) : std::string();
        const Thread* absent = absent_for(waiting);
        if (!absent) {
            return concatenate(waiting.waits_in, mask, " never completes", barriers);
        }
        std::string where = " has exited";
        if (absent->state != Thread::kExited) {
            where = concatenate(
                " waits in ", absent->waits_in,
                absent->state == Thread::kInCollective ? concatenate(" with mask ", hexadecimal(absent->mask))
                                                       : std::string(),
                " at ", absent->site.text());
        }
        const char* all = in_collective                           ? "its lanes"
                          : waiting.state == Thread::kInWarpgroup ? "threads of the warpgroup"
                                                                  : "threads";
        return concatenate(
            waiting.waits_in, mask, " is not reached by all ", all, ": ", name_of(*absent), where, barriers);
    }

    Launch* launch_ = nullptr;
    Stacks stacks_;
    Fiber scheduler_;
    std::unique_ptr<Thread[]> threads_;
    unsigned capacity_ = 0, num_threads_ = 0, exited_ = 0, at_barrier_ = 0;
    int barrier_nonzero_ = 0;
    uint64_t switches_ = 0;
    bool faulted_ = false;
    Clocks clocks_;
    struct NamedBarrier {
        unsigned count = 0;
        std::vector<unsigned> threads;  // that have come
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
