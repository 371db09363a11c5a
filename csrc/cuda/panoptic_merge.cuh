// SPDX-License-Identifier: Apache-2.0
//
// Device code shared by the kernels of the panoptic merge: their scratch memory and functions of a block or warp.
#pragma once

#include "common/panoptic_merge.h"
#include "cuda/workspace.cuh"
#include "ops/panoptic_merge.h"

namespace spatialflow {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kGreedyShift = 9;
constexpr int kGreedyThreads = 1 << kGreedyShift;
constexpr int kGreedyWarps = kGreedyThreads / kWarpSize;
constexpr int kGroup = 4;  // words of a 16-byte access; images are padded to whole groups
constexpr int kLoads = 4;  // loads of a lane in flight

using Words = Vec<unsigned, kGroup>;

// Sizes, and scratch memory that all kernels share. Instances are numbered by rank c, in descending order of scores.
struct MergeScratch {
    int instances, stuff_labels, height, width, pixels;
    int words;  // in the bits of an image
    // Zero before the first kernel.
    Global<int> candidates;  // (1), instances at or above the score threshold
    Global<int> segments;    // (1), ids assigned
    Global<int> area;        // (K), pixels of the mask
    Global<int> words_from;  // (K), words from the first nonzero one to the end of the image
    Global<int> end_word;    // (K), end of the nonzero words
    Global<int> id_of;       // (K), 0: not kept
    Global<int> fill_id;     // (K), id that fills the box; 0: not filled
    Global<int> stuff_area;  // (S)
    Global<int> stuff_id;    // (S), 0: not kept
    Global<int> ignored;     // (S), nonzero: ignored
    Global<int> measured;    // (5, K + S), by id - 1: area, W - x1, H - y1, x2, y2; x2, y2 exclusive
    Global<unsigned> used;   // (words), pixels of kept instances
    // Written before they are read.
    Global<int> order;             // (K), instance of rank c
    Global<int> boxes;             // (K, 4), pixels
    Global<int> segment_source;    // (K + S), by id - 1: rank of an instance, or K + stuff label
    Global<unsigned> void_pixels;  // (words); after fill: pixels still void
    Global<unsigned> bits;         // (K, words); after greedy, for kept instances: the pixels assigned to them

    __device__ __forceinline__ Global<unsigned> bits_of(int c) const { return bits + static_cast<int64_t>(c) * words; }
};

struct MergeOptions {
    double score_threshold, overlap_threshold, box_overlap_threshold;
    int64_t stuff_area_threshold;
};

// Sum over a block of kGreedyThreads threads, returned in all threads, with one barrier. Consecutive calls must use
// different `sums`.
__device__ __forceinline__ int block_sum(int value, Shared<unsigned> sums) {
    const unsigned warp_sum = __reduce_add_sync(kAllLanes, static_cast<unsigned>(value));
    if (threadIdx.x % kWarpSize == 0) {
        sums[threadIdx.x / kWarpSize] = warp_sum;
    }
    __syncthreads();
    unsigned partial_sum = 0;
    if (threadIdx.x % kWarpSize < kGreedyWarps) {
        partial_sum = sums[threadIdx.x % kWarpSize];
    }
    return static_cast<int>(__reduce_add_sync(kAllLanes, partial_sum));
}

// Copy the bits of an image, with all kGreedyThreads threads of the block. A thread copies the same groups each time.
template <typename Target, typename Source>
__device__ __forceinline__ void copy_bits(const Target& target, const Source& source, int words) {
    for (int group = static_cast<int>(threadIdx.x); group < words / kGroup; group += kGreedyThreads) {
        store_vector(target + kGroup * group, load_vector<kGroup>(source + kGroup * group));
    }
}

// Call body(value, lanes) once for each different value in the warp. `lanes` is the mask of the lanes with this value;
// the first of them makes the call.
template <typename Body>
__device__ __forceinline__ void for_each_value(int value, const Body& body) {
    const unsigned lanes = __match_any_sync(kAllLanes, value);
    if (static_cast<int>(threadIdx.x) % kWarpSize == __ffs(static_cast<int>(lanes)) - 1) {
        body(value, lanes);
    }
}

}  // namespace
}  // namespace spatialflow
