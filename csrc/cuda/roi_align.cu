// SPDX-License-Identifier: Apache-2.0
//
// Forward pass of RoIAlign on CUDA, over one feature map or a pyramid (roi_align is a pyramid of one level).
//
//   output[k, c, ph, pw] = mean over the samples (y, x) of bin (ph, pw) of bilinear(level(k)[batch(k), c], y, x)
//                        = sum_y wy[y] sum_x wx[x] level(k)[batch(k), c, y, x]     over the cells that the bin reads
//
// Layouts: features (N, H, W, C) of any strides with adjacent channels (others are copied first); output (K, PH, PW, C)
// or (K, C, PH, PW). A block computes a tile of bins of one RoI, and a warp computes bin rows of the tile. A lane has
// 16 bytes of channels, or one channel if 16-byte accesses to features or output are not aligned.
#include "ops/roi_align.h"

#include "cuda/roi_align_walk.cuh"

// The kernel in pseudo-code:
//
//   for each RoI k:                                   # a thread block per tile of its bins
//       level, image = level of the box area, batch index of the box
//       for each bin row and each bin column:         # taps: the cells that the samples of a bin read on one axis,
//           compute its taps                          #   with their weights; the tables are in shared memory
//       for each bin row:                             # a warp
//           for each channel c:                       # a lane has 16 bytes of adjacent channels
//               for each column x of cells that the bin row reads, from left to right:
//                   column_sum = sum over the taps (y, wy) of the bin row of wy * level[image, y, x, c]
//                   for each bin of the row that reads column x, with weight wx:
//                       bin_sum += wx * column_sum
//                   store each bin whose last column was x
//       each other bin row, with too many taps for the tables or registers:
//           for each bin and channel: sum wy * wx * level[image, y, x, c] over all pairs of taps

namespace spatialflow {
namespace {

// Iteration along a bin row that reads kRows rows of cells. A column of cells is loaded, summed over its rows, and
// added to the bins that read it. It is loaded once if the cells of all bins ascend (`write_walk`). emit(sums) is
// called for each bin, from left to right.
template <typename scalar_t, int kWidth, int kRows>
class BinRowWalk {
    using real_t = accum_t<scalar_t>;

public:
    __device__ __forceinline__ BinRowWalk(
        Global<const scalar_t> feature, int64_t row_stride, Shared<Tap<real_t>> rows, Shared<Step<real_t>> steps,
        Shared<int64_t> columns, WalkLength length)
        : steps_(steps), columns_(columns), steps_left_(length.steps), columns_left_(length.columns) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            const Tap<real_t> tap = rows[r * kTapStride];
            row_[r] = pointer_cast<const unsigned char>(feature + tap.cell * row_stride);
            weight_[r] = tap.weight;
        }
    }

    template <typename Emit>
    __device__ __forceinline__ void run(Emit&& emit) {
        real_t even[kWidth] = {}, odd[kWidth] = {}, sum[kWidth] = {};
        fetch();
        while (true) {  // the two column buffers alternate, so that no column is copied
            if (!advance(even, odd, sum, emit) || !advance(odd, even, sum, emit)) {
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

    // Run the steps up to the next step that loads a column. Return false after the last step.
    template <typename Emit>
    __device__ __forceinline__ bool advance(
        const real_t (&previous)[kWidth], real_t (&current)[kWidth], real_t (&sum)[kWidth], Emit&& emit) {
        Step<real_t> step = steps_[0];
        if (step.flags & kLoadsColumn) {
#pragma unroll
            for (int i = 0; i < kWidth; ++i) {
                current[i] = real_t(0);
            }
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
                raw_[r].add_to(current, weight_[r]);
            }
            fetch();  // the loads are in flight while this column is added and bins are stored
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
            if (step.flags & kLoadsColumn) {
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

// Distance between two bins in shared memory, in channels: the channels of a warp plus one access. So the values of a
// channel in 8 adjacent bins are in different banks.
template <int kWidth>
constexpr int kTileStride = kWarpSize * kWidth + kWidth;

// Blocks per multiprocessor, so that a thread has up to 168 registers (float64) or 128.
template <typename scalar_t>
constexpr int kForwardBlocks = std::is_same_v<scalar_t, double> ? 3 : 4;

// Writer of the bins of a bin row, one call per bin. Channels-last output is stored at once; channels-first output is
// collected in shared memory until `finish`.
template <typename scalar_t, int kWidth>
class BinRowWriter {
    using real_t = accum_t<scalar_t>;

public:
    __device__ __forceinline__ BinRowWriter(
        const RoiProblem& problem, const RoiPart& part, int row, int first_channel, Global<scalar_t> output,
        Shared<scalar_t> tile)
        : problem_(problem), part_(part), first_channel_(first_channel), output_(output), tile_(tile) {
        const int lane = threadIdx.x % kWarpSize, channel = first_channel + lane * kWidth;
        bins_ = problem.pooled_height * problem.pooled_width;
        first_bin_ = (part.first_row + row) * problem.pooled_width + part.first_column;
        active_ = channel < problem.channels;
        bin_target_ = output + ((static_cast<int64_t>(part.roi) * bins_ + first_bin_) * problem.channels + channel);
        bin_tile_ = tile + lane * kWidth;
    }

    __device__ __forceinline__ void operator()(const real_t (&sum)[kWidth]) {
        Vec<scalar_t, kWidth> values;
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
            store(values[i], sum[i]);
        }
        if (problem_.channels_first) {
            store_vector(bin_tile_, values);
            bin_tile_ += kTileStride<kWidth>;
        } else {
            if (active_) {
                store_vector(bin_target_, values);
            }
            bin_target_ += problem_.channels;
        }
    }

    // Store a channels-first bin row, with lanes along bins, then channels.
    __device__ __forceinline__ void finish() {
        if (!problem_.channels_first) {
            return;
        }
        __syncwarp();
        const int lane = threadIdx.x % kWarpSize;
        const int bin_lanes = part_.columns > 8 ? 16 : part_.columns > 4 ? 8 : 4;
        const int bin = lane % bin_lanes, channels = std::min(problem_.channels - first_channel_, kWarpSize * kWidth);
#pragma unroll 1
        for (int c = lane / bin_lanes; c < channels && bin < part_.columns; c += kWarpSize / bin_lanes) {
            const scalar_t value = tile_[bin * kTileStride<kWidth> + c];
            const int64_t plane = static_cast<int64_t>(part_.roi) * problem_.channels + first_channel_ + c;
            output_[plane * bins_ + first_bin_ + bin] = value;
        }
        __syncwarp();  // the tile is read before the next bin row overwrites it
    }

private:
    const RoiProblem& problem_;
    const RoiPart& part_;
    int first_channel_, bins_, first_bin_;
    bool active_;  // false for lanes beyond the last channel, which store nothing
    Global<scalar_t> output_, bin_target_;
    Shared<scalar_t> tile_, bin_tile_;  // of this warp
};

// Pooling of the bin rows of a block.
template <typename scalar_t, int kWidth>
struct BinRowPooling {
    using real_t = accum_t<scalar_t>;
    using Writer = BinRowWriter<scalar_t, kWidth>;

    const RoiProblem& problem;
    const BinTiles& tiles;
    const RoiPart& part;
    const WalkTables<real_t>& tables;
    WalkLength length;
    Global<const real_t> box;
    const CudaRoiLevel<const scalar_t>& level;
    int64_t image;

    // Pool a bin row with `count` taps, at most kMaxRowTaps, by the steps in the tables.
    __device__ __forceinline__ void pool_by_tables(
        int row, int count, Global<const scalar_t> feature, Writer& writer) const {
        const auto walk = [&](auto rows) {
            BinRowWalk<scalar_t, kWidth, decltype(rows)::value>(
                feature, level.row_stride, tables.taps + (kMaxBinColumns + row), tables.steps, tables.columns, length)
                .run(writer);
        };
        if (count == 0) {
            const real_t zeros[kWidth] = {};
#pragma unroll 1
            for (int bin = 0; bin < part.columns; ++bin) {
                writer(zeros);
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
    }

    // Pool any other bin row: it has more than kMaxRowTaps taps, or a bin column of the block has too many.
    __device__ __forceinline__ void pool_by_cells(int row, Global<const scalar_t> feature, Writer& writer) const {
#pragma unroll 1
        for (int bin = 0; bin < part.columns; ++bin) {
            real_t sum[kWidth] = {};
            visit_cells(
                box, level, problem, part.first_row + row, part.first_column + bin,
                [&](real_t weight, int first_row, int first_column) {
                    add_pairs(
                        weight, feature + (first_row * level.row_stride + first_column * level.column_stride),
                        level.row_stride, level.column_stride, sum);
                });
            writer(sum);
        }
    }

    // Pool the bin rows that `pool_by_tables` can compute (kByTables), or all others.
    template <bool kByTables>
    __device__ __forceinline__ void run(Global<scalar_t> output, Shared<scalar_t> tile) const {
        constexpr int kLaneStep = kWarpSize * kWidth;
        const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
        const int warps = static_cast<int>(blockDim.x) / kWarpSize;
        const int passes = (problem.channels + kLaneStep - 1) / kLaneStep;
#pragma unroll 1
        for (int item = warp; item < part.rows * passes; item += warps) {
            const int row = item / passes, first_channel = item % passes * kLaneStep;
            const int count = tables.row_taps[row];
            const bool by_tables = count == 0 || (count <= kMaxRowTaps && length.steps >= 0);
            if (by_tables != kByTables) {
                continue;
            }
            // Lanes beyond the last channel repeat the first one and store nothing.
            const int channel = first_channel + lane * kWidth;
            Global<const scalar_t> feature =
                level.data + (image * level.image_stride + (channel < problem.channels ? channel : 0));
            Writer writer(problem, part, row, first_channel, output, tile + warp * tiles.columns * kTileStride<kWidth>);
            if constexpr (kByTables) {
                pool_by_tables(row, count, feature, writer);
            } else {
                pool_by_cells(row, feature, writer);
            }
            writer.finish();
        }
    }
};

template <typename scalar_t, int kWidth>
__global__ void __launch_bounds__(kWalkWarps* kWarpSize, kForwardBlocks<scalar_t>) roi_align_kernel(
    const __grid_constant__ RoiPyramid<const scalar_t> pyramid,
    Global<const accum_t<scalar_t>> boxes,  // (K, 5)
    Global<scalar_t> output,                // (K, bins, C), or (K, C, bins) if channels_first
    const RoiProblem problem, const BinTiles tiles) {
    using real_t = accum_t<scalar_t>;
    SPATIALFLOW_WALK_TABLES(real_t, tables);
    SPATIALFLOW_DYNAMIC_SHARED(scalar_t, tile);  // (warps, tiles.columns, kTileStride), for channels_first only
    const RoiPart part(problem, tiles);
    Global<const real_t> box = boxes + static_cast<int64_t>(part.roi) * 5;
    write_tables(tables, box, part, pyramid, problem, sizeof(scalar_t));
    const int level = tables.place[0];
    const int64_t image = tables.place[1];
    const WalkLength length{tables.place[2], tables.place[3]};
    const BinRowPooling<scalar_t, kWidth> pooling{problem, tiles, part, tables, length, box, pyramid.levels[level],
                                                  image};
    pooling.template run<true>(output, tile);
    pooling.template run<false>(output, tile);
}

// ---- host --------------------------------------------------------------------------------------------------------

template <typename scalar_t, int kWidth>
void launch_forward(
    const char* op, const RoiPyramid<const scalar_t>& pyramid, const Tensor& rois, const Tensor& output,
    const RoiProblem& problem, Stream stream) {
    const WalkGrid walk(op, problem, kWidth);
    const size_t bins = problem.channels_first ? walk.block.x / kWarpSize * static_cast<size_t>(walk.tiles.columns) : 0;
    launch<roi_align_kernel<scalar_t, kWidth>>(
        walk.grid, walk.block, bins * kTileStride<kWidth> * sizeof(scalar_t), stream, pyramid,
        data<accum_t<scalar_t>>(rois), mutable_data<scalar_t>(output), problem, walk.tiles);
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
    const RoiProblem problem =
        problem_of(op, settings, boxes, first.size(0), channels, format == MemoryFormat::Contiguous);
    dispatch_floating(op, first.scalar_type(), [&](auto zero) {
        using scalar_t = decltype(zero);
        constexpr int kWidth = kVectorElements<scalar_t>;
        RoiPyramid<const scalar_t> pyramid{};
        for (size_t l = 0; l < sources.size(); ++l) {
            pyramid.levels[l] = level_of(op, sources[l], data<scalar_t>(sources[l]), settings.scales[l]);
        }
        if (channels % kWidth == 0 && levels_are_vectorizable(sources, kWidth) &&
            is_aligned(output.const_data_ptr(), 16)) {
            launch_forward<scalar_t, kWidth>(op, pyramid, rois, output, problem, device.stream());
        } else {
            launch_forward<scalar_t, 1>(op, pyramid, rois, output, problem, device.stream());
        }
    });
    return output;
}

}  // namespace spatialflow

SPATIALFLOW_DEVICE_IMPL(library) { library.impl("roi_align", TORCH_BOX(&spatialflow::single_level_roi_align)); }
