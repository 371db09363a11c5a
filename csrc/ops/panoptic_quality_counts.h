// SPDX-License-Identifier: Apache-2.0
//
// panoptic_quality_counts: argument checks shared by all back ends. Schema in panoptic_quality_counts.cpp.
#pragma once

#include "ops/tensor.h"

namespace spatialflow {

inline void check_panoptic_quality_counts(
    const Tensor& gt_map, const Tensor& pred_map, int64_t gt_segments, int64_t pred_segments) {
    const char* op = "panoptic_quality_counts";
    check_dim(op, "gt_map", gt_map, 2, "(H, W)");
    check_dtype(op, "gt_map", gt_map, ScalarType::Int);
    check(
        pred_map.dim() == 2 && pred_map.size(0) == gt_map.size(0) && pred_map.size(1) == gt_map.size(1), op,
        ": pred_map must have gt_map's shape ", gt_map, ", got ", pred_map);
    check_dtype(op, "pred_map", pred_map, ScalarType::Int);
    check_same_device(op, "pred_map", pred_map, "gt_map", gt_map);
    constexpr int64_t kEnd = int64_t{1} << 31;  // end of the range of ids
    check(gt_segments >= 0 && gt_segments < kEnd, op, ": gt_segments must be from 0 to 2^31 - 1, got ", gt_segments);
    check(
        pred_segments >= 0 && pred_segments < kEnd, op, ": pred_segments must be from 0 to 2^31 - 1, got ",
        pred_segments);
}

}  // namespace spatialflow
