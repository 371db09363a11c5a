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
    enum State : uint8_t { kReady, kAtBarrier, kInCollective, kExited };

    Fiber fiber;
    uint3 index;
    unsigned linear = 0;
    Block* block = nullptr;
    State state = kReady;
    // What it waits for; valid while the state says so.
    const char* waits_in = nullptr;
    const void* slot_type = nullptr;
    void* slot = nullptr;
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
            if (switches_ == switches_before) {
                report(*first_waiting(), describe_deadlock());
            }
        }
        current_thread = nullptr;
        return !faulted_;
    }

    // ---- called from fibers ----

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
                fault(site, concatenate(name, ": mask ", hexadecimal(mask), " names lane ", other, ", which ",
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

    void synchronise_warp(uint32_t mask) { clocks_[current_thread->linear / kLanes].synchronise(mask); }

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
            fault(site, concatenate("out of bounds: ", bytes, " bytes at byte ", at - static_cast<int64_t>(begin),
                                    " of shared array '", array_name(begin), "' of ", end - begin, " bytes"));
        }
        if (__builtin_expect(at % static_cast<int64_t>(alignment) != 0, 0)) {
            fault(site, concatenate("misaligned: ", bytes, " bytes at byte ", at - static_cast<int64_t>(begin),
                                    " of shared array '", array_name(begin), "'"));
        }
    }
    void note_read(size_t at, size_t bytes, Shadow::Kind kind, Site site) {
        complain(shadow_.read(at, bytes, first_epoch_, toucher(), kind, site), at, site);
    }
    void note_write(size_t at, size_t bytes, Shadow::Kind kind, Site site) {
        complain(shadow_.write(at, bytes, toucher(), kind, site), at, site);
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
        clocks_.resize((wanted + kLanes - 1) / kLanes);
        for (WarpClock& clock : clocks_) {
            clock.reset();
        }
        first_epoch_ = ++epoch_;
        arrays_.assign(1, {nullptr, "dynamic shared memory", 0, launch.dynamic_shared_bytes});
        exited_ = at_barrier_ = 0;
        faulted_ = false;
        for (unsigned i = 0; i < wanted; ++i) {
            Thread& thread = threads_[i];
            thread.index = {i % launch.block.x, i / launch.block.x % launch.block.y,
                            i / (launch.block.x * launch.block.y)};
            thread.linear = i;
            thread.block = this;
            thread.state = Thread::kReady;
            thread.copies.clear();
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
                fault(current_thread->site,
                      concatenate("divergent barrier: ", name_of(other), " waits in ", other.waits_in, " at ",
                                  other.site.text(), ", other threads in ", current_thread->waits_in, " here"));
            }
            barrier_nonzero_ += threads_[i].predicate != 0;
        }
        for (unsigned i = 0; i < num_threads_; ++i) {
            threads_[i].state = Thread::kReady;
        }
        at_barrier_ = 0;
        ++epoch_;
    }

    Toucher toucher() const {
        const unsigned linear = current_thread->linear;
        return {epoch_, static_cast<uint16_t>(linear / kLanes), static_cast<uint16_t>(linear % kLanes),
                &clocks_[linear / kLanes]};
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

    void complain(const Shadow::Conflict& conflict, size_t at, Site site) {
        if (__builtin_expect(conflict.what != nullptr, 0)) {
            std::string text = concatenate(conflict.what);
            if (conflict.other.packed != 0) {
                text += concatenate(" ", conflict.other.text(), " by ", name_of(threads_[conflict.other_thread]));
            }
            fault(site, concatenate(text, " (shared array '", array_name(at), "')"));
        }
    }

    static std::string name_of(const Thread& thread) {
        return concatenate("thread (", thread.index.x, ", ", thread.index.y, ", ", thread.index.z, ")");
    }

    void report_at(const Thread& thread, Site site, const std::string& what) {
        faulted_ = true;
        launch_->report(concatenate("simt: kernel ", launch_->kernel, ", block (", index.x, ", ", index.y, ", ",
                                    index.z, "), ", name_of(thread), ", ", site.text(), ": ", what));
    }
    void report(const Thread& thread, const std::string& what) { report_at(thread, thread.site, what); }

    const Thread* first_waiting() const {
        const Thread* found = nullptr;
        for (unsigned i = 0; i < num_threads_; ++i) {
            const Thread& thread = threads_[i];
            if (thread.state == Thread::kInCollective) {
                return &thread;
            }
            if (thread.state == Thread::kAtBarrier && !found) {
                found = &thread;
            }
        }
        return found;
    }

    // No thread can go on: says who waits for whom.
    std::string describe_deadlock() const {
        const Thread& waiting = *first_waiting();
        const bool in_warp = waiting.state == Thread::kInCollective;
        const unsigned first = in_warp ? waiting.linear / kLanes * kLanes : 0;
        const unsigned last = in_warp ? std::min(num_threads_, first + kLanes) : num_threads_;
        for (unsigned i = first; i < last; ++i) {
            const Thread& other = threads_[i];
            if (in_warp && (waiting.mask >> (i - first) & 1u) == 0) {
                continue;
            }
            if (other.state == waiting.state && (!in_warp || (other.mask == waiting.mask &&
                                                              other.slot_type == waiting.slot_type))) {
                continue;
            }
            std::string where = " has exited";
            if (other.state == Thread::kAtBarrier) {
                where = concatenate(" waits in ", other.waits_in, " at ", other.site.text());
            } else if (other.state == Thread::kInCollective) {
                where = concatenate(" waits in ", other.waits_in, " with mask ", hexadecimal(other.mask), " at ",
                                    other.site.text());
            }
            return concatenate(
                waiting.waits_in, in_warp ? concatenate(" with mask ", hexadecimal(waiting.mask)) : std::string(),
                in_warp ? " is not reached by all its lanes: " : " is not reached by all threads: ", name_of(other),
                where);
        }
        return concatenate(waiting.waits_in, " never completes");
    }

    Launch* launch_ = nullptr;
    Stacks stacks_;
    Fiber scheduler_;
    std::unique_ptr<Thread[]> threads_;
    unsigned capacity_ = 0, num_threads_ = 0, exited_ = 0, at_barrier_ = 0;
    int barrier_nonzero_ = 0;
    uint64_t switches_ = 0;
    bool faulted_ = false;
    std::vector<WarpClock> clocks_;
    std::vector<Array> arrays_;
    std::unique_ptr<char[]> shared_;
    Shadow shadow_;
    uint32_t epoch_ = 0, first_epoch_ = 0;
};

inline Block& current_block() { return *current_thread->block; }

}  // namespace simt
}  // namespace spatialflow
