// SPDX-License-Identifier: Apache-2.0
//
// RoIAlign over a feature pyramid on CUDA. The kernels of roi_align.cu choose the level per RoI (roi_level in
// common/roi_align.h). So one launch computes all levels, and the host never reads the boxes.
#include "ops/multilevel_roi_align.h"

#include "cuda/launch.h"

namespace spatialflow {
namespace {

Tensor multilevel_roi_align_cuda(
    const std::vector<Tensor>& features, const Tensor& boxes, int64_t pooled_height, int64_t pooled_width,
    const std::vector<double>& strides, int64_t sampling_ratio, bool aligned, double finest_scale) {
    check_multilevel_roi_align(features, boxes, pooled_height, pooled_width, strides, sampling_ratio, finest_scale);
    return roi_align_forward(
        "multilevel_roi_align", features, boxes,
        pyramid_settings(pooled_height, pooled_width, strides, sampling_ratio, aligned, finest_scale));
}

std::vector<Tensor> multilevel_roi_align_backward_cuda(
    const Tensor& grad_output, const Tensor& boxes, int64_t pooled_height, int64_t pooled_width,
    const std::vector<double>& strides, int64_t sampling_ratio, bool aligned, double finest_scale, int64_t batch,
    int64_t channels, const std::vector<int64_t>& heights, const std::vector<int64_t>& widths, bool channels_last,
    bool deterministic) {
    check_multilevel_roi_align_backward(
        grad_output, boxes, pooled_height, pooled_width, strides, sampling_ratio, finest_scale, channels, heights,
        widths);
    return roi_align_backward(
        "multilevel_roi_align_backward", grad_output, boxes,
        pyramid_settings(pooled_height, pooled_width, strides, sampling_ratio, aligned, finest_scale), batch, channels,
        heights, widths, channels_last, deterministic);
}

}  // namespace
}  // namespace spatialflow

SPATIALFLOW_DEVICE_IMPL(library) {
    library.impl("multilevel_roi_align", TORCH_BOX(&spatialflow::multilevel_roi_align_cuda));
    library.impl("_multilevel_roi_align_backward", TORCH_BOX(&spatialflow::multilevel_roi_align_backward_cuda));
}
