// SPDX-License-Identifier: Apache-2.0
//
// paste_masks: argument checks shared by all back ends. Schema in paste_masks.cpp.
#pragma once

#include "ops/tensor.h"

namespace spatialflow {

inline void check_paste_masks(
    const Tensor& mask_logits, const Tensor& boxes, int64_t height, int64_t width, double threshold) {
    const char* op = "paste_masks";
    check_dim(op, "mask_logits", mask_logits, 3, "(K, MH, MW)");
    check_floating(op, "mask_logits", mask_logits);
    check(
        boxes.dim() == 2 && boxes.size(0) == mask_logits.size(0) && boxes.size(1) == 4, op, ": boxes must have shape (",
        mask_logits.size(0), ", 4), x1, y1, x2, y2 of every mask, got ", boxes);
    check_floating(op, "boxes", boxes);
    check_same_device(op, "boxes", boxes, "mask_logits", mask_logits);
    check(height >= 0 && width >= 0, op, ": size must not be negative, got (", height, ", ", width, ")");
    // The cells around the mask are zero. Zero must be below the threshold, also after the threshold is rounded to
    // float.
    check(static_cast<float>(threshold) > 0 && threshold <= 1, op, ": threshold must lie in (0, 1], got ", threshold);
}

}  // namespace spatialflow
