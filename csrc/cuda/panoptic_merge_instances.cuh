// SPDX-License-Identifier: Apache-2.0
//
// Kernels of the panoptic merge for instances, in this order:
//
//   order    rank of every instance by score, and its box in pixels; instances below the threshold are omitted
//   pack     masks to one bit per pixel, in score order, with their areas and ranges of nonzero words
//   greedy   (one block) for each instance: count the pixels already used, keep or drop it, mark its pixels
#pragma once

#include "cuda/panoptic_merge.cuh"

namespace spatialflow {
namespace {

constexpr int kRegisterGroups = 6;  // groups of an instance that a thread of the greedy block keeps in registers

__global__ void __launch_bounds__(kThreads) merge_order_kernel(
    Global<const double> scores,  // (K)
    Global<const double> boxes,   // (K, 4) or null
    const MergeScratch scratch, const MergeOptions options) {
    const int k = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
    if (k >= scratch.instances) {
        return;
    }
    const double score = scores[k];
    if (!merge_is_candidate(score, options.score_threshold)) {
        return;
    }
    int rank = 0;
    for (int j = 0; j < scratch.instances; ++j) {
        const double score_j = scores[j];
        rank +=
            merge_is_candidate(score_j, options.score_threshold) && (score_j > score || (score_j == score && j < k));
    }
    scratch.order[rank] = k;
    atomicAdd(scratch.candidates + 0, 1);
    if (boxes) {
        const int64_t first = static_cast<int64_t>(k) * 4;
        const double corners[4] = {boxes[first], boxes[first + 1], boxes[first + 2], boxes[first + 3]};
        const PixelBox box = merge_pixel_box(corners, scratch.height, scratch.width);
        Vec<int, 4> edges = {
            {static_cast<int>(box.x1), static_cast<int>(box.y1), static_cast<int>(box.x2), static_cast<int>(box.y2)}};
        if (box.area() == 0) {
            edges = {};
        }
        store_vector(scratch.boxes + 4 * rank, edges);
    }
}

// kPixels adjacent pixels of a mask, a byte each. They are loaded as words, because the compiler would wait for a
// vector of bytes right after its load, in order to unpack it.
template <int kPixels>
struct PackedPixels {
    Vec<unsigned, kPixels / 4> words{};

    __device__ __forceinline__ void load(Global<const uint8_t> source) {
        words = load_vector<kPixels / 4>(pointer_cast<const unsigned>(source));
    }
    // One bit for every nonzero byte.
    __device__ __forceinline__ unsigned bits() const {
        unsigned result = 0;
#pragma unroll
        for (int i = 0; i < kPixels / 4; ++i) {
            const unsigned tops = (words[i] | ((words[i] & 0x7f7f7f7fu) + 0x7f7f7f7fu)) & 0x80808080u;
            result |= ((tops >> 7) * 0x10204080u >> 28) << (4 * i);
        }
        return result;
    }
};

template <>
struct PackedPixels<1> {
    uint8_t value = 0;

    __device__ __forceinline__ void load(Global<const uint8_t> source) { value = source[0]; }
    __device__ __forceinline__ unsigned bits() const { return value != 0; }
};

// Pack the masks into bits. A lane reads kPixels adjacent pixels at a time.
template <int kPixels>
__global__ void __launch_bounds__(kThreads) merge_pack_kernel(
    Global<const uint8_t> masks,  // (K, H, W)
    const MergeScratch scratch) {
    constexpr int kLanes = kWarpSize / kPixels > 0 ? kWarpSize / kPixels : 1;  // lanes that share a word
    constexpr int kStep = kWarpSize * kPixels;
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize, c = static_cast<int>(blockIdx.y);
    if (c >= scratch.candidates[0]) {
        return;
    }
    Global<const uint8_t> mask = masks + static_cast<int64_t>(scratch.order[c]) * scratch.pixels;
    const int first =
        (static_cast<int>(blockIdx.x) * kWarps + static_cast<int>(threadIdx.x) / kWarpSize) * kLoads * kStep +
        lane * kPixels;
    PackedPixels<kPixels> values[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
        if (first + i * kStep < scratch.pixels) {
            values[i].load(mask + (first + i * kStep));
        }
    }
    unsigned area = 0, from = 0, end = 0;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
        unsigned bits = values[i].bits() << (lane % kLanes * kPixels);
#pragma unroll
        for (int step = 1; step < kLanes; step *= 2) {
            bits |= __shfl_xor_sync(kAllLanes, bits, step);
        }
        const int word = (first + i * kStep) / kWarpSize;
        if (lane % kLanes == 0 && word < scratch.words) {
            scratch.bits_of(c)[word] = bits;
            if (bits != 0) {
                area += static_cast<unsigned>(__popc(bits));
                from = from != 0 ? from : static_cast<unsigned>(scratch.words - word);
                end = static_cast<unsigned>(word) + 1;
            }
        }
    }
    area = __reduce_add_sync(kAllLanes, area);
    from = __reduce_max_sync(kAllLanes, from);
    end = __reduce_max_sync(kAllLanes, end);
    if (lane == 0 && area != 0) {
        atomicAdd(scratch.area + c, static_cast<int>(area));
        atomicMax(scratch.words_from + c, static_cast<int>(from));
        atomicMax(scratch.end_word + c, static_cast<int>(end));
    }
}

// Number of common bits. A full adder reduces four popc to three, since popc is the slowest instruction here.
__device__ __forceinline__ int common_pixels(const Words& a, const Words& b) {
    static_assert(kGroup == 4, "the adder takes three of four words");
    const unsigned x = a[0] & b[0], y = a[1] & b[1], z = a[2] & b[2], last = a[3] & b[3];
    const unsigned carry = (x & y) | (x & z) | (y & z);
    return __popc(x ^ y ^ z) + __popc(last) + 2 * __popc(carry);
}

__device__ __forceinline__ bool has_pixels(const Words& words) {
    return (words[0] | words[1] | words[2] | words[3]) != 0;
}

// Area and range of nonzero words of an instance. The members are the loaded values, so that only their first use waits
// for the loads.
struct MergeSpan {
    int area = 0, words_from = 0, end_word = 0;

    // Zeros for `c` beyond the last candidate.
    __device__ __forceinline__ MergeSpan(const MergeScratch& scratch, int c, int candidates) {
        if (c < candidates) {
            area = scratch.area[c];
            words_from = scratch.words_from[c];
            end_word = scratch.end_word[c];
        }
    }
    // First group of this thread in the range. For every instance, thread t has the groups t, t + kGreedyThreads, and
    // so on.
    __device__ __forceinline__ int first_of_thread(const MergeScratch& scratch) const {
        const int first = (scratch.words - words_from) / kGroup;
        const int start = first / kGreedyThreads * kGreedyThreads + static_cast<int>(threadIdx.x);
        return start < first ? start + kGreedyThreads : start;
    }
    __device__ __forceinline__ int end() const { return (end_word + kGroup - 1) / kGroup; }
};

struct RegisterGroups {
    Words words[kRegisterGroups];

    __device__ __forceinline__ RegisterGroups(const MergeScratch& scratch, int c, const MergeSpan& span) {
        const int first = span.first_of_thread(scratch), end = span.end();
#pragma unroll
        for (int i = 0; i < kRegisterGroups; ++i) {
            words[i] = {};
            const int group = first + i * kGreedyThreads;
            if (group < end) {
                words[i] = load_vector<kGroup>(scratch.bits_of(c) + kGroup * group);
            }
        }
    }
};

// Add a group of words of an instance to `used`, and keep in `mask` only the bits that no earlier instance uses.
template <typename Used>
__device__ __forceinline__ void use_group(Used used, Global<unsigned> mask, int group, const Words& words) {
    if (!has_pixels(words)) {
        return;
    }
    const Words before = load_vector<kGroup>(used + kGroup * group);
    Words all, left;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
        all[i] = before[i] | words[i];
        left[i] = words[i] & ~before[i];
    }
    store_vector(used + kGroup * group, all);
    store_vector(mask + kGroup * group, left);
}

// Add to `overlap` the pixels of a group of words that earlier instances use.
template <typename Used>
__device__ __forceinline__ void add_used_pixels(Used used, int group, const Words& words, int& overlap) {
    if (has_pixels(words)) {
        overlap += common_pixels(words, load_vector<kGroup>(used + kGroup * group));
    }
}

// Keep or drop the instances in order. A kept instance keeps only the pixels that no earlier instance uses. The same
// thread always accesses a given group of `used`, so an instance needs only the barrier of block_sum. The next instance
// is loaded before the decision on the current one. Return the number of segments.
template <typename Used>
__device__ __forceinline__ int merge_greedy(
    const MergeScratch& scratch, const MergeOptions& options, Used used, Shared<unsigned> sums) {
    const int thread = static_cast<int>(threadIdx.x), candidates = scratch.candidates[0];
    int segments = 0;
    MergeSpan span(scratch, 0, candidates), next_span(scratch, 1, candidates);
    RegisterGroups groups(scratch, 0, span);
    for (int c = 0; c < candidates; ++c) {
        const RegisterGroups next_groups(scratch, c + 1, next_span);
        const MergeSpan after_next(scratch, c + 2, candidates);
        Global<unsigned> mask = scratch.bits_of(c);
        const int first = span.first_of_thread(scratch), end = span.end();
        const int beyond = first + kRegisterGroups * kGreedyThreads;  // first group that is not in registers
        int overlap = 0;
#pragma unroll
        for (int i = 0; i < kRegisterGroups; ++i) {
            add_used_pixels(used, first + i * kGreedyThreads, groups.words[i], overlap);
        }
        for (int group = beyond; group < end; group += kGreedyThreads) {
            add_used_pixels(used, group, load_vector<kGroup>(mask + kGroup * group), overlap);
        }
        overlap = block_sum(overlap, sums + c % 2 * kGreedyWarps);
        // With a threshold of 1 or more, an instance without a free pixel passes the test. It is dropped: segments are
        // not empty.
        if (merge_instance_is_kept(overlap, span.area, options.overlap_threshold) && overlap != span.area) {
#pragma unroll
            for (int i = 0; i < kRegisterGroups; ++i) {
                use_group(used, mask, first + i * kGreedyThreads, groups.words[i]);
            }
            for (int group = beyond; group < end; group += kGreedyThreads) {
                use_group(used, mask, group, load_vector<kGroup>(mask + kGroup * group));
            }
            if (thread == 0) {
                scratch.id_of[c] = segments + 1;
                scratch.segment_source[segments] = c;
            }
            ++segments;
        }
        span = next_span;
        next_span = after_next;
        groups = next_groups;
    }
    return segments;
}

// Launched with one block, which may use all registers of a multiprocessor.
template <bool kInShared>
__global__ void __launch_bounds__(kGreedyThreads, 1)
    merge_greedy_kernel(const MergeScratch scratch, const MergeOptions options) {
    SPATIALFLOW_SHARED(unsigned, sums, 2 * kGreedyWarps);
    int segments;
    if constexpr (kInShared) {
        SPATIALFLOW_DYNAMIC_SHARED(unsigned, used);
        for (int group = static_cast<int>(threadIdx.x); group < scratch.words / kGroup; group += kGreedyThreads) {
            store_vector(used + kGroup * group, Words{});
        }
        segments = merge_greedy(scratch, options, used, sums);
        copy_bits(scratch.used, used, scratch.words);
    } else {
        segments = merge_greedy(scratch, options, scratch.used, sums);
    }
    if (threadIdx.x == 0) {
        scratch.segments[0] = segments;
    }
}

}  // namespace
}  // namespace spatialflow
