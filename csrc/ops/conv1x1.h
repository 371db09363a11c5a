// SPDX-License-Identifier: Apache-2.0
//
// Argument checks and result of conv1x1, shared by all back ends. Schema in conv1x1.cpp.
#pragma once

#include "ops/tensor.h"

namespace spatialflow {

inline void check_conv1x1(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const std::optional<Tensor>& residual) {
    const char* op = "conv1x1";
    check_dim(op, "x", x, 4, "(N, C, H, W)");
    check_floating(op, "x", x);
    check(
        weight.dim() == 4 && weight.size(1) == x.size(1) && weight.size(2) == 1 && weight.size(3) == 1, op,
        ": weight must have shape (O, ", x.size(1), ", 1, 1), with the channels of x, got shape ", weight);
    check_dtype(op, "weight", weight, x.scalar_type());
    check_same_device(op, "weight", weight, "x", x);
    if (bias) {
        check(
            bias->dim() == 1 && bias->size(0) == weight.size(0), op, ": bias must have shape (", weight.size(0),
            "), got shape ", *bias);
        check_dtype(op, "bias", *bias, x.scalar_type());
        check_same_device(op, "bias", *bias, "x", x);
    }
    if (residual) {
        check(
            residual->dim() == 4 && residual->size(0) == x.size(0) && residual->size(1) == weight.size(0) &&
                residual->size(2) == x.size(2) && residual->size(3) == x.size(3),
            op, ": residual must have the shape of the result, (", x.size(0), ", ", weight.size(0), ", ", x.size(2),
            ", ", x.size(3), "), got shape ", *residual);
        check_dtype(op, "residual", *residual, x.scalar_type());
        check_same_device(op, "residual", *residual, "x", x);
    }
}

// Allocate the result, uninitialized.
inline Tensor empty_conv1x1(const Tensor& x, const Tensor& weight) {
    return empty_like_sized(
        x, {x.size(0), weight.size(0), x.size(2), x.size(3)}, std::nullopt, MemoryFormat::ChannelsLast);
}

}  // namespace spatialflow
