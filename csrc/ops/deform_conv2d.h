// SPDX-License-Identifier: Apache-2.0
//
// Sizes and argument checks of deform_conv2d, shared by all back ends. Schemas in deform_conv2d.cpp and
// deform_conv2d_backward.cpp.
#pragma once

#include <algorithm>

#include "ops/conv_algorithm.h"
#include "ops/tensor.h"

namespace spatialflow {

// Stride, padding and dilation as (height, width), and the algorithm for float32. The last two fields are used only
// with a packed weight.
struct DeformConvOptions {
    int64_t stride[2];
    int64_t padding[2];
    int64_t dilation[2];
    int64_t algorithm;
    bool mask_sigmoid = false;  // the factor of a sample is the sigmoid of `mask`
    bool relu = false;
};

// Sizes that determine packed weights, together with the channels of the input.
struct DeformConvKernel {
    int64_t out_channels, groups, offset_groups, height, width;
};

struct DeformConvShape {
    int64_t batch, channels, height, width;
    int64_t out_channels, kernel_height, kernel_width, out_height, out_width;
    int64_t groups, offset_groups;

    int64_t taps() const { return kernel_height * kernel_width; }
    int64_t pixels() const { return out_height * out_width; }
    int64_t group_channels() const { return channels / groups; }
    int64_t group_outputs() const { return out_channels / groups; }
    int64_t offset_group_channels() const { return channels / offset_groups; }
};

constexpr int64_t kMaxDeformStep = 1 << 29;  // so that positions fit 32 bits

inline void check_deform_options(const char* op, const DeformConvOptions& options) {
    check_algorithm(op, options.algorithm);
    check(
        options.algorithm != kConvWinograd, op,
        ": algorithm must not be 1 (winograd), which is an algorithm of flow_conv2d only");
    check(
        options.stride[0] > 0 && options.stride[1] > 0, op, ": stride must be positive, got (", options.stride[0], ", ",
        options.stride[1], ")");
    check(
        options.padding[0] >= 0 && options.padding[1] >= 0, op, ": padding must not be negative, got (",
        options.padding[0], ", ", options.padding[1], ")");
    check(
        options.dilation[0] > 0 && options.dilation[1] > 0, op, ": dilation must be positive, got (",
        options.dilation[0], ", ", options.dilation[1], ")");
    for (int axis = 0; axis < 2; ++axis) {
        check(
            options.stride[axis] <= kMaxDeformStep && options.padding[axis] <= kMaxDeformStep &&
                options.dilation[axis] <= kMaxDeformStep,
            op, ": stride, padding and dilation must be at most 2^29, got ", options.stride[axis], ", ",
            options.padding[axis], " and ", options.dilation[axis]);
    }
}

inline int64_t deform_out_size(int64_t size, int64_t kernel, const DeformConvOptions& options, int axis) {
    // C++ rounds a negative quotient toward zero, which would give an output size of 1.
    const int64_t span = size + 2 * options.padding[axis] - options.dilation[axis] * (kernel - 1) - 1;
    return span < 0 ? 0 : span / options.stride[axis] + 1;
}

// Check the sampling arguments: input, offset, mask, tangent and kernel size. The caller checks `groups` and
// `out_channels`.
inline DeformConvShape check_deform_sampling(
    const char* op, const Tensor& input, const Tensor& offset, const std::optional<Tensor>& mask,
    const std::optional<Tensor>& offset_tangent, int64_t kernel_height, int64_t kernel_width,
    const DeformConvOptions& options) {
    check_dim(op, "input", input, 4, "(N, C, H, W)");
    check_floating(op, "input", input);
    check_dim(op, "offset", offset, 4, "(N, 2 * offset_groups * taps, H_out, W_out)");
    check_floating(op, "offset", offset);
    check_same_device(op, "offset", offset, "input", input);
    check_deform_options(op, options);
    // Without channels a weight of any kernel size needs no memory, and the product of its sides may overflow.
    check(
        kernel_height > 0 && kernel_width > 0 && kernel_height <= kMaxDeformStep && kernel_width <= kMaxDeformStep, op,
        ": weight must have a kernel of at least one tap, and of sides up to 2^29, got (", kernel_height, ", ",
        kernel_width, ")");
    DeformConvShape shape{};
    shape.batch = input.size(0);
    shape.channels = input.size(1);
    shape.height = input.size(2);
    shape.width = input.size(3);
    shape.kernel_height = kernel_height;
    shape.kernel_width = kernel_width;
    shape.out_height = deform_out_size(shape.height, kernel_height, options, 0);
    shape.out_width = deform_out_size(shape.width, kernel_width, options, 1);
    shape.groups = 1;
    check(
        shape.out_height > 0 && shape.out_width > 0, op, ": input of ", shape.height, " x ", shape.width,
        " is too small for the kernel: the output would be ", shape.out_height, " x ", shape.out_width);
    check(
        offset.size(1) > 0 && offset.size(1) % (2 * shape.taps()) == 0, op,
        ": offset must have a multiple of 2 * kernel height * kernel width = ", 2 * shape.taps(), " channels, got ",
        offset.size(1));
    shape.offset_groups = offset.size(1) / (2 * shape.taps());
    check(
        shape.channels % shape.offset_groups == 0, op, ": offset groups must divide the channels of input, got ",
        shape.offset_groups, " groups (offset has ", offset.size(1), " channels) for ", shape.channels, " channels");
    check(
        offset.size(0) == shape.batch && offset.size(2) == shape.out_height && offset.size(3) == shape.out_width, op,
        ": offset must have shape (", shape.batch, ", ", offset.size(1), ", ", shape.out_height, ", ", shape.out_width,
        "), got ", offset);
    if (mask) {
        check_dim(op, "mask", *mask, 4, "(N, offset_groups * taps, H_out, W_out)");
        check_floating(op, "mask", *mask);
        check_same_device(op, "mask", *mask, "input", input);
        check(
            mask->size(0) == shape.batch && mask->size(1) == shape.offset_groups * shape.taps() &&
                mask->size(2) == shape.out_height && mask->size(3) == shape.out_width,
            op, ": mask must have shape (", shape.batch, ", ", shape.offset_groups * shape.taps(), ", ",
            shape.out_height, ", ", shape.out_width, "), got ", *mask);
    }
    if (offset_tangent) {
        check_floating(op, "offset_tangent", *offset_tangent);
        check_same_device(op, "offset_tangent", *offset_tangent, "input", input);
        bool is_same_shape = offset_tangent->dim() == 4;
        for (int64_t d = 0; is_same_shape && d < 4; ++d) {
            is_same_shape = offset_tangent->size(d) == offset.size(d);
        }
        check(is_same_shape, op, ": offset_tangent must have the shape of offset, ", offset, ", got ", *offset_tangent);
    }
    return shape;
}

// Add the sizes that are determined by the weight.
inline void check_deform_weight(const char* op, const Tensor& input, const Tensor& weight, DeformConvShape& shape) {
    check_dtype(op, "weight", weight, input.scalar_type());
    check_same_device(op, "weight", weight, "input", input);
    shape.out_channels = weight.size(0);
    const int64_t group_channels = weight.size(1);
    check(
        group_channels > 0 ? shape.channels % group_channels == 0 && shape.channels > 0 : shape.channels == 0, op,
        ": weight must have input channels / groups = a divisor of ", shape.channels, " as its second size, got ",
        group_channels);
    shape.groups = group_channels > 0 ? shape.channels / group_channels : 1;
    check(
        shape.out_channels % shape.groups == 0, op, ": weight must have a multiple of groups = ", shape.groups,
        " output channels, got ", shape.out_channels);
}

inline void check_deform_bias(
    const char* op, const std::optional<Tensor>& bias, const Tensor& input, const DeformConvShape& shape) {
    if (bias) {
        check_dtype(op, "bias", *bias, input.scalar_type());
        check_same_device(op, "bias", *bias, "input", input);
        check(
            bias->dim() == 1 && bias->size(0) == shape.out_channels, op, ": bias must have shape (", shape.out_channels,
            "), got ", *bias);
    }
}

inline DeformConvShape check_deform_conv2d(
    const Tensor& input, const Tensor& offset, const Tensor& weight, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& mask, const std::optional<Tensor>& offset_tangent, const DeformConvOptions& options) {
    const char* op = "deform_conv2d";
    check_dim(op, "weight", weight, 4, "(C_out, C / groups, kernel height, kernel width)");
    DeformConvShape shape =
        check_deform_sampling(op, input, offset, mask, offset_tangent, weight.size(2), weight.size(3), options);
    check_deform_weight(op, input, weight, shape);
    check_deform_bias(op, bias, input, shape);
    return shape;
}

// Check that products of the sizes of a packed weight fit into 64 bits.
inline void check_packed_deform_sizes(const char* op, const DeformConvShape& shape) {
    constexpr int64_t kMaxValues = int64_t(1) << 60;
    const int64_t channels = std::max<int64_t>(1, shape.channels);
    check(
        shape.taps() <= kMaxValues / channels && shape.out_channels <= kMaxValues / (channels * shape.taps()) - 64, op,
        ": weight must have fewer than 2^60 values, got ", shape.out_channels, " output channels for ", shape.channels,
        " channels and a kernel of ", shape.kernel_height, " x ", shape.kernel_width);
}

// Check the arguments of packing. Return the sizes of the weight; the sizes of images are 0.
inline DeformConvShape check_pack_deform_conv2d(
    const Tensor& weight, int64_t groups, int64_t offset_groups, int64_t algorithm) {
    const char* op = "pack_deform_conv2d";
    check_dim(op, "weight", weight, 4, "(C_out, C / groups, kernel height, kernel width)");
    check_floating(op, "weight", weight);
    DeformConvOptions options{{1, 1}, {0, 0}, {1, 1}, algorithm};
    check_deform_options(op, options);
    DeformConvShape shape{};
    shape.out_channels = weight.size(0);
    shape.kernel_height = weight.size(2);
    shape.kernel_width = weight.size(3);
    shape.groups = groups;
    shape.offset_groups = offset_groups;
    check(
        groups >= 1 && groups <= std::max<int64_t>(1, shape.out_channels) && shape.out_channels % groups == 0, op,
        ": groups must divide the output channels of weight, ", shape.out_channels, ", got ", groups);
    shape.channels = weight.size(1) * groups;
    check(
        offset_groups >= 1 && shape.channels % offset_groups == 0, op, ": offset_groups must divide the ",
        shape.channels, " input channels, got ", offset_groups);
    check(
        shape.kernel_height > 0 && shape.kernel_width > 0 && shape.kernel_height <= kMaxDeformStep &&
            shape.kernel_width <= kMaxDeformStep,
        op, ": weight must have a kernel of at least one tap, and of sides up to 2^29, got (", shape.kernel_height,
        ", ", shape.kernel_width, ")");
    check_packed_deform_sizes(op, shape);
    return shape;
}

// Check all arguments except the packed weight, whose layout depends on the back end.
inline DeformConvShape check_deform_conv2d_packed(
    const Tensor& input, const Tensor& offset, const std::optional<Tensor>& bias, const std::optional<Tensor>& mask,
    const DeformConvOptions& options, const DeformConvKernel& kernel) {
    const char* op = "deform_conv2d";
    DeformConvShape shape =
        check_deform_sampling(op, input, offset, mask, std::nullopt, kernel.height, kernel.width, options);
    check(
        shape.offset_groups == kernel.offset_groups, op, ": offset must be of ", kernel.offset_groups,
        " offset groups, for which the weight was packed, got ", shape.offset_groups, " (offset has ", offset.size(1),
        " channels)");
    const int64_t max_groups = std::max<int64_t>({1, shape.channels, kernel.out_channels});
    check(
        kernel.groups >= 1 && kernel.groups <= max_groups && kernel.out_channels >= 0 &&
            shape.channels % kernel.groups == 0 && kernel.out_channels % kernel.groups == 0,
        op, ": groups must divide ", shape.channels, " input and ", kernel.out_channels, " output channels, got ",
        kernel.groups);
    shape.groups = kernel.groups;
    shape.out_channels = kernel.out_channels;
    check_packed_deform_sizes(op, shape);
    check_deform_bias(op, bias, input, shape);
    return shape;
}

// Check a packed weight. `size` is its required length without the tag. For `columns`, see packed_tag.
inline void check_packed_deform_weight(
    const Tensor& packed, const Tensor& input, ScalarType dtype, int64_t size, int64_t columns) {
    const char* op = "deform_conv2d";
    check_same_device(op, "packed weight", packed, "input", input);
    check(
        packed.scalar_type() == dtype && packed.dim() == 1 && packed.is_contiguous() &&
            packed.numel() == size + packed_tag(columns, input.scalar_type() == ScalarType::Double),
        op,
        ": the packed weight was made for other channels, another instruction set, device, dtype or version than "
        "input, ",
        input, " ", dtype_name(input.scalar_type()), "; pack the weight again, by pack_deform_conv2d");
}

inline void check_deform_grad_output(
    const char* op, const Tensor& grad_output, const Tensor& input, const DeformConvShape& shape) {
    check_dim(op, "grad_output", grad_output, 4, "(N, C_out, H_out, W_out)");
    check_dtype(op, "grad_output", grad_output, input.scalar_type());
    check_same_device(op, "grad_output", grad_output, "input", input);
    check(
        grad_output.size(0) == shape.batch && grad_output.size(1) == shape.out_channels &&
            grad_output.size(2) == shape.out_height && grad_output.size(3) == shape.out_width,
        op, ": grad_output must have shape (", shape.batch, ", ", shape.out_channels, ", ", shape.out_height, ", ",
        shape.out_width, "), got ", grad_output);
}

// Gradients of a backward call; those not requested have shape (0).
struct DeformGradients {
    Tensor input, offset, mask;
};

// Allocate the gradients as kernels write them: input channels-last in `input_dtype`, offset and mask dense in
// accum_dtype.
inline DeformGradients empty_deform_gradients(
    const DeformConvShape& shape, const Tensor& input, const Tensor& offset, const std::optional<Tensor>& mask,
    ScalarType input_dtype, bool need_input, bool need_sampling) {
    const ScalarType accum = accum_dtype(input.scalar_type());
    const int64_t samples = shape.offset_groups * shape.taps();
    const Tensor& mask_or_offset = mask ? *mask : offset;
    return {
        need_input ? empty_like_sized(
                         input, {shape.batch, shape.channels, shape.height, shape.width}, input_dtype,
                         MemoryFormat::ChannelsLast)
                   : empty_like_sized(input, {0}),
        need_sampling ? empty_like_sized(offset, {shape.batch, 2 * samples, shape.out_height, shape.out_width}, accum)
                      : empty_like_sized(offset, {0}),
        need_sampling && mask
            ? empty_like_sized(*mask, {shape.batch, samples, shape.out_height, shape.out_width}, accum)
            : empty_like_sized(mask_or_offset, {0})};
}

// Convert the gradients to the dtypes and memory formats of their tensors.
inline std::tuple<Tensor, Tensor, Tensor> finished_deform_gradients(
    const DeformGradients& gradients, const Tensor& input, const Tensor& offset, const std::optional<Tensor>& mask) {
    const auto finished = [](const Tensor& gradient, const Tensor& like) {
        const Tensor typed = as_dtype(gradient, like.scalar_type());
        return gradient.dim() == 4 ? to_contiguous(typed, memory_format_of(like)) : typed;
    };
    return {
        finished(gradients.input, input), finished(gradients.offset, offset),
        finished(gradients.mask, mask ? *mask : offset)};
}

// Check the arguments of the weight gradient. Return its sizes and the uninitialized result.
inline std::pair<DeformConvShape, Tensor> check_deform_grad_weight(
    const char* op, const Tensor& grad_output, const Tensor& input, const Tensor& offset,
    const std::optional<Tensor>& mask, const std::optional<Tensor>& offset_tangent, const DeformConvOptions& options,
    int64_t group_channels, int64_t kernel_h, int64_t kernel_w) {
    DeformConvShape shape = check_deform_sampling(op, input, offset, mask, offset_tangent, kernel_h, kernel_w, options);
    check_dim(op, "grad_output", grad_output, 4, "(N, C_out, H_out, W_out)");
    const Tensor grad_weight = empty_like_sized(input, {grad_output.size(1), group_channels, kernel_h, kernel_w});
    check_deform_weight(op, input, grad_weight, shape);
    check_deform_grad_output(op, grad_output, input, shape);
    return {shape, grad_weight};
}

}  // namespace spatialflow
