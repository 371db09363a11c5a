// SPDX-License-Identifier: Apache-2.0
//
// Vector clocks: the order of the accesses of a block.
//
// Actors are the threads of the block, the wgmma unit of each warp (its time counts groups of products), and mbarriers
// (their time counts phases). The time of an actor never decreases. A thread stores, for every actor, the time up to
// which it has synchronized with that actor. An access of actor `a` at moment `m` is ordered before accesses of threads
// that have synchronized with `a` up to `m` or later.
//
// Most kernels order their warps only by __syncthreads, which the epochs of the shadow memory count (shadow.h). So at
// first a thread tracks only the lanes of its warp. It tracks all actors once the block uses mbarriers, named barriers,
// proxy fences or wgmma instructions.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace spatialflow {
namespace simt {

constexpr int kLanes = 32;
constexpr unsigned kMaxMemoryBarriers = 64;

class Clocks {
public:
    // Times of all actors that a thread or a phase of an mbarrier knows. `fenced` contains the times up to which
    // fence.proxy.async has made accesses visible to the asynchronous proxy.
    struct Row {
        std::vector<uint32_t> known, fenced;
    };

    void reset(unsigned threads) {
        warps_ = (threads + kLanes - 1) / kLanes;
        threads_ = warps_ * kLanes;
        tracks_all_ = false;
        width_ = kLanes;
        known_.assign(size_t{threads_} * width_, 0);
        at_barrier_.assign(threads_, 0);
        for (unsigned thread = 0; thread < threads_; ++thread) {
            time_of(thread) = 1;
        }
    }

    bool tracks_all() const { return tracks_all_; }
    unsigned num_warps() const { return warps_; }
    unsigned wgmma_unit(unsigned warp) const { return threads_ + warp; }
    unsigned memory_barrier(unsigned index) const { return threads_ + warps_ + index; }

    uint32_t now(unsigned thread) const { return known_[cell(thread, thread)]; }
    bool knows(unsigned thread, unsigned actor, uint32_t moment) const {
        return (tracks_all_ || thread / kLanes == actor / kLanes) && known_[cell(thread, actor)] >= moment;
    }
    bool knows_fenced(unsigned thread, unsigned actor, uint32_t moment) const {
        return fenced_[cell(thread, actor)] >= moment;
    }

    // Track actors of other warps from now on; their known times are those of the last __syncthreads.
    void track_all() {
        if (tracks_all_) {
            return;
        }
        const std::vector<uint32_t> lanes = std::move(known_);
        width_ = threads_ + warps_ + kMaxMemoryBarriers;
        known_.assign(size_t{threads_} * width_, 0);
        fenced_.assign(known_.size(), 0);
        tracks_all_ = true;
        for (unsigned thread = 0; thread < threads_; ++thread) {
            std::copy(at_barrier_.begin(), at_barrier_.end(), known_.begin() + thread * width_);
            for (unsigned lane = 0; lane < kLanes; ++lane) {
                uint32_t& moment = known_[cell(thread, thread / kLanes * kLanes + lane)];
                moment = std::max(moment, lanes[thread * kLanes + lane]);
            }
        }
        equal_times_.assign(warps_, false);
    }

    // Synchronize the lanes of `mask`.
    void synchronize_warp(unsigned warp, uint32_t mask) {
        const unsigned first = warp * kLanes;
        uint32_t latest = 0;
        for (unsigned lane = 0; lane < kLanes; ++lane) {
            latest = mask >> lane & 1u ? std::max(latest, now(first + lane)) : latest;
        }
        // Set the times of all lanes to the latest of them, so that all lanes have one time.
        for (unsigned lane = 0; lane < kLanes; ++lane) {
            if (mask >> lane & 1u) {
                time_of(first + lane) = latest;
            }
        }
        const bool whole = !tracks_all_ || !equal_times_[warp] || mask != 0xffffffffu;
        join(first, mask, known_, whole);
        if (tracks_all_ && whole) {
            join(first, mask, fenced_, true);
            equal_times_[warp] = mask == 0xffffffffu;
        }
        for (unsigned lane = 0; lane < kLanes; ++lane) {
            if (mask >> lane & 1u) {
                time_of(first + lane) = latest + 1;
            }
        }
    }

    // Synchronize all threads of the block.
    void synchronize_block() {
        if (tracks_all_) {
            std::vector<unsigned> all(threads_);
            for (unsigned thread = 0; thread < threads_; ++thread) {
                all[thread] = thread;
            }
            synchronize(all);
            return;
        }
        for (unsigned thread = 0; thread < threads_; ++thread) {
            at_barrier_[thread] = time_of(thread)++;
        }
    }

    // Synchronize `threads` with each other.
    void synchronize(const std::vector<unsigned>& threads) {
        Row together = empty_row();
        for (const unsigned thread : threads) {
            release(thread, together);
        }
        for (const unsigned thread : threads) {
            acquire(thread, together);
        }
    }

    Row empty_row() const { return {std::vector<uint32_t>(width_, 0), std::vector<uint32_t>(width_, 0)}; }
    // Merge the known times of the thread into `row`; later accesses are not included.
    void release(unsigned thread, Row& row) {
        raise(row.known.data(), known_.data() + size_t{thread} * width_);
        raise(row.fenced.data(), fenced_.data() + size_t{thread} * width_);
        ++time_of(thread);
    }
    void acquire(unsigned thread, const Row& row) {
        raise(known_.data() + size_t{thread} * width_, row.known.data());
        raise(fenced_.data() + size_t{thread} * width_, row.fenced.data());
        equal_times_[thread / kLanes] = false;
    }
    void acquire(unsigned thread, unsigned actor, uint32_t moment) {
        uint32_t& known = known_[cell(thread, actor)];
        known = std::max(known, moment);
        equal_times_[thread / kLanes] = false;
    }
    // Make the known times of the thread visible to the asynchronous proxy, for this thread and for threads that
    // synchronize with it later. Later accesses are not included.
    void fence(unsigned thread) {
        const auto row = known_.begin() + size_t{thread} * width_;
        std::copy(row, row + width_, fenced_.begin() + size_t{thread} * width_);
        ++time_of(thread);
        equal_times_[thread / kLanes] = false;
    }
    // Return whether two lanes of a warp have equal fenced times, and equal known times of all actors but the warp's
    // lanes.
    bool have_equal_times(unsigned a, unsigned b) const {
        const unsigned first_lane = a / kLanes * kLanes;
        const auto equal = [&](const std::vector<uint32_t>& rows, unsigned begin, unsigned end) {
            const auto first = rows.begin() + size_t{a} * width_, second = rows.begin() + size_t{b} * width_;
            return std::equal(first + begin, first + end, second + begin);
        };
        return equal(known_, 0, first_lane) && equal(known_, first_lane + kLanes, width_) && equal(fenced_, 0, width_);
    }
    // Return whether have_equal_times is true for every two lanes of a warp. equal_times_ stores a positive answer.
    bool have_equal_times(unsigned warp) {
        if (!equal_times_[warp]) {
            bool equal = true;
            for (unsigned lane = 1; lane < kLanes && equal; ++lane) {
                equal = have_equal_times(warp * kLanes, warp * kLanes + lane);
            }
            equal_times_[warp] = equal;
        }
        return equal_times_[warp];
    }

private:
    size_t cell(unsigned thread, unsigned actor) const {
        return size_t{thread} * width_ + (tracks_all_ ? actor : actor % kLanes);
    }
    uint32_t& time_of(unsigned thread) { return known_[cell(thread, thread)]; }

    void raise(uint32_t* target, const uint32_t* source) const {
        for (unsigned i = 0; i < width_; ++i) {
            target[i] = std::max(target[i], source[i]);
        }
    }

    // Set the rows of the lanes in `mask` to their maximum; without `whole`, only the columns of the warp's lanes.
    void join(unsigned first, uint32_t mask, std::vector<uint32_t>& rows, bool whole) {
        const unsigned begin = whole ? 0 : first, count = whole ? width_ : kLanes;
        joined_.assign(count, 0);
        for (unsigned lane = 0; lane < kLanes; ++lane) {
            if (mask >> lane & 1u) {
                const uint32_t* row = rows.data() + size_t{first + lane} * width_ + begin;
                for (unsigned i = 0; i < count; ++i) {
                    joined_[i] = std::max(joined_[i], row[i]);
                }
            }
        }
        for (unsigned lane = 0; lane < kLanes; ++lane) {
            if (mask >> lane & 1u) {
                std::copy(joined_.begin(), joined_.end(), rows.begin() + size_t{first + lane} * width_ + begin);
            }
        }
    }

    unsigned threads_ = 0, warps_ = 0, width_ = 0;
    bool tracks_all_ = false;
    std::vector<uint32_t> known_, fenced_;  // [thread][actor]
    std::vector<uint32_t> at_barrier_;      // time of each thread at the last __syncthreads
    std::vector<bool> equal_times_;         // for each warp: have_equal_times is known to be true
    std::vector<uint32_t> joined_;
};

}  // namespace simt
}  // namespace spatialflow
