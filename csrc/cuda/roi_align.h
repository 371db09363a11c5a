// SPDX-License-Identifier: Apache-2.0
//
// RoIAlign over one feature map or a pyramid of them, as host functions; the kernels are in roi_align.cu.
#pragma once

#include "ops/tensor.h"

namespace spatialflow {

struct RoiAlignSettings {
    int64_t pooled_height, pooled_width;
    std::vector<double> scales;  // cells per pixel, one per level
    int64_t sampling_ratio;
    bool aligned;
    double finest_scale;  // of the level rule; any number where there is one level
};

// Pools boxes (K, 5) from `features`, one or more levels (N, C, H, W), in one launch. Arguments are checked already.
Tensor roi_align_forward(
    const char* op, const std::vector<Tensor>& features, const Tensor& boxes, const RoiAlignSettings& settings);

// Gradients of the levels, of sizes (batch, channels, heights[l], widths[l]), in one launch.
std::vector<Tensor> roi_align_backward(
    const char* op, const Tensor& grad_output, const Tensor& boxes, const RoiAlignSettings& settings, int64_t batch,
    int64_t channels, const std::vector<int64_t>& heights, const std::vector<int64_t>& widths, bool channels_last,
    bool deterministic);

}  // namespace spatialflow
