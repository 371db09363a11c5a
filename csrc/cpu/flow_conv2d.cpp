// SPDX-License-Identifier: Apache-2.0
//
// flow_conv2d on the CPU: relu(conv3x3(x + flow) + bias) over all levels of a pyramid in one parallel loop. The kernels
// are in conv3x3_winograd.h and conv3x3_direct.h, instantiated in conv3x3.cpp.
#include <algorithm>
#include <cstring>

#include "cpu/conv3x3_direct.h"
#include "cpu/conv3x3_tensors.h"
#include "cpu/conv3x3_winograd.h"

namespace spatialflow {

namespace {

// With fewer output pixels, over all levels and images, transforming the weights costs more than Winograd saves.
constexpr int64_t kWinogradPixels = 256;

Tensor pack(const Tensor& weight, int64_t resolved) {
    const int64_t out_channels = weight.size(0), in_channels = weight.size(1);
    const bool is_double = weight.scalar_type() == ScalarType::Double;
    const int64_t size = packed_conv_size(resolved, is_double, in_channels, out_channels);
    const int64_t tag = packed_tag(kPackedColumns, is_double);
    Tensor packed = empty_like_sized(weight, {size + tag}, accum_dtype(weight.scalar_type()));
    const int64_t strides[4] = {stride_of(weight, 0), stride_of(weight, 1), stride_of(weight, 2), stride_of(weight, 3)};
    dispatch_floating("pack_conv3x3", weight.scalar_type(), [&](auto zero) {
        using scalar_t = decltype(zero);
        accum_t<scalar_t>* target = mutable_data<accum_t<scalar_t>>(packed);
        int64_t filled = size;
        if (resolved == kConvWinograd) {
            pack_conv3x3_winograd(
                data<scalar_t>(weight), strides, out_channels, in_channels, mutable_data<float>(packed));
        } else {
            pack_conv3x3_direct(data<scalar_t>(weight), strides, out_channels, in_channels, target);
            // The rest is space for 16-bit copies, which only CUDA writes.
            filled = 9 * packed_tap_size(in_channels, out_channels);
        }
        std::fill(target + filled, target + size + tag, 0);
    });
    return packed;
}

Tensor pack_conv3x3_cpu(const Tensor& weight, int64_t algorithm) {
    check_conv_weight("pack_conv3x3", weight);
    check_algorithm("pack_conv3x3", algorithm);
    return pack(
        weight,
        resolve_algorithm(algorithm, weight.scalar_type() == ScalarType::Double, weight.size(1), weight.size(0)));
}

// Group of the active images: each range of adjacent active images is a separate level. The results of inactive images
// are set to zero.
template <typename scalar_t>
ConvGroup<scalar_t> active_images(const ConvGroup<scalar_t>& all_images, const uint8_t* active) {
    ConvGroup<scalar_t> group = {all_images.channels, {}, {all_images.branches[0]}};
    ConvBranch<scalar_t>& branch = group.branches[0];
    branch.out.clear();
    for (size_t i = 0; i < all_images.levels.size(); ++i) {
        const ConvLevel<scalar_t>& level = all_images.levels[i];
        const int64_t pixels = level.height * level.width;
        int64_t end = 0;
        for (int64_t first = 0; first < level.batch; first = end) {
            const bool is_active = active[first] != 0;
            while (end < level.batch && (active[end] != 0) == is_active) {
                ++end;
            }
            const int64_t offset = first * pixels * all_images.channels;
            const int64_t size = (end - first) * pixels * branch.channels;  // of the results
            scalar_t* out = all_images.branches[0].out[i] + first * pixels * branch.channels;
            if (is_active) {
                const scalar_t* flow = level.flow ? level.flow + offset : nullptr;
                group.levels.push_back({end - first, level.height, level.width, level.x + offset, flow});
                branch.out.push_back(out);
            } else if (size > 0) {
                std::memset(out, 0, static_cast<size_t>(size) * sizeof(scalar_t));
            }
        }
    }
    return group;
}

// A convolution with the tensors that its group refers to.
struct Convolution {
    int64_t resolved;
    std::vector<Tensor> x, flow, out;
    Tensor packed;
    std::optional<Tensor> bias;
    bool relu;
    std::optional<Tensor> active;  // (N), contiguous

    Convolution(
        const std::vector<Tensor>& x, const std::vector<Tensor>& flow, const Tensor& packed,
        const std::optional<Tensor>& bias, int64_t out_channels, bool relu, int64_t resolved,
        const std::optional<Tensor>& active = std::nullopt)
        : resolved(resolved),
          x(channels_last(x)),
          flow(channels_last(flow)),
          out(empty_channels_last(x, out_channels)),
          packed(packed),
          bias(accum_bias(bias, packed.scalar_type())),
          relu(relu),
          active(active ? std::make_optional(to_contiguous(*active)) : std::nullopt) {}

    template <typename scalar_t>
    ConvGroup<scalar_t> group() const {
        using real_t = accum_t<scalar_t>;
        const ConvBranch<scalar_t> branch = {data<real_t>(packed),
                                             bias ? data<real_t>(*bias) : nullptr,
                                             out[0].size(1),
                                             relu,
                                             output_pointers<scalar_t>(out),
                                             {}};
        ConvGroup<scalar_t> all_images = {x[0].size(1), conv_levels<scalar_t>(x, flow), {branch}};
        if (active) {
            return active_images(all_images, data<uint8_t>(*active));
        }
        return all_images;
    }
};

// Run the convolutions. Return their results in order, each level in the memory format of the same level of `like`.
std::vector<Tensor> run(const std::vector<Tensor>& like, const std::vector<Convolution>& convolutions) {
    std::vector<Tensor> results;
    dispatch_floating("flow_conv2d", like[0].scalar_type(), [&](auto zero) {
        using scalar_t = decltype(zero);
        for (const int64_t algorithm : {kConvWinograd, kConvDirect}) {
            std::vector<ConvGroup<scalar_t>> groups;
            for (const Convolution& convolution : convolutions) {
                if (convolution.resolved == algorithm) {
                    groups.push_back(convolution.group<scalar_t>());
                }
            }
            if (!groups.empty()) {
                run_conv3x3<scalar_t>(algorithm, groups);
            }
        }
    });
    for (const Convolution& convolution : convolutions) {
        results.insert(results.end(), convolution.out.begin(), convolution.out.end());
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
    return run(x, {{x, flow, pack(weight, resolved), bias, out_channels, relu, resolved}});
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
    return run(x, {{x, flow, packed, bias, out_channels, relu, resolved, active}});
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
            convolutions.emplace_back(maps, std::vector<Tensor>{}, packed[i], bias, out_channels[i], relu, resolved);
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
