// SPDX-License-Identifier: Apache-2.0
//
// The 3x3 convolutions of flow_conv2d and fused_subnets: dispatch from tensors to the kernels of conv3x3_winograd.h and
// conv3x3_direct.h. Only this source compiles them.
#include <algorithm>
#include <cstring>

#include "cpu/conv3x3_direct.h"
#include "cpu/conv3x3_tensors.h"
#include "cpu/conv3x3_winograd.h"

namespace spatialflow {

namespace {

template <typename scalar_t>
ConvGroup<scalar_t> typed(const ConvTensors& tensors) {
    using real_t = accum_t<scalar_t>;
    ConvGroup<scalar_t> group = {tensors.x[0].size(1), conv_levels<scalar_t>(tensors.x, tensors.flow), {}};
    for (const ConvTensors::Branch& source : tensors.branches) {
        ConvBranch<scalar_t> branch = {
            data<real_t>(source.packed), source.bias ? data<real_t>(*source.bias) : nullptr, 0, source.relu, {}, {}};
        for (const Tensor& level : source.out) {
            branch.channels = level.size(1);
            branch.out.push_back(mutable_data<scalar_t>(level));
        }
        for (const Tensor& level : source.residual) {
            branch.residual.push_back(data<scalar_t>(level));
        }
        group.branches.push_back(std::move(branch));
    }
    return group;
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

}  // namespace

Tensor pack_conv3x3(const Tensor& weight, int64_t resolved) {
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

void run_conv3x3(int64_t resolved, const std::vector<ConvTensors>& groups) {
    if (groups.empty()) {
        return;
    }
    dispatch_floating("conv3x3", groups[0].x[0].scalar_type(), [&](auto zero) {
        using scalar_t = decltype(zero);
        std::vector<ConvGroup<scalar_t>> typed_groups;
        for (const ConvTensors& group : groups) {
            const ConvGroup<scalar_t> all_images = typed<scalar_t>(group);
            typed_groups.push_back(group.active ? active_images(all_images, data<uint8_t>(*group.active)) : all_images);
        }
        if constexpr (!std::is_same_v<scalar_t, double>) {
            if (resolved == kConvWinograd) {
                return conv3x3_winograd(typed_groups);
            }
        }
        conv3x3_direct(typed_groups);
    });
}

}  // namespace spatialflow
