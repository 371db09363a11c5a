// SPDX-License-Identifier: Apache-2.0
//
// multiclass_nms: argument checks and results shared by all back ends. Schema in multiclass_nms.cpp.
#pragma once

#include "ops/nms.h"

namespace spatialflow {

inline void check_multiclass_nms(
    const Tensor& boxes, const Tensor& scores, double score_threshold, double iou_threshold, int64_t max_detections) {
    constexpr const char* kOp = "multiclass_nms";
    check(
        boxes.dim() == 3 && boxes.size(2) == 4, kOp,
        ": boxes must have shape (B, N, 4), rows of x1, y1, x2, y2, got shape ", boxes);
    check_floating(kOp, "boxes", boxes);
    check(
        scores.dim() == 3 && scores.size(0) == boxes.size(0) && scores.size(1) == boxes.size(1), kOp,
        ": scores must have shape (", boxes.size(0), ", ", boxes.size(1), ", C), got shape ", scores);
    check_floating(kOp, "scores", scores);
    check_same_device(kOp, "scores", scores, "boxes", boxes);
    check(score_threshold == score_threshold, kOp, ": score_threshold must be a number, got ", score_threshold);
    check_iou_threshold(kOp, iou_threshold);
    check(
        max_detections >= 0 && max_detections <= 0x7fffffff, kOp, ": max_detections must be from 0 to 2147483647, got ",
        max_detections);
}

// Arguments in the form that kernels expect, and the results that kernels fill.
struct DetectionTensors {
    Tensor boxes, scores;          // contiguous, in the dtype of `nms_compute_type`
    Tensor out_boxes, out_scores;  // (B, max_detections, 4), (B, max_detections), same dtype
    Tensor labels, indices;        // (B, max_detections) int64
    Tensor count;                  // (B) int64
};

inline DetectionTensors detection_tensors(const Tensor& boxes, const Tensor& scores, int64_t max_detections) {
    const int64_t batch = boxes.size(0), classes = scores.size(2);
    check(
        classes == 0 || boxes.size(1) <= ((int64_t(1) << 32) - 1) / classes,
        "multiclass_nms: scores must have fewer than 2^32 entries per image, got shape ", scores);
    const ScalarType type = nms_compute_type(boxes, scores);
    return {
        contiguous_as(boxes, type),
        contiguous_as(scores, type),
        empty_like_sized(boxes, {batch, max_detections, 4}, type),
        empty_like_sized(boxes, {batch, max_detections}, type),
        empty_like_sized(boxes, {batch, max_detections}, ScalarType::Long),
        empty_like_sized(boxes, {batch, max_detections}, ScalarType::Long),
        empty_like_sized(boxes, {batch}, ScalarType::Long)};
}

// Return the results of the operator, with the dtypes of its arguments.
inline std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> finished_detections(
    const DetectionTensors& tensors, const Tensor& boxes, const Tensor& scores) {
    return {
        contiguous_as(tensors.out_boxes, boxes.scalar_type()), contiguous_as(tensors.out_scores, scores.scalar_type()),
        tensors.labels, tensors.count, tensors.indices};
}

}  // namespace spatialflow
