// SPDX-License-Identifier: Apache-2.0
//
// RoIAlign over a feature pyramid on the CPU: the kernels of roi_align.h with the level chosen per RoI.
#include "ops/multilevel_roi_align.h"

#include "cpu/roi_align.h"

namespace spatialflow {
namespace {

Tensor multilevel_roi_align_cpu(
    const std::vector<Tensor>& features, const Tensor& boxes, int64_t pooled_height, int64_t pooled_width,
    const std::vector<double>& strides, int64_t sampling_ratio, bool aligned, double finest_scale) {
    check_multilevel_roi_align(features, boxes, pooled_height, pooled_width, strides, sampling_ratio, finest_scale);
    const Tensor& first = features[0];
    const int64_t num_rois = boxes.size(0), channels = first.size(1);
    const MemoryFormat format = memory_format_of(first);
    Tensor output = empty_like_sized(first, {num_rois, channels, pooled_height, pooled_width}, std::nullopt, format);
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
    dispatch_floating("multilevel_roi_align", first.scalar_type(), [&](auto zero) {
        using scalar_t = decltype(zero);
        std::vector<FeatureLevel<const scalar_t>> levels;
        for (size_t l = 0; l < sources.size(); ++l) {
            levels.push_back(feature_level(sources[l], data<scalar_t>(sources[l]), 1.0 / strides[l]));
        }
        roi_align_forward<scalar_t>(
            levels, data<accum_t<scalar_t>>(rois), mutable_data<scalar_t>(output), num_rois, first.size(0), channels,
            {pooled_height, pooled_width, sampling_ratio, aligned, finest_scale}, format == MemoryFormat::Contiguous);
    });
    return output;
}

std::vector<Tensor> multilevel_roi_align_backward_cpu(
    const Tensor& grad_output, const Tensor& boxes, int64_t pooled_height, int64_t pooled_width,
    const std::vector<double>& strides, int64_t sampling_ratio, bool aligned, double finest_scale, int64_t batch,
    int64_t channels, const std::vector<int64_t>& heights, const std::vector<int64_t>& widths, bool channels_last,
    bool /* deterministic: it always is */) {
    check_multilevel_roi_align_backward(
        grad_output, boxes, pooled_height, pooled_width, strides, sampling_ratio, finest_scale, channels, heights,
        widths);
    const ScalarType dtype = grad_output.scalar_type();
    std::vector<Tensor> gradients;
    for (size_t l = 0; l < heights.size(); ++l) {
        gradients.push_back(gradient_buffer(grad_output, dtype, batch, channels, heights[l], widths[l]));
    }
    if (grad_output.numel() != 0 && batch != 0) {
        const Tensor source = to_contiguous(grad_output, MemoryFormat::ChannelsLast);
        const Tensor rois = contiguous_as(boxes, accum_dtype(dtype));
        dispatch_floating("multilevel_roi_align_backward", dtype, [&](auto zero) {
            using scalar_t = decltype(zero);
            using real_t = accum_t<scalar_t>;
            std::vector<FeatureLevel<real_t>> levels;
            for (size_t l = 0; l < gradients.size(); ++l) {
                levels.push_back(feature_level(gradients[l], mutable_data<real_t>(gradients[l]), 1.0 / strides[l]));
            }
            roi_align_scatter<scalar_t>(
                data<scalar_t>(source), data<real_t>(rois), levels, boxes.size(0), batch, channels,
                {pooled_height, pooled_width, sampling_ratio, aligned, finest_scale});
        });
    }
    for (Tensor& gradient : gradients) {
        gradient = finished_gradient(gradient, dtype, channels_last);
    }
    return gradients;
}

}  // namespace
}  // namespace spatialflow

STABLE_TORCH_LIBRARY_IMPL(spatialflow, CPU, library) {
    library.impl("multilevel_roi_align", TORCH_BOX(&spatialflow::multilevel_roi_align_cpu));
    library.impl("_multilevel_roi_align_backward", TORCH_BOX(&spatialflow::multilevel_roi_align_backward_cpu));
}
