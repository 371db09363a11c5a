// SPDX-License-Identifier: Apache-2.0
//
// roi_align: argument checks, the operators, and the host functions that each back end defines. Schemas in
// roi_align.cpp.
#pragma once

#include "ops/tensor.h"

namespace spatialflow {

// Options of RoIAlign over one feature map or a pyramid of feature maps.
struct RoiAlignSettings {
    int64_t pooled_height, pooled_width;
    std::vector<double> scales;  // cells per pixel, one per level
    int64_t sampling_ratio;
    bool aligned;
    double finest_scale;  // of roi_level (common/roi_align.h); unused for a single level
};

// Pool boxes (K, 5) from `features`, one or more levels (N, C, H, W). Each back end defines this function. The caller
// has checked the arguments.
Tensor roi_align_forward(
    const char* op, const std::vector<Tensor>& features, const Tensor& boxes, const RoiAlignSettings& settings);

// Compute the gradients of the levels, of sizes (batch, channels, heights[l], widths[l]). Each back end defines this
// function. The caller has checked the arguments.
std::vector<Tensor> roi_align_backward(
    const char* op, const Tensor& grad_output, const Tensor& boxes, const RoiAlignSettings& settings, int64_t batch,
    int64_t channels, const std::vector<int64_t>& heights, const std::vector<int64_t>& widths, bool channels_last,
    bool deterministic);

// Largest sampling ratio. sample_range (common/roi_align.h) skips no sample of a reversed or empty RoI, so the work for
// such a RoI grows with the ratio.
constexpr int64_t kMaxSamplingRatio = int64_t(1) << 16;

inline void check_pooling_options(const char* op, int64_t pooled_height, int64_t pooled_width, int64_t sampling_ratio) {
    check(
        pooled_height > 0 && pooled_width > 0, op, ": output_size must be positive, got (", pooled_height, ", ",
        pooled_width, ")");
    check(
        sampling_ratio <= kMaxSamplingRatio, op, ": sampling_ratio must be at most ", kMaxSamplingRatio, ", got ",
        sampling_ratio);
}

inline void check_spatial_scale(const char* op, double spatial_scale) {
    check(
        spatial_scale > 0 && spatial_scale - spatial_scale == 0, op,
        ": spatial_scale must be positive and finite, got ", spatial_scale);
}

inline void check_boxes(const char* op, const Tensor& boxes) {
    check(
        boxes.dim() == 2 && boxes.size(1) == 5, op,
        ": boxes must have shape (K, 5), rows of batch index, x1, y1, x2, y2, got shape ", boxes);
    check_floating(op, "boxes", boxes);
}

inline void check_roi_align(
    const Tensor& input, const Tensor& boxes, int64_t pooled_height, int64_t pooled_width, double spatial_scale,
    int64_t sampling_ratio) {
    check_dim("roi_align", "input", input, 4, "(N, C, H, W)");
    check_floating("roi_align", "input", input);
    check_boxes("roi_align", boxes);
    check_same_device("roi_align", "boxes", boxes, "input", input);
    check_pooling_options("roi_align", pooled_height, pooled_width, sampling_ratio);
    check_spatial_scale("roi_align", spatial_scale);
}

inline void check_roi_align_backward(
    const Tensor& grad_output, const Tensor& boxes, int64_t pooled_height, int64_t pooled_width, double spatial_scale,
    int64_t sampling_ratio, int64_t channels) {
    check_dim("roi_align_backward", "grad_output", grad_output, 4, "(K, C, PH, PW)");
    check_floating("roi_align_backward", "grad_output", grad_output);
    check_boxes("roi_align_backward", boxes);
    check_pooling_options("roi_align_backward", pooled_height, pooled_width, sampling_ratio);
    check_spatial_scale("roi_align_backward", spatial_scale);
    check(
        grad_output.size(0) == boxes.size(0) && grad_output.size(1) == channels &&
            grad_output.size(2) == pooled_height && grad_output.size(3) == pooled_width,
        "roi_align_backward: grad_output must have shape (", boxes.size(0), ", ", channels, ", ", pooled_height, ", ",
        pooled_width, "), got ", grad_output);
}

// Operator roi_align: a pyramid of one level.
inline Tensor single_level_roi_align(
    const Tensor& input, const Tensor& boxes, int64_t pooled_height, int64_t pooled_width, double spatial_scale,
    int64_t sampling_ratio, bool aligned) {
    check_roi_align(input, boxes, pooled_height, pooled_width, spatial_scale, sampling_ratio);
    return roi_align_forward(
        "roi_align", {input}, boxes, {pooled_height, pooled_width, {spatial_scale}, sampling_ratio, aligned, 1.0});
}

// Operator _roi_align_backward.
inline Tensor single_level_roi_align_backward(
    const Tensor& grad_output, const Tensor& boxes, int64_t pooled_height, int64_t pooled_width, double spatial_scale,
    int64_t sampling_ratio, bool aligned, int64_t batch, int64_t channels, int64_t height, int64_t width,
    bool channels_last, bool deterministic) {
    check_roi_align_backward(grad_output, boxes, pooled_height, pooled_width, spatial_scale, sampling_ratio, channels);
    return roi_align_backward(
        "roi_align_backward", grad_output, boxes,
        {pooled_height, pooled_width, {spatial_scale}, sampling_ratio, aligned, 1.0}, batch, channels, {height},
        {width}, channels_last, deterministic)[0];
}

// Convert the gradients of the levels to `dtype` and the memory format of the features.
inline std::vector<Tensor> finished_level_gradients(
    std::vector<Tensor> gradients, ScalarType dtype, bool channels_last) {
    for (Tensor& gradient : gradients) {
        gradient = as_dtype(gradient, dtype);
        if (!channels_last) {
            gradient = to_contiguous(gradient);
        }
    }
    return gradients;
}

}  // namespace spatialflow
