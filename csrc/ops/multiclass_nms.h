// SPDX-License-Identifier: Apache-2.0
//
// multiclass_nms: argument checks shared by all back ends. Schema in multiclass_nms.cpp.
#pragma once

#include "ops/nms.h"

namespace spatialflow {

inline void check_multiclass_nms(
    const Tensor& boxes, const Tensor& scores, double score_threshold, double iou_threshold, int64_t max_detections) {
    constexpr const char* kOp = "multiclass_nms";
    check(
        boxes.dim() == 3 && boxes.size(2) == 4, kOp,
        ": boxes must have shape (B, N, 4), rows of x1, y1, x2, y2, got shape ", shape_string(boxes));
    check_floating(kOp, "boxes", boxes);
    check(
        scores.dim() == 3 && scores.size(0) == boxes.size(0) && scores.size(1) == boxes.size(1), kOp,
        ": scores must have shape (", boxes.size(0), ", ", boxes.size(1), ", C), got shape ", shape_string(scores));
    check_floating(kOp, "scores", scores);
    check_same_device(kOp, "scores", scores, "boxes", boxes);
    check(score_threshold == score_threshold, kOp, ": score_threshold must be a number, got ", score_threshold);
    check_iou_threshold(kOp, iou_threshold);
    check(
        max_detections >= 0 && max_detections <= 0x7fffffff, kOp, ": max_detections must be from 0 to 2147483647, got ",
        max_detections);
}

}  // namespace spatialflow
