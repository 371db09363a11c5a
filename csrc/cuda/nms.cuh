// SPDX-License-Identifier: Apache-2.0
//
// Block-wide functions of the NMS operators: the sort of a chunk of entries (also for select_candidates), and the
// greedy pass (nms, multiclass_nms).
#pragma once

#include <cstring>

#include "common/nms.h"
#include "cuda/platform.h"

namespace spatialflow {

constexpr int kGreedyThreads = 1024;
constexpr int kGreedyWarps = kGreedyThreads / kWarpSize;
constexpr int kChunk = 2 * kGreedyThreads;

template <typename real_t>
using ScoreKey = decltype(descending_key(real_t{}));

// Candidate ordered by its score; ties are ordered by row.
template <typename key_t>
struct Entry {
    key_t key;
    unsigned row;
};

template <typename key_t>
__host__ __device__ __forceinline__ bool operator<(const Entry<key_t>& a, const Entry<key_t>& b) {
    return a.key != b.key ? a.key < b.key : a.row < b.row;
}

template <typename entry_t>
__device__ __forceinline__ entry_t shuffle_xor(const entry_t& entry, int lanes) {
    constexpr int kWords = sizeof(entry_t) / sizeof(unsigned);
    unsigned words[kWords];
    memcpy(words, &entry, sizeof(entry_t));
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
        words[i] = __shfl_xor_sync(kAllLanes, words[i], lanes);
    }
    entry_t received;
    memcpy(&received, words, sizeof(entry_t));
    return received;
}

// Step of a bitonic sort for the entry at `index`: exchange it with that of another lane if the two are out of order.
template <typename entry_t>
__device__ __forceinline__ void exchange(entry_t& entry, int index, int width, int step) {
    const entry_t partner = shuffle_xor(entry, step);
    const bool takes_less = ((index & width) == 0) == ((index & step) == 0);
    if (takes_less ? partner < entry : entry < partner) {
        entry = partner;
    }
}

// Run the steps of the bitonic sort with distances below 64 in registers, for the widths from `first_width` to
// `last_width`. A warp has 64 adjacent entries, two per lane: lane l has entries l and l + 32.
template <typename entry_t>
__device__ __forceinline__ void sort_warps(Shared<entry_t> entries, int padded, int first_width, int last_width) {
    const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarpSize;
    for (int base = 2 * (thread - lane); base < padded; base += 2 * kGreedyThreads) {
        entry_t low = entries[base + lane], high = entries[base + kWarpSize + lane];
        for (int width = first_width; width <= last_width; width *= 2) {
            if (width > kWarpSize && ((base & width) == 0 ? high < low : low < high)) {
                const entry_t swapped = low;
                low = high;
                high = swapped;
            }
            for (int step = width < kWarpSize ? width / 2 : kWarpSize / 2; step > 0; step /= 2) {
                exchange(low, base + lane, width, step);
                exchange(high, base + kWarpSize + lane, width, step);
            }
        }
        entries[base + lane] = low;
        entries[base + kWarpSize + lane] = high;
    }
    __syncthreads();
}

constexpr int kMinPadded = 2 * kWarpSize;

// Sort `padded` entries, a power of two from kMinPadded to kChunk, by a bitonic sort of kGreedyThreads threads.
template <typename entry_t>
__device__ __forceinline__ void sort_chunk(Shared<entry_t> entries, int padded) {
    sort_warps<entry_t>(entries, padded, 2, kMinPadded);
    for (int width = 2 * kMinPadded; width <= padded; width *= 2) {
        for (int step = width / 2; step >= kMinPadded; step /= 2) {
            for (int pair = static_cast<int>(threadIdx.x); pair < padded / 2; pair += kGreedyThreads) {
                const int low = 2 * pair - (pair & (step - 1)), high = low + step;
                const entry_t a = entries[low], b = entries[high];
                const bool ascending = (low & width) == 0;
                if (ascending ? b < a : a < b) {
                    entries[low] = b;
                    entries[high] = a;
                }
            }
            __syncthreads();
        }
        sort_warps<entry_t>(entries, padded, width, width);
    }
}

// Candidate of a thread; within a label, thread indices are in score order.
template <typename real_t, typename label_t>
struct Candidate {
    Box<real_t> box;
    real_t area;
    label_t label;
    bool alive;  // neither suppressed nor kept so far; false if the thread has no candidate
};

// Return true if the candidate in shared memory at `suppressor` suppresses `candidate`.
template <typename real_t, typename label_t>
__device__ __forceinline__ bool is_suppressed_by(
    int suppressor, const Candidate<real_t, label_t>& candidate, Shared<Box<real_t>> boxes, real_t threshold) {
    const Box<real_t> box = boxes[suppressor];
    return suppresses(box, box_area(box), candidate.box, candidate.area, threshold);
}

constexpr int kLabelSlots = 256;
constexpr int kGreedySlots = 3 * kLabelSlots;

// Keep the first live candidate, drop the candidates of its label that it suppresses, and repeat. The pass ends when no
// candidate is alive or `limit` are kept. Each warp in order decides on its 32 candidates by votes, for all its labels
// at once. Then all later warps test their candidates against those that this warp kept, which needs one barrier per
// warp. A table by label modulo kLabelSlots gives the kept lanes that a candidate must be tested against. Return the
// number of kept candidates. `position` is the rank of this thread among them in order of threads, or -1. All threads
// of the block must call it.
template <typename real_t, typename label_t>
__device__ __forceinline__ int greedy_pass(
    Candidate<real_t, label_t> candidate, int limit, Shared<Box<real_t>> boxes, Shared<label_t> labels,
    Shared<unsigned> kept_of_warp,  // (kGreedyWarps)
    Shared<unsigned> slots,         // (kGreedySlots), three tables: kept lanes by label
    real_t threshold, int& position) {
    const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarpSize, warp = thread / kWarpSize;
    const int slot = static_cast<int>(static_cast<unsigned>(candidate.label) % kLabelSlots);
    boxes[thread] = candidate.box;
    labels[thread] = candidate.label;
    for (int i = thread; i < kGreedySlots; i += kGreedyThreads) {
        slots[i] = 0;
    }
    position = -1;
    int kept = 0;
    bool is_kept = false;
    const unsigned same_label = __match_any_sync(kAllLanes, candidate.label);
    __syncthreads();
    for (int deciding_warp = 0; deciding_warp < kGreedyWarps && kept < limit; ++deciding_warp) {
        const auto table = slots + deciding_warp % 3 * kLabelSlots;
        if (warp == deciding_warp) {
            for (unsigned alive; (alive = __ballot_sync(kAllLanes, candidate.alive)) != 0;) {
                const int best = __ffs(static_cast<int>(alive & same_label)) - 1;
                if (lane == best) {
                    is_kept = true;
                    candidate.alive = false;
                } else if (candidate.alive) {
                    candidate.alive = !is_suppressed_by(deciding_warp * kWarpSize + best, candidate, boxes, threshold);
                }
            }
            const unsigned kept_lanes = __ballot_sync(kAllLanes, is_kept);
            const int rank = kept + __popc(kept_lanes & ((1u << lane) - 1u));
            position = is_kept && rank < limit ? rank : -1;
            if (is_kept) {
                atomicOr(table + slot, 1u << lane);
            }
            if (lane == 0) {
                kept_of_warp[deciding_warp] = kept_lanes;
            }
        }
        __syncthreads();
        if (warp == deciding_warp - 1 && is_kept) {  // no warp reads the previous table now, or writes it next
            atomicExch(slots + (deciding_warp - 1) % 3 * kLabelSlots + slot, 0u);
        }
        if (warp > deciding_warp && candidate.alive) {
            for (unsigned left = table[slot]; candidate.alive && left != 0; left &= left - 1) {
                const int kept_thread = deciding_warp * kWarpSize + __ffs(static_cast<int>(left)) - 1;
                const label_t label = labels[kept_thread];
                candidate.alive =
                    label != candidate.label || !is_suppressed_by(kept_thread, candidate, boxes, threshold);
            }
        }
        const unsigned bits = kept_of_warp[deciding_warp];
        kept += __popc(bits);
    }
    __syncthreads();  // the arrays can be reused by the next call
    return kept < limit ? kept : limit;
}

}  // namespace spatialflow
