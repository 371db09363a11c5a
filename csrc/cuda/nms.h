// SPDX-License-Identifier: Apache-2.0
//
// The greedy pass of one thread block, shared by nms and multiclass_nms.
#pragma once

#include "common/nms.h"
#include "cuda/platform.h"

namespace spatialflow {

constexpr int kGreedyThreads = 1024;
constexpr int kGreedyWarps = kGreedyThreads / kWarpSize;

// One candidate per thread, in score order by thread index.
template <typename real_t, typename label_t>
struct Candidate {
    Box<real_t> box;
    real_t area;
    label_t label;
    bool alive;  // not suppressed so far, and takes part
};

// True if the candidate in shared memory at `other` suppresses `candidate`.
template <typename real_t, typename label_t>
__device__ __forceinline__ bool is_suppressed_by(
    int other, const Candidate<real_t, label_t>& candidate, Shared<Box<real_t>> boxes, Shared<label_t> labels,
    real_t threshold) {
    const label_t label = labels[other];
    if (label != candidate.label) {
        return false;
    }
    const Box<real_t> box = boxes[other];
    return suppresses(box, box_area(box), candidate.box, candidate.area, threshold);
}

// Keeps the first candidate alive, drops those of its label that it suppresses, and so on, until none is alive or
// `limit` are kept. A warp decides among its own 32 by votes; then all later warps test theirs against those it kept:
// one barrier a warp, however many are kept. Returns how many were; `position` is this thread's rank among them, or -1.
// Called by all threads of the block.
template <typename real_t, typename label_t>
__device__ __forceinline__ int greedy_pass(
    Candidate<real_t, label_t> candidate, int limit, Shared<Box<real_t>> boxes, Shared<label_t> labels,
    Shared<unsigned> kept_of_warp,  // (kGreedyWarps)
    real_t threshold, int& position) {
    const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarpSize, warp = thread / kWarpSize;
    boxes[thread] = candidate.box;
    labels[thread] = candidate.label;
    position = -1;
    int kept = 0;
    __syncthreads();
    for (int turn = 0; turn < kGreedyWarps && kept < limit; ++turn) {
        if (warp == turn) {
            unsigned own_kept = 0;
            unsigned alive = __ballot_sync(kAllLanes, candidate.alive);
            for (int rank = kept; alive != 0 && rank < limit; ++rank) {
                const int best = __ffs(static_cast<int>(alive)) - 1;
                own_kept |= 1u << best;
                if (lane == best) {
                    position = rank;
                    candidate.alive = false;
                } else if (candidate.alive) {
                    candidate.alive =
                        !is_suppressed_by(turn * kWarpSize + best, candidate, boxes, labels, threshold);
                }
                alive = __ballot_sync(kAllLanes, candidate.alive);
            }
            if (lane == 0) {
                kept_of_warp[turn] = own_kept;
            }
        }
        __syncthreads();
        const unsigned bits = kept_of_warp[turn];
        for (unsigned left = bits; warp > turn && candidate.alive && left != 0; left &= left - 1) {
            const int other = turn * kWarpSize + __ffs(static_cast<int>(left)) - 1;
            candidate.alive = !is_suppressed_by(other, candidate, boxes, labels, threshold);
        }
        kept += __popc(bits);
    }
    __syncthreads();  // the arrays are free for the next call
    return kept;
}

}  // namespace spatialflow
