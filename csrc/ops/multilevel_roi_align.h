// SPDX-License-Identifier: Apache-2.0
//
// multilevel_roi_align: the operators and their argument checks, shared by all back ends. Schemas in
// multilevel_roi_align.cpp.
#pragma once

#include "ops/roi_align.h"

namespace spatialflow {

inline RoiAlignSettings pyramid_settings(
    int64_t pooled_height, int64_t pooled_width, const std::vector<double>& strides, int64_t sampling_ratio,
    bool aligned, double finest_scale) {
    RoiAlignSettings settings{pooled_height, pooled_width, {}, sampling_ratio, aligned, finest_scale};
    for (const double stride : strides) {
        settings.scales.push_back(1.0 / stride);
    }
    return settings;
}

inline void check_pyramid_options(
    const char* op, int64_t pooled_height, int64_t pooled_width, size_t levels, const std::vector<double>& strides,
    int64_t sampling_ratio, double finest_scale) {
    check_pooling_options(op, pooled_height, pooled_width, sampling_ratio);
    check(
        strides.size() == levels, op, ": strides must have one number per level, got ", strides.size(), " for ", levels,
        " levels");
    for (double stride : strides) {
        check(stride > 0 && stride - stride == 0, op, ": strides must be positive and finite, got ", stride);
    }
    check(
        finest_scale > 0 && finest_scale - finest_scale == 0, op, ": finest_scale must be positive and finite, got ",
        finest_scale);
}

inline void check_multilevel_roi_align(
    const std::vector<Tensor>& features, const Tensor& boxes, int64_t pooled_height, int64_t pooled_width,
    const std::vector<double>& strides, int64_t sampling_ratio, double finest_scale) {
    const char* op = "multilevel_roi_align";
    check(!features.empty(), op, ": features must hold at least one level");
    for (size_t l = 0; l < features.size(); ++l) {
        const std::string name = "features[" + std::to_string(l) + "]";
        const Tensor& feature = features[l];
        check_dim(op, name.c_str(), feature, 4, "(N, C, H, W)");
        check_floating(op, name.c_str(), feature);
        check_dtype(op, name.c_str(), feature, features[0].scalar_type());
        check_same_device(op, name.c_str(), feature, "features[0]", features[0]);
        check(
            feature.size(0) == features[0].size(0) && feature.size(1) == features[0].size(1), op, ": ", name,
            " must have the batch size and the channels of features[0], (", features[0].size(0), ", ",
            features[0].size(1), "), got shape ", feature);
    }
    check_boxes(op, boxes);
    check_same_device(op, "boxes", boxes, "features[0]", features[0]);
    check_pyramid_options(op, pooled_height, pooled_width, features.size(), strides, sampling_ratio, finest_scale);
}

inline void check_multilevel_roi_align_backward(
    const Tensor& grad_output, const Tensor& boxes, int64_t pooled_height, int64_t pooled_width,
    const std::vector<double>& strides, int64_t sampling_ratio, double finest_scale, int64_t channels,
    const std::vector<int64_t>& heights, const std::vector<int64_t>& widths) {
    const char* op = "multilevel_roi_align_backward";
    check_dim(op, "grad_output", grad_output, 4, "(K, C, PH, PW)");
    check_floating(op, "grad_output", grad_output);
    check_boxes(op, boxes);
    check(
        heights.size() == widths.size(), op, ": heights and widths must have one number per level, got ",
        heights.size(), " and ", widths.size());
    check_pyramid_options(op, pooled_height, pooled_width, heights.size(), strides, sampling_ratio, finest_scale);
    check(
        grad_output.size(0) == boxes.size(0) && grad_output.size(1) == channels &&
            grad_output.size(2) == pooled_height && grad_output.size(3) == pooled_width,
        op, ": grad_output must have shape (", boxes.size(0), ", ", channels, ", ", pooled_height, ", ", pooled_width,
        "), got ", grad_output);
}

// Operator multilevel_roi_align.
inline Tensor multilevel_roi_align(
    const std::vector<Tensor>& features, const Tensor& boxes, int64_t pooled_height, int64_t pooled_width,
    const std::vector<double>& strides, int64_t sampling_ratio, bool aligned, double finest_scale) {
    check_multilevel_roi_align(features, boxes, pooled_height, pooled_width, strides, sampling_ratio, finest_scale);
    return roi_align_forward(
        "multilevel_roi_align", features, boxes,
        pyramid_settings(pooled_height, pooled_width, strides, sampling_ratio, aligned, finest_scale));
}

// Operator _multilevel_roi_align_backward.
inline std::vector<Tensor> multilevel_roi_align_backward(
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

}  // namespace spatialflow
