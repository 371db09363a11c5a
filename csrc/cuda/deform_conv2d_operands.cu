// SPDX-License-Identifier: Apache-2.0
//
// Operands of deformable convolution on CUDA, for the forward and backward pass: packed weights, offsets and masks in
// the dtype of sums, checks of sizes. The order of packed weights is described in deform_conv2d.cuh.
#include <numeric>

#include "common/sigmoid.h"
#include "cuda/deform_conv2d.cuh"
#include "cuda/device_exp.cuh"

namespace spatialflow {
namespace {

// ---- device ------------------------------------------------------------------------------------------------------

constexpr int kPackTile = 64;

// Transpose a tile of the weight, 64 values of 64 outputs of a group, and prepare its values for the operand type.
template <typename operand_t>
__global__ void __launch_bounds__(256) pack_deform_weight_kernel(
    Global<const element_t<operand_t>> weight,  // (O, C / groups, taps)
    Global<element_t<operand_t>> packed,        // (C * taps, packed_outputs)
    const WeightOrder order) {
    using scalar_t = element_t<operand_t>;
    constexpr int kTileRow = kPackTile + 4 / static_cast<int>(sizeof(scalar_t) < 4 ? sizeof(scalar_t) : 4);
    SPATIALFLOW_SHARED(scalar_t, tile, kPackTile * kTileRow);
    const int length = order.group_channels * order.taps, group = static_cast<int>(blockIdx.z);
    const int first_value = static_cast<int>(blockIdx.x) * kPackTile;
    const int first_output = static_cast<int>(blockIdx.y) * kPackTile;
    const int column = static_cast<int>(threadIdx.x) % kPackTile, first_row = static_cast<int>(threadIdx.x) / kPackTile;
#pragma unroll
    for (int i = first_row; i < kPackTile; i += 256 / kPackTile) {
        scalar_t value{};
        if (first_output + i < order.group_outputs && first_value + column < length) {
            value = weight[(group * order.group_outputs + first_output + i) * length + first_value + column];
        }
        tile[i * kTileRow + column] = prepared(value, operand_t{});
    }
    __syncthreads();
#pragma unroll
    for (int i = first_row; i < kPackTile; i += 256 / kPackTile) {
        if (first_output + column < order.packed_outputs && first_value + i < length) {
            const int row = order.row(group, first_value + i);
            packed[row * order.packed_outputs + first_output + column] = tile[column * kTileRow + i];
        }
    }
}

template <typename value_t>
struct SampleOperands {
    StridedImages<value_t> offset, mask;  // (N, 2 * samples, height, width); (N, samples, height, width) or null
    int samples, height, width;           // offset groups * taps; height and width of the output
    bool sigmoid;                         // apply sigmoid to the mask
};

// Convert offsets and masks to accum_t, with the pixels of a channel adjacent, and apply the sigmoid to masks on
// request. A thread computes one value.
template <typename value_t>
__global__ void __launch_bounds__(256) deform_operands_kernel(
    const __grid_constant__ SampleOperands<value_t> operands,
    Global<accum_t<value_t>> offset,  // (N, 2 * samples, pixels) or null
    Global<accum_t<value_t>> mask,    // (N, samples, pixels) or null
    const int64_t size) {             // of both together
    using real_t = accum_t<value_t>;
    const int64_t index = static_cast<int64_t>(blockIdx.x) * 256 + static_cast<int>(threadIdx.x);
    if (index >= size) {
        return;
    }
    const int pixels = operands.height * operands.width;
    const int offsets = offset ? 2 * operands.samples : 0, channels = offsets + (mask ? operands.samples : 0);
    const int64_t row = index / pixels;
    const int pixel = static_cast<int>(index - row * pixels), y = pixel / operands.width,
              x = pixel - y * operands.width;
    const int image = static_cast<int>(row / channels), channel = static_cast<int>(row % channels);
    if (channel < offsets) {
        const value_t value = operands.offset.at(image, channel, y, x);
        offset[(static_cast<int64_t>(image) * offsets + channel) * pixels + pixel] = load(value);
        return;
    }
    const int sample = channel - offsets;
    const value_t value = operands.mask.at(image, sample, y, x);
    const real_t factor = load(value);
    mask[(static_cast<int64_t>(image) * operands.samples + sample) * pixels + pixel] =
        operands.sigmoid ? sigmoid<real_t, DeviceExp>(factor) : factor;
}

}  // namespace

// ---- host --------------------------------------------------------------------------------------------------------

std::pair<Tensor, std::optional<Tensor>> sample_operands(
    const char* op, const DeformConvShape& shape, ScalarType accum, const Tensor& offset,
    const std::optional<Tensor>& mask, bool mask_sigmoid, Stream stream) {
    const bool same_dtype =
        accum_dtype(offset.scalar_type()) == accum && (!mask || mask->scalar_type() == offset.scalar_type());
    const Tensor accum_offset = same_dtype ? offset : as_dtype(offset, accum);
    const std::optional<Tensor> accum_mask = same_dtype || !mask ? mask : std::make_optional(as_dtype(*mask, accum));
    if ((accum_offset.scalar_type() == accum && !mask_sigmoid) || accum_offset.numel() == 0) {
        return {accum_offset, accum_mask};
    }
    const int64_t samples = shape.offset_groups * shape.taps();
    const auto empty_channels_first = [&](const Tensor& like, int64_t channels) {
        return empty_like_sized(like, {shape.batch, channels, shape.out_height, shape.out_width}, accum);
    };
    const bool converts = accum_offset.scalar_type() != accum;
    const Tensor offsets = converts ? empty_channels_first(accum_offset, 2 * samples) : accum_offset;
    const std::optional<Tensor> factors =
        mask ? std::make_optional(empty_channels_first(*accum_mask, samples)) : std::nullopt;
    const int64_t size = (converts ? offsets.numel() : 0) + (factors ? factors->numel() : 0);
    dispatch_floating(op, accum_offset.scalar_type(), [&](auto zero) {
        using value_t = decltype(zero);
        using real_t = accum_t<value_t>;
        SampleOperands<value_t> operands{};
        operands.offset = strided_images<value_t>(accum_offset);
        if (accum_mask) {
            operands.mask = strided_images<value_t>(*accum_mask);
        }
        operands.samples = static_cast<int>(samples);
        operands.height = static_cast<int>(shape.out_height);
        operands.width = static_cast<int>(shape.out_width);
        operands.sigmoid = mask_sigmoid;
        launch<deform_operands_kernel<value_t>>(
            dim3(grid_size(op, ceil_div(size, 256))), dim3(256), 0, stream, operands,
            converts ? mutable_data<real_t>(offsets) : Global<real_t>(nullptr),
            factors ? mutable_data<real_t>(*factors) : Global<real_t>(nullptr), size);
    });
    return {offsets, factors};
}

int64_t deform_run(const DeformConvShape& shape) {
    return std::gcd(shape.group_channels(), shape.offset_group_channels());
}

WeightOrder deform_weight_order(const DeformConvShape& shape, ScalarType dtype, int64_t run) {
    const int64_t item = dtype == ScalarType::Double ? 2 : dtype == ScalarType::Float ? 4 : 8;
    return {
        static_cast<int>(shape.taps()), static_cast<int>(run), static_cast<int>(shape.group_channels()),
        static_cast<int>(shape.group_outputs()), static_cast<int>(ceil_div(shape.group_outputs(), item) * item)};
}

dim3 deform_grid(const char* op, int64_t tiles, int64_t y, int64_t z) {
    check(y <= 65535 && z <= 65535, op, ": groups and taps make too many blocks for CUDA, ", y, " x ", z);
    return dim3(grid_size(op, tiles), static_cast<unsigned>(y), static_cast<unsigned>(z));
}

Tensor pack_deform_weight(
    const char* op, const Tensor& weight, const DeformConvShape& shape, int64_t run, int64_t algorithm, int64_t tag,
    Stream stream) {
    const WeightOrder order = deform_weight_order(shape, weight.scalar_type(), run);
    Tensor packed = empty_like_sized(weight, {shape.channels * shape.taps() * order.packed_outputs + tag});
    if (tag > 0) {
        torch::stable::zero_(packed);  // the tag must be zero, so that equal weights give equal packed tensors
    }
    if (weight.numel() == 0) {
        return packed;
    }
    const Tensor dense = to_contiguous(weight);
    const dim3 grid = deform_grid(
        op, ceil_div(shape.group_channels() * shape.taps(), kPackTile), ceil_div(order.packed_outputs, kPackTile),
        shape.groups);
    dispatch_floating(op, weight.scalar_type(), [&](auto zero) {
        using scalar_t = decltype(zero);
        dispatch_operand<scalar_t>(cuda_algorithm(algorithm, weight.scalar_type()), [&](auto operand) {
            launch<pack_deform_weight_kernel<decltype(operand)>>(
                grid, dim3(256), 0, stream, data<scalar_t>(dense), mutable_data<scalar_t>(packed), order);
        });
    });
    return packed;
}

void check_deform_weight_size(const char* op, const DeformConvShape& shape) {
    const double taps = static_cast<double>(shape.taps());  // in double, as products of integers may overflow
    check(
        taps * (shape.channels + 1) * (shape.group_outputs() + 8) <= kMaxDeformIndex &&
            taps * (shape.out_channels + 1) * (shape.group_channels() + 1) <= kMaxDeformIndex,
        op, ": weight must have fewer than 2^31 values on CUDA");
}

void check_deform_sizes(const char* op, const DeformConvShape& shape) {
    const int64_t cells = shape.batch * shape.height * shape.width, pixels = shape.batch * shape.pixels();
    check(cells <= kMaxDeformIndex, op, ": input must have at most ", kMaxDeformIndex, " cells on CUDA, got ", cells);
    check(
        pixels <= kMaxDeformIndex, op, ": the output must have at most ", kMaxDeformIndex, " pixels on CUDA, got ",
        pixels);
    check_deform_weight_size(op, shape);
}

DeformOperands::DeformOperands(
    const char* op, const DeformConvShape& shape, const DeformConvOptions& options, const Tensor& input,
    const Tensor& offset, const std::optional<Tensor>& mask, const std::optional<Tensor>& offset_tangent)
    : shape_(shape),
      options_(options),
      input_(to_contiguous(input, MemoryFormat::ChannelsLast)),
      offset_(as_dtype(offset, accum_dtype(input.scalar_type()))) {
    const ScalarType accum = accum_dtype(input.scalar_type());
    if (mask) {
        mask_ = as_dtype(*mask, accum);
    }
    if (offset_tangent) {
        offset_tangent_ = as_dtype(*offset_tangent, accum);
    }
    check_deform_sizes(op, shape);
}

}  // namespace spatialflow
