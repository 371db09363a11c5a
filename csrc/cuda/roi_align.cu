// SPDX-License-Identifier: Apache-2.0
//
// RoIAlign on CUDA, over one feature map or a pyramid of them (roi_align is a pyramid of one level).
//
//   output[k, c, ph, pw] = mean over the samples (y, x) of bin (ph, pw) of bilinear(level(k)[batch(k), c], y, x)
//                        = sum_y wy[y] sum_x wx[x] level(k)[batch(k), c, y, x]     over the cells that the bin reads
//
// The samples of a bin form a grid and bilinear interpolation is a product, so each axis of a bin is a short run of
// cells with one weight each (taps). Samples that share cells are merged: two samples an axis read three cells, not
// four.
//
// Layouts: features (N, H, W, C) by strides, channels adjacent (others are copied into it first: two passes over the
// features, less than uncoalesced reads cost); output and its gradient (K, PH, PW, C); output also (K, C, PH, PW).
// Forward: a block computes the taps of its part of a RoI once, in shared memory. A warp walks along a bin row with 16
// bytes of channels a lane, loads each column of cells once and sums it over its rows while the next is loaded.
// Backward, two ways:
//   scatter   the same walk in reverse: columns of cells are summed over bins, then added to the map in float32, 16
//             bytes a reduction; the order of sums is not fixed
//   gather    a warp per cell adds up the bins that read it, RoIs in ascending order: deterministic, no float32 buffer
//             and no atomics, but a cell under many RoIs is one warp's work. Always taken in float64.
//
// Floor (H100, 3.0 TB/s), bfloat16, 1000 RoIs x 256 x 7 x 7 from 256 x 100 x 168: output 25 MB + features read once
// 9 MB: 11 us. Backward: gradient 25 MB + features' gradient 9 MB: 11 us (gather); the scatter is bound by reductions.
#include "cuda/roi_align.h"

#include <algorithm>

#include "common/roi_align.h"
#include "cuda/launch.h"
#include "cuda/raw_channels.cuh"
#include "ops/roi_align.h"

namespace spatialflow {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kMaxLevels = 8;

// One feature map: (N, H, W, C) by strides in elements, C adjacent.
template <typename element_t>
struct RoiLevel {
    Global<element_t> data;
    int height, width;
    int64_t stride_n, stride_h, stride_w;
    double scale;    // cells per pixel
    int tile_begin;  // first block of this level, where blocks are tiles of cells
};

template <typename element_t>
struct RoiPyramid {
    RoiLevel<element_t> levels[kMaxLevels];
};

struct RoiOptions {
    int num_levels, num_rois, batch, channels, pooled_height, pooled_width;
    int64_t sampling_ratio;
    double finest_scale;
    bool aligned;
    bool planar;  // output (K, C, PH, PW)
};

// ---- device ------------------------------------------------------------------------------------------------------

// Where a RoI reads. `valid` is false if the batch index is outside the batch or the level is empty.
struct RoiPlace {
    int level, image;
    bool valid;
};

template <typename real_t, typename element_t>
__device__ __forceinline__ RoiPlace roi_place(
    Global<const real_t> box,  // (5,): batch index, x1, y1, x2, y2
    const RoiPyramid<element_t>& pyramid, const RoiOptions& options) {
    const real_t index = box[0];
    const int level = static_cast<int>(roi_level<real_t>(
        box[1], box[2], box[3], box[4], static_cast<real_t>(options.finest_scale), options.num_levels));
    const bool inside = index >= real_t(0) && index < real_t(options.batch);  // false for NaN
    return {
        level, inside ? static_cast<int>(index) : 0,
        inside && pyramid.levels[level].height > 0 && pyramid.levels[level].width > 0};
}

// The y axis of a RoI, or its x axis.
template <typename real_t, typename element_t>
__device__ __forceinline__ RoiAxis<real_t> axis_of(
    Global<const real_t> box, bool of_rows, const RoiLevel<element_t>& level, const RoiOptions& options) {
    const real_t x1 = box[1], y1 = box[2], x2 = box[3], y2 = box[4];
    return roi_axis<real_t>(
        of_rows ? y1 : x1, of_rows ? y2 : x2, static_cast<real_t>(level.scale),
        of_rows ? options.pooled_height : options.pooled_width, options.sampling_ratio, options.aligned);
}

// ---- weights in the lanes of a warp ------------------------------------------------------------------------------

constexpr int kHalfWarp = kWarpSize / 2;

// Adds the first kCount pairs in `left`, whose offsets and weights the lanes hold; their loads go out together.
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

// Lane l of the lower half of a warp holds the weight of row l, that of the upper half the weight of column l.
// visit(pairs, offset, weight) takes the pairs of both that are not zero, 4 x 8 at a time: a lane each, `pairs` is the
// mask of these lanes.
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

// A bin that tables have no room for: visit(weight, row, column) takes its cells, 16 x 16 from (row, column) on, whose
// weights the lanes hold as `visit_pairs` wants them.
template <typename real_t, typename element_t, typename Visit>
__device__ __forceinline__ void visit_cells(
    Global<const real_t> box, const RoiLevel<element_t>& level, const RoiOptions& options, int ph, int pw,
    Visit&& visit) {
    const int lane = threadIdx.x % kWarpSize;
    const bool of_rows = lane < kHalfWarp;
    const RoiAxis<real_t> axis = axis_of(box, of_rows, level, options);
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

// ---- tables of a block -------------------------------------------------------------------------------------------

constexpr int kMaxBinColumns = 16;  // of a block: half a warp; the other half takes its bin rows
constexpr int kWalkWarps = 4;       // of a block, which takes as many bin rows
constexpr int kMaxSamples = 32;     // of a bin on an axis, for a bin that tables hold
constexpr int kMaxTaps = 8;
constexpr int kTooMany = kMaxTaps + 1;
constexpr int kTapStride = kWarpSize;  // from a lane's tap to its next one: lanes side by side, in different banks
constexpr int kMaxRows = 4;            // taps of a bin row that registers hold

// The bins of a RoI, cut into the tiles that blocks take.
struct BinTiles {
    int rows, columns;            // bins of a tile
    int row_tiles, column_tiles;  // tiles of a RoI
};

// A cell of an axis and its weight in the mean over the samples of a bin; never zero.
template <typename real_t>
struct alignas(2 * sizeof(real_t)) Tap {
    int cell;
    real_t weight;
};

// One addition of a walk along a bin row, which holds the last two columns of cells that it has loaded.
template <typename real_t>
struct alignas(4 * sizeof(real_t)) Step {
    real_t previous, current;  // weights of the two columns; zero: not read
    int flags;
};
constexpr int kLoads = 1;  // before: the next column becomes the current one, the current one the previous
constexpr int kEndsBin = 2;

// Adds `weight` to the tap of `cell`. Samples ascend, so a cell seen before is one of the last two.
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

// Taps of a bin, up to kMaxTaps of them; returns their number, or kTooMany.
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

// Writes the walk over the bins of lanes [0, bins), `count` taps each, and the offsets of the columns that it loads;
// called by a whole warp. -1 steps if a bin has too many taps. A column is loaded once where bins follow each other
// upwards.
template <typename real_t>
__device__ __forceinline__ WalkLength write_walk(
    Shared<Tap<real_t>> taps, int count, int bins, int64_t column_stride, Shared<Step<real_t>> steps,
    Shared<int64_t> columns) {
    const int lane = threadIdx.x % kWarpSize;
    count = lane < bins ? count : 0;
    if (__any_sync(kAllLanes, count == kTooMany)) {
        return {-1, 0};
    }
    // Cells of the first and the last two taps; negative: none.
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
    // The walk holds these columns when it comes to this bin, if every bin goes on from the one before.
    int held = __shfl_up_sync(kAllLanes, last, 1), held_before = __shfl_up_sync(kAllLanes, before_last, 1);
    held = lane > 0 ? held : -1;
    held_before = lane > 0 ? held_before : -2;
    const bool follows = count == 0 || first >= held || (first == held_before && second == held);
    const bool reuses = __all_sync(kAllLanes, ascends && follows) && (first == held || first == held_before);
    const int taps_held = count == 0 || !reuses ? 0 : first == held_before ? 2 : 1;
    const int first_taps = reuses && count > 1 ? 2 : 1;  // of the first step
    const int own_steps = lane < bins ? (count > first_taps ? count - first_taps + 1 : 1) : 0;
    const int own_columns = count - taps_held;
    int ends = own_steps << 16 | own_columns;  // of this lane's steps and columns, once summed over the lanes before
#pragma unroll
    for (int distance = 1; distance < kWarpSize; distance *= 2) {
        const int before = __shfl_up_sync(kAllLanes, ends, distance);
        ends += lane >= distance ? before : 0;
    }
    const int first_step = (ends >> 16) - own_steps, first_column = (ends & 0xffff) - own_columns;
#pragma unroll 1
    for (int j = 0; j < own_steps; ++j) {
        Step<real_t> step{real_t(0), real_t(0), j + 1 == own_steps ? kEndsBin : 0};
        if (count > 0) {
            const int at = j + first_taps - 1;
            const Tap<real_t> tap = taps[at * kTapStride];
            step.current = tap.weight;
            if (at > j && j == 0) {
                const Tap<real_t> before = taps[0];
                step.previous = before.weight;
            }
            if (at >= taps_held) {
                step.flags |= kLoads;
                columns[first_column + at - taps_held] = tap.cell * column_stride;
            }
        }
        steps[first_step + j] = step;
    }
    ends = __shfl_sync(kAllLanes, ends, kWarpSize - 1);
    return {ends >> 16, ends & 0xffff};
}

// Tables in shared memory of a block's part of a RoI.
template <typename real_t>
struct WalkTables {
    Shared<Tap<real_t>> taps;    // (kMaxTaps, kTapStride): of the bin columns, from kMaxBinColumns on of the bin rows
    Shared<Step<real_t>> steps;  // (kMaxBinColumns * kMaxTaps,)
    Shared<int64_t> columns;     // the same
    Shared<int> row_taps;        // (kWalkWarps,): taps of each bin row, or kTooMany
    Shared<int> place;           // (4,): level, image, numbers of steps and of columns
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

// The bins that a block takes.
struct RoiPart {
    int roi, first_row, first_column, rows, columns;

    __device__ __forceinline__ RoiPart(const RoiOptions& options, const BinTiles& tiles) {
        const int parts = tiles.row_tiles * tiles.column_tiles;
        const int part = static_cast<int>(blockIdx.x) % parts;
        roi = static_cast<int>(blockIdx.x) / parts;
        first_row = part / tiles.column_tiles * tiles.rows;
        first_column = part % tiles.column_tiles * tiles.columns;
        rows = std::min(tiles.rows, options.pooled_height - first_row);
        columns = std::min(tiles.columns, options.pooled_width - first_column);
    }
};

// Fills the tables; the whole block calls it. `column_unit` is what offsets of columns count: an element or its bytes.
template <typename real_t, typename element_t>
__device__ __forceinline__ void write_tables(
    const WalkTables<real_t>& tables, Global<const real_t> box, const RoiPart& part,
    const RoiPyramid<element_t>& pyramid, const RoiOptions& options, int64_t column_unit) {
    if (threadIdx.x < kWarpSize) {
        const int lane = threadIdx.x;
        const RoiPlace place = roi_place(box, pyramid, options);
        const RoiLevel<element_t>& level = pyramid.levels[place.level];
        const bool of_rows = lane >= kMaxBinColumns;
        const RoiAxis<real_t> axis = axis_of(box, of_rows, level, options);
        const bool valid = __all_sync(kAllLanes, place.valid && axis.valid);
        const int index = of_rows ? lane - kMaxBinColumns : lane;
        Shared<Tap<real_t>> own_taps = tables.taps + lane;
        int count = 0;
        if (valid && index < (of_rows ? part.rows : part.columns)) {
            count = collect_taps(
                axis, index + (of_rows ? part.first_row : part.first_column), of_rows ? level.height : level.width,
                own_taps);
        }
        if (of_rows && index < part.rows) {
            tables.row_taps[index] = count;
        }
        const WalkLength length =
            write_walk(own_taps, count, part.columns, level.stride_w * column_unit, tables.steps, tables.columns);
        if (lane == 0) {
            tables.place[0] = place.level;
            tables.place[1] = place.image;
            tables.place[2] = length.steps;
            tables.place[3] = length.columns;
        }
    }
    __syncthreads();
}

// ---- forward -----------------------------------------------------------------------------------------------------

// A walk along a bin row that reads kRows rows of cells: each column of cells is loaded once and summed over its rows,
// then added to the bins that read it. emit(sums) takes the bins one after the other.
template <typename scalar_t, int kWidth, int kRows>
class BinRowWalk {
    using real_t = accum_t<scalar_t>;

public:
    __device__ __forceinline__ BinRowWalk(
        Global<const scalar_t> feature, int64_t stride_h, Shared<Tap<real_t>> rows, Shared<Step<real_t>> steps,
        Shared<int64_t> columns, WalkLength length)
        : steps_(steps), columns_(columns), steps_left_(length.steps), columns_left_(length.columns) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            const Tap<real_t> tap = rows[r * kTapStride];
            row_[r] = pointer_cast<const unsigned char>(feature + tap.cell * stride_h);
            weight_[r] = tap.weight;
        }
    }

    template <typename Emit>
    __device__ __forceinline__ void run(Emit&& emit) {
        real_t one[kWidth] = {}, other[kWidth] = {}, sum[kWidth] = {};
        fetch();
        while (true) {  // the two columns take turns, so that none is copied
            if (!go_on(one, other, sum, emit) || !go_on(other, one, sum, emit)) {
                return;
            }
        }
    }

private:
    __device__ __forceinline__ void fetch() {
        if (columns_left_-- > 0) {
            const int64_t offset = columns_[0];
            columns_ += 1;
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
                raw_[r] = load_raw<scalar_t, kWidth>(row_[r] + offset);
            }
        }
    }

    // The steps up to the next one that loads a column; false after the last.
    template <typename Emit>
    __device__ __forceinline__ bool go_on(
        const real_t (&previous)[kWidth], real_t (&current)[kWidth], real_t (&sum)[kWidth], Emit&& emit) {
        Step<real_t> step = steps_[0];
        if (step.flags & kLoads) {
#pragma unroll
            for (int i = 0; i < kWidth; ++i) {
                current[i] = real_t(0);
            }
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
                raw_[r].add_to(current, weight_[r]);
            }
            fetch();  // loads run while this column is added and bins are stored
        }
#pragma unroll 1
        while (true) {
            if (step.previous != real_t(0)) {
#pragma unroll
                for (int i = 0; i < kWidth; ++i) {
                    sum[i] += step.previous * previous[i];
                }
            }
            if (step.current != real_t(0)) {
#pragma unroll
                for (int i = 0; i < kWidth; ++i) {
                    sum[i] += step.current * current[i];
                }
            }
            if (step.flags & kEndsBin) {
                emit(sum);
#pragma unroll
                for (int i = 0; i < kWidth; ++i) {
                    sum[i] = real_t(0);
                }
            }
            if (--steps_left_ == 0) {
                return false;
            }
            steps_ += 1;
            step = steps_[0];
            if (step.flags & kLoads) {
                return true;
            }
        }
    }

    Shared<Step<real_t>> steps_;
    Shared<int64_t> columns_;
    int steps_left_, columns_left_;
    Global<const unsigned char> row_[kRows];
    real_t weight_[kRows];
    RawChannels<scalar_t, kWidth> raw_[kRows];
};

// Channels from one bin to the next in shared memory: those of a warp, and an access more, so that the bins of a
// channel lie in different banks.
template <int kWidth>
constexpr int kTileStride = kWarpSize * kWidth + kWidth;

template <typename scalar_t>
constexpr int kForwardBlocks = std::is_same_v<scalar_t, double> ? 3 : 4;  // on a multiprocessor: 168 or 128 registers

template <typename scalar_t, int kWidth>
__global__ void __launch_bounds__(kWalkWarps* kWarpSize, kForwardBlocks<scalar_t>) roi_align_kernel(
    const __grid_constant__ RoiPyramid<const scalar_t> pyramid,
    Global<const accum_t<scalar_t>> boxes,  // (K, 5)
    Global<scalar_t> output,                // (K, bins, C), planar (K, C, bins)
    const RoiOptions options, const BinTiles tiles) {
    using real_t = accum_t<scalar_t>;
    constexpr int kLaneStep = kWarpSize * kWidth;
    SPATIALFLOW_WALK_TABLES(real_t, tables);
    SPATIALFLOW_DYNAMIC_SHARED(scalar_t, tile);  // (warps, tiles.columns, kTileStride), planar only
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const RoiPart part(options, tiles);
    Global<const real_t> box = boxes + static_cast<int64_t>(part.roi) * 5;
    write_tables(tables, box, part, pyramid, options, sizeof(scalar_t));
    const int level_index = tables.place[0];
    const int64_t image = tables.place[1];
    const WalkLength length{tables.place[2], tables.place[3]};
    const RoiLevel<const scalar_t>& level = pyramid.levels[level_index];
    const int warps = static_cast<int>(blockDim.x) / kWarpSize;
    const int passes = (options.channels + kLaneStep - 1) / kLaneStep;
    // Bin rows that tables hold, or the others: take(ph, its taps, their number, channels of cell (0, 0), emit).
    const auto for_bin_rows = [&](bool of_tables, auto&& take) {
#pragma unroll 1
        for (int item = warp; item < part.rows * passes; item += warps) {
            const int row = item / passes, first_channel = item % passes * kLaneStep;
            const int count = tables.row_taps[row];
            if ((count == 0 || (count <= kMaxRows && length.steps >= 0)) != of_tables) {
                continue;
            }
            const int ph = part.first_row + row, bins = options.pooled_height * options.pooled_width;
            const int first_bin = ph * options.pooled_width + part.first_column;
            const int channel = first_channel + lane * kWidth;
            const bool active = channel < options.channels;
            Global<scalar_t> bin_target =
                output + ((static_cast<int64_t>(part.roi) * bins + first_bin) * options.channels + channel);
            const Shared<scalar_t> own_tile = tile + warp * tiles.columns * kTileStride<kWidth>;
            Shared<scalar_t> bin_tile = own_tile + lane * kWidth;
            const auto emit = [&](const real_t(&sum)[kWidth]) {
                Vec<scalar_t, kWidth> values;
#pragma unroll
                for (int i = 0; i < kWidth; ++i) {
                    store(values[i], sum[i]);
                }
                if (options.planar) {
                    store_vector(bin_tile, values);
                    bin_tile += kTileStride<kWidth>;
                } else {
                    if (active) {
                        store_vector(bin_target, values);
                    }
                    bin_target += options.channels;
                }
            };
            // Lanes beyond the last channel repeat the first one and store nothing.
            Global<const scalar_t> feature = level.data + (image * level.stride_n + (active ? channel : 0));
            take(ph, row, count, feature, emit);
            if (options.planar) {  // lanes along bins, then channels
                __syncwarp();
                const int bin_lanes = part.columns > 8 ? 16 : part.columns > 4 ? 8 : 4;
                const int bin = lane % bin_lanes, channels = std::min(options.channels - first_channel, kLaneStep);
#pragma unroll 1
                for (int c = lane / bin_lanes; c < channels && bin < part.columns; c += kWarpSize / bin_lanes) {
                    const scalar_t value = own_tile[bin * kTileStride<kWidth> + c];
                    const int64_t plane = static_cast<int64_t>(part.roi) * options.channels + first_channel + c;
                    output[plane * bins + first_bin + bin] = value;
                }
                __syncwarp();  // the tile is read before the next bin row overwrites it
            }
        }
    };
    for_bin_rows(true, [&](int, int row, int count, Global<const scalar_t> feature, auto&& emit) {
        const auto walk = [&](auto rows) {
            BinRowWalk<scalar_t, kWidth, decltype(rows)::value>(
                feature, level.stride_h, tables.taps + (kMaxBinColumns + row), tables.steps, tables.columns, length)
                .run(emit);
        };
        if (count == 0) {
            const real_t zeros[kWidth] = {};
#pragma unroll 1
            for (int bin = 0; bin < part.columns; ++bin) {
                emit(zeros);
            }
        } else if (count == 1) {
            walk(std::integral_constant<int, 1>{});
        } else if (count == 2) {
            walk(std::integral_constant<int, 2>{});
        } else if (count == 3) {
            walk(std::integral_constant<int, 3>{});
        } else {
            walk(std::integral_constant<int, 4>{});
        }
    });
    for_bin_rows(false, [&](int ph, int, int, Global<const scalar_t> feature, auto&& emit) {
#pragma unroll 1
        for (int bin = 0; bin < part.columns; ++bin) {
            real_t sum[kWidth] = {};
            visit_cells(box, level, options, ph, part.first_column + bin, [&](real_t weight, int row, int column) {
                add_pairs(
                    weight, feature + (row * level.stride_h + column * level.stride_w), level.stride_h, level.stride_w,
                    sum);
            });
            emit(sum);
        }
    });
}

// ---- backward ----------------------------------------------------------------------------------------------------

template <typename real_t, int kWidth>
__device__ __forceinline__ void add_to_cell(Global<real_t> cell, const real_t (&sums)[kWidth], real_t weight) {
    Vec<real_t, kWidth> values;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
        values[i] = weight * sums[i];
    }
    reduce_add(cell, values);
}

// The walk of the forward pass in reverse: gradients of bins are added to the two columns of cells that the walk
// holds, and a column goes to its rows when the walk leaves it.
template <typename scalar_t, int kWidth>
__device__ __forceinline__ void scatter_bin_row(
    Global<const scalar_t> source, int bins, int channels,  // bins one after the other, `channels` apart
    Global<accum_t<scalar_t>> feature, bool active, int64_t stride_h, Shared<Tap<accum_t<scalar_t>>> rows,
    int row_count, Shared<Step<accum_t<scalar_t>>> steps, Shared<int64_t> columns, WalkLength length) {
    using real_t = accum_t<scalar_t>;
    real_t previous[kWidth] = {}, current[kWidth] = {};
    int64_t previous_column = -1, current_column = -1;
    const auto leave = [&](const real_t(&sums)[kWidth], int64_t column) {
        if (active && column >= 0) {
#pragma unroll 1
            for (int r = 0; r < row_count; ++r) {
                const Tap<real_t> tap = rows[r * kTapStride];
                add_to_cell(feature + (tap.cell * stride_h + column), sums, tap.weight);
            }
        }
    };
    auto next = load_raw<scalar_t, kWidth>(pointer_cast<const unsigned char>(source));
    int loaded = 0;
#pragma unroll 1
    for (int s = 0; s < length.steps;) {
        const auto gradient = next;
        if (--bins > 0) {  // loads run while this bin is added
            source += channels;
            next = load_raw<scalar_t, kWidth>(pointer_cast<const unsigned char>(source));
        }
        int flags = 0;
#pragma unroll 1
        while (!(flags & kEndsBin)) {
            const Step<real_t> step = steps[s++];
            flags = step.flags;
            if (flags & kLoads) {
                leave(previous, previous_column);
                previous_column = current_column;
                current_column = columns[loaded++];
#pragma unroll
                for (int i = 0; i < kWidth; ++i) {
                    previous[i] = current[i];
                    current[i] = real_t(0);
                }
            }
            if (step.previous != real_t(0)) {
                gradient.add_to(previous, step.previous);
            }
            if (step.current != real_t(0)) {
                gradient.add_to(current, step.current);
            }
        }
    }
    leave(previous, previous_column);
    leave(current, current_column);
}

// A bin that the tables have no room for.
template <typename scalar_t, int kWidth>
__device__ __forceinline__ void scatter_bin(
    Global<const scalar_t> source, Global<accum_t<scalar_t>> feature, bool active, Global<const accum_t<scalar_t>> box,
    const RoiLevel<accum_t<scalar_t>>& level, const RoiOptions& options, int ph, int pw) {
    using real_t = accum_t<scalar_t>;
    const auto gradient = load_raw<scalar_t, kWidth>(pointer_cast<const unsigned char>(source));
    visit_cells(box, level, options, ph, pw, [&](real_t weight, int row, int column) {
        Global<real_t> corner = feature + (row * level.stride_h + column * level.stride_w);
        visit_pairs(weight, level.stride_h, level.stride_w, [&](unsigned left, int64_t offset, real_t pair) {
#pragma unroll 1
            for (; left != 0; left &= left - 1) {
                const int from = __ffs(static_cast<int>(left)) - 1;
                const int64_t cell = __shfl_sync(kAllLanes, offset, from);
                real_t values[kWidth] = {};
                gradient.add_to(values, __shfl_sync(kAllLanes, pair, from));
                if (active) {
                    add_to_cell(corner + cell, values, real_t(1));
                }
            }
        });
    });
}

// Four channels a lane: the 16 bytes of a lane's reduction and those of its neighbours fill whole sectors.
constexpr int kScatterWidth = 4;

template <typename scalar_t, int kWidth>
__global__ void __launch_bounds__(kWalkWarps* kWarpSize, 5) roi_align_scatter_kernel(
    Global<const scalar_t> grad_output,                               // (K, PH, PW, C)
    Global<const accum_t<scalar_t>> boxes,                            // (K, 5)
    const __grid_constant__ RoiPyramid<accum_t<scalar_t>> gradients,  // zero on entry
    const RoiOptions options, const BinTiles tiles) {
    using real_t = accum_t<scalar_t>;
    constexpr int kLaneStep = kWarpSize * kWidth;
    SPATIALFLOW_WALK_TABLES(real_t, tables);
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const RoiPart part(options, tiles);
    Global<const real_t> box = boxes + static_cast<int64_t>(part.roi) * 5;
    write_tables(tables, box, part, gradients, options, 1);
    const int level_index = tables.place[0];
    const int64_t image = tables.place[1];
    const WalkLength length{tables.place[2], tables.place[3]};
    const RoiLevel<real_t>& level = gradients.levels[level_index];
    const int64_t bins = static_cast<int64_t>(options.pooled_height) * options.pooled_width;
    const int warps = static_cast<int>(blockDim.x) / kWarpSize;
    const int passes = (options.channels + kLaneStep - 1) / kLaneStep;
#pragma unroll 1
    for (int item = warp; item < part.rows * passes; item += warps) {
        const int row = item / passes, ph = part.first_row + row;
        const int row_count = tables.row_taps[row];
        if (row_count == 0) {
            continue;
        }
        const int channel = item % passes * kLaneStep + lane * kWidth;
        const bool active = channel < options.channels;
        // Lanes beyond the last channel repeat the first one and add nothing.
        const int own_channel = active ? channel : 0;
        const int64_t first_bin = part.roi * bins + static_cast<int64_t>(ph) * options.pooled_width + part.first_column;
        Global<const scalar_t> source = grad_output + (first_bin * options.channels + own_channel);
        Global<real_t> feature = level.data + (image * level.stride_n + own_channel);
        if (row_count == kTooMany || length.steps < 0) {
#pragma unroll 1
            for (int bin = 0; bin < part.columns; ++bin) {
                scatter_bin<scalar_t, kWidth>(
                    source + static_cast<int64_t>(bin) * options.channels, feature, active, box, level, options, ph,
                    part.first_column + bin);
            }
        } else {
            scatter_bin_row<scalar_t, kWidth>(
                source, part.columns, options.channels, feature, active, level.stride_h,
                tables.taps + (kMaxBinColumns + row), row_count, tables.steps, tables.columns, length);
        }
    }
}

// What a RoI reads, computed once for the gather.
struct alignas(32) RoiCells {
    int level, image;                                  // level -1: nothing
    int first_row, end_row, first_column, end_column;  // no cell outside is read
    int unused[2];
};

// Weights of the cells that a bin reads on an axis, from `first` on.
template <typename real_t>
struct alignas(32) BinWeights {
    static constexpr int kCells = sizeof(real_t) == 8 ? 3 : 7;
    int first;  // kTooWide: not here
    real_t weights[kCells];
};
constexpr int kTooWide = -1;

// Cells of an axis of `size` cells that no bin reads beyond, two and the rounding of coordinates more.
template <typename real_t>
__device__ __forceinline__ void touched_cells(const RoiAxis<real_t>& axis, int bins, int size, int& first, int& end) {
    const real_t extent = real_t(bins) * axis.bin, other = axis.start + extent;
    const real_t low = axis.start < other ? axis.start : other, high = axis.start < other ? other : axis.start;
    const real_t margin = real_t(2) + real_t(1e-6) * (std::fabs(axis.start) + std::fabs(extent));
    const real_t last = real_t(size);
    const real_t from = low - margin, to = high + margin + real_t(1);
    first = static_cast<int>(from > real_t(0) ? (from < last ? from : last) : real_t(0));
    end = static_cast<int>(to > real_t(0) ? (to < last ? to : last) : real_t(0));
}

constexpr int kTableThreads = 128;

// A thread per bin of an axis of a RoI: first those of the y axis, then those of the x axis.
template <typename real_t, typename element_t>
__global__ void __launch_bounds__(kTableThreads) roi_align_weights_kernel(
    Global<const real_t> boxes,                                                                               // (K, 5)
    const __grid_constant__ RoiPyramid<element_t> pyramid, const RoiOptions options, Global<RoiCells> cells,  // (K,)
    Global<BinWeights<real_t>> weights) {  // (K, PH + PW)
    SPATIALFLOW_SHARED(Tap<real_t>, taps, kTableThreads * kMaxTaps);
    const int bins = options.pooled_height + options.pooled_width;
    const int64_t at = static_cast<int64_t>(blockIdx.x) * kTableThreads + threadIdx.x;
    const int64_t roi_index = at / bins;
    const int index = static_cast<int>(at % bins);
    if (roi_index >= options.num_rois) {
        return;
    }
    Global<const real_t> box = boxes + roi_index * 5;
    const bool of_rows = index < options.pooled_height;
    const RoiPlace place = roi_place(box, pyramid, options);
    const RoiLevel<element_t>& level = pyramid.levels[place.level];
    const RoiAxis<real_t> axis = axis_of(box, of_rows, level, options);
    if (index == 0) {
        const RoiAxis<real_t> x = axis_of(box, false, level, options);
        RoiCells touched{};
        touched.level = place.valid && axis.valid && x.valid ? place.level : -1;
        touched.image = place.image;
        touched_cells(axis, options.pooled_height, level.height, touched.first_row, touched.end_row);
        touched_cells(x, options.pooled_width, level.width, touched.first_column, touched.end_column);
        cells[roi_index] = touched;
    }
    BinWeights<real_t> own{};
    if (place.valid && axis.valid) {
        Shared<Tap<real_t>> own_taps =
            taps + (threadIdx.x / kTapStride * (kMaxTaps * kTapStride) + threadIdx.x % kTapStride);
        const int count = collect_taps(
            axis, of_rows ? index : index - options.pooled_height, of_rows ? level.height : level.width, own_taps);
        own.first = count == kTooMany ? kTooWide : 0x7fffffff;
#pragma unroll 1
        for (int j = 0; j < count && count != kTooMany; ++j) {
            const Tap<real_t> tap = own_taps[j * kTapStride];
            own.first = tap.cell < own.first ? tap.cell : own.first;
        }
#pragma unroll 1
        for (int j = 0; j < count && own.first != kTooWide; ++j) {
            const Tap<real_t> tap = own_taps[j * kTapStride];
#pragma unroll
            for (int i = 0; i < BinWeights<real_t>::kCells; ++i) {
                own.weights[i] += tap.cell - own.first == i ? tap.weight : real_t(0);
            }
            own.first = tap.cell - own.first < BinWeights<real_t>::kCells ? own.first : kTooWide;
        }
    }
    weights[at] = own;
}

constexpr int kCellRows = 2, kCellColumns = 4;  // of a block of the gather, a warp each
// The bin of this lane: bin rows from ph0 on in the lower half of a warp, bin columns from pw0 on in the upper half.
struct LaneBin {
    bool of_rows, exists;
    int bin;

    __device__ __forceinline__ LaneBin(const RoiOptions& options, int ph0, int pw0) {
        const int lane = threadIdx.x % kWarpSize;
        of_rows = lane < kHalfWarp;
        bin = of_rows ? ph0 + lane : pw0 + lane - kHalfWarp;
        exists = bin < (of_rows ? options.pooled_height : options.pooled_width);
    }
    // Those of another bin if it does not exist.
    template <typename real_t>
    __device__ __forceinline__ BinWeights<real_t> load(
        Global<const BinWeights<real_t>> weights, const RoiOptions& options) const {
        return weights[exists ? (of_rows ? bin : options.pooled_height + bin) : 0];
    }
};

// A block owns kCellRows x kCellColumns cells, a warp one of them. The block lists the RoIs that may read its cells, in
// order, kThreads candidates at a time; each warp then adds up the bins that do read its cell.
template <typename scalar_t, int kWidth>
__global__ void __launch_bounds__(kThreads, 2) roi_align_gather_kernel(
    Global<const scalar_t> grad_output,                   // (K, PH, PW, C)
    Global<const accum_t<scalar_t>> boxes,                // (K, 5)
    Global<const RoiCells> cells,                         // (K,)
    Global<const BinWeights<accum_t<scalar_t>>> weights,  // (K, PH + PW)
    const __grid_constant__ RoiPyramid<scalar_t> gradients, const RoiOptions options) {
    using real_t = accum_t<scalar_t>;
    SPATIALFLOW_SHARED(int, listed, kThreads);
    SPATIALFLOW_SHARED(int, listed_by_warp, kWarps);
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    int level_index = options.num_levels - 1;  // the coarsest comes first: its cells lie under the most RoIs
    while (level_index > 0 && static_cast<int>(blockIdx.x) >= gradients.levels[level_index - 1].tile_begin) {
        --level_index;
    }
    const RoiLevel<scalar_t>& level = gradients.levels[level_index];
    const int tiles_per_row = (level.width + kCellColumns - 1) / kCellColumns;
    const int tiles_per_image = (level.height + kCellRows - 1) / kCellRows * tiles_per_row;
    const int tile = static_cast<int>(blockIdx.x) - level.tile_begin;
    const int image = tile / tiles_per_image, tile_of_image = tile % tiles_per_image;
    const int tile_y = tile_of_image / tiles_per_row * kCellRows, tile_x = tile_of_image % tiles_per_row * kCellColumns;
    const int y = tile_y + warp / kCellColumns, x = tile_x + warp % kCellColumns;
    const bool exists = y < level.height && x < level.width;
    const int64_t bins = static_cast<int64_t>(options.pooled_height) * options.pooled_width;
    const int64_t axis_bins = static_cast<int64_t>(options.pooled_height) + options.pooled_width;
    Global<scalar_t> target = level.data + (image * level.stride_n + y * level.stride_h + x * level.stride_w);

    for (int first = 0; first < options.channels; first += kWarpSize * kWidth) {
        const int c = first + lane * kWidth;
        const bool active = c < options.channels;
        real_t sum[kWidth] = {};
        for (int base = 0; base < options.num_rois; base += kThreads) {
            const int candidate = base + static_cast<int>(threadIdx.x);
            bool hit = false;
            if (candidate < options.num_rois) {
                const RoiCells roi = cells[candidate];
                hit = roi.level == level_index && roi.image == image && roi.first_row < tile_y + kCellRows &&
                      roi.end_row > tile_y && roi.first_column < tile_x + kCellColumns && roi.end_column > tile_x;
            }
            const unsigned hits = __ballot_sync(kAllLanes, hit);
            if (lane == 0) {
                listed_by_warp[warp] = __popc(hits);
            }
            __syncthreads();
            int before = 0, total = 0;
            for (int w = 0; w < kWarps; ++w) {
                const int count = listed_by_warp[w];
                before += w < warp ? count : 0;
                total += count;
            }
            if (hit) {
                listed[before + __popc(hits & ((1u << lane) - 1u))] = candidate;
            }
            __syncthreads();
            const auto load_weights = [&](int roi, int ph0, int pw0) {
                return LaneBin(options, ph0, pw0).load(weights + roi * axis_bins, options);
            };
            int next_roi = 0;
            if (total > 0) {
                next_roi = listed[0];
            }
            BinWeights<real_t> next = load_weights(next_roi, 0, 0);
#pragma unroll 1
            for (int entry = 0; entry < total && exists; ++entry) {
                const int roi = next_roi;
                BinWeights<real_t> own = next;
                if (entry + 1 < total) {
                    next_roi = listed[entry + 1];
                }
                next = load_weights(next_roi, 0, 0);
                // Lanes beyond the last channel repeat the first one and store nothing.
                Global<const scalar_t> source = grad_output + (roi * bins * options.channels + (active ? c : 0));
#pragma unroll 1
                for (int ph0 = 0; ph0 < options.pooled_height; ph0 += kHalfWarp) {
#pragma unroll 1
                    for (int pw0 = 0; pw0 < options.pooled_width; pw0 += kHalfWarp) {
                        if (ph0 + pw0 > 0) {
                            own = load_weights(roi, ph0, pw0);
                        }
                        const LaneBin lane_bin(options, ph0, pw0);
                        const int cell = lane_bin.of_rows ? y : x;
                        real_t weight = real_t(0);
#pragma unroll
                        for (int i = 0; i < BinWeights<real_t>::kCells; ++i) {
                            weight = lane_bin.exists && cell - own.first == i ? own.weights[i] : weight;
                        }
                        if (lane_bin.exists && own.first == kTooWide) {
                            const RoiAxis<real_t> axis =
                                axis_of(boxes + static_cast<int64_t>(roi) * 5, lane_bin.of_rows, level, options);
                            weight =
                                cell_weight(axis, lane_bin.bin, cell, lane_bin.of_rows ? level.height : level.width);
                        }
                        const int bin = ph0 * options.pooled_width + pw0;
                        add_pairs(
                            weight, source + bin * options.channels, options.pooled_width * options.channels,
                            options.channels, sum);
                    }
                }
            }
            __syncthreads();  // the list is read to its end before the next candidates overwrite it
        }
        if (active && exists) {
            Vec<scalar_t, kWidth> values;
#pragma unroll
            for (int i = 0; i < kWidth; ++i) {
                store(values[i], sum[i]);
            }
            store_vector(target + c, values);
        }
    }
}

// ---- host --------------------------------------------------------------------------------------------------------

int as_int(const char* op, const char* name, int64_t value) {
    check(value <= 0x7fffffff, op, ": ", name, " must be below 2^31 on CUDA, got ", value);
    return static_cast<int>(value);
}

RoiOptions options_of(
    const char* op, const RoiAlignSettings& settings, const Tensor& boxes, int64_t batch, int64_t channels,
    bool planar) {
    check(
        settings.scales.size() <= kMaxLevels, op, ": at most ", kMaxLevels, " levels on CUDA, got ",
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
        planar};
}

template <typename element_t>
RoiLevel<element_t> level_of(const char* op, const Tensor& tensor, Global<element_t> data, double scale) {
    return {
        data,
        as_int(op, "a level's height", tensor.size(2)),
        as_int(op, "a level's width", tensor.size(3)),
        stride_of(tensor, 0),
        stride_of(tensor, 2),
        stride_of(tensor, 3),
        scale,
        0};
}

// True if 16-byte accesses along channels are aligned in all levels.
bool levels_are_wide(const std::vector<Tensor>& levels, int64_t width) {
    for (const Tensor& level : levels) {
        if (stride_of(level, 0) % width != 0 || stride_of(level, 2) % width != 0 || stride_of(level, 3) % width != 0 ||
            !is_aligned(level.const_data_ptr(), 16)) {
            return false;
        }
    }
    return true;
}

// Launch of a kernel whose blocks take tiles of bins, its warps kWarpSize * `width` channels of a bin row. Wide tiles
// share the most columns of cells, but few RoIs need more of them to fill the card.
struct WalkGrid {
    BinTiles tiles;
    dim3 grid, block;

    WalkGrid(const char* op, const RoiOptions& options, int width) {
        constexpr int64_t kFillingWarps = 2048;  // 16 on each of 128 multiprocessors
        constexpr int64_t kMinColumns = 4;
        const int64_t bin_rows = options.pooled_height, bin_columns = options.pooled_width;
        const int64_t passes = ceil_div(options.channels, kWarpSize * width);
        const int64_t wanted =
            std::min(ceil_div(kFillingWarps, options.num_rois * bin_rows * passes), ceil_div(bin_columns, kMinColumns));
        const int64_t columns = ceil_div(bin_columns, std::max(ceil_div(bin_columns, kMaxBinColumns), wanted));
        const int64_t rows = ceil_div(bin_rows, ceil_div(bin_rows, kWalkWarps));
        tiles = {
            static_cast<int>(rows), static_cast<int>(columns), static_cast<int>(ceil_div(bin_rows, rows)),
            static_cast<int>(ceil_div(bin_columns, columns))};
        const int64_t items = rows * passes, warps = ceil_div(items, ceil_div(items, kWalkWarps));
        grid = dim3(grid_size(op, static_cast<int64_t>(options.num_rois) * tiles.row_tiles * tiles.column_tiles));
        block = dim3(static_cast<unsigned>(warps * kWarpSize));
    }
};

template <typename scalar_t, int kWidth>
void launch_forward(
    const char* op, const RoiPyramid<const scalar_t>& pyramid, const Tensor& rois, const Tensor& output,
    const RoiOptions& options, Stream stream) {
    const WalkGrid walk(op, options, kWidth);
    const size_t bins = options.planar ? walk.block.x / kWarpSize * static_cast<size_t>(walk.tiles.columns) : 0;
    launch<roi_align_kernel<scalar_t, kWidth>>(
        walk.grid, walk.block, bins * kTileStride<kWidth> * sizeof(scalar_t), stream, pyramid,
        data<accum_t<scalar_t>>(rois), mutable_data<scalar_t>(output), options, walk.tiles);
}

template <typename scalar_t, int kWidth>
void launch_scatter(
    const char* op, const Tensor& grad_output, const Tensor& rois, const std::vector<Tensor>& gradients,
    const RoiAlignSettings& settings, const RoiOptions& options, Stream stream) {
    using real_t = accum_t<scalar_t>;
    RoiPyramid<real_t> pyramid{};
    for (size_t l = 0; l < gradients.size(); ++l) {
        pyramid.levels[l] = level_of(op, gradients[l], mutable_data<real_t>(gradients[l]), settings.scales[l]);
    }
    const WalkGrid walk(op, options, kWidth);
    launch<roi_align_scatter_kernel<scalar_t, kWidth>>(
        walk.grid, walk.block, 0, stream, data<scalar_t>(grad_output), data<real_t>(rois), pyramid, options,
        walk.tiles);
}

template <typename scalar_t, int kWidth>
void launch_gather(
    const char* op, const Tensor& grad_output, const Tensor& rois, const std::vector<Tensor>& gradients,
    const RoiAlignSettings& settings, const RoiOptions& options, Stream stream) {
    using real_t = accum_t<scalar_t>;
    RoiPyramid<scalar_t> pyramid{};
    int64_t tiles = 0;
    for (size_t l = gradients.size(); l-- > 0;) {
        pyramid.levels[l] = level_of(op, gradients[l], mutable_data<scalar_t>(gradients[l]), settings.scales[l]);
        pyramid.levels[l].tile_begin = as_int(op, "the number of tiles", tiles);
        tiles +=
            ceil_div(gradients[l].size(2), kCellRows) * ceil_div(gradients[l].size(3), kCellColumns) * options.batch;
    }
    const int64_t axis_bins = settings.pooled_height + settings.pooled_width;
    const Tensor cells = empty_like_sized(
        rois, {options.num_rois, static_cast<int64_t>(sizeof(RoiCells) / sizeof(int))}, ScalarType::Int);
    const Tensor weights = empty_like_sized(
        rois, {options.num_rois, axis_bins, static_cast<int64_t>(sizeof(BinWeights<real_t>) / sizeof(real_t))});
    const auto roi_cells = pointer_cast<RoiCells>(mutable_data<int>(cells));
    const auto bin_weights = pointer_cast<BinWeights<real_t>>(mutable_data<real_t>(weights));
    launch<roi_align_weights_kernel<real_t, scalar_t>>(
        dim3(grid_size(op, ceil_div(options.num_rois * axis_bins, kTableThreads))), dim3(kTableThreads), 0, stream,
        data<real_t>(rois), pyramid, options, roi_cells, bin_weights);
    launch<roi_align_gather_kernel<scalar_t, kWidth>>(
        dim3(grid_size(op, tiles)), dim3(kThreads), 0, stream, data<scalar_t>(grad_output), data<real_t>(rois),
        roi_cells, bin_weights, pyramid, options);
}

}  // namespace

Tensor roi_align_forward(
    const char* op, const std::vector<Tensor>& features, const Tensor& boxes, const RoiAlignSettings& settings) {
    const Tensor& first = features[0];
    const DeviceScope device(first);
    const int64_t channels = first.size(1);
    const MemoryFormat format = memory_format_of(first);
    Tensor output = empty_like_sized(
        first, {boxes.size(0), channels, settings.pooled_height, settings.pooled_width}, std::nullopt, format);
    if (output.numel() == 0) {
        return output;
    }
    if (first.size(0) == 0) {
        return torch::stable::zero_(output);
    }
    std::vector<Tensor> sources;
    for (const Tensor& feature : features) {
        sources.push_back(channels_adjacent(feature));
    }
    const Tensor rois = contiguous_as(boxes, accum_dtype(first.scalar_type()));
    const RoiOptions options =
        options_of(op, settings, boxes, first.size(0), channels, format == MemoryFormat::Contiguous);
    dispatch_floating(op, first.scalar_type(), [&](auto zero) {
        using scalar_t = decltype(zero);
        constexpr int kWidth = kWideElements<scalar_t>;
        RoiPyramid<const scalar_t> pyramid{};
        for (size_t l = 0; l < sources.size(); ++l) {
            pyramid.levels[l] = level_of(op, sources[l], data<scalar_t>(sources[l]), settings.scales[l]);
        }
        if (channels % kWidth == 0 && levels_are_wide(sources, kWidth) && is_aligned(output.const_data_ptr(), 16)) {
            launch_forward<scalar_t, kWidth>(op, pyramid, rois, output, options, device.stream());
        } else {
            launch_forward<scalar_t, 1>(op, pyramid, rois, output, options, device.stream());
        }
    });
    return output;
}

std::vector<Tensor> roi_align_backward(
    const char* op, const Tensor& grad_output, const Tensor& boxes, const RoiAlignSettings& settings, int64_t batch,
    int64_t channels, const std::vector<int64_t>& heights, const std::vector<int64_t>& widths, bool channels_last,
    bool deterministic) {
    const DeviceScope device(grad_output);
    const ScalarType dtype = grad_output.scalar_type();
    const bool gather = deterministic || dtype == ScalarType::Double;
    const bool launched = grad_output.numel() != 0 && batch != 0;
    std::vector<Tensor> gradients;
    for (size_t l = 0; l < heights.size(); ++l) {
        gradients.push_back(empty_like_sized(
            grad_output, {batch, channels, heights[l], widths[l]}, gather ? dtype : accum_dtype(dtype),
            MemoryFormat::ChannelsLast));
        if (!gather || !launched) {
            torch::stable::zero_(gradients[l]);
        }
    }
    if (launched) {
        const Tensor source = to_contiguous(grad_output, MemoryFormat::ChannelsLast);
        const Tensor rois = contiguous_as(boxes, accum_dtype(dtype));
        const RoiOptions options = options_of(op, settings, boxes, batch, channels, false);
        dispatch_floating(op, dtype, [&](auto zero) {
            using scalar_t = decltype(zero);
            const auto is_wide = [&](int64_t width) {
                return channels % width == 0 && levels_are_wide(gradients, width) &&
                       is_aligned(source.const_data_ptr(), 16);
            };
            if (gather) {
                constexpr int kWidth = kWideElements<scalar_t>;
                const auto run = is_wide(kWidth) ? launch_gather<scalar_t, kWidth> : launch_gather<scalar_t, 1>;
                run(op, source, rois, gradients, settings, options, device.stream());
            } else if constexpr (!std::is_same_v<scalar_t, double>) {
                const auto run =
                    is_wide(kScatterWidth) ? launch_scatter<scalar_t, kScatterWidth> : launch_scatter<scalar_t, 1>;
                run(op, source, rois, gradients, settings, options, device.stream());
            }
        });
    }
    for (Tensor& gradient : gradients) {
        gradient = as_dtype(gradient, dtype);
        if (!channels_last) {
            gradient = to_contiguous(gradient);
        }
    }
    return gradients;
}

namespace {

Tensor roi_align_cuda(
    const Tensor& input, const Tensor& boxes, int64_t pooled_height, int64_t pooled_width, double spatial_scale,
    int64_t sampling_ratio, bool aligned) {
    check_roi_align(input, boxes, pooled_height, pooled_width, spatial_scale, sampling_ratio);
    return roi_align_forward(
        "roi_align", {input}, boxes, {pooled_height, pooled_width, {spatial_scale}, sampling_ratio, aligned, 1.0});
}

Tensor roi_align_backward_cuda(
    const Tensor& grad_output, const Tensor& boxes, int64_t pooled_height, int64_t pooled_width, double spatial_scale,
    int64_t sampling_ratio, bool aligned, int64_t batch, int64_t channels, int64_t height, int64_t width,
    bool channels_last, bool deterministic) {
    check_roi_align_backward(grad_output, boxes, pooled_height, pooled_width, spatial_scale, sampling_ratio, channels);
    return roi_align_backward(
        "roi_align_backward", grad_output, boxes,
        {pooled_height, pooled_width, {spatial_scale}, sampling_ratio, aligned, 1.0}, batch, channels, {height},
        {width}, channels_last, deterministic)[0];
}

}  // namespace
}  // namespace spatialflow

SPATIALFLOW_DEVICE_IMPL(library) {
    library.impl("roi_align", TORCH_BOX(&spatialflow::roi_align_cuda));
    library.impl("_roi_align_backward", TORCH_BOX(&spatialflow::roi_align_backward_cuda));
}
