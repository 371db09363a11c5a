// SPDX-License-Identifier: Apache-2.0
//
// nms, batched_nms: argument checks shared by all back ends. Schemas in nms.cpp.
#pragma once

#include "ops/tensor.h"

namespace spatialflow {

inline void check_iou_threshold(const char* op, double iou_threshold) {
    check(iou_threshold >= 0, op, ": iou_threshold must be a number >= 0, got ", iou_threshold);
}

inline void check_nms(const char* op, const Tensor& boxes, const Tensor& scores, double iou_threshold) {
    check(
        boxes.dim() == 2 && boxes.size(1) == 4, op,
        ": boxes must have shape (N, 4), rows of x1, y1, x2, y2, got shape ", boxes);
    check_floating(op, "boxes", boxes);
    check(
        scores.dim() == 1 && scores.size(0) == boxes.size(0), op, ": scores must have shape (", boxes.size(0),
        "), one per box, got shape ", scores);
    check_floating(op, "scores", scores);
    check_same_device(op, "scores", scores, "boxes", boxes);
    check_iou_threshold(op, iou_threshold);
}

inline void check_batched_nms(const Tensor& boxes, const Tensor& scores, const Tensor& idxs, double iou_threshold) {
    check_nms("batched_nms", boxes, scores, iou_threshold);
    check(
        idxs.dim() == 1 && idxs.size(0) == boxes.size(0), "batched_nms: idxs must have shape (", boxes.size(0),
        "), one per box, got shape ", idxs);
    check_dtype("batched_nms", "idxs", idxs, ScalarType::Long);
    check_same_device("batched_nms", "idxs", idxs, "boxes", boxes);
}

// Dtype of score comparisons and overlaps.
inline ScalarType nms_compute_type(const Tensor& boxes, const Tensor& scores) {
    return boxes.scalar_type() == ScalarType::Double || scores.scalar_type() == ScalarType::Double ? ScalarType::Double
                                                                                                   : ScalarType::Float;
}

}  // namespace spatialflow
