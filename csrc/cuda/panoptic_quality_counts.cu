// SPDX-License-Identifier: Apache-2.0
//
// Number of pixels that each pair of segments of two id maps shares, on CUDA:
//
//   counts[g, p] = number of pixels with gt_map = g and pred_map = p, 0 <= g <= gt_segments, 0 <= p <= pred_segments
//
// A block processes a strip of adjacent pixels, a thread four at a time (one 16-byte load from each map). Since
// segments are large, a thread counts consecutive equal pairs before it adds them to the block's hash table in shared
// memory. At the end the block adds its table to global memory; pairs that find no slot are added there directly.
// Integer sums do not depend on order, so results are deterministic.
#include "cuda/launch.h"
#include "ops/panoptic_quality_counts.h"

namespace spatialflow {
namespace {

constexpr int kThreads = 256;
constexpr int kWidth = 4;  // pixels per load
constexpr int kLoads = 8;  // loads of a thread from each map
constexpr int kStrip = kThreads * kWidth * kLoads;
constexpr int kSlots = 1024;  // a power of two
constexpr int kProbes = 8;
constexpr unsigned kEmpty = 0xffffffffu;

struct CountsProblem {
    int64_t pixels, gt_segments, pred_segments;
};

// ---- device ------------------------------------------------------------------------------------------------------

// Add `count` pixels to `cell` of the table of counts.
__device__ __forceinline__ void add_pixels(
    int64_t cell, int count, Shared<unsigned> keys, Shared<int> sums, Global<unsigned long long> counts) {
    if (cell < static_cast<int64_t>(kEmpty)) {
        const unsigned key = static_cast<unsigned>(cell);
        unsigned slot = (key * 2654435769u) >> 22;  // Knuth's multiplicative hash: the top ten bits
        for (int probe = 0; probe < kProbes; ++probe) {
            const unsigned previous_key = atomicCAS(keys + slot, kEmpty, key);
            if (previous_key == kEmpty || previous_key == key) {
                atomicAdd(sums + slot, count);
                return;
            }
            slot = (slot + 1) % kSlots;
        }
    }
    atomicAdd(counts + cell, static_cast<unsigned long long>(count));
}

template <bool kVectorized>
__global__ void __launch_bounds__(kThreads) panoptic_quality_counts_kernel(
    Global<const int32_t> gt_map,       // (pixels)
    Global<const int32_t> pred_map,     // (pixels)
    Global<unsigned long long> counts,  // (gt_segments + 1, pred_segments + 1), added to
    const CountsProblem problem) {
    SPATIALFLOW_SHARED(unsigned, keys, kSlots);
    SPATIALFLOW_SHARED(int, sums, kSlots);
    for (int slot = static_cast<int>(threadIdx.x); slot < kSlots; slot += kThreads) {
        keys[slot] = kEmpty;
        sums[slot] = 0;
    }
    __syncthreads();
    int64_t pending_cell = -1;
    int pending = 0;
    for (int load_index = 0; load_index < kLoads; ++load_index) {
        const int64_t first = static_cast<int64_t>(blockIdx.x) * kStrip +
                              (load_index * kThreads + static_cast<int>(threadIdx.x)) * kWidth;
        if (first >= problem.pixels) {
            break;
        }
        Vec<int32_t, kWidth> gt, pred;
        if (kVectorized && first + kWidth <= problem.pixels) {
            gt = load_vector<kWidth>(gt_map + first);
            pred = load_vector<kWidth>(pred_map + first);
        } else {
#pragma unroll
            for (int i = 0; i < kWidth; ++i) {
                const bool inside = first + i < problem.pixels;
                gt[i] = inside ? gt_map[first + i] : -1;
                pred[i] = inside ? pred_map[first + i] : -1;
            }
        }
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
            const bool counted =
                gt[i] >= 0 && gt[i] <= problem.gt_segments && pred[i] >= 0 && pred[i] <= problem.pred_segments;
            const int64_t cell = counted ? gt[i] * (problem.pred_segments + 1) + pred[i] : -1;
            if (cell != pending_cell) {
                if (pending_cell >= 0) {
                    add_pixels(pending_cell, pending, keys, sums, counts);
                }
                pending_cell = cell;
                pending = 0;
            }
            ++pending;
        }
    }
    if (pending_cell >= 0) {
        add_pixels(pending_cell, pending, keys, sums, counts);
    }
    __syncthreads();
    for (int slot = static_cast<int>(threadIdx.x); slot < kSlots; slot += kThreads) {
        const int sum = sums[slot];
        if (sum != 0) {
            const unsigned key = keys[slot];
            atomicAdd(counts + key, static_cast<unsigned long long>(sum));
        }
    }
}

// ---- host --------------------------------------------------------------------------------------------------------

Tensor panoptic_quality_counts_cuda(
    const Tensor& gt_map, const Tensor& pred_map, int64_t gt_segments, int64_t pred_segments) {
    check_panoptic_quality_counts(gt_map, pred_map, gt_segments, pred_segments);
    const DeviceScope device(gt_map);
    Tensor counts = empty_like_sized(gt_map, {gt_segments + 1, pred_segments + 1}, ScalarType::Long);
    torch::stable::zero_(counts);
    const Tensor gt = to_contiguous(gt_map), pred = to_contiguous(pred_map);
    const CountsProblem problem{gt.numel(), gt_segments, pred_segments};
    const dim3 grid(grid_size("panoptic_quality_counts", ceil_div(problem.pixels, kStrip)));
    const auto run = [&](auto vectorized) {
        launch<panoptic_quality_counts_kernel<decltype(vectorized)::value>>(
            grid, dim3(kThreads), 0, device.stream(), data<int32_t>(gt), data<int32_t>(pred),
            mutable_data<unsigned long long>(counts), problem);
    };
    if (is_aligned(gt.const_data_ptr(), 16) && is_aligned(pred.const_data_ptr(), 16)) {
        run(std::bool_constant<true>{});
    } else {
        run(std::bool_constant<false>{});
    }
    return counts;
}

}  // namespace
}  // namespace spatialflow

SPATIALFLOW_DEVICE_IMPL(library) {
    library.impl("panoptic_quality_counts", TORCH_BOX(&spatialflow::panoptic_quality_counts_cuda));
}
