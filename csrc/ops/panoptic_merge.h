// SPDX-License-Identifier: Apache-2.0
//
// panoptic_merge: argument checks shared by all back ends. Schema in panoptic_merge.cpp.
#pragma once

#include "ops/tensor.h"

namespace spatialflow {

inline bool is_integer(ScalarType dtype) {
    return dtype == ScalarType::Byte || dtype == ScalarType::Char || dtype == ScalarType::Short ||
           dtype == ScalarType::Int || dtype == ScalarType::Long;
}

inline void check_panoptic_merge(
    const Tensor& masks, const Tensor& scores, const Tensor& labels, const std::optional<Tensor>& boxes,
    const Tensor& stuff, int64_t stuff_labels, double score_threshold, double overlap_threshold,
    double box_overlap_threshold) {
    const char* op = "panoptic_merge";
    check_dim(op, "masks", masks, 3, "(K, H, W)");
    check(
        masks.scalar_type() == ScalarType::Bool || masks.scalar_type() == ScalarType::Byte, op,
        ": masks must be bool or uint8, got ", dtype_name(masks.scalar_type()));
    const int64_t count = masks.size(0);
    check(
        scores.dim() == 1 && scores.size(0) == count, op, ": scores must have shape (", count, "), one per mask, got ",
        scores);
    check_floating(op, "scores", scores);
    check(
        labels.dim() == 1 && labels.size(0) == count, op, ": labels must have shape (", count, "), one per mask, got ",
        labels);
    check(is_integer(labels.scalar_type()), op, ": labels must be integers, got ", dtype_name(labels.scalar_type()));
    if (boxes) {
        check(
            boxes->dim() == 2 && boxes->size(0) == count && boxes->size(1) == 4, op, ": boxes must have shape (", count,
            ", 4), x1, y1, x2, y2 of every mask, got ", *boxes);
        check_floating(op, "boxes", *boxes);
        check_same_device(op, "boxes", *boxes, "masks", masks);
    }
    check(
        stuff.dim() == 2 && stuff.size(0) == masks.size(1) && stuff.size(1) == masks.size(2), op,
        ": stuff must have the masks' size (", masks.size(1), ", ", masks.size(2), "), got ", stuff);
    check(is_integer(stuff.scalar_type()), op, ": stuff must hold integers, got ", dtype_name(stuff.scalar_type()));
    check_same_device(op, "scores", scores, "masks", masks);
    check_same_device(op, "labels", labels, "masks", masks);
    check_same_device(op, "stuff", stuff, "masks", masks);
    check(stuff_labels >= 0, op, ": stuff_labels must not be negative, got ", stuff_labels);
    check(
        stuff_labels < (int64_t{1} << 31) - count, op, ": masks and stuff labels must be fewer than 2^31, got ", count,
        " and ", stuff_labels);
    check(score_threshold == score_threshold, op, ": score_threshold must be a number, got nan");
    check(overlap_threshold == overlap_threshold, op, ": overlap_threshold must be a number, got nan");
    check(box_overlap_threshold == box_overlap_threshold, op, ": box_overlap_threshold must be a number, got nan");
}

}  // namespace spatialflow
