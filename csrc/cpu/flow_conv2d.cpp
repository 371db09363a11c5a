// SPDX-License-Identifier: Apache-2.0
//
// flow_conv2d on the CPU: relu(conv3x3(x + flow) + bias) over all levels of a pyramid in one parallel loop. The kernels
// are in conv3x3.cpp.
#include <algorithm>

#include "cpu/conv3x3_tensors.h"

namespace spatialflow {

namespace {

// With fewer output pixels, over all levels and images, transforming the weights costs more than Winograd saves.
constexpr int64_t kWinogradPixels = 256;

Tensor pack_conv3x3_cpu(const Tensor& weight, int64_t algorithm) {
    check_conv_weight("pack_conv3x3", weight);
    check_algorithm("pack_conv3x3", algorithm);
    const bool is_double = weight.scalar_type() == ScalarType::Double;
    return pack_conv3x3(weight, resolve_algorithm(algorithm, is_double, weight.size(1), weight.size(0)));
}

// A convolution, and the algorithm that its weights were packed for.
struct Convolution {
    int64_t resolved;
    ConvTensors tensors;
};

Convolution convolution(
    const std::vector<Tensor>& x, const std::vector<Tensor>& flow, const Tensor& packed,
    const std::optional<Tensor>& bias, int64_t out_channels, bool relu, int64_t resolved,
    const std::optional<Tensor>& active = std::nullopt) {
    const ConvTensors::Branch branch = {
        packed,
        bias ? std::make_optional(contiguous_as(*bias, packed.scalar_type())) : std::nullopt,
        relu,
        empty_channels_last(x, out_channels),
        {}};
    return {
        resolved,
        {channels_last(x),
         channels_last(flow),
         {branch},
         active ? std::make_optional(to_contiguous(*active)) : std::nullopt}};
}

// Run the convolutions. Return their results in order, each level in the memory format of the same level of `like`.
std::vector<Tensor> run(const std::vector<Tensor>& like, const std::vector<Convolution>& convolutions) {
    for (const int64_t algorithm : {kConvWinograd, kConvDirect}) {
        std::vector<ConvTensors> groups;
        for (const Convolution& convolution : convolutions) {
            if (convolution.resolved == algorithm) {
                groups.push_back(convolution.tensors);
            }
        }
        run_conv3x3(algorithm, groups);
    }
    std::vector<Tensor> results;
    for (const Convolution& convolution : convolutions) {
        const std::vector<Tensor>& out = convolution.tensors.branches[0].out;
        results.insert(results.end(), out.begin(), out.end());
    }
    return in_format_of(like, std::move(results));
}

std::vector<Tensor> flow_conv2d_cpu(
    const std::vector<Tensor>& x, const std::vector<Tensor>& flow, const Tensor& weight,
    const std::optional<Tensor>& bias, bool relu, int64_t algorithm) {
    check_flow_conv2d(x, flow, weight, bias, algorithm);
    if (x.empty()) {
        return {};
    }
    const int64_t out_channels = weight.size(0), in_channels = weight.size(1);
    int64_t pixels = 0;
    for (const Tensor& level : x) {
        pixels += level.size(0) * level.size(2) * level.size(3);
    }
    const bool is_double = weight.scalar_type() == ScalarType::Double;
    const int64_t resolved = allows_any_algorithm(algorithm) && pixels < kWinogradPixels
                                 ? kConvDirect
                                 : resolve_algorithm(algorithm, is_double, in_channels, out_channels);
    return run(x, {convolution(x, flow, pack_conv3x3(weight, resolved), bias, out_channels, relu, resolved)});
}

std::vector<Tensor> flow_conv2d_packed_cpu(
    const std::vector<Tensor>& x, const std::vector<Tensor>& flow, const Tensor& packed,
    const std::optional<Tensor>& bias, int64_t out_channels, bool relu, int64_t algorithm,
    const std::optional<Tensor>& active) {
    check_algorithm("flow_conv2d", algorithm);
    if (x.empty()) {
        return {};
    }
    const int64_t resolved = check_flow_conv2d_packed(x, flow, packed, bias, out_channels, algorithm, active);
    check_packed_layout("flow_conv2d", packed, kPackedColumns);
    return run(x, {convolution(x, flow, packed, bias, out_channels, relu, resolved, active)});
}

std::vector<Tensor> flow_conv2d_group_cpu(
    const std::vector<Tensor>& x, const std::vector<int64_t>& counts, const std::vector<Tensor>& packed,
    const std::vector<Tensor>& biases, const std::vector<int64_t>& out_channels, bool relu,
    const std::vector<int64_t>& algorithms) {
    std::vector<Convolution> convolutions;
    for_each_in_group(
        x, counts, packed, biases, out_channels, algorithms,
        [&](size_t i, const std::vector<Tensor>& maps, const std::optional<Tensor>& bias, int64_t resolved) {
            check_packed_layout("flow_conv2d", packed[i], kPackedColumns);
            convolutions.push_back(convolution(maps, {}, packed[i], bias, out_channels[i], relu, resolved));
        });
    return convolutions.empty() ? std::vector<Tensor>{} : run(x, convolutions);
}

}  // namespace
}  // namespace spatialflow

STABLE_TORCH_LIBRARY_IMPL(spatialflow, CPU, library) {
    library.impl("flow_conv2d", TORCH_BOX(&spatialflow::flow_conv2d_cpu));
    library.impl("_pack_conv3x3", TORCH_BOX(&spatialflow::pack_conv3x3_cpu));
    library.impl("_flow_conv2d_packed", TORCH_BOX(&spatialflow::flow_conv2d_packed_cpu));
    library.impl("_flow_conv2d_group", TORCH_BOX(&spatialflow::flow_conv2d_group_cpu));
}
