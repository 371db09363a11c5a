// SPDX-License-Identifier: Apache-2.0
//
// Tables in shared memory for the iteration along a row of bins, shared by the forward pass and the scatter of
// RoIAlign.
#pragma once

#include "cuda/roi_align.cuh"

namespace spatialflow {

constexpr int kMaxBinColumns = 16;  // of a block: a half-warp computes their taps, the other one those of the bin rows
constexpr int kWalkWarps = 4;       // maximum of a block, and maximum number of its bin rows
constexpr int kMaxSamples = 32;     // of a bin on an axis, for a bin that fits in the tables
constexpr int kMaxTaps = 8;         // of a bin on an axis
constexpr int kTooMany = kMaxTaps + 1;
constexpr int kTapStride = kWarpSize;  // between taps of a lane: adjacent lanes are in different banks
constexpr int kMaxRowTaps = 4;         // taps of a bin row that fit in registers

// Division of the bins of a RoI into tiles, one per block.
struct BinTiles {
    int rows, columns;            // bins of a tile
    int row_tiles, column_tiles;  // tiles of a RoI
};

// Tap: a cell of an axis and its nonzero weight in the mean over the samples of a bin.
template <typename real_t>
struct alignas(2 * sizeof(real_t)) Tap {
    int cell;
    real_t weight;
};

// Step of the iteration along a bin row: the weights, in one bin, of the last two loaded columns of cells. These
// columns are in registers.
template <typename real_t>
struct alignas(4 * sizeof(real_t)) Step {
    real_t previous, current;  // zero: the bin does not read the column in this step
    int flags;
};
constexpr int kLoadsColumn = 1;  // first, the current column becomes the previous one, and the next column is loaded
constexpr int kEndsBin = 2;

// Add `weight` to the tap of `cell`. If samples ascend, a repeated cell is one of the last two. Samples of a reversed
// RoI may descend; a cell can then have two taps, whose weights add up to its weight.
template <typename real_t>
__device__ __forceinline__ void add_tap(Shared<Tap<real_t>> taps, int& count, int cell, real_t weight) {
    if (weight == real_t(0)) {
        return;
    }
#pragma unroll
    for (int back = 1; back <= 2; ++back) {
        if (count >= back && count <= kMaxTaps) {
            Tap<real_t> tap = taps[(count - back) * kTapStride];
            if (tap.cell == cell) {
                tap.weight += weight;
                taps[(count - back) * kTapStride] = tap;
                return;
            }
        }
    }
    if (count < kMaxTaps) {
        taps[count * kTapStride] = Tap<real_t>{cell, weight};
    }
    count = count < kTooMany ? count + 1 : kTooMany;
}

// Collect the taps of a bin, up to kMaxTaps of them; return their number, or kTooMany.
template <typename real_t>
__device__ __forceinline__ int collect_taps(
    const RoiAxis<real_t>& axis, int bin, int64_t size, Shared<Tap<real_t>> taps) {
    const SampleRange range = sample_range(axis, bin, size);
    if (range.end - range.begin > kMaxSamples) {
        return kTooMany;
    }
    int count = 0;
#pragma unroll 1
    for (int64_t i = range.begin; i < range.end; ++i) {
        LinearSample<real_t> sample;
        if (linear_sample(sample_position(axis, bin, i), size, sample)) {
            add_tap(taps, count, static_cast<int>(sample.low), sample.low_weight);
            add_tap(taps, count, static_cast<int>(sample.high), sample.high_weight);
        }
    }
    const real_t grid = axis.grid > real_t(1) ? axis.grid : real_t(1);
#pragma unroll 1
    for (int j = 0; j < count && j < kMaxTaps; ++j) {
        Tap<real_t> tap = taps[j * kTapStride];
        tap.weight /= grid;
        taps[j * kTapStride] = tap;
    }
    return count;
}

struct WalkLength {
    int steps, columns;
};

// Write the steps over the bins [0, bins) of a bin row, and the offsets of the columns that the steps load. A lane has
// the `count` taps of one bin column. If a bin has too many taps, the result is -1 steps. If the cells of all bins
// ascend, columns in registers are not loaded again. All lanes of the warp must call the function.
template <typename real_t>
__device__ __forceinline__ WalkLength write_walk(
    Shared<Tap<real_t>> taps, int count, int bins, int64_t column_stride, Shared<Step<real_t>> steps,
    Shared<int64_t> columns) {
    const int lane = threadIdx.x % kWarpSize;
    count = lane < bins ? count : 0;
    if (__any_sync(kAllLanes, count == kTooMany)) {
        return {-1, 0};
    }
    // Cells of the first two and the last two taps; negative: none.
    int first = -1, second = -1, last = -1, before_last = -2;
    bool ascends = true;
#pragma unroll 1
    for (int j = 0; j < count; ++j) {
        const Tap<real_t> tap = taps[j * kTapStride];
        first = j == 0 ? tap.cell : first;
        second = j == 1 ? tap.cell : second;
        ascends = ascends && tap.cell > last;
        before_last = j > 0 ? last : -2;
        last = tap.cell;
    }
    // Columns that are in registers at the start of this bin, if the cells of all bins ascend.
    int last_column = __shfl_up_sync(kAllLanes, last, 1),
        column_before_last = __shfl_up_sync(kAllLanes, before_last, 1);
    last_column = lane > 0 ? last_column : -1;
    column_before_last = lane > 0 ? column_before_last : -2;
    const bool follows = count == 0 || first >= last_column || (first == column_before_last && second == last_column);
    const bool reuses =
        __all_sync(kAllLanes, ascends && follows) && (first == last_column || first == column_before_last);
    const int reused_taps = count == 0 || !reuses ? 0 : first == column_before_last ? 2 : 1;
    const int first_taps = reuses && count > 1 ? 2 : 1;  // added by the bin's first step
    const int lane_steps = lane < bins ? (count > first_taps ? count - first_taps + 1 : 1) : 0;
    const int lane_columns = count - reused_taps;
    // Steps (upper half) and columns (lower half) of this lane, then of all lanes up to this one.
    int ends = lane_steps << 16 | lane_columns;
#pragma unroll
    for (int distance = 1; distance < kWarpSize; distance *= 2) {
        const int before = __shfl_up_sync(kAllLanes, ends, distance);
        ends += lane >= distance ? before : 0;
    }
    const int first_step = (ends >> 16) - lane_steps, first_column = (ends & 0xffff) - lane_columns;
#pragma unroll 1
    for (int j = 0; j < lane_steps; ++j) {
        Step<real_t> step{real_t(0), real_t(0), j + 1 == lane_steps ? kEndsBin : 0};
        if (count > 0) {
            const int at = j + first_taps - 1;
            const Tap<real_t> tap = taps[at * kTapStride];
            step.current = tap.weight;
            if (at > j && j == 0) {
                const Tap<real_t> before = taps[0];
                step.previous = before.weight;
            }
            if (at >= reused_taps) {
                step.flags |= kLoadsColumn;
                columns[first_column + at - reused_taps] = tap.cell * column_stride;
            }
        }
        steps[first_step + j] = step;
    }
    ends = __shfl_sync(kAllLanes, ends, kWarpSize - 1);
    return {ends >> 16, ends & 0xffff};
}

// Tables in shared memory for the bins of a block.
template <typename real_t>
struct WalkTables {
    Shared<Tap<real_t>> taps;    // (kMaxTaps, kTapStride): of bin columns; from kMaxBinColumns on, of bin rows
    Shared<Step<real_t>> steps;  // (kMaxBinColumns * kMaxTaps,)
    Shared<int64_t> columns;     // (kMaxBinColumns * kMaxTaps,)
    Shared<int> row_taps;        // (kWalkWarps,): number of taps of each bin row, or kTooMany
    Shared<int> place;           // (4,): level, image, number of steps or -1, number of columns
};
#define SPATIALFLOW_WALK_TABLES(real_t, tables)                                            \
    SPATIALFLOW_SHARED(Tap<real_t>, tables##_taps, kWarpSize* kMaxTaps);                   \
    SPATIALFLOW_SHARED(Step<real_t>, tables##_steps, kMaxBinColumns* kMaxTaps);            \
    SPATIALFLOW_SHARED(int64_t, tables##_columns, kMaxBinColumns* kMaxTaps);               \
    SPATIALFLOW_SHARED(int, tables##_row_taps, kWalkWarps);                                \
    SPATIALFLOW_SHARED(int, tables##_place, 4);                                            \
    const WalkTables<real_t> tables {                                                      \
        tables##_taps, tables##_steps, tables##_columns, tables##_row_taps, tables##_place \
    }

// Bins of a block.
struct RoiPart {
    int roi, first_row, first_column, rows, columns;

    __device__ __forceinline__ RoiPart(const RoiProblem& problem, const BinTiles& tiles) {
        const int parts = tiles.row_tiles * tiles.column_tiles;
        const int part = static_cast<int>(blockIdx.x) % parts;
        roi = static_cast<int>(blockIdx.x) / parts;
        first_row = part / tiles.column_tiles * tiles.rows;
        first_column = part % tiles.column_tiles * tiles.columns;
        rows = std::min(tiles.rows, problem.pooled_height - first_row);
        columns = std::min(tiles.columns, problem.pooled_width - first_column);
    }
};

// Fill the tables; all threads of the block must call it. `column_unit` is 1 for column offsets in elements, or the
// size of an element for offsets in bytes.
template <typename real_t, typename element_t>
__device__ __forceinline__ void write_tables(
    const WalkTables<real_t>& tables, Global<const real_t> box, const RoiPart& part,
    const RoiPyramid<element_t>& pyramid, const RoiProblem& problem, int64_t column_unit) {
    if (threadIdx.x < kWarpSize) {
        const int lane = threadIdx.x;
        const RoiPlace place = roi_place(box, pyramid, problem);
        const CudaRoiLevel<element_t>& level = pyramid.levels[place.level];
        const bool of_rows = lane >= kMaxBinColumns;
        const RoiAxis<real_t> axis = axis_of(box, of_rows, level, problem);
        const bool valid = __all_sync(kAllLanes, place.valid && axis.valid);
        const int index = of_rows ? lane - kMaxBinColumns : lane;
        Shared<Tap<real_t>> lane_taps = tables.taps + lane;
        int count = 0;
        if (valid && index < (of_rows ? part.rows : part.columns)) {
            count = collect_taps(
                axis, index + (of_rows ? part.first_row : part.first_column), of_rows ? level.height : level.width,
                lane_taps);
        }
        if (of_rows && index < part.rows) {
            tables.row_taps[index] = count;
        }
        const WalkLength length =
            write_walk(lane_taps, count, part.columns, level.column_stride * column_unit, tables.steps, tables.columns);
        if (lane == 0) {
            tables.place[0] = place.level;
            tables.place[1] = place.image;
            tables.place[2] = length.steps;
            tables.place[3] = length.columns;
        }
    }
    __syncthreads();
}

// Launch grid of a kernel whose blocks compute tiles of bins, and whose warps compute kWarpSize * `width` channels of a
// bin row. Wide tiles share the most columns of cells; for few RoIs, narrower tiles occupy more of the GPU.
struct WalkGrid {
    BinTiles tiles;
    dim3 grid, block;

    WalkGrid(const char* op, const RoiProblem& problem, int width) {
        constexpr int64_t kFillingWarps = 2048;  // 16 on each of 128 multiprocessors
        constexpr int64_t kMinColumns = 4;
        const int64_t bin_rows = problem.pooled_height, bin_columns = problem.pooled_width;
        const int64_t passes = ceil_div(problem.channels, kWarpSize * width);
        const int64_t wanted =
            std::min(ceil_div(kFillingWarps, problem.num_rois * bin_rows * passes), ceil_div(bin_columns, kMinColumns));
        const int64_t columns = ceil_div(bin_columns, std::max(ceil_div(bin_columns, kMaxBinColumns), wanted));
        const int64_t rows = ceil_div(bin_rows, ceil_div(bin_rows, kWalkWarps));
        tiles = {
            static_cast<int>(rows), static_cast<int>(columns), static_cast<int>(ceil_div(bin_rows, rows)),
            static_cast<int>(ceil_div(bin_columns, columns))};
        const int64_t items = rows * passes, warps = ceil_div(items, ceil_div(items, kWalkWarps));
        grid = dim3(grid_size(op, static_cast<int64_t>(problem.num_rois) * tiles.row_tiles * tiles.column_tiles));
        block = dim3(static_cast<unsigned>(warps * kWarpSize));
    }
};

}  // namespace spatialflow
