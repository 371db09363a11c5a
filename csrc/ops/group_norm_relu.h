// SPDX-License-Identifier: Apache-2.0
//
// group_norm_relu: argument checks and results shared by all back ends. Schemas in group_norm_relu.cpp and
// group_norm_relu_backward.cpp.
#pragma once

#include "ops/tensor.h"

namespace spatialflow {

inline void check_group_norm_relu(
    const Tensor& input, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, int64_t num_groups,
    double eps) {
    constexpr const char* kOp = "group_norm_relu";
    check_dim(kOp, "input", input, 4, "(N, C, H, W)");
    check_floating(kOp, "input", input);
    check(
        num_groups >= 1 && input.size(1) % num_groups == 0, kOp, ": num_groups must be positive and divide the ",
        input.size(1), " channels of input, got ", num_groups);
    check(eps >= 0 && eps - eps == 0, kOp, ": eps must be a finite number >= 0, got ", eps);
    const std::pair<const char*, const std::optional<Tensor>&> affine[] = {{"weight", weight}, {"bias", bias}};
    for (const auto& [name, tensor] : affine) {
        if (tensor) {
            check(
                tensor->dim() == 1 && tensor->size(0) == input.size(1), kOp, ": ", name, " must have shape (",
                input.size(1), "), one number per channel of input, got shape ", *tensor);
            check_floating(kOp, name, *tensor);
            check_same_device(kOp, name, *tensor, "input", input);
        }
    }
}

inline void check_group_norm_relu_backward(
    const Tensor& grad_output, const Tensor& input, const Tensor& statistics, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& bias, int64_t num_groups, bool upsample) {
    constexpr const char* kOp = "group_norm_relu_backward";
    check_group_norm_relu(input, weight, bias, num_groups, 0.0);
    const int64_t factor = upsample ? 2 : 1;
    check(
        grad_output.dim() == 4 && grad_output.size(0) == input.size(0) && grad_output.size(1) == input.size(1) &&
            grad_output.size(2) == factor * input.size(2) && grad_output.size(3) == factor * input.size(3),
        kOp, ": grad_output must have shape (", input.size(0), ", ", input.size(1), ", ", factor * input.size(2), ", ",
        factor * input.size(3), "), got ", grad_output);
    check_floating(kOp, "grad_output", grad_output);
    check_same_device(kOp, "grad_output", grad_output, "input", input);
    check(
        statistics.dim() == 3 && statistics.size(0) == input.size(0) && statistics.size(1) == num_groups &&
            statistics.size(2) == 2,
        kOp, ": statistics must have shape (", input.size(0), ", ", num_groups, ", 2), got ", statistics);
    check_dtype(kOp, "statistics", statistics, ScalarType::Double);
    check_same_device(kOp, "statistics", statistics, "input", input);
}

// Allocate an output map, `factor` times as high and wide as the input. It is channels-last, but an empty map has the
// format of the input.
inline Tensor empty_norm_map(const Tensor& input, int64_t factor) {
    return empty_like_sized(
        input, {input.size(0), input.size(1), factor * input.size(2), factor * input.size(3)}, std::nullopt,
        input.numel() ? MemoryFormat::ChannelsLast : memory_format_of(input));
}

// Convert gradients to the memory formats and dtypes of their tensors.
inline std::tuple<Tensor, Tensor, Tensor> finished_norm_gradients(
    const Tensor& input, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
    const Tensor& grad_input, const Tensor& grad_weight, const Tensor& grad_bias) {
    const auto dtype_of = [&](const std::optional<Tensor>& tensor) {
        return tensor ? tensor->scalar_type() : input.scalar_type();
    };
    return {
        to_contiguous(grad_input, memory_format_of(input)), as_dtype(grad_weight, dtype_of(weight)),
        as_dtype(grad_bias, dtype_of(bias))};
}

}  // namespace spatialflow
