// SPDX-License-Identifier: Apache-2.0
//
// stuff_labels: argument checks and the result, shared by all back ends. Schema in stuff_labels.cpp.
#pragma once

#include "ops/tensor.h"

namespace spatialflow {

constexpr int64_t kMaxLogitSide = int64_t(1) << 22;  // positions of logits upsampled four times are exact in float32
constexpr int64_t kMaxByteClasses = 256;

inline void check_stuff_labels(
    const Tensor& logits, int64_t valid_height, int64_t valid_width, int64_t height, int64_t width) {
    const char* op = "stuff_labels";
    check_dim(op, "logits", logits, 3, "(C, h, w)");
    check_floating(op, "logits", logits);
    check(
        logits.size(0) >= 1 && logits.size(0) < (int64_t{1} << 31), op,
        ": logits must have from 1 to 2147483647 classes, got shape ", logits);
    check(
        logits.size(1) <= kMaxLogitSide && logits.size(2) <= kMaxLogitSide, op, ": logits must have sides up to ",
        kMaxLogitSide, ", got shape ", logits);
    const int64_t max_height = 4 * logits.size(1), max_width = 4 * logits.size(2);
    check(
        valid_height >= 1 && valid_height <= max_height && valid_width >= 1 && valid_width <= max_width, op,
        ": valid_size must lie between (1, 1) and four times the logits, (", max_height, ", ", max_width, "), got (",
        valid_height, ", ", valid_width, ")");
    check(height >= 0 && width >= 0, op, ": original_size must not be negative, got (", height, ", ", width, ")");
}

// Allocate the labels: uint8 if a byte can hold every class, else int64.
inline Tensor empty_labels(const Tensor& logits, int64_t height, int64_t width) {
    return empty_like_sized(
        logits, {height, width}, logits.size(0) <= kMaxByteClasses ? ScalarType::Byte : ScalarType::Long);
}

}  // namespace spatialflow
