// SPDX-License-Identifier: Apache-2.0
//
// sigmoid_focal_loss: argument checks shared by all back ends. Schemas in sigmoid_focal_loss.cpp.
#pragma once

#include "ops/tensor.h"

namespace spatialflow {

inline void check_sigmoid_focal_loss(const Tensor& logits, const Tensor& labels, double gamma, double alpha) {
    constexpr const char* kOp = "sigmoid_focal_loss";
    check(logits.dim() >= 1, kOp, ": logits must have shape (..., C), got shape ", logits);
    check_floating(kOp, "logits", logits);
    bool fits = labels.dim() == logits.dim() - 1;
    for (int64_t d = 0; fits && d < labels.dim(); ++d) {
        fits = labels.size(d) == logits.size(d);
    }
    check(
        fits, kOp, ": labels must have the shape of logits without the classes, got shape ", labels,
        " for logits of shape ", logits);
    check(
        labels.scalar_type() == ScalarType::Long || labels.scalar_type() == ScalarType::Int, kOp,
        ": labels must be int64 or int32, got ", dtype_name(labels.scalar_type()));
    check_same_device(kOp, "labels", labels, "logits", logits);
    check(gamma >= 0 && gamma - gamma == 0, kOp, ": gamma must be a finite number >= 0, got ", gamma);
    check(alpha <= 1, kOp, ": alpha must be a number <= 1 (negative: no weighting), got ", alpha);
}

inline void check_sigmoid_focal_loss_derivative(
    const Tensor& factor, const Tensor& logits, const Tensor& labels, double gamma, double alpha, int64_t order) {
    constexpr const char* kOp = "sigmoid_focal_loss";
    check_sigmoid_focal_loss(logits, labels, gamma, alpha);
    bool fits = factor.dim() == 0 || factor.dim() == logits.dim();
    for (int64_t d = 0; fits && d < factor.dim(); ++d) {
        fits = factor.size(d) == logits.size(d);
    }
    check(fits, kOp, ": the incoming gradient must have shape ", logits, " or (), got ", factor);
    check_floating(kOp, "the incoming gradient", factor);
    check_same_device(kOp, "the incoming gradient", factor, "logits", logits);
    check(order == 1 || order == 2, kOp, ": derivatives beyond the second are not supported, got order ", order);
}

}  // namespace spatialflow
