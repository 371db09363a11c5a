// SPDX-License-Identifier: Apache-2.0
//
// GroupNorm, ReLU and optional 2x bilinear upsampling on CUDA in two launches. Layouts: see group_norm_relu.cuh.
//   y = relu((x - mean) * rstd * weight + bias), mean and rstd of a group of an image (common/group_norm_relu.h)
//
//   sums        A thread sums x - pivot and (x - pivot)^2 over up to 64 pixels; pivot is its first pixel. These sums
//               are then added in float64. Blocks write partial sums per group to a table (N, groups, blocks, slices of
//               a group, 2).
//   normalize   A block adds the partial sums of its groups in a fixed order, so results are deterministic. For
//               upsampling, a thread processes a column of the output, row by row. It keeps the two input rows around
//               the current row, interpolated at this column.
#include "cuda/group_norm_relu.cuh"

namespace spatialflow {
namespace {

// ---- device ------------------------------------------------------------------------------------------------------

template <typename scalar_t, int kWidth>
__global__ void __launch_bounds__(kThreads) group_norm_sums_kernel(
    const NormMap<const scalar_t> input,
    Global<double> table,  // (N, groups, blocks, pieces, 2)
    const NormShape shape) {
    using real_t = accum_t<scalar_t>;
    constexpr int kChannels = kSlice<kWidth>;
    SPATIALFLOW_SHARED(double, of_warps, kWarps * 2 * kChannels);
    SPATIALFLOW_SHARED(double, total, 2 * kChannels);
    const NormPlace<kWidth> place(shape, shape.sum_blocks);
    const PixelRange pixels(shape, place, {shape.sum_blocks, shape.sum_pixels, 0});
    double sums[kWidth] = {}, squares[kWidth] = {};
    if (place.has_channels(shape) && pixels.begin < pixels.end) {
        real_t pivot[kWidth], sum[kWidth] = {}, square[kWidth] = {};
        for_pixels(
            pixels,
            [&](int pixel) {
                return load_channels<kWidth>(pixel_of(input, shape, place.image, pixel) + place.channel);
            },
            [&](int, const RawChannels<scalar_t, kWidth>& values, bool is_first) {
#pragma unroll
                for (int i = 0; i < kWidth; ++i) {
                    const real_t value = values.value(i);
                    pivot[i] = is_first ? value : pivot[i];
                    const real_t from = value - pivot[i];
                    sum[i] += from;
                    square[i] += from * from;
                }
            });
        const double count = (pixels.end - pixels.begin + kPixelLanes - 1) / kPixelLanes;
        const Global<const scalar_t> origin = input.data + place.image * input.stride_n;
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
            const int group = (place.channel + i) / shape.group_channels;
            GroupSums channel_sums{0, 0};
            add_run(channel_sums, load(origin[group * shape.group_channels]), pivot[i], count, sum[i], square[i]);
            sums[i] = channel_sums.sum;
            squares[i] = channel_sums.square;
        }
    }
    sum_block(sums, squares, of_warps, total);
    const int group = place.first_group + static_cast<int>(threadIdx.x);
    if (group < place.end_group) {
        const int slice_begin = place.slice * kChannels, group_begin = group * shape.group_channels;
        const int first = group_begin > slice_begin ? group_begin - slice_begin : 0;
        int last = group_begin + shape.group_channels - slice_begin;
        last = last < kChannels ? last : kChannels;
        double sum = 0, square = 0;
        for (int c = first; c < last; ++c) {
            sum += total[2 * c];
            square += total[2 * c + 1];
        }
        const int piece = place.slice - group_begin / kChannels;
        const int64_t row = (static_cast<int64_t>(place.image) * shape.groups + group) * shape.sum_blocks + place.block;
        store_vector(table + (row * shape.pieces + piece) * 2, Vec<double, 2>{{sum, square}});
    }
}

// Compute mean and rstd of the groups in this block's slice from the sums of all blocks, and synchronize the block. The
// block with `is_first` also writes the values of groups that begin in its slice to `statistics`.
template <int kWidth, typename scalar_t>
__device__ __forceinline__ void collect_statistics(
    const NormMap<const scalar_t>& input, Global<const double> table, const NormShape& shape,
    const NormPlace<kWidth>& place, bool is_first, Shared<double> shared, Global<double> statistics) {
    constexpr int kChannels = kSlice<kWidth>;
    const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarpSize;
    for (int group = place.first_group + thread / kWarpSize; group < place.end_group; group += kWarps) {
        const int begin = group * shape.group_channels, first_slice = begin / kChannels;
        const int pieces = (begin + shape.group_channels - 1) / kChannels - first_slice + 1;
        const int64_t row = static_cast<int64_t>(place.image) * shape.groups + group;
        GroupSums sums{0, 0};
        for (int entry = lane; entry < shape.sum_blocks * pieces; entry += kWarpSize) {
            const int block = entry / pieces;
            const int64_t at = (row * shape.sum_blocks + block) * shape.pieces + (entry - block * pieces);
            const Vec<double, 2> partial = load_vector<2>(table + at * 2);
            sums.sum += partial[0];
            sums.square += partial[1];
        }
        sums.sum = sum_lanes(sums.sum, 1);
        sums.square = sum_lanes(sums.square, 1);
        if (lane == 0) {
            const scalar_t pivot = input.data[place.image * input.stride_n + begin];
            const GroupStatistics normalization = group_statistics(sums, load(pivot), shape.group_size(), shape.eps);
            shared[(group - place.first_group) * 2] = normalization.mean;
            shared[(group - place.first_group) * 2 + 1] = normalization.rstd;
            if (is_first && first_slice == place.slice) {
                statistics[row * 2] = normalization.mean;
                statistics[row * 2 + 1] = normalization.rstd;
            }
        }
    }
    __syncthreads();
}

template <typename real_t>
__device__ __forceinline__ real_t relu(real_t value) {
    return value < real_t(0) ? real_t(0) : value;  // NaN is kept
}

template <typename scalar_t, int kWidth>
__global__ void __launch_bounds__(kThreads) group_norm_relu_kernel(
    const NormMap<const scalar_t> input, Global<const double> table, const ByChannel<accum_t<scalar_t>> by_channel,
    Global<double> statistics,  // (N, groups, 2)
    Global<scalar_t> output,    // (N, H, W, C)
    const NormShape shape, const NormParts parts) {
    using real_t = accum_t<scalar_t>;
    SPATIALFLOW_SHARED(double, shared, 2 * kSlice<kWidth>);
    const NormPlace<kWidth> place(shape, parts.blocks);
    collect_statistics(input, table, shape, place, place.block == 0, shared, statistics);
    if (!place.has_channels(shape)) {
        return;
    }
    const AffineVector<real_t, kWidth> affine = affine_of(shared, -place.first_group, by_channel, shape, place);
    const Global<scalar_t> target =
        output + (static_cast<int64_t>(place.image) * shape.pixels() * shape.channels + place.channel);
    for_pixels(
        PixelRange(shape, place, parts),
        [&](int pixel) { return load_channels<kWidth>(pixel_of(input, shape, place.image, pixel) + place.channel); },
        [&](int pixel, const RawChannels<scalar_t, kWidth>& values, bool) {
            Vec<scalar_t, kWidth> result;
#pragma unroll
            for (int i = 0; i < kWidth; ++i) {
                store(result[i], relu<real_t>(affine.before_relu(i, values.value(i))));
            }
            store_vector(target + static_cast<int64_t>(pixel) * shape.channels, result);
        });
}

template <typename scalar_t, int kWidth>
__global__ void __launch_bounds__(kThreads) group_norm_relu_upsample_kernel(
    const NormMap<const scalar_t> input, Global<const double> table, const ByChannel<accum_t<scalar_t>> by_channel,
    Global<double> statistics,  // (N, groups, 2)
    Global<scalar_t> output,    // (N, 2 H, 2 W, C)
    const NormShape shape, const NormParts parts) {
    using real_t = accum_t<scalar_t>;
    SPATIALFLOW_SHARED(double, shared, 2 * kSlice<kWidth>);
    const NormPlace<kWidth> place(shape, parts.blocks);
    collect_statistics(input, table, shape, place, place.block == 0, shared, statistics);
    const int column = place.block % parts.column_blocks * kPixelLanes + place.pixel_lane;
    if (!place.has_channels(shape) || column >= 2 * shape.width) {
        return;
    }
    const AffineVector<real_t, kWidth> affine = affine_of(shared, -place.first_group, by_channel, shape, place);
    const DoubledCell<real_t> cell = doubled_cell<real_t>(column, shape.width);
    const Global<const scalar_t> source = input.data + (place.image * input.stride_n + place.channel);
    // Normalize row `y` of the input, apply ReLU, and interpolate it at the column of this thread.
    const auto at_row = [&](int y, real_t(&result)[kWidth]) {
        const Global<const scalar_t> row = source + y * input.stride_h;
        const auto low = load_channels<kWidth>(row + cell.low * input.stride_w);
        const auto high = load_channels<kWidth>(row + cell.high * input.stride_w);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
            result[i] = relu<real_t>(affine.before_relu(i, low.value(i))) * cell.low_weight +
                        relu<real_t>(affine.before_relu(i, high.value(i))) * cell.high_weight;
        }
    };
    const int begin = place.block / parts.column_blocks * parts.extent;
    const int end = begin + parts.extent < 2 * shape.height ? begin + parts.extent : 2 * shape.height;
    Global<scalar_t> target =
        output +
        ((static_cast<int64_t>(place.image) * 2 * shape.height + begin) * 2 * shape.width + column) * shape.channels +
        place.channel;
    DoubledWalk<real_t> walk(begin, shape.height);
    real_t above[kWidth], below[kWidth];
    at_row(walk.low, above);
    at_row(walk.high(), below);
    int low = walk.low;
    for (int y = begin; y < end; ++y) {
        if (walk.low != low) {
            low = walk.low;
#pragma unroll
            for (int i = 0; i < kWidth; ++i) {
                above[i] = below[i];
            }
            at_row(walk.high(), below);
        }
        const real_t weight = walk.high_weight();
        Vec<scalar_t, kWidth> result;
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
            store(result[i], above[i] * (real_t(1) - weight) + below[i] * weight);
        }
        store_vector(target, result);
        target += static_cast<int64_t>(2) * shape.width * shape.channels;
        walk.step();
    }
}

// ---- host --------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> group_norm_relu_cuda(
    const Tensor& input, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, int64_t num_groups,
    double eps, bool upsample) {
    check_group_norm_relu(input, weight, bias, num_groups, eps);
    const DeviceScope device(input);
    Tensor statistics = empty_like_sized(input, {input.size(0), num_groups, 2}, ScalarType::Double);
    const Tensor output = empty_norm_map(input, upsample ? 2 : 1);
    if (input.numel() == 0) {
        return {output, torch::stable::zero_(statistics)};
    }
    const Tensor source = channels_adjacent(input);
    const ScalarType accumulated = accum_dtype(input.scalar_type());
    const std::optional<Tensor> scale = in_dtype(weight, accumulated), shift = in_dtype(bias, accumulated);
    dispatch_floating("group_norm_relu", input.scalar_type(), [&](auto zero) {
        using scalar_t = decltype(zero);
        dispatch_width<scalar_t>({&source, &output}, [&](auto width) {
            constexpr int kWidth = decltype(width)::value;
            const NormShape shape = shape_of<kWidth>(source, num_groups, eps);
            const Tensor table = empty_like_sized(
                input, {shape.batch, shape.groups, shape.sum_blocks, shape.pieces, 2}, ScalarType::Double);
            const NormMap<const scalar_t> map = map_of<scalar_t>(source);
            launch<group_norm_sums_kernel<scalar_t, kWidth>>(
                grid_of(shape, {shape.sum_blocks, shape.sum_pixels, 0}), dim3(kThreads), 0, device.stream(), map,
                mutable_data<double>(table), shape);
            const ByChannel<accum_t<scalar_t>> by_channel = by_channel_of<accum_t<scalar_t>>(scale, shift);
            if (upsample) {
                const NormParts parts = column_parts(shape, 2 * shape.height, 2 * shape.width);
                launch<group_norm_relu_upsample_kernel<scalar_t, kWidth>>(
                    grid_of(shape, parts), dim3(kThreads), 0, device.stream(), map, data<double>(table), by_channel,
                    mutable_data<double>(statistics), mutable_data<scalar_t>(output), shape, parts);
            } else {
                const NormParts parts = pixel_parts(shape, kGroupNormRun);
                launch<group_norm_relu_kernel<scalar_t, kWidth>>(
                    grid_of(shape, parts), dim3(kThreads), 0, device.stream(), map, data<double>(table), by_channel,
                    mutable_data<double>(statistics), mutable_data<scalar_t>(output), shape, parts);
            }
        });
    });
    return {to_contiguous(output, memory_format_of(input)), statistics};
}

}  // namespace
}  // namespace spatialflow

SPATIALFLOW_DEVICE_IMPL(library) { library.impl("group_norm_relu", TORCH_BOX(&spatialflow::group_norm_relu_cuda)); }
