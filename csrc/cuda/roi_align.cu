// SPDX-License-Identifier: Apache-2.0
//
// RoIAlign on CUDA, over one feature map or a pyramid of them (roi_align is a pyramid of one level).
//
//   output[k, c, ph, pw] = mean over the samples (y, x) of bin (ph, pw) of bilinear(level(k)[batch(k), c], y, x)
//                        = sum_y wy[y] sum_x wx[x] level(k)[batch(k), c, y, x]     over the cells that the bin reads
//
// The samples of a bin form a grid and bilinear interpolation is a product, so each axis of a bin is a short run of
// cells with one weight each: lane j of a warp computes the weight of the j-th cell, the warp passes them round by
// shuffles. Samples that share cells are merged: two samples an axis read three cells, not four.
//
// Layouts: features (N, H, W, C) by strides, channels adjacent (others are copied into it first: two passes over the
// features, less than uncoalesced reads cost); output and its gradient (K, PH, PW, C); output also (K, C, PH, PW).
// Forward: a warp per bin, 16 bytes per lane and access along channels (256 channels of bfloat16 are one access). Into
// (K, C, PH, PW) the 8 bins of a block go through shared memory, so that 8 lanes store the adjacent bins of a channel.
// Backward, two ways:
//   scatter   a warp per bin adds to its cells in float32, 16 bytes a reduction; the order of sums is not fixed
//   gather    a warp per cell adds up the bins that read it, RoIs in ascending order: deterministic, no float32 buffer
//             and no atomics, but a cell under many RoIs is one warp's work. Always taken in float64.
//
// Floor (H100, 3.0 TB/s), bfloat16, 1000 RoIs x 256 x 7 x 7 from 256 x 100 x 168: output 25 MB + features read once
// 9 MB: 11 us. Backward: gradient 25 MB + features' gradient 9 MB: 11 us (gather); the scatter moves 9 cells x 4 bytes
// for every bin and channel, 450 MB of reductions in L2.
#include "cuda/roi_align.h"

#include "common/roi_align.h"
#include "cuda/launch.h"
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
    double scale;   // cells per pixel
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

template <typename real_t>
struct RoiGeometry {
    RoiAxis<real_t> y, x;
    int64_t image;
    int level;
    bool valid;  // false: a coordinate is not finite, the batch index is outside the batch, or the level is empty
};

template <typename real_t, typename element_t>
__device__ __forceinline__ RoiGeometry<real_t> roi_geometry(
    Global<const real_t> row,  // (5,): batch index, x1, y1, x2, y2
    const RoiPyramid<element_t>& pyramid, const RoiOptions& options) {
    RoiGeometry<real_t> roi;
    const real_t index = row[0], x1 = row[1], y1 = row[2], x2 = row[3], y2 = row[4];
    roi.level = static_cast<int>(
        roi_level<real_t>(x1, y1, x2, y2, static_cast<real_t>(options.finest_scale), options.num_levels));
    const RoiLevel<element_t>& level = pyramid.levels[roi.level];
    const real_t scale = static_cast<real_t>(level.scale);
    roi.y = roi_axis<real_t>(y1, y2, scale, options.pooled_height, options.sampling_ratio, options.aligned);
    roi.x = roi_axis<real_t>(x1, x2, scale, options.pooled_width, options.sampling_ratio, options.aligned);
    const bool inside = index >= real_t(0) && index < real_t(options.batch);  // false for NaN
    roi.image = inside ? static_cast<int64_t>(index) : 0;
    roi.valid = inside && roi.y.valid && roi.x.valid && level.height > 0 && level.width > 0;
    return roi;
}

// Channels from one bin to the next in shared memory: as many as a pass takes, and an access more, so that the bins of
// a channel lie in different banks.
template <int kWidth, int kVectors>
constexpr int kTileStride = kVectors * kWarpSize * kWidth + kWidth;

template <typename scalar_t, int kWidth, int kVectors>
__global__ void __launch_bounds__(kThreads, 2) roi_align_kernel(
    const __grid_constant__ RoiPyramid<const scalar_t> pyramid,
    Global<const accum_t<scalar_t>> boxes,  // (K, 5)
    Global<scalar_t> output,                // (K, bins, C), planar (K, C, bins)
    const RoiOptions options, const int blocks_per_roi) {
    using real_t = accum_t<scalar_t>;
    constexpr int kStride = kTileStride<kWidth, kVectors>;
    SPATIALFLOW_DYNAMIC_SHARED(scalar_t, tile);  // (kWarps, kStride), planar only
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const int bins = options.pooled_height * options.pooled_width;
    const int roi_index = static_cast<int>(blockIdx.x) / blocks_per_roi;
    const int first_bin = static_cast<int>(blockIdx.x) % blocks_per_roi * kWarps, bin = first_bin + warp;
    if (bin >= bins && !options.planar) {  // planar, the whole block stores
        return;
    }
    const int ph = bin / options.pooled_width, pw = bin % options.pooled_width;
    const RoiGeometry<real_t> roi = roi_geometry(boxes + static_cast<int64_t>(roi_index) * 5, pyramid, options);
    const RoiLevel<const scalar_t>& level = pyramid.levels[roi.level];
    const int64_t height = level.height, width = level.width, stride_h = level.stride_h, stride_w = level.stride_w;
    const bool reads = roi.valid && bin < bins;
    const CellRange rows = reads ? bin_cells(roi.y, ph, height) : CellRange{0, 0};
    const CellRange columns = reads ? bin_cells(roi.x, pw, width) : CellRange{0, 0};
    // Sides of maps are ints: 32 bits hold a cell and the step beyond it, and take half the registers.
    const unsigned first_row = static_cast<unsigned>(rows.begin), end_row = static_cast<unsigned>(rows.end);
    const unsigned first_column = static_cast<unsigned>(columns.begin), end_column = static_cast<unsigned>(columns.end);
    Global<const scalar_t> feature = level.data + roi.image * level.stride_n;
    Global<scalar_t> target = output + static_cast<int64_t>(roi_index) * bins * options.channels;

    constexpr int kLaneStep = kWarpSize * kWidth;
    for (int first = lane * kWidth; first - lane * kWidth < options.channels; first += kVectors * kLaneStep) {
        real_t sum[kVectors][kWidth] = {};
        for (unsigned y0 = first_row; y0 < end_row; y0 += kWarpSize) {
            const int count_y = static_cast<int>(end_row - y0 < kWarpSize ? end_row - y0 : kWarpSize);
            const real_t lane_y = lane < count_y ? cell_weight(roi.y, ph, y0 + lane, height) : real_t(0);
            for (unsigned x0 = first_column; x0 < end_column; x0 += kWarpSize) {
                const int count_x = static_cast<int>(end_column - x0 < kWarpSize ? end_column - x0 : kWarpSize);
                const real_t lane_x = lane < count_x ? cell_weight(roi.x, pw, x0 + lane, width) : real_t(0);
                for (int y = 0; y < count_y; ++y) {
                    const real_t weight_y = __shfl_sync(kAllLanes, lane_y, y);
                    Global<const scalar_t> cell =
                        feature + ((y0 + y) * stride_h + x0 * stride_w + first);
#pragma unroll 4
                    for (int x = 0; x < count_x; ++x) {
                        const real_t weight = weight_y * __shfl_sync(kAllLanes, lane_x, x);
#pragma unroll
                        for (int v = 0; v < kVectors; ++v) {
                            if (first + v * kLaneStep < options.channels) {
                                const auto values =
                                    load_vector<kWidth>(cell + (x * stride_w + v * kLaneStep));
                                if (weight == real_t(0)) {
                                    continue;  // lies between samples: not read, whatever it holds
                                }
#pragma unroll
                                for (int i = 0; i < kWidth; ++i) {
                                    sum[v][i] += weight * load(values[i]);
                                }
                            }
                        }
                    }
                }
            }
        }
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
            const int c = first + v * kLaneStep;
            if (c < options.channels) {
                Vec<scalar_t, kWidth> values;
#pragma unroll
                for (int i = 0; i < kWidth; ++i) {
                    store(values[i], sum[v][i]);
                }
                if (options.planar) {
                    store_vector(tile + (warp * kStride + lane * kWidth + v * kLaneStep), values);
                } else {
                    store_vector(target + (static_cast<int64_t>(bin) * options.channels + c), values);
                }
            }
        }
        if (options.planar) {  // lanes along bins, then channels
            __syncthreads();
            const int first_channel = first - lane * kWidth, rest = options.channels - first_channel;
            const int channels = rest < kVectors * kLaneStep ? rest : kVectors * kLaneStep;
            const int tile_row = threadIdx.x % kWarps, stored_bin = first_bin + tile_row;
            for (int c = threadIdx.x / kWarps; c < channels && stored_bin < bins; c += kThreads / kWarps) {
                const scalar_t value = tile[tile_row * kStride + c];
                target[static_cast<int64_t>(first_channel + c) * bins + stored_bin] = value;
            }
            __syncthreads();  // the tile is read before the next channels overwrite it
        }
    }
}

template <typename scalar_t, int kWidth>
__global__ void __launch_bounds__(kThreads, 2) roi_align_scatter_kernel(
    Global<const scalar_t> grad_output,     // (K, PH, PW, C)
    Global<const accum_t<scalar_t>> boxes,  // (K, 5)
    const __grid_constant__ RoiPyramid<accum_t<scalar_t>> gradients,  // zero on entry
    const RoiOptions options, const int blocks_per_roi) {
    using real_t = accum_t<scalar_t>;
    const int lane = threadIdx.x % kWarpSize;
    const int bins = options.pooled_height * options.pooled_width;
    const int roi_index = static_cast<int>(blockIdx.x) / blocks_per_roi;
    const int bin = static_cast<int>(blockIdx.x) % blocks_per_roi * kWarps + static_cast<int>(threadIdx.x) / kWarpSize;
    if (bin >= bins) {
        return;
    }
    const int ph = bin / options.pooled_width, pw = bin % options.pooled_width;
    const RoiGeometry<real_t> roi = roi_geometry(boxes + static_cast<int64_t>(roi_index) * 5, gradients, options);
    if (!roi.valid) {
        return;
    }
    const RoiLevel<real_t>& level = gradients.levels[roi.level];
    const int64_t height = level.height, width = level.width, stride_h = level.stride_h, stride_w = level.stride_w;
    const CellRange rows = bin_cells(roi.y, ph, height);
    const CellRange columns = bin_cells(roi.x, pw, width);
    Global<const scalar_t> source = grad_output + (static_cast<int64_t>(roi_index) * bins + bin) * options.channels;
    Global<real_t> feature = level.data + roi.image * level.stride_n;
    for (int64_t y0 = rows.begin; y0 < rows.end; y0 += kWarpSize) {
        const int count_y = static_cast<int>(rows.end - y0 < kWarpSize ? rows.end - y0 : kWarpSize);
        const real_t lane_y = lane < count_y ? cell_weight(roi.y, ph, y0 + lane, height) : real_t(0);
        for (int64_t x0 = columns.begin; x0 < columns.end; x0 += kWarpSize) {
            const int count_x = static_cast<int>(columns.end - x0 < kWarpSize ? columns.end - x0 : kWarpSize);
            const real_t lane_x = lane < count_x ? cell_weight(roi.x, pw, x0 + lane, width) : real_t(0);
            for (int first = 0; first < options.channels; first += kWarpSize * kWidth) {
                const int c = first + lane * kWidth;
                const bool active = c < options.channels;
                Vec<scalar_t, kWidth> gradient = {};
                if (active) {
                    gradient = load_vector<kWidth>(source + c);
                }
                for (int y = 0; y < count_y; ++y) {
                    const real_t weight_y = __shfl_sync(kAllLanes, lane_y, y);
                    Global<real_t> cell = feature + ((y0 + y) * stride_h + x0 * stride_w + c);
                    for (int x = 0; x < count_x; ++x) {
                        const real_t weight = weight_y * __shfl_sync(kAllLanes, lane_x, x);
                        if (active && weight != real_t(0)) {
                            Vec<real_t, kWidth> values;
#pragma unroll
                            for (int i = 0; i < kWidth; ++i) {
                                values[i] = weight * load(gradient[i]);
                            }
                            reduce_add(cell + x * stride_w, values);
                        }
                    }
                }
            }
        }
    }
}

// True if samples of the axis may read one of the cells [begin, end); errs on the side of true.
template <typename real_t>
__device__ __forceinline__ bool axis_touches(
    const RoiAxis<real_t>& axis, int bins, int64_t begin, int64_t end) {
    const real_t one = axis.start, other = axis.start + real_t(bins) * axis.bin;
    const real_t low = one < other ? one : other, high = one < other ? other : one;
    return high >= real_t(begin - 3) && low <= real_t(end + 2);
}

// A block owns kWarps cells side by side, a warp one of them. The block lists the RoIs that may read its cells, in
// order, kThreads candidates at a time; each warp then adds up the bins that do read its cell.
template <typename scalar_t, int kWidth>
__global__ void __launch_bounds__(kThreads, 2) roi_align_gather_kernel(
    Global<const scalar_t> grad_output,     // (K, PH, PW, C)
    Global<const accum_t<scalar_t>> boxes,  // (K, 5)
    const __grid_constant__ RoiPyramid<scalar_t> gradients, const RoiOptions options) {
    using real_t = accum_t<scalar_t>;
    SPATIALFLOW_SHARED(int, listed, kThreads);
    SPATIALFLOW_SHARED(int, listed_by_warp, kWarps);
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    int level_index = 0;
    while (level_index + 1 < options.num_levels &&
           static_cast<int>(blockIdx.x) >= gradients.levels[level_index + 1].tile_begin) {
        ++level_index;
    }
    const RoiLevel<scalar_t>& level = gradients.levels[level_index];
    const int64_t height = level.height, width = level.width;
    const int tile = static_cast<int>(blockIdx.x) - level.tile_begin;
    const int tiles_per_row = (level.width + kWarps - 1) / kWarps;
    const int row = tile / tiles_per_row;
    const int64_t tile_x = static_cast<int64_t>(tile % tiles_per_row) * kWarps;
    const int64_t image = row / level.height, y = row % level.height, x = tile_x + warp;
    const int bins = options.pooled_height * options.pooled_width;
    Global<scalar_t> target = level.data + (image * level.stride_n + y * level.stride_h + x * level.stride_w);

    for (int first = 0; first < options.channels; first += kWarpSize * kWidth) {
        const int c = first + lane * kWidth;
        const bool active = c < options.channels;
        real_t sum[kWidth] = {};
        for (int base = 0; base < options.num_rois; base += kThreads) {
            const int candidate = base + static_cast<int>(threadIdx.x);
            bool hit = false;
            if (candidate < options.num_rois) {
                const RoiGeometry<real_t> roi =
                    roi_geometry(boxes + static_cast<int64_t>(candidate) * 5, gradients, options);
                hit = roi.valid && roi.level == level_index && roi.image == image &&
                      axis_touches(roi.y, options.pooled_height, y, y + 1) &&
                      axis_touches(roi.x, options.pooled_width, tile_x, tile_x + kWarps);
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
            for (int entry = 0; entry < total && x < width; ++entry) {
                const int roi_index = listed[entry];
                const RoiGeometry<real_t> roi =
                    roi_geometry(boxes + static_cast<int64_t>(roi_index) * 5, gradients, options);
                Global<const scalar_t> source =
                    grad_output + (static_cast<int64_t>(roi_index) * bins * options.channels + c);
                for (int ph0 = 0; ph0 < options.pooled_height; ph0 += kWarpSize) {
                    const real_t lane_y = ph0 + lane < options.pooled_height
                                              ? cell_weight(roi.y, ph0 + lane, y, height)
                                              : real_t(0);
                    const unsigned used_y = __ballot_sync(kAllLanes, lane_y != real_t(0));
                    for (int pw0 = 0; used_y != 0 && pw0 < options.pooled_width; pw0 += kWarpSize) {
                        const real_t lane_x = pw0 + lane < options.pooled_width
                                                  ? cell_weight(roi.x, pw0 + lane, x, width)
                                                  : real_t(0);
                        const unsigned used_x = __ballot_sync(kAllLanes, lane_x != real_t(0));
                        for (unsigned left_y = used_y; left_y != 0; left_y &= left_y - 1) {
                            const int py = __ffs(static_cast<int>(left_y)) - 1;
                            const real_t weight_y = __shfl_sync(kAllLanes, lane_y, py);
                            for (unsigned left_x = used_x; left_x != 0; left_x &= left_x - 1) {
                                const int px = __ffs(static_cast<int>(left_x)) - 1;
                                const real_t weight = weight_y * __shfl_sync(kAllLanes, lane_x, px);
                                if (active) {
                                    const int64_t bin = (ph0 + py) * options.pooled_width + pw0 + px;
                                    const auto values = load_vector<kWidth>(source + bin * options.channels);
#pragma unroll
                                    for (int i = 0; i < kWidth; ++i) {
                                        sum[i] += weight * load(values[i]);
                                    }
                                }
                            }
                        }
                    }
                }
            }
            __syncthreads();  // the list is read to its end before the next candidates overwrite it
        }
        if (active && x < width) {
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
    check(settings.scales.size() <= kMaxLevels, op, ": at most ", kMaxLevels, " levels on CUDA, got ",
          settings.scales.size());
    const int64_t bins = settings.pooled_height * settings.pooled_width;
    as_int(op, "the number of bins", bins);
    return {static_cast<int>(settings.scales.size()), as_int(op, "the number of boxes", boxes.size(0)),
            as_int(op, "the batch", batch), as_int(op, "the number of channels", channels),
            static_cast<int>(settings.pooled_height), static_cast<int>(settings.pooled_width), settings.sampling_ratio,
            settings.finest_scale, settings.aligned, planar};
}

template <typename element_t>
RoiLevel<element_t> level_of(const char* op, const Tensor& tensor, Global<element_t> data, double scale) {
    return {data, as_int(op, "a level's height", tensor.size(2)), as_int(op, "a level's width", tensor.size(3)),
            tensor.stride(0), tensor.stride(2), tensor.stride(3), scale, 0};
}

// True if 16-byte accesses along channels are aligned in all levels.
bool levels_are_wide(const std::vector<Tensor>& levels, int64_t width) {
    for (const Tensor& level : levels) {
        if (level.stride(0) % width != 0 || level.stride(2) % width != 0 || level.stride(3) % width != 0 ||
            !is_aligned(level.const_data_ptr(), 16)) {
            return false;
        }
    }
    return true;
}

unsigned bins_grid(const char* op, const RoiOptions& options, int& blocks_per_roi) {
    blocks_per_roi = static_cast<int>(ceil_div(options.pooled_height * options.pooled_width, kWarps));
    return grid_size(op, static_cast<int64_t>(options.num_rois) * blocks_per_roi);
}

template <typename scalar_t, int kWidth>
void launch_forward(
    const char* op, const RoiPyramid<const scalar_t>& pyramid, const Tensor& rois, const Tensor& output,
    const RoiOptions& options, Stream stream) {
    int blocks_per_roi = 0;
    const dim3 grid(bins_grid(op, options, blocks_per_roi));
    const auto run = [&](auto vectors) {
        constexpr int kVectors = decltype(vectors)::value;
        const size_t tile_bytes = options.planar ? kWarps * kTileStride<kWidth, kVectors> * sizeof(scalar_t) : 0;
        launch<roi_align_kernel<scalar_t, kWidth, kVectors>>(
            grid, dim3(kThreads), tile_bytes, stream, pyramid, data<accum_t<scalar_t>>(rois),
            mutable_data<scalar_t>(output), options, blocks_per_roi);
    };
    const int64_t accesses = ceil_div(options.channels, kWarpSize * kWidth);
    if (accesses == 1) {
        run(std::integral_constant<int, 1>{});
    } else if (accesses == 2 || std::is_same_v<scalar_t, double>) {  // four of double would spill registers
        run(std::integral_constant<int, 2>{});
    } else if constexpr (!std::is_same_v<scalar_t, double>) {
        run(std::integral_constant<int, 4>{});
    }
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
    int blocks_per_roi = 0;
    const dim3 grid(bins_grid(op, options, blocks_per_roi));
    launch<roi_align_scatter_kernel<scalar_t, kWidth>>(
        grid, dim3(kThreads), 0, stream, data<scalar_t>(grad_output), data<real_t>(rois), pyramid, options,
        blocks_per_roi);
}

template <typename scalar_t, int kWidth>
void launch_gather(
    const char* op, const Tensor& grad_output, const Tensor& rois, const std::vector<Tensor>& gradients,
    const RoiAlignSettings& settings, const RoiOptions& options, Stream stream) {
    RoiPyramid<scalar_t> pyramid{};
    int64_t tiles = 0;
    for (size_t l = 0; l < gradients.size(); ++l) {
        pyramid.levels[l] = level_of(op, gradients[l], mutable_data<scalar_t>(gradients[l]), settings.scales[l]);
        pyramid.levels[l].tile_begin = as_int(op, "the number of tiles", tiles);
        tiles += ceil_div(gradients[l].size(3), kWarps) * gradients[l].size(2) * options.batch;
    }
    launch<roi_align_gather_kernel<scalar_t, kWidth>>(
        dim3(grid_size(op, tiles)), dim3(kThreads), 0, stream, data<scalar_t>(grad_output),
        data<accum_t<scalar_t>>(rois), pyramid, options);
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
            constexpr int kWidth = kWideElements<scalar_t>;
            const bool wide = channels % kWidth == 0 && levels_are_wide(gradients, kWidth) &&
                              is_aligned(source.const_data_ptr(), 16);
            const auto run = [&](auto width) {
                constexpr int kOwnWidth = decltype(width)::value;
                if (gather) {
                    launch_gather<scalar_t, kOwnWidth>(op, source, rois, gradients, settings, options, device.stream());
                } else if constexpr (!std::is_same_v<scalar_t, double>) {
                    launch_scatter<scalar_t, kOwnWidth>(
                        op, source, rois, gradients, settings, options, device.stream());
                }
            };
            if (wide) {
                run(std::integral_constant<int, kWidth>{});
            } else {
                run(std::integral_constant<int, 1>{});
            }
        });
    }
    for (Tensor& gradient : gradients) {
        if (gradient.scalar_type() != dtype) {
            gradient = torch::stable::to(gradient, dtype);
        }
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
    check_roi_align_backward(
        grad_output, boxes, pooled_height, pooled_width, spatial_scale, sampling_ratio, channels);
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
