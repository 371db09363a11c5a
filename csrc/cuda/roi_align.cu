// SPDX-License-Identifier: Apache-2.0
//
// RoIAlign on CUDA.
//
//   output[k, c, ph, pw] = mean over the samples (y, x) of bin (ph, pw) of bilinear(input[batch(k), c], y, x)
//                        = sum_y wy[y] sum_x wx[x] input[batch(k), c, y, x]        over the cells that the bin reads
//
// The samples of a bin form a grid and bilinear interpolation is a product, so each axis of a bin is a short run of
// cells with one weight each: lane j of a warp computes the weight of the j-th cell, the warp passes them round by
// shuffles. Samples that share cells are merged: two samples an axis read three cells, not four.
//
// Layouts: features (N, H, W, C) by strides, channels adjacent (others are copied into it first: two passes over the
// features, less than uncoalesced reads cost); output and its gradient (K, PH, PW, C); output also (K, C, PH, PW).
// Forward: a warp per bin, 16 bytes per lane and access along channels (256 channels of bfloat16 are one access).
// Backward, two ways:
//   scatter   a warp per bin adds to its cells in float32, 16 bytes a reduction; the order of sums is not fixed
//   gather    a warp per cell adds up the bins that read it, RoIs in ascending order: deterministic, no float32 buffer
//             and no atomics, but a cell under many RoIs is one warp's work. Always taken in float64.
//
// Floor (H100, 3.0 TB/s), bfloat16, 1000 RoIs x 256 x 7 x 7 from 256 x 100 x 168: output 25 MB + features read once 9 MB:
// 11 us. Backward: gradient 25 MB + features' gradient 9 MB: 11 us (gather); the scatter moves 9 cells x 4 bytes for
// every bin and channel, 450 MB of reductions in L2.
#include "ops/roi_align.h"

#include "common/roi_align.h"
#include "cuda/launch.h"

namespace spatialflow {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;

struct RoiAlignProblem {
    int num_rois, batch, channels, height, width;
    int pooled_height, pooled_width;
    int64_t stride_n, stride_h, stride_w;  // of the features, in elements; channels are adjacent
    int64_t output_stride_c, output_stride_bin;
    double spatial_scale;
    int64_t sampling_ratio;
    bool aligned;
};

// ---- device ------------------------------------------------------------------------------------------------------

template <typename real_t>
struct RoiGeometry {
    RoiAxis<real_t> y, x;
    int64_t image;
    bool valid;  // false: a coordinate is not finite, or the batch index is outside the batch
};

template <typename real_t>
__device__ __forceinline__ RoiGeometry<real_t> roi_geometry(
    Global<const real_t> row,  // (5,): batch index, x1, y1, x2, y2
    const RoiAlignProblem& problem) {
    RoiGeometry<real_t> roi;
    const real_t index = row[0];
    const real_t scale = static_cast<real_t>(problem.spatial_scale);
    roi.y = roi_axis<real_t>(row[2], row[4], scale, problem.pooled_height, problem.sampling_ratio, problem.aligned);
    roi.x = roi_axis<real_t>(row[1], row[3], scale, problem.pooled_width, problem.sampling_ratio, problem.aligned);
    const bool inside = index >= real_t(0) && index < real_t(problem.batch);  // false for NaN
    roi.image = inside ? static_cast<int64_t>(index) : 0;
    roi.valid = inside && roi.y.valid && roi.x.valid;
    return roi;
}

template <typename scalar_t, int kWidth, int kVectors>
__global__ void __launch_bounds__(kThreads, 2) roi_align_kernel(
    Global<const scalar_t> input,           // (N, H, W, C) by strides
    Global<const accum_t<scalar_t>> boxes,  // (K, 5)
    Global<scalar_t> output,                // (K, bins, C) by strides
    const RoiAlignProblem problem, const int blocks_per_roi) {
    using real_t = accum_t<scalar_t>;
    const int lane = threadIdx.x % kWarpSize;
    const int bins = problem.pooled_height * problem.pooled_width;
    const int roi_index = static_cast<int>(blockIdx.x) / blocks_per_roi;
    const int bin = static_cast<int>(blockIdx.x) % blocks_per_roi * kWarps + static_cast<int>(threadIdx.x) / kWarpSize;
    if (bin >= bins) {
        return;
    }
    const int ph = bin / problem.pooled_width, pw = bin % problem.pooled_width;
    const RoiGeometry<real_t> roi = roi_geometry<real_t>(boxes + static_cast<int64_t>(roi_index) * 5, problem);
    const CellRange rows = roi.valid ? bin_cells(roi.y, ph, problem.height) : CellRange{0, 0};
    const CellRange columns = roi.valid ? bin_cells(roi.x, pw, problem.width) : CellRange{0, 0};
    Global<const scalar_t> feature = input + roi.image * problem.stride_n;
    Global<scalar_t> target = output + (static_cast<int64_t>(roi_index) * bins * problem.channels +
                                        bin * problem.output_stride_bin);

    constexpr int kLaneStep = kWarpSize * kWidth;
    for (int first = lane * kWidth; first - lane * kWidth < problem.channels; first += kVectors * kLaneStep) {
        real_t sum[kVectors][kWidth] = {};
        for (int64_t y0 = rows.begin; y0 < rows.end; y0 += kWarpSize) {
            const int count_y = static_cast<int>(rows.end - y0 < kWarpSize ? rows.end - y0 : kWarpSize);
            const real_t lane_y = lane < count_y ? cell_weight(roi.y, ph, y0 + lane, problem.height) : real_t(0);
            for (int64_t x0 = columns.begin; x0 < columns.end; x0 += kWarpSize) {
                const int count_x = static_cast<int>(columns.end - x0 < kWarpSize ? columns.end - x0 : kWarpSize);
                const real_t lane_x = lane < count_x ? cell_weight(roi.x, pw, x0 + lane, problem.width) : real_t(0);
                for (int y = 0; y < count_y; ++y) {
                    const real_t weight_y = __shfl_sync(kAllLanes, lane_y, y);
                    Global<const scalar_t> cell =
                        feature + ((y0 + y) * problem.stride_h + x0 * problem.stride_w + first);
#pragma unroll 4
                    for (int x = 0; x < count_x; ++x) {
                        const real_t weight = weight_y * __shfl_sync(kAllLanes, lane_x, x);
#pragma unroll
                        for (int v = 0; v < kVectors; ++v) {
                            if (first + v * kLaneStep < problem.channels) {
                                const auto values =
                                    load_vector<kWidth>(cell + (x * problem.stride_w + v * kLaneStep));
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
            if (c < problem.channels) {
                Vec<scalar_t, kWidth> values;
#pragma unroll
                for (int i = 0; i < kWidth; ++i) {
                    store(values[i], sum[v][i]);
                }
                if (problem.output_stride_c == 1) {
                    store_vector(target + c, values);
                } else {
#pragma unroll
                    for (int i = 0; i < kWidth; ++i) {
                        target[(c + i) * problem.output_stride_c] = values[i];
                    }
                }
            }
        }
    }
}

template <typename scalar_t, int kWidth>
__global__ void __launch_bounds__(kThreads, 2) roi_align_scatter_kernel(
    Global<const scalar_t> grad_output,       // (K, PH, PW, C)
    Global<const accum_t<scalar_t>> boxes,    // (K, 5)
    Global<accum_t<scalar_t>> grad_input,     // (N, H, W, C), zero on entry
    const RoiAlignProblem problem, const int blocks_per_roi) {
    using real_t = accum_t<scalar_t>;
    const int lane = threadIdx.x % kWarpSize;
    const int bins = problem.pooled_height * problem.pooled_width;
    const int roi_index = static_cast<int>(blockIdx.x) / blocks_per_roi;
    const int bin = static_cast<int>(blockIdx.x) % blocks_per_roi * kWarps + static_cast<int>(threadIdx.x) / kWarpSize;
    if (bin >= bins) {
        return;
    }
    const int ph = bin / problem.pooled_width, pw = bin % problem.pooled_width;
    const RoiGeometry<real_t> roi = roi_geometry<real_t>(boxes + static_cast<int64_t>(roi_index) * 5, problem);
    if (!roi.valid) {
        return;
    }
    const CellRange rows = bin_cells(roi.y, ph, problem.height);
    const CellRange columns = bin_cells(roi.x, pw, problem.width);
    Global<const scalar_t> source = grad_output + (static_cast<int64_t>(roi_index) * bins + bin) * problem.channels;
    Global<real_t> feature = grad_input + roi.image * problem.stride_n;
    for (int64_t y0 = rows.begin; y0 < rows.end; y0 += kWarpSize) {
        const int count_y = static_cast<int>(rows.end - y0 < kWarpSize ? rows.end - y0 : kWarpSize);
        const real_t lane_y = lane < count_y ? cell_weight(roi.y, ph, y0 + lane, problem.height) : real_t(0);
        for (int64_t x0 = columns.begin; x0 < columns.end; x0 += kWarpSize) {
            const int count_x = static_cast<int>(columns.end - x0 < kWarpSize ? columns.end - x0 : kWarpSize);
            const real_t lane_x = lane < count_x ? cell_weight(roi.x, pw, x0 + lane, problem.width) : real_t(0);
            for (int first = 0; first < problem.channels; first += kWarpSize * kWidth) {
                const int c = first + lane * kWidth;
                const bool active = c < problem.channels;
                Vec<scalar_t, kWidth> gradient = {};
                if (active) {
                    gradient = load_vector<kWidth>(source + c);
                }
                for (int y = 0; y < count_y; ++y) {
                    const real_t weight_y = __shfl_sync(kAllLanes, lane_y, y);
                    Global<real_t> cell = feature + ((y0 + y) * problem.stride_h + x0 * problem.stride_w + c);
                    for (int x = 0; x < count_x; ++x) {
                        const real_t weight = weight_y * __shfl_sync(kAllLanes, lane_x, x);
                        if (active && weight != real_t(0)) {
                            Vec<real_t, kWidth> values;
#pragma unroll
                            for (int i = 0; i < kWidth; ++i) {
                                values[i] = weight * load(gradient[i]);
                            }
                            reduce_add(cell + x * problem.stride_w, values);
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
    Global<scalar_t> grad_input,            // (N, H, W, C)
    const RoiAlignProblem problem, const int tiles_per_row) {
    using real_t = accum_t<scalar_t>;
    SPATIALFLOW_SHARED(int, listed, kThreads);
    SPATIALFLOW_SHARED(int, listed_by_warp, kWarps);
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const int row = static_cast<int>(blockIdx.x) / tiles_per_row;
    const int64_t tile_x = static_cast<int64_t>(blockIdx.x % static_cast<unsigned>(tiles_per_row)) * kWarps;
    const int64_t image = row / problem.height, y = row % problem.height, x = tile_x + warp;
    const int bins = problem.pooled_height * problem.pooled_width;
    Global<scalar_t> target = grad_input + (image * problem.stride_n + y * problem.stride_h + x * problem.stride_w);

    for (int first = 0; first < problem.channels; first += kWarpSize * kWidth) {
        const int c = first + lane * kWidth;
        const bool active = c < problem.channels;
        real_t sum[kWidth] = {};
        for (int base = 0; base < problem.num_rois; base += kThreads) {
            const int candidate = base + static_cast<int>(threadIdx.x);
            bool hit = false;
            if (candidate < problem.num_rois) {
                const RoiGeometry<real_t> roi =
                    roi_geometry<real_t>(boxes + static_cast<int64_t>(candidate) * 5, problem);
                hit = roi.valid && roi.image == image && axis_touches(roi.y, problem.pooled_height, y, y + 1) &&
                      axis_touches(roi.x, problem.pooled_width, tile_x, tile_x + kWarps);
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
            for (int entry = 0; entry < total && x < problem.width; ++entry) {
                const int roi_index = listed[entry];
                const RoiGeometry<real_t> roi =
                    roi_geometry<real_t>(boxes + static_cast<int64_t>(roi_index) * 5, problem);
                Global<const scalar_t> source =
                    grad_output + (static_cast<int64_t>(roi_index) * bins * problem.channels + c);
                for (int ph0 = 0; ph0 < problem.pooled_height; ph0 += kWarpSize) {
                    const real_t lane_y = ph0 + lane < problem.pooled_height
                                              ? cell_weight(roi.y, ph0 + lane, y, problem.height)
                                              : real_t(0);
                    const unsigned used_y = __ballot_sync(kAllLanes, lane_y != real_t(0));
                    for (int pw0 = 0; used_y != 0 && pw0 < problem.pooled_width; pw0 += kWarpSize) {
                        const real_t lane_x = pw0 + lane < problem.pooled_width
                                                  ? cell_weight(roi.x, pw0 + lane, x, problem.width)
                                                  : real_t(0);
                        const unsigned used_x = __ballot_sync(kAllLanes, lane_x != real_t(0));
                        for (unsigned left_y = used_y; left_y != 0; left_y &= left_y - 1) {
                            const int py = __ffs(static_cast<int>(left_y)) - 1;
                            const real_t weight_y = __shfl_sync(kAllLanes, lane_y, py);
                            for (unsigned left_x = used_x; left_x != 0; left_x &= left_x - 1) {
                                const int px = __ffs(static_cast<int>(left_x)) - 1;
                                const real_t weight = weight_y * __shfl_sync(kAllLanes, lane_x, px);
                                if (active) {
                                    const int64_t bin = (ph0 + py) * problem.pooled_width + pw0 + px;
                                    const auto values = load_vector<kWidth>(source + bin * problem.channels);
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
        if (active && x < problem.width) {
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

// Boxes keep their own precision: double for double features, else float32, whatever the features are.
Tensor boxes_as(const Tensor& boxes, ScalarType feature_dtype) {
    const ScalarType wanted = feature_dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
    return to_contiguous(boxes.scalar_type() == wanted ? boxes : torch::stable::to(boxes, wanted));
}

int as_int(const char* name, int64_t value) {
    check(value >= -0x7fffffff && value <= 0x7fffffff, "roi_align: ", name, " must be below 2^31 on CUDA, got ", value);
    return static_cast<int>(value);
}

template <typename scalar_t, int kWidth>
void launch_forward(
    const Tensor& feature, const Tensor& rois, const Tensor& output, const RoiAlignProblem& problem, Stream stream) {
    const int blocks_per_roi = static_cast<int>(ceil_div(problem.pooled_height * problem.pooled_width, kWarps));
    const dim3 grid(grid_size("roi_align", static_cast<int64_t>(problem.num_rois) * blocks_per_roi));
    const auto run = [&](auto vectors) {
        launch<roi_align_kernel<scalar_t, kWidth, decltype(vectors)::value>>(
            grid, dim3(kThreads), 0, stream, data<scalar_t>(feature), data<accum_t<scalar_t>>(rois),
            mutable_data<scalar_t>(output), problem, blocks_per_roi);
    };
    const int64_t accesses = ceil_div(problem.channels, kWarpSize * kWidth);
    if (accesses == 1) {
        run(std::integral_constant<int, 1>{});
    } else if (accesses == 2) {
        run(std::integral_constant<int, 2>{});
    } else {
        run(std::integral_constant<int, 4>{});
    }
}

Tensor roi_align_cuda(
    const Tensor& input, const Tensor& boxes, int64_t pooled_height, int64_t pooled_width, double spatial_scale,
    int64_t sampling_ratio, bool aligned) {
    check_roi_align(input, boxes, pooled_height, pooled_width, spatial_scale);
    const DeviceScope device(input);
    const MemoryFormat format = memory_format_of(input);
    Tensor output = empty_like_sized(
        input, {boxes.size(0), input.size(1), pooled_height, pooled_width}, std::nullopt, format);
    if (output.numel() == 0) {
        return output;
    }
    if (input.numel() == 0) {
        return torch::stable::zero_(output);
    }
    const Tensor feature = input.stride(1) == 1 ? input : to_contiguous(input, MemoryFormat::ChannelsLast);
    const Tensor rois = boxes_as(boxes, input.scalar_type());
    const bool planar = format == MemoryFormat::Contiguous;
    const int64_t bins = pooled_height * pooled_width;
    const RoiAlignProblem problem{
        as_int("number of boxes", boxes.size(0)), as_int("batch", input.size(0)), as_int("channels", input.size(1)),
        as_int("height", input.size(2)), as_int("width", input.size(3)), as_int("output_size", pooled_height),
        as_int("output_size", bins) / as_int("output_size", pooled_height), feature.stride(0), feature.stride(2),
        feature.stride(3), planar ? bins : 1, planar ? 1 : input.size(1), spatial_scale, sampling_ratio, aligned};
    dispatch_floating("roi_align", input.scalar_type(), [&](auto zero) {
        using scalar_t = decltype(zero);
        constexpr int kWidth = kWideElements<scalar_t>;
        const bool wide = problem.channels % kWidth == 0 && problem.stride_n % kWidth == 0 &&
                          problem.stride_h % kWidth == 0 && problem.stride_w % kWidth == 0 &&
                          is_aligned(feature.const_data_ptr(), 16) && is_aligned(output.const_data_ptr(), 16);
        if (wide) {
            launch_forward<scalar_t, kWidth>(feature, rois, output, problem, device.stream());
        } else {
            launch_forward<scalar_t, 1>(feature, rois, output, problem, device.stream());
        }
    });
    return output;
}

template <typename scalar_t, int kWidth>
void launch_scatter(
    const Tensor& grad_output, const Tensor& rois, const Tensor& grad_input, const RoiAlignProblem& problem,
    Stream stream) {
    const int blocks_per_roi = static_cast<int>(ceil_div(problem.pooled_height * problem.pooled_width, kWarps));
    launch<roi_align_scatter_kernel<scalar_t, kWidth>>(
        dim3(grid_size("roi_align_backward", static_cast<int64_t>(problem.num_rois) * blocks_per_roi)), dim3(kThreads),
        0, stream, data<scalar_t>(grad_output), data<accum_t<scalar_t>>(rois),
        mutable_data<accum_t<scalar_t>>(grad_input), problem, blocks_per_roi);
}

template <typename scalar_t, int kWidth>
void launch_gather(
    const Tensor& grad_output, const Tensor& rois, const Tensor& grad_input, const RoiAlignProblem& problem,
    Stream stream) {
    const int64_t tiles_per_row = ceil_div(problem.width, kWarps);
    launch<roi_align_gather_kernel<scalar_t, kWidth>>(
        dim3(grid_size("roi_align_backward", tiles_per_row * problem.height * problem.batch)), dim3(kThreads), 0,
        stream, data<scalar_t>(grad_output), data<accum_t<scalar_t>>(rois), mutable_data<scalar_t>(grad_input),
        problem, static_cast<int>(tiles_per_row));
}

Tensor roi_align_backward_cuda(
    const Tensor& grad_output, const Tensor& boxes, int64_t pooled_height, int64_t pooled_width, double spatial_scale,
    int64_t sampling_ratio, bool aligned, int64_t batch, int64_t channels, int64_t height, int64_t width,
    bool channels_last, bool deterministic) {
    check_roi_align_backward(grad_output, boxes, pooled_height, pooled_width, spatial_scale, channels);
    const DeviceScope device(grad_output);
    const ScalarType dtype = grad_output.scalar_type();
    const bool gather = deterministic || dtype == ScalarType::Double;
    Tensor grad_input = empty_like_sized(
        grad_output, {batch, channels, height, width}, gather ? dtype : ScalarType::Float, MemoryFormat::ChannelsLast);
    if (grad_output.numel() == 0 || grad_input.numel() == 0) {
        torch::stable::zero_(grad_input);
    } else {
        const Tensor source = to_contiguous(grad_output, MemoryFormat::ChannelsLast);
        const Tensor rois = boxes_as(boxes, dtype);
        const RoiAlignProblem problem{
            as_int("number of boxes", boxes.size(0)), as_int("batch", batch), as_int("channels", channels),
            as_int("height", height), as_int("width", width), as_int("output_size", pooled_height),
            as_int("output_size", pooled_width), height * width * channels, width * channels, channels, 1, channels,
            spatial_scale, sampling_ratio, aligned};
        if (!gather) {
            torch::stable::zero_(grad_input);
        }
        dispatch_floating("roi_align_backward", dtype, [&](auto zero) {
            using scalar_t = decltype(zero);
            constexpr int kWidth = kWideElements<scalar_t>;
            const bool wide = channels % kWidth == 0 && is_aligned(source.const_data_ptr(), 16) &&
                              is_aligned(grad_input.const_data_ptr(), 16);
            if (gather) {
                wide ? launch_gather<scalar_t, kWidth>(source, rois, grad_input, problem, device.stream())
                     : launch_gather<scalar_t, 1>(source, rois, grad_input, problem, device.stream());
            } else if constexpr (!std::is_same_v<scalar_t, double>) {
                wide ? launch_scatter<scalar_t, kWidth>(source, rois, grad_input, problem, device.stream())
                     : launch_scatter<scalar_t, 1>(source, rois, grad_input, problem, device.stream());
            }
        });
    }
    if (grad_input.scalar_type() != dtype) {
        grad_input = torch::stable::to(grad_input, dtype);
    }
    return channels_last ? grad_input : to_contiguous(grad_input);
}

}  // namespace
}  // namespace spatialflow

SPATIALFLOW_DEVICE_IMPL(library) {
    library.impl("roi_align", TORCH_BOX(&spatialflow::roi_align_cuda));
    library.impl("_roi_align_backward", TORCH_BOX(&spatialflow::roi_align_backward_cuda));
}
