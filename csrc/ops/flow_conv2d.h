// SPDX-License-Identifier: Apache-2.0
//
// Argument checks of flow_conv2d, shared by all back ends. Schemas in flow_conv2d.cpp and flow_conv2d_backward.cpp.
#pragma once

#include "ops/conv_algorithm.h"
#include "ops/tensor.h"

namespace spatialflow {

// Multiple to which C_out is padded in packed weights. See packed_conv_size for their length, packed_tag for their tag.
constexpr int64_t kPackedOutputs = 32;

// Whether the CPU may choose the algorithm: for "auto" and for the algorithms of tensor cores.
inline bool allows_any_algorithm(int64_t algorithm) { return algorithm != kConvWinograd && algorithm != kConvDirect; }

// Algorithm for which the CPU packs weights. float64 is always direct, because it is used to check gradients. For other
// types the result is `algorithm`, unless the CPU may choose. The CPU then chooses Winograd for at least 32 input and
// 32 output channels, and direct for fewer.
inline int64_t resolve_algorithm(int64_t algorithm, bool is_double, int64_t in_channels, int64_t out_channels) {
    if (is_double) {
        return kConvDirect;
    }
    if (allows_any_algorithm(algorithm)) {
        return in_channels >= 32 && out_channels >= 32 ? kConvWinograd : kConvDirect;
    }
    return algorithm;
}

// Number of elements of a tap in packed weights.
inline int64_t packed_tap_size(int64_t in_channels, int64_t out_channels) {
    return (out_channels + kPackedOutputs - 1) / kPackedOutputs * kPackedOutputs * in_channels;
}

// Length of packed weights without the tag, equal on all back ends. Except for float64 there is space for nine taps in
// float32 and in both 16-bit types.
inline int64_t packed_conv_size(int64_t resolved, bool is_double, int64_t in_channels, int64_t out_channels) {
    return (resolved == kConvWinograd ? 36 : is_double ? 9 : 18) * packed_tap_size(in_channels, out_channels);
}

constexpr int64_t kPackedUnit = 9 * kPackedOutputs;  // divides packed_conv_size, and is larger than every tag

// Length of a packed weight tensor without its tag.
inline int64_t packed_size(const Tensor& packed) { return packed.numel() - packed.numel() % kPackedUnit; }

// Check that the weights have the tag of this back end; for `columns`, see packed_tag.
inline void check_packed_layout(const char* op, const Tensor& packed, int64_t columns) {
    const int64_t tag = packed.numel() % kPackedUnit;
    const int64_t expected = packed_tag(columns, packed.scalar_type() == ScalarType::Double);
    check(
        tag == expected, op,
        ": the packed weight has the layout of another instruction set, device, dtype or version "
        "(tag ",
        tag, ", here ", expected, "); pack the weight again, by pack_conv3x3 or pack_subnets");
}

// Check that every tensor of `levels` is (N, channels, H, W) with the dtype and on the device of `like`.
inline void check_levels(
    const char* op, const char* name, const std::vector<Tensor>& levels, int64_t channels, const Tensor& like,
    const char* like_name) {
    for (size_t i = 0; i < levels.size(); ++i) {
        const Tensor& level = levels[i];
        check(
            level.dim() == 4 && level.size(1) == channels, op, ": ", name, "[", i, "] must be (N, ", channels,
            ", H, W) to fit ", like_name, ", got shape ", level);
        check(
            level.scalar_type() == like.scalar_type(), op, ": ", name, "[", i, "] must have the dtype of ", like_name,
            " (", dtype_name(like.scalar_type()), "), got ", dtype_name(level.scalar_type()));
        check(have_same_device(level, like), op, ": ", name, "[", i, "] must be on the device of ", like_name);
    }
}

// Check that there are as many `tensors` as `levels`, of the same batch and size. The caller checks the channels.
inline void check_matching_levels(
    const char* op, const char* name, const std::vector<Tensor>& tensors, const char* levels_name,
    const std::vector<Tensor>& levels) {
    check(
        tensors.size() == levels.size(), op, ": ", name, " must have as many levels as ", levels_name, ", ",
        levels.size(), ", got ", tensors.size());
    for (size_t i = 0; i < levels.size(); ++i) {
        for (int64_t d : {0, 2, 3}) {
            check(
                tensors[i].size(d) == levels[i].size(d), op, ": ", name, "[", i, "] must have the batch and size of ",
                levels_name, "[", i, "], ", levels[i], ", got ", tensors[i]);
        }
    }
}

inline void check_conv_weight(const char* op, const Tensor& weight) {
    check(
        weight.dim() == 4 && weight.size(2) == 3 && weight.size(3) == 3, op,
        ": weight must have shape (C_out, C_in, 3, 3), got ", weight);
    check_floating(op, "weight", weight);
}

inline void check_conv_bias(
    const char* op, const std::optional<Tensor>& bias, int64_t channels, const Tensor& like, const char* like_name) {
    if (bias) {
        check(
            bias->dim() == 1 && bias->size(0) == channels, op, ": bias must have shape (", channels, ",), got ", *bias);
        check_floating(op, "bias", *bias);
        check_same_device(op, "bias", *bias, like_name, like);
    }
}

inline void check_conv_inputs(
    const char* op, const std::vector<Tensor>& x, const std::vector<Tensor>& flow, int64_t channels, const Tensor& like,
    const char* like_name) {
    check_levels(op, "x", x, channels, like, like_name);
    if (!flow.empty()) {
        check_levels(op, "flow", flow, channels, like, like_name);
        check_matching_levels(op, "flow", flow, "x", x);
    }
}

inline void check_flow_conv2d(
    const std::vector<Tensor>& x, const std::vector<Tensor>& flow, const Tensor& weight,
    const std::optional<Tensor>& bias, int64_t algorithm) {
    check_conv_weight("flow_conv2d", weight);
    check_conv_inputs("flow_conv2d", x, flow, weight.size(1), weight, "weight");
    check_conv_bias("flow_conv2d", bias, weight.size(0), weight, "weight");
    check_algorithm("flow_conv2d", algorithm);
}

// Check that `active` has a flag for each image, and that all levels of `x` have the same number of images.
inline void check_active(const char* op, const std::optional<Tensor>& active, const std::vector<Tensor>& x) {
    if (!active) {
        return;
    }
    check_dtype(op, "active", *active, ScalarType::Bool);
    check_dim(op, "active", *active, 1, "(N,)");
    check_same_device(op, "active", *active, "x[0]", x[0]);
    for (size_t i = 0; i < x.size(); ++i) {
        check(
            active->size(0) == x[i].size(0), op, ": active must have a flag for each image of x[", i, "], ",
            x[i].size(0), ", got ", active->size(0));
    }
}

// Check the arguments. The caller ensures that `x` is not empty. Return the algorithm that the weights were packed for.
inline int64_t check_flow_conv2d_packed(
    const std::vector<Tensor>& x, const std::vector<Tensor>& flow, const Tensor& packed,
    const std::optional<Tensor>& bias, int64_t out_channels, int64_t algorithm,
    const std::optional<Tensor>& active = std::nullopt) {
    check_dim("flow_conv2d", "x[0]", x[0], 4, "(N, C, H, W)");
    check_floating("flow_conv2d", "x[0]", x[0]);
    const int64_t in_channels = x[0].size(1);
    check_conv_inputs("flow_conv2d", x, flow, in_channels, x[0], "x[0]");
    check_conv_bias("flow_conv2d", bias, out_channels, x[0], "x[0]");
    check_active("flow_conv2d", active, x);
    check_dtype("flow_conv2d", "packed weight", packed, accum_dtype(x[0].scalar_type()));
    check_dim("flow_conv2d", "packed weight", packed, 1, "a vector");
    check_same_device("flow_conv2d", "packed weight", packed, "x[0]", x[0]);
    const bool is_double = packed.scalar_type() == ScalarType::Double;
    const int64_t resolved = resolve_algorithm(algorithm, is_double, in_channels, out_channels);
    check(
        out_channels >= 0 && packed.is_contiguous() &&
            packed_size(packed) == packed_conv_size(resolved, is_double, in_channels, out_channels),
        "flow_conv2d: the packed weight was made for other channels, another algorithm or another dtype than x with ",
        in_channels, " channels and ", out_channels, " outputs");
    return resolved;
}

// Call body(index, maps, bias, algorithm that the weights were packed for) for each of several convolutions. The first
// reads the first counts[0] tensors of `x`, the second the next counts[1], and so on. An empty bias means no bias.
template <typename Body>
inline void for_each_in_group(
    const std::vector<Tensor>& x, const std::vector<int64_t>& counts, const std::vector<Tensor>& packed,
    const std::vector<Tensor>& biases, const std::vector<int64_t>& out_channels, const std::vector<int64_t>& algorithms,
    const Body& body) {
    const char* op = "flow_conv2d";
    const size_t size = packed.size();
    check(
        counts.size() == size && biases.size() == size && out_channels.size() == size && algorithms.size() == size, op,
        ": counts, packed, biases, out_channels and algorithms must have one length");
    auto next = x.begin();
    for (size_t i = 0; i < size; ++i) {
        check(
            counts[i] >= 1 && counts[i] <= x.end() - next, op, ": counts must be at least 1 and add up to the ",
            x.size(), " tensors of x, got ", counts[i], " at ", i);
        check_algorithm(op, algorithms[i]);
        const std::vector<Tensor> maps(next, next + counts[i]);
        next += counts[i];
        const std::string name = "x[" + std::to_string(i) + "]";  // in Python, x[i] has all maps of convolution i
        check_dtype(op, name.c_str(), maps[0], x[0].scalar_type());
        check_same_device(op, name.c_str(), maps[0], "x[0]", x[0]);
        const std::optional<Tensor> bias = biases[i].numel() == 0 ? std::nullopt : std::make_optional(biases[i]);
        body(i, maps, bias, check_flow_conv2d_packed(maps, {}, packed[i], bias, out_channels[i], algorithms[i]));
    }
    check(next == x.end(), op, ": counts must add up to the ", x.size(), " tensors of x");
}

inline void check_conv_weight_gradient(
    const std::vector<Tensor>& x, const std::vector<Tensor>& flow, const std::vector<Tensor>& grad_output,
    int64_t algorithm) {
    const char* op = "flow_conv2d_weight_gradient";
    check(!x.empty(), op, ": x must have at least one level");
    check_dim(op, "x[0]", x[0], 4, "(N, C_in, H, W)");
    check_floating(op, "x[0]", x[0]);
    check_conv_inputs(op, x, flow, x[0].size(1), x[0], "x[0]");
    check(
        grad_output.size() == x.size(), op, ": grad_output must have as many levels as x, ", x.size(), ", got ",
        grad_output.size());
    check_dim(op, "grad_output[0]", grad_output[0], 4, "(N, C_out, H, W)");
    check_levels(op, "grad_output", grad_output, grad_output[0].size(1), x[0], "x[0]");
    check_matching_levels(op, "grad_output", grad_output, "x", x);
    check_algorithm(op, algorithm);
}

}  // namespace spatialflow
