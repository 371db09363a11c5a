// SPDX-License-Identifier: Apache-2.0
//
// Gradient of RoIAlign w.r.t. the features on CUDA, over one feature map or a pyramid. Two algorithms:
//
//   scatter   The transpose of the forward pass. Columns of cells are summed over bins, then added to the map by
//             float32 reductions, of 16 bytes if alignment and device allow it. The order of the sums is not fixed.
//   gather    A warp per cell adds the bins that read the cell, RoIs in ascending order. It is deterministic and needs
//             no float32 buffer or atomics, but one warp adds all RoIs of a cell. Used if `deterministic` is true, and
//             always in float64.
//
// Layouts: gradient of the output (K, PH, PW, C); gradients of the levels (N, H, W, C).
#include "cuda/roi_align_walk.cuh"

namespace spatialflow {
namespace {

// ---- scatter -----------------------------------------------------------------------------------------------------

template <typename real_t, int kWidth>
__device__ __forceinline__ void add_to_cell(Global<real_t> cell, const real_t (&sums)[kWidth], real_t weight) {
    Vec<real_t, kWidth> values;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
        values[i] = weight * sums[i];
    }
    reduce_add(cell, values);
}

// Transpose the forward pass of a bin row. Gradients of bins are added to the two columns of cells in registers. A
// column is added to its rows of cells before another column replaces it.
template <typename scalar_t, int kWidth>
__device__ __forceinline__ void scatter_bin_row(
    Global<const scalar_t> source, int bins, int channels,  // elements from one bin to the next: `channels`
    Global<accum_t<scalar_t>> feature, bool active, int64_t row_stride, Shared<Tap<accum_t<scalar_t>>> rows,
    int row_count, Shared<Step<accum_t<scalar_t>>> steps, Shared<int64_t> columns, WalkLength length) {
    using real_t = accum_t<scalar_t>;
    real_t previous[kWidth] = {}, current[kWidth] = {};
    int64_t previous_column = -1, current_column = -1;
    const auto flush = [&](const real_t(&sums)[kWidth], int64_t column) {
        if (active && column >= 0) {
#pragma unroll 1
            for (int r = 0; r < row_count; ++r) {
                const Tap<real_t> tap = rows[r * kTapStride];
                add_to_cell(feature + (tap.cell * row_stride + column), sums, tap.weight);
            }
        }
    };
    auto next = load_raw<scalar_t, kWidth>(pointer_cast<const unsigned char>(source));
    int loaded = 0;
#pragma unroll 1
    for (int s = 0; s < length.steps;) {
        const auto gradient = next;
        if (--bins > 0) {  // load the next gradient before this one is used
            source += channels;
            next = load_raw<scalar_t, kWidth>(pointer_cast<const unsigned char>(source));
        }
        int flags = 0;
#pragma unroll 1
        while (!(flags & kEndsBin)) {
            const Step<real_t> step = steps[s++];
            flags = step.flags;
            if (flags & kLoadsColumn) {
                flush(previous, previous_column);
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
    flush(previous, previous_column);
    flush(current, current_column);
}

// Scatter the gradient of a bin whose cells do not fit in the tables.
template <typename scalar_t, int kWidth>
__device__ __forceinline__ void scatter_bin(
    Global<const scalar_t> source, Global<accum_t<scalar_t>> feature, bool active, Global<const accum_t<scalar_t>> box,
    const CudaRoiLevel<accum_t<scalar_t>>& level, const RoiProblem& problem, int ph, int pw) {
    using real_t = accum_t<scalar_t>;
    const auto gradient = load_raw<scalar_t, kWidth>(pointer_cast<const unsigned char>(source));
    visit_cells(box, level, problem, ph, pw, [&](real_t weight, int row, int column) {
        Global<real_t> corner = feature + (row * level.row_stride + column * level.column_stride);
        visit_pairs(weight, level.row_stride, level.column_stride, [&](unsigned left, int64_t offset, real_t pair) {
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

// Four channels per lane: the 16-byte reductions of adjacent lanes fill whole sectors.
constexpr int kScatterWidth = 4;

template <typename scalar_t, int kWidth>
__global__ void __launch_bounds__(kWalkWarps* kWarpSize, 5) roi_align_scatter_kernel(
    Global<const scalar_t> grad_output,                               // (K, PH, PW, C)
    Global<const accum_t<scalar_t>> boxes,                            // (K, 5)
    const __grid_constant__ RoiPyramid<accum_t<scalar_t>> gradients,  // zero on entry
    const RoiProblem problem, const BinTiles tiles) {
    using real_t = accum_t<scalar_t>;
    constexpr int kLaneStep = kWarpSize * kWidth;
    SPATIALFLOW_WALK_TABLES(real_t, tables);
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const RoiPart part(problem, tiles);
    Global<const real_t> box = boxes + static_cast<int64_t>(part.roi) * 5;
    write_tables(tables, box, part, gradients, problem, 1);
    const int level_index = tables.place[0];
    const int64_t image = tables.place[1];
    const WalkLength length{tables.place[2], tables.place[3]};
    const CudaRoiLevel<real_t>& level = gradients.levels[level_index];
    const int64_t bins = static_cast<int64_t>(problem.pooled_height) * problem.pooled_width;
    const int warps = static_cast<int>(blockDim.x) / kWarpSize;
    const int passes = (problem.channels + kLaneStep - 1) / kLaneStep;
#pragma unroll 1
    for (int item = warp; item < part.rows * passes; item += warps) {
        const int row = item / passes, ph = part.first_row + row;
        const int row_count = tables.row_taps[row];
        if (row_count == 0) {
            continue;
        }
        const int channel = item % passes * kLaneStep + lane * kWidth;
        const bool active = channel < problem.channels;
        // Lanes beyond the last channel repeat the first one and add nothing.
        const int source_channel = active ? channel : 0;
        const int64_t first_bin = part.roi * bins + static_cast<int64_t>(ph) * problem.pooled_width + part.first_column;
        Global<const scalar_t> source = grad_output + (first_bin * problem.channels + source_channel);
        Global<real_t> feature = level.data + (image * level.image_stride + source_channel);
        if (row_count == kTooMany || length.steps < 0) {
#pragma unroll 1
            for (int bin = 0; bin < part.columns; ++bin) {
                scatter_bin<scalar_t, kWidth>(
                    source + static_cast<int64_t>(bin) * problem.channels, feature, active, box, level, problem, ph,
                    part.first_column + bin);
            }
        } else {
            scatter_bin_row<scalar_t, kWidth>(
                source, part.columns, problem.channels, feature, active, level.row_stride,
                tables.taps + (kMaxBinColumns + row), row_count, tables.steps, tables.columns, length);
        }
    }
}

// ---- gather ------------------------------------------------------------------------------------------------------

// Kernel argument: the gradients of the levels, divided into tiles of cells.
template <typename element_t>
struct TiledPyramid {
    RoiPyramid<element_t> pyramid;
    int tile_begin[kMaxRoiLevels];  // first block of a level
};

// Level, image and cells that a RoI reads; computed once for the gather.
struct alignas(32) RoiCells {
    int level, image;                                  // level -1: the RoI reads nothing
    int first_row, end_row, first_column, end_column;  // no cell outside this rectangle is read
    int unused[2];
};

// Weights of the cells that a bin reads on an axis, from `first` on.
template <typename real_t>
struct alignas(32) BinWeights {
    static constexpr int kCells = sizeof(real_t) == 8 ? 3 : 7;
    int first;  // kTooWide: too many taps, samples or cells; `weights` is not used
    real_t weights[kCells];
};
constexpr int kTooWide = -1;

struct CellInterval {
    int first, end;
};

// Cells that the bins can read on an axis of `size` cells, widened by two cells and the rounding of coordinates.
template <typename real_t>
__device__ __forceinline__ CellInterval readable_cells(const RoiAxis<real_t>& axis, int bins, int size) {
    const real_t extent = real_t(bins) * axis.bin, end = axis.start + extent;
    const real_t low = axis.start < end ? axis.start : end, high = axis.start < end ? end : axis.start;
    const real_t margin = real_t(2) + real_t(1e-6) * (std::fabs(axis.start) + std::fabs(extent));
    const real_t last = real_t(size);
    const real_t from = low - margin, to = high + margin + real_t(1);
    return {
        static_cast<int>(from > real_t(0) ? (from < last ? from : last) : real_t(0)),
        static_cast<int>(to > real_t(0) ? (to < last ? to : last) : real_t(0))};
}

constexpr int kTableThreads = 128;

// Convert the `count` taps of a bin to weights of consecutive cells.
template <typename real_t>
__device__ __forceinline__ void set_weights(BinWeights<real_t>& bin, Shared<Tap<real_t>> taps, int count) {
    bin.first = count == kTooMany ? kTooWide : 0x7fffffff;
#pragma unroll 1
    for (int j = 0; j < count && count != kTooMany; ++j) {
        const Tap<real_t> tap = taps[j * kTapStride];
        bin.first = tap.cell < bin.first ? tap.cell : bin.first;
    }
#pragma unroll 1
    for (int j = 0; j < count && bin.first != kTooWide; ++j) {
        const Tap<real_t> tap = taps[j * kTapStride];
#pragma unroll
        for (int i = 0; i < BinWeights<real_t>::kCells; ++i) {
            bin.weights[i] += tap.cell - bin.first == i ? tap.weight : real_t(0);
        }
        bin.first = tap.cell - bin.first < BinWeights<real_t>::kCells ? bin.first : kTooWide;
    }
}

// Compute the weights of the bins, a thread per bin of an axis of a RoI: first the y axis, then the x axis.
template <typename real_t, typename element_t>
__global__ void __launch_bounds__(kTableThreads) roi_align_weights_kernel(
    Global<const real_t> boxes,  // (K, 5)
    const __grid_constant__ TiledPyramid<element_t> gradients, const RoiProblem problem,
    Global<RoiCells> cells,                // (K,)
    Global<BinWeights<real_t>> weights) {  // (K, PH + PW)
    SPATIALFLOW_SHARED(Tap<real_t>, taps, kTableThreads * kMaxTaps);
    const int bins = problem.pooled_height + problem.pooled_width;
    const int64_t at = static_cast<int64_t>(blockIdx.x) * kTableThreads + threadIdx.x;
    const int64_t roi_index = at / bins;
    const int index = static_cast<int>(at % bins);
    if (roi_index >= problem.num_rois) {
        return;
    }
    Global<const real_t> box = boxes + roi_index * 5;
    const bool of_rows = index < problem.pooled_height;
    const RoiPlace place = roi_place(box, gradients.pyramid, problem);
    const CudaRoiLevel<element_t>& level = gradients.pyramid.levels[place.level];
    const RoiAxis<real_t> axis = axis_of(box, of_rows, level, problem);
    if (index == 0) {
        const RoiAxis<real_t> x = axis_of(box, false, level, problem);
        const CellInterval rows = readable_cells(axis, problem.pooled_height, level.height);
        const CellInterval columns = readable_cells(x, problem.pooled_width, level.width);
        const bool valid = place.valid && axis.valid && x.valid;
        cells[roi_index] =
            RoiCells{valid ? place.level : -1, place.image, rows.first, rows.end, columns.first, columns.end, {}};
    }
    BinWeights<real_t> bin{};
    if (place.valid && axis.valid) {
        Shared<Tap<real_t>> lane_taps =
            taps + (threadIdx.x / kTapStride * (kMaxTaps * kTapStride) + threadIdx.x % kTapStride);
        const int count = collect_taps(
            axis, of_rows ? index : index - problem.pooled_height, of_rows ? level.height : level.width, lane_taps);
        set_weights(bin, lane_taps, count);
    }
    weights[at] = bin;
}

// Bin of this lane on one axis. Lane l of the lower half-warp has bin row ph0 + l; lane l of the upper half-warp has
// bin column pw0 + l.
struct LaneBin {
    bool of_rows, exists;
    int bin;

    __device__ __forceinline__ LaneBin(const RoiProblem& problem, int ph0, int pw0) {
        const int lane = threadIdx.x % kWarpSize;
        of_rows = lane < kHalfWarp;
        bin = of_rows ? ph0 + lane : pw0 + lane - kHalfWarp;
        exists = bin < (of_rows ? problem.pooled_height : problem.pooled_width);
    }
    // Load the weights of this lane's bin; those of the first bin if this lane does not have a bin.
    template <typename real_t>
    __device__ __forceinline__ BinWeights<real_t> load(
        Global<const BinWeights<real_t>> weights, const RoiProblem& problem) const {
        return weights[exists ? (of_rows ? bin : problem.pooled_height + bin) : 0];
    }
};

constexpr int kGatherThreads = 256;
constexpr int kGatherWarps = kGatherThreads / kWarpSize;
constexpr int kCellRows = 2, kCellColumns = 4;  // cells of a block of the gather, one per warp

// Level, image and cells of a block of the gather.
struct CellTile {
    int level, image, y, x;  // y, x: of the first cell

    template <typename element_t>
    __device__ __forceinline__ CellTile(const TiledPyramid<element_t>& gradients, const RoiProblem& problem)
        : level(problem.num_levels - 1) {  // the coarsest level has the first blocks: the most RoIs read its cells
        while (level > 0 && static_cast<int>(blockIdx.x) >= gradients.tile_begin[level - 1]) {
            --level;
        }
        const CudaRoiLevel<element_t>& cells = gradients.pyramid.levels[level];
        const int tiles_per_row = (cells.width + kCellColumns - 1) / kCellColumns;
        const int tiles_per_image = (cells.height + kCellRows - 1) / kCellRows * tiles_per_row;
        const int tile = static_cast<int>(blockIdx.x) - gradients.tile_begin[level];
        image = tile / tiles_per_image;
        const int tile_of_image = tile % tiles_per_image;
        y = tile_of_image / tiles_per_row * kCellRows;
        x = tile_of_image % tiles_per_row * kCellColumns;
    }
    // Return false only if the RoI reads no cell of this tile.
    __device__ __forceinline__ bool may_be_read_by(const RoiCells& roi) const {
        return roi.level == level && roi.image == image && roi.first_row < y + kCellRows && roi.end_row > y &&
               roi.first_column < x + kCellColumns && roi.end_column > x;
    }
};

// List the RoIs among [base, base + kGatherThreads) that may read the tile, in ascending order, and return their
// number. All threads of the block must call it.
__device__ __forceinline__ int list_rois_of_tile(
    Global<const RoiCells> cells, int num_rois, int base, const CellTile& tile, Shared<int> listed,
    Shared<int> listed_by_warp) {
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const int candidate = base + static_cast<int>(threadIdx.x);
    bool hit = false;
    if (candidate < num_rois) {
        const RoiCells roi = cells[candidate];
        hit = tile.may_be_read_by(roi);
    }
    const unsigned hits = __ballot_sync(kAllLanes, hit);
    if (lane == 0) {
        listed_by_warp[warp] = __popc(hits);
    }
    __syncthreads();
    int before = 0, total = 0;
    for (int w = 0; w < kGatherWarps; ++w) {
        const int count = listed_by_warp[w];
        before += w < warp ? count : 0;
        total += count;
    }
    if (hit) {
        listed[before + __popc(hits & ((1u << lane) - 1u))] = candidate;
    }
    __syncthreads();
    return total;
}

// Sums of one cell: a warp adds the bins that read the cell.
template <typename scalar_t, int kWidth>
struct CellGather {
    using real_t = accum_t<scalar_t>;

    const RoiProblem& problem;
    const CudaRoiLevel<scalar_t>& level;
    Global<const scalar_t> grad_output;        // (K, PH, PW, C), from this lane's first channel on
    Global<const real_t> boxes;                // (K, 5)
    Global<const BinWeights<real_t>> weights;  // (K, PH + PW)
    int y, x;                                  // the cell

    __device__ __forceinline__ BinWeights<real_t> load_weights(int roi, int ph0, int pw0) const {
        const int64_t axis_bins = static_cast<int64_t>(problem.pooled_height) + problem.pooled_width;
        return LaneBin(problem, ph0, pw0).load(weights + roi * axis_bins, problem);
    }

    // Weight of the cell in this lane's bin, on the axis of the bin.
    __device__ __forceinline__ real_t lane_weight(int roi, int ph0, int pw0, const BinWeights<real_t>& bin) const {
        const LaneBin lane_bin(problem, ph0, pw0);
        const int cell = lane_bin.of_rows ? y : x;
        real_t weight = real_t(0);
#pragma unroll
        for (int i = 0; i < BinWeights<real_t>::kCells; ++i) {
            const real_t value = bin.weights[i];  // loaded without a condition, so that no branch is needed
            weight = lane_bin.exists && cell - bin.first == i ? value : weight;
        }
        if (lane_bin.exists && bin.first == kTooWide) {
            const RoiAxis<real_t> axis =
                axis_of(boxes + static_cast<int64_t>(roi) * 5, lane_bin.of_rows, level, problem);
            weight = cell_weight(axis, lane_bin.bin, cell, lane_bin.of_rows ? level.height : level.width);
        }
        return weight;
    }

    // Add the gradients of the bins of a RoI. `bin` is load_weights(roi, 0, 0), loaded by the caller.
    __device__ __forceinline__ void add_roi(int roi, BinWeights<real_t> bin, real_t (&sum)[kWidth]) const {
        const int64_t bins = static_cast<int64_t>(problem.pooled_height) * problem.pooled_width;
        Global<const scalar_t> source = grad_output + roi * bins * problem.channels;
#pragma unroll 1
        for (int ph0 = 0; ph0 < problem.pooled_height; ph0 += kHalfWarp) {
#pragma unroll 1
            for (int pw0 = 0; pw0 < problem.pooled_width; pw0 += kHalfWarp) {
                if (ph0 + pw0 > 0) {
                    bin = load_weights(roi, ph0, pw0);
                }
                const real_t weight = lane_weight(roi, ph0, pw0, bin);
                const int first_bin = ph0 * problem.pooled_width + pw0;
                add_pairs(
                    weight, source + first_bin * problem.channels, problem.pooled_width * problem.channels,
                    problem.channels, sum);
            }
        }
    }

    // Add the gradients of `total` listed RoIs. The weights of the next RoI are loaded before this one is added.
    __device__ __forceinline__ void add_rois(Shared<int> listed, int total, real_t (&sum)[kWidth]) const {
        int next_roi = 0;
        if (total > 0) {
            next_roi = listed[0];
        }
        BinWeights<real_t> next = load_weights(next_roi, 0, 0);
#pragma unroll 1
        for (int entry = 0; entry < total; ++entry) {
            const int roi = next_roi;
            const BinWeights<real_t> bin = next;
            if (entry + 1 < total) {
                next_roi = listed[entry + 1];
            }
            next = load_weights(next_roi, 0, 0);
            add_roi(roi, bin, sum);
        }
    }
};

// A block computes kCellRows x kCellColumns cells, one per warp. It lists the RoIs that may read its cells, in order,
// from kGatherThreads candidates at a time. Each warp then adds the bins that read its cell.
template <typename scalar_t, int kWidth>
__global__ void __launch_bounds__(kGatherThreads, 2) roi_align_gather_kernel(
    Global<const scalar_t> grad_output,                   // (K, PH, PW, C)
    Global<const accum_t<scalar_t>> boxes,                // (K, 5)
    Global<const RoiCells> cells,                         // (K,)
    Global<const BinWeights<accum_t<scalar_t>>> weights,  // (K, PH + PW)
    const __grid_constant__ TiledPyramid<scalar_t> gradients, const RoiProblem problem) {
    using real_t = accum_t<scalar_t>;
    SPATIALFLOW_SHARED(int, listed, kGatherThreads);
    SPATIALFLOW_SHARED(int, listed_by_warp, kGatherWarps);
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const CellTile tile(gradients, problem);
    const CudaRoiLevel<scalar_t>& level = gradients.pyramid.levels[tile.level];
    const int y = tile.y + warp / kCellColumns, x = tile.x + warp % kCellColumns;
    const bool exists = y < level.height && x < level.width;
    Global<scalar_t> target =
        level.data + (tile.image * level.image_stride + y * level.row_stride + x * level.column_stride);
    for (int first = 0; first < problem.channels; first += kWarpSize * kWidth) {
        const int c = first + lane * kWidth;
        const bool active = c < problem.channels;
        // Lanes beyond the last channel repeat the first one and store nothing.
        const CellGather<scalar_t, kWidth> cell{problem, level, grad_output + (active ? c : 0), boxes, weights, y, x};
        real_t sum[kWidth] = {};
        for (int base = 0; base < problem.num_rois; base += kGatherThreads) {
            const int total = list_rois_of_tile(cells, problem.num_rois, base, tile, listed, listed_by_warp);
            cell.add_rois(listed, exists ? total : 0, sum);
            __syncthreads();  // all warps have read the list before it is overwritten
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

template <typename scalar_t, int kWidth>
void launch_scatter(
    const char* op, const Tensor& grad_output, const Tensor& rois, const std::vector<Tensor>& gradients,
    const RoiAlignSettings& settings, const RoiProblem& problem, Stream stream) {
    using real_t = accum_t<scalar_t>;
    RoiPyramid<real_t> pyramid{};
    for (size_t l = 0; l < gradients.size(); ++l) {
        pyramid.levels[l] = level_of(op, gradients[l], mutable_data<real_t>(gradients[l]), settings.scales[l]);
    }
    const WalkGrid walk(op, problem, kWidth);
    launch<roi_align_scatter_kernel<scalar_t, kWidth>>(
        walk.grid, walk.block, 0, stream, data<scalar_t>(grad_output), data<real_t>(rois), pyramid, problem,
        walk.tiles);
}

template <typename scalar_t, int kWidth>
void launch_gather(
    const char* op, const Tensor& grad_output, const Tensor& rois, const std::vector<Tensor>& gradients,
    const RoiAlignSettings& settings, const RoiProblem& problem, Stream stream) {
    using real_t = accum_t<scalar_t>;
    TiledPyramid<scalar_t> tiled{};
    int64_t tiles = 0;
    for (size_t l = gradients.size(); l-- > 0;) {
        tiled.pyramid.levels[l] = level_of(op, gradients[l], mutable_data<scalar_t>(gradients[l]), settings.scales[l]);
        tiled.tile_begin[l] = as_int(op, "the number of tiles", tiles);
        tiles +=
            ceil_div(gradients[l].size(2), kCellRows) * ceil_div(gradients[l].size(3), kCellColumns) * problem.batch;
    }
    const int64_t axis_bins = settings.pooled_height + settings.pooled_width;
    const Tensor cells = empty_like_sized(
        rois, {problem.num_rois, static_cast<int64_t>(sizeof(RoiCells) / sizeof(int))}, ScalarType::Int);
    const Tensor weights = empty_like_sized(
        rois, {problem.num_rois, axis_bins, static_cast<int64_t>(sizeof(BinWeights<real_t>) / sizeof(real_t))});
    const auto roi_cells = pointer_cast<RoiCells>(mutable_data<int>(cells));
    const auto bin_weights = pointer_cast<BinWeights<real_t>>(mutable_data<real_t>(weights));
    launch<roi_align_weights_kernel<real_t, scalar_t>>(
        dim3(grid_size(op, ceil_div(problem.num_rois * axis_bins, kTableThreads))), dim3(kTableThreads), 0, stream,
        data<real_t>(rois), tiled, problem, roi_cells, bin_weights);
    launch<roi_align_gather_kernel<scalar_t, kWidth>>(
        dim3(grid_size(op, tiles)), dim3(kGatherThreads), 0, stream, data<scalar_t>(grad_output), data<real_t>(rois),
        roi_cells, bin_weights, tiled, problem);
}

}  // namespace

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
        const RoiProblem problem = problem_of(op, settings, boxes, batch, channels, false);
        dispatch_floating(op, dtype, [&](auto zero) {
            using scalar_t = decltype(zero);
            const auto is_vectorizable = [&](int64_t width) {
                return channels % width == 0 && levels_are_vectorizable(gradients, width) &&
                       is_aligned(source.const_data_ptr(), 16);
            };
            if (gather) {
                constexpr int kWidth = kVectorElements<scalar_t>;
                const auto run = is_vectorizable(kWidth) ? launch_gather<scalar_t, kWidth> : launch_gather<scalar_t, 1>;
                run(op, source, rois, gradients, settings, problem, device.stream());
            } else if constexpr (!std::is_same_v<scalar_t, double>) {
                const auto run = is_vectorizable(kScatterWidth) ? launch_scatter<scalar_t, kScatterWidth>
                                                                : launch_scatter<scalar_t, 1>;
                run(op, source, rois, gradients, settings, problem, device.stream());
            }
        });
    }
    return finished_level_gradients(std::move(gradients), dtype, channels_last);
}

}  // namespace spatialflow

SPATIALFLOW_DEVICE_IMPL(library) {
    library.impl("_roi_align_backward", TORCH_BOX(&spatialflow::single_level_roi_align_backward));
}
