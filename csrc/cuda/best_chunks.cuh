// SPDX-License-Identifier: Apache-2.0
//
// Selection of the best entries of a list in order, a chunk at a time, by one thread block. A radix select finds the
// next best 2048 entries or fewer, which are then sorted in shared memory. Entries are compared by (key, row), so ties
// do not occur and the order of the list does not matter.
#pragma once

#include "cuda/nms.cuh"

namespace spatialflow {

template <typename key_t>
constexpr int kEntriesAhead = sizeof(key_t) == 4 ? 4 : 1;  // entries that a thread loads before it uses the first one
constexpr int kDigitBits = 11;
constexpr int kBins = 1 << kDigitBits;
static_assert(kBins == 2 * kGreedyThreads, "a thread sums two bins");
constexpr int kCutWords = 3;

// Call body(entry) for all entries, distributed over the threads of the block.
template <typename key_t, typename Body>
__device__ __forceinline__ void for_each_entry(
    Global<const key_t> keys, Global<const unsigned> rows, unsigned count, const Body& body) {
    constexpr int kAhead = kEntriesAhead<key_t>;
    for (int64_t first = threadIdx.x; first < count; first += kAhead * kGreedyThreads) {  // 32 bits could wrap around
        Entry<key_t> entries[kAhead];
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            const int64_t at = first + i * kGreedyThreads;
            if (at < count) {
                entries[i] = {keys[at], rows[at]};
            }
        }
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            if (first + i * kGreedyThreads < count) {
                body(entries[i]);
            }
        }
    }
}

// Return the sum of `value` over the threads before this one, and set `total` to the sum over all threads. `sums` is
// scratch, (kGreedyWarps). All threads of the block must call it.
__device__ __forceinline__ unsigned sum_before(unsigned value, Shared<unsigned> sums, unsigned& total) {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize, warp = static_cast<int>(threadIdx.x) / kWarpSize;
    unsigned inclusive = value;
    for (int step = 1; step < kWarpSize; step *= 2) {
        const unsigned preceding = __shfl_up_sync(kAllLanes, inclusive, static_cast<unsigned>(step));
        inclusive += lane >= step ? preceding : 0u;
    }
    if (lane == kWarpSize - 1) {
        sums[warp] = inclusive;
    }
    __syncthreads();
    unsigned before = 0;
    total = 0;
    for (int w = 0; w < kGreedyWarps; ++w) {
        const unsigned sum = sums[w];
        before += w < warp ? sum : 0u;
        total += sum;
    }
    __syncthreads();
    return before + inclusive - value;
}

// Find `end` such that [begin, end) has 1 to kChunk entries. If all remaining entries fit, `end` is beyond all of them.
// Return false if no entry remains. All threads of the block must call it and get the same result.
template <typename key_t>
__device__ __forceinline__ bool select_chunk(
    Global<const key_t> keys, Global<const unsigned> rows, unsigned count, const Entry<key_t>& begin,
    Shared<unsigned> histogram,  // (kBins)
    Shared<unsigned> sums,       // (kGreedyWarps)
    Shared<unsigned> cut,        // (kCutWords): first bin that does not fit; number of entries before it; unused
    Entry<key_t>& end) {
    constexpr int kKeyBits = static_cast<int>(8 * sizeof(key_t)), kRowBits = 32;
    const int thread = static_cast<int>(threadIdx.x);
    end = {0, 0};
    for (int fixed = 0; fixed < kKeyBits + kRowBits;) {  // leading bits of (key, row) already fixed in `end`
        const bool in_key = fixed < kKeyBits;
        const int left = in_key ? kKeyBits - fixed : kKeyBits + kRowBits - fixed;
        const int bits = left < kDigitBits ? left : kDigitBits, shift = left - bits;
        histogram[2 * thread] = 0;
        histogram[2 * thread + 1] = 0;
        if (thread == 0) {
            cut[0] = kBins;
        }
        __syncthreads();
        for_each_entry(keys, rows, count, [&](const Entry<key_t>& entry) {
            if (entry < begin) {
                return;
            }
            unsigned digit;
            if (in_key) {
                const key_t high = entry.key >> shift;
                if (fixed > 0 && (high >> bits) != (end.key >> shift >> bits)) {
                    return;
                }
                digit = static_cast<unsigned>(high) & ((1u << bits) - 1u);
            } else {
                const unsigned high = entry.row >> shift;
                if (entry.key != end.key || (fixed > kKeyBits && (high >> bits) != (end.row >> shift >> bits))) {
                    return;
                }
                digit = high & ((1u << bits) - 1u);
            }
            atomicAdd(histogram + digit, 1u);  // one ATOMS.POPC.INC counts the lanes with the same bin
        });
        __syncthreads();
        const unsigned first = histogram[2 * thread], second = histogram[2 * thread + 1];
        unsigned total;
        const unsigned before = sum_before(first + second, sums, total);
        if (before <= kChunk && before + first + second > kChunk) {
            const bool at_first = before + first > kChunk;
            cut[0] = static_cast<unsigned>(2 * thread + (at_first ? 0 : 1));
            cut[1] = at_first ? before : before + first;
        }
        __syncthreads();
        const unsigned bin = cut[0];
        // All remaining entries fit. This happens only in the first round: later rounds split a bin that does not fit.
        if (bin == kBins) {
            end = {~key_t(0), ~0u};
            __syncthreads();
            return total > 0;
        }
        const unsigned taken = cut[1];
        __syncthreads();
        if (in_key) {
            end.key |= static_cast<key_t>(bin) << shift;
        } else {
            end.row |= bin << shift;
        }
        if (taken > 0) {
            return true;
        }
        fixed += bits;
    }
    return true;
}

// Write the best of the entries from `begin` on, in order, to `chunk`, and move `begin` past them. Return their number,
// at most kChunk; 0 if no entry remains. All threads of the block must call it.
template <typename key_t>
__device__ __forceinline__ int next_chunk(
    Global<const key_t> keys, Global<const unsigned> rows, unsigned count, Entry<key_t>& begin,
    Shared<Entry<key_t>> chunk,  // (kChunk)
    Shared<unsigned> histogram,  // (kBins)
    Shared<unsigned> sums,       // (kGreedyWarps)
    Shared<unsigned> cut) {      // (kCutWords): two words for select_chunk; number of gathered entries
    const int thread = static_cast<int>(threadIdx.x);
    Entry<key_t> end;
    if (!select_chunk(keys, rows, count, begin, histogram, sums, cut, end)) {
        return 0;
    }
    const auto gathered = cut + 2;
    if (thread == 0) {
        gathered[0] = 0;
    }
    __syncthreads();
    for_each_entry(keys, rows, count, [&](const Entry<key_t>& entry) {
        if (!(entry < begin) && entry < end) {
            const unsigned slot = atomicAdd(gathered + 0, 1u);
            chunk[slot] = entry;
        }
    });
    __syncthreads();
    const int taken = static_cast<int>(static_cast<unsigned>(gathered[0]));
    int padded = kMinPadded;
    while (padded < taken) {
        padded *= 2;
    }
    for (int i = taken + thread; i < padded; i += kGreedyThreads) {
        chunk[i] = Entry<key_t>{~key_t(0), ~0u};
    }
    __syncthreads();
    sort_chunk<Entry<key_t>>(chunk, padded);
    begin = end;
    return taken;
}

}  // namespace spatialflow
