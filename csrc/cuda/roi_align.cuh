// SPDX-License-Identifier: Apache-2.0
//
// Code shared by the forward and backward pass of RoIAlign on CUDA: kernel arguments, geometry of a RoI, and weighted
// sums over rectangles of cells or bins. The weights are distributed over the lanes of a warp.
#pragma once

#include <algorithm>
#include <vector>

#include "common/roi_align.h"
#include "cuda/launch.h"
#include "cuda/raw_channels.cuh"
#include "ops/roi_align.h"

namespace spatialflow {

constexpr int kMaxRoiLevels = 8;

template <typename element_t>
using CudaRoiLevel = RoiLevel<Global<element_t>, int>;

// Kernel argument: the levels of a feature pyramid.
template <typename element_t>
struct RoiPyramid {
    CudaRoiLevel<element_t> levels[kMaxRoiLevels];
};

// Kernel argument: sizes and options of the problem.
struct RoiProblem {
    int num_levels, num_rois, batch, channels, pooled_height, pooled_width;
    int64_t sampling_ratio;
    double finest_scale;
    bool aligned;
    bool channels_first;  // output (K, C, PH, PW)
};

// ---- device ------------------------------------------------------------------------------------------------------

// Level and image that a RoI reads. `valid` is false if the batch index is outside the batch or the level is empty.
struct RoiPlace {
    int level, image;
    bool valid;
};

template <typename real_t, typename element_t>
__device__ __forceinline__ RoiPlace roi_place(
    Global<const real_t> box,  // (5,): batch index, x1, y1, x2, y2
    const RoiPyramid<element_t>& pyramid, const RoiProblem& problem) {
    const real_t index = box[0];
    const int level = static_cast<int>(roi_level<real_t>(
        box[1], box[2], box[3], box[4], static_cast<real_t>(problem.finest_scale), problem.num_levels));
    const bool inside = index >= real_t(0) && index < real_t(problem.batch);  // false for NaN
    return {
        level, inside ? static_cast<int>(index) : 0,
        inside && pyramid.levels[level].height > 0 && pyramid.levels[level].width > 0};
}

// Return the y axis of a RoI if `of_rows`, else its x axis.
template <typename real_t, typename element_t>
__device__ __forceinline__ RoiAxis<real_t> axis_of(
    Global<const real_t> box, bool of_rows, const CudaRoiLevel<element_t>& level, const RoiProblem& problem) {
    const real_t x1 = box[1], y1 = box[2], x2 = box[3], y2 = box[4];
    return roi_axis<real_t>(
        of_rows ? y1 : x1, of_rows ? y2 : x2, static_cast<real_t>(level.scale),
        of_rows ? problem.pooled_height : problem.pooled_width, problem.sampling_ratio, problem.aligned);
}

// ---- weights in the lanes of a warp ------------------------------------------------------------------------------

constexpr int kHalfWarp = kWarpSize / 2;

// Add weight * channels for the pairs (row, column) of the first kCount lanes in the mask `left`, and remove these
// lanes from it. Each lane has the offset and weight of one pair. All loads are issued before the first use.
template <int kCount, int kWidth, typename scalar_t, typename real_t, typename offset_t>
__device__ __forceinline__ void add_group(
    unsigned& left, offset_t offset, real_t weight, Global<const scalar_t> source, real_t (&sum)[kWidth]) {
    RawChannels<scalar_t, kWidth> raw[kCount];
    real_t weights[kCount];
#pragma unroll
    for (int g = 0; g < kCount; ++g) {
        const int from = __ffs(static_cast<int>(left)) - 1;
        left &= left - 1;
        raw[g] = load_raw<scalar_t, kWidth>(
            pointer_cast<const unsigned char>(source + __shfl_sync(kAllLanes, offset, from)));
        weights[g] = __shfl_sync(kAllLanes, weight, from);
    }
#pragma unroll
    for (int g = 0; g < kCount; ++g) {
        raw[g].add_to(sum, weights[g]);
    }
}

// Call visit(pairs, offset, weight) for all pairs of a row and a column with nonzero weights, 4 x 8 at a time. Lane l
// of the lower half-warp holds the weight of row l, and lane l of the upper half-warp that of column l. In each call, a
// lane gets one pair, and `pairs` is the mask of the lanes whose product of weights is not zero.
template <typename real_t, typename offset_t, typename Visit>
__device__ __forceinline__ void visit_pairs(real_t weight, offset_t row_stride, offset_t column_stride, Visit&& visit) {
    const int lane = threadIdx.x % kWarpSize;
    const unsigned used = __ballot_sync(kAllLanes, weight != real_t(0));
    const unsigned rows = used & 0xffffu, columns = used >> kHalfWarp;
    if (rows == 0 || columns == 0) {
        return;
    }
    const int end_row = kWarpSize - __clz(static_cast<int>(rows));
    const int end_column = kWarpSize - __clz(static_cast<int>(columns));
#pragma unroll 1
    for (int row0 = __ffs(static_cast<int>(rows)) - 1; row0 < end_row; row0 += 4) {
#pragma unroll 1
        for (int column0 = __ffs(static_cast<int>(columns)) - 1; column0 < end_column; column0 += 8) {
            const int row = row0 + lane / 8, column = column0 + lane % 8;
            const real_t row_weight = __shfl_sync(kAllLanes, weight, row & (kHalfWarp - 1));
            const real_t column_weight = __shfl_sync(kAllLanes, weight, kHalfWarp | column);
            const bool is_pair = row < end_row && column < end_column;
            const real_t pair = is_pair ? row_weight * column_weight : real_t(0);
            const offset_t offset = is_pair ? row * row_stride + column * column_stride : offset_t(0);
            visit(__ballot_sync(kAllLanes, pair != real_t(0)), offset, pair);
        }
    }
}

// sum += weight of row * weight of column * source at row * row_stride + column * column_stride, over all pairs.
template <int kWidth, typename scalar_t, typename real_t, typename offset_t>
__device__ __forceinline__ void add_pairs(
    real_t weight, Global<const scalar_t> source, offset_t row_stride, offset_t column_stride, real_t (&sum)[kWidth]) {
    visit_pairs(weight, row_stride, column_stride, [&](unsigned left, offset_t offset, real_t pair) {
#pragma unroll 1
        for (int count = __popc(left); count >= 4; count -= 4) {
            add_group<4>(left, offset, pair, source, sum);
        }
        if (__popc(left) >= 2) {
            add_group<2>(left, offset, pair, source, sum);
        }
        if (left != 0) {
            add_group<1>(left, offset, pair, source, sum);
        }
    });
}

// Call visit(weight, row, column) for each square of 16 x 16 cells of a bin. (row, column) is the first cell of the
// square. The weights are distributed over the lanes as for `visit_pairs`.
template <typename real_t, typename element_t, typename Visit>
__device__ __forceinline__ void visit_cells(
    Global<const real_t> box, const CudaRoiLevel<element_t>& level, const RoiProblem& problem, int ph, int pw,
    Visit&& visit) {
    const int lane = threadIdx.x % kWarpSize;
    const bool of_rows = lane < kHalfWarp;
    const RoiAxis<real_t> axis = axis_of(box, of_rows, level, problem);
    const int bin = of_rows ? ph : pw, size = of_rows ? level.height : level.width;
    const CellRange range = bin_cells(axis, bin, size);
    const int begin = static_cast<int>(range.begin), end = static_cast<int>(range.end);
    const int first_column = __shfl_sync(kAllLanes, begin, kHalfWarp);
    const int end_row = __shfl_sync(kAllLanes, end, 0), end_column = __shfl_sync(kAllLanes, end, kHalfWarp);
#pragma unroll 1
    for (int row = __shfl_sync(kAllLanes, begin, 0); row < end_row; row += kHalfWarp) {
#pragma unroll 1
        for (int column = first_column; column < end_column; column += kHalfWarp) {
            const int cell = (of_rows ? row : column) + lane % kHalfWarp;
            visit(cell < end ? cell_weight(axis, bin, cell, size) : real_t(0), row, column);
        }
    }
}

// ---- host --------------------------------------------------------------------------------------------------------

inline int as_int(const char* op, const char* name, int64_t value) {
    check(value <= 0x7fffffff, op, ": ", name, " must be below 2^31 on CUDA, got ", value);
    return static_cast<int>(value);
}

inline RoiProblem problem_of(
    const char* op, const RoiAlignSettings& settings, const Tensor& boxes, int64_t batch, int64_t channels,
    bool channels_first) {
    check(
        settings.scales.size() <= kMaxRoiLevels, op, ": at most ", kMaxRoiLevels, " levels on CUDA, got ",
        settings.scales.size());
    const int64_t bins = settings.pooled_height * settings.pooled_width;
    as_int(op, "the number of bins", bins);
    as_int(op, "the number of values of a box", bins * channels);
    return {
        static_cast<int>(settings.scales.size()),
        as_int(op, "the number of boxes", boxes.size(0)),
        as_int(op, "the batch", batch),
        as_int(op, "the number of channels", channels),
        static_cast<int>(settings.pooled_height),
        static_cast<int>(settings.pooled_width),
        settings.sampling_ratio,
        settings.finest_scale,
        settings.aligned,
        channels_first};
}

template <typename element_t>
CudaRoiLevel<element_t> level_of(const char* op, const Tensor& tensor, Global<element_t> data, double scale) {
    return {
        data,
        as_int(op, "a level's height", tensor.size(2)),
        as_int(op, "a level's width", tensor.size(3)),
        stride_of(tensor, 0),
        stride_of(tensor, 2),
        stride_of(tensor, 3),
        scale};
}

// Return true if 16-byte accesses along channels are aligned in all levels.
inline bool levels_are_vectorizable(const std::vector<Tensor>& levels, int64_t width) {
    for (const Tensor& level : levels) {
        if (stride_of(level, 0) % width != 0 || stride_of(level, 2) % width != 0 || stride_of(level, 3) % width != 0 ||
            !is_aligned(level.const_data_ptr(), 16)) {
            return false;
        }
    }
    return true;
}

}  // namespace spatialflow
