// SPDX-License-Identifier: Apache-2.0
//
// RoIAlign of one feature map on the CPU; the kernels are in roi_align.h.
#include "cpu/roi_align.h"

#include "ops/roi_align.h"

namespace spatialflow {
namespace {

Tensor roi_align_cpu(
    const Tensor& input, const Tensor& boxes, int64_t pooled_height, int64_t pooled_width, double spatial_scale,
    int64_t sampling_ratio, bool aligned) {
    check_roi_align(input, boxes, pooled_height, pooled_width, spatial_scale, sampling_ratio);
    const int64_t num_rois = boxes.size(0), channels = input.size(1);
    const MemoryFormat format = memory_format_of(input);
    Tensor output = empty_like_sized(input, {num_rois, channels, pooled_height, pooled_width}, std::nullopt, format);
    if (output.numel() == 0) {
        return output;
    }
    if (input.numel() == 0) {
        return torch::stable::zero_(output);
    }
    const Tensor feature = channels_adjacent(input);
    const Tensor rois = contiguous_as(boxes, accum_dtype(input.scalar_type()));
    dispatch_floating("roi_align", input.scalar_type(), [&](auto zero) {
        using scalar_t = decltype(zero);
        roi_align_forward<scalar_t>(
            {feature_level(feature, data<scalar_t>(feature), spatial_scale)}, data<accum_t<scalar_t>>(rois),
            mutable_data<scalar_t>(output), num_rois, input.size(0), channels,
            {pooled_height, pooled_width, sampling_ratio, aligned, 1.0}, format == MemoryFormat::Contiguous);
    });
    return output;
}

Tensor roi_align_backward_cpu(
    const Tensor& grad_output, const Tensor& boxes, int64_t pooled_height, int64_t pooled_width, double spatial_scale,
    int64_t sampling_ratio, bool aligned, int64_t batch, int64_t channels, int64_t height, int64_t width,
    bool channels_last, bool /* deterministic: it always is */) {
    check_roi_align_backward(grad_output, boxes, pooled_height, pooled_width, spatial_scale, sampling_ratio, channels);
    const ScalarType dtype = grad_output.scalar_type();
    const Tensor grad_input = gradient_buffer(grad_output, dtype, batch, channels, height, width);
    if (grad_output.numel() != 0 && grad_input.numel() != 0) {
        const Tensor source = to_contiguous(grad_output, MemoryFormat::ChannelsLast);
        const Tensor rois = contiguous_as(boxes, accum_dtype(dtype));
        dispatch_floating("roi_align_backward", dtype, [&](auto zero) {
            using scalar_t = decltype(zero);
            roi_align_scatter<scalar_t>(
                data<scalar_t>(source), data<accum_t<scalar_t>>(rois),
                {feature_level(grad_input, mutable_data<accum_t<scalar_t>>(grad_input), spatial_scale)}, boxes.size(0),
                batch, channels, {pooled_height, pooled_width, sampling_ratio, aligned, 1.0});
        });
    }
    return finished_gradient(grad_input, dtype, channels_last);
}

}  // namespace
}  // namespace spatialflow

STABLE_TORCH_LIBRARY_IMPL(spatialflow, CPU, library) {
    library.impl("roi_align", TORCH_BOX(&spatialflow::roi_align_cpu));
    library.impl("_roi_align_backward", TORCH_BOX(&spatialflow::roi_align_backward_cpu));
}
