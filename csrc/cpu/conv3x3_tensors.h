// SPDX-License-Identifier: Apache-2.0
//
// Conversion of tensors to the structures of conv3x3.h.
#pragma once

#include "cpu/conv3x3.h"
#include "cpu/huge_pages.h"
#include "ops/flow_conv2d.h"

namespace spatialflow {

static_assert(kGemmColumnPadding == kPackedOutputs, "packed weights have one size on every back end");

// See packed_tag.
constexpr int64_t kPackedColumns = kGemmColumns<float>;

// The bias as a contiguous tensor of `dtype`.
inline std::optional<Tensor> accum_bias(const std::optional<Tensor>& bias, ScalarType dtype) {
    return bias ? std::optional<Tensor>(contiguous_as(*bias, dtype)) : std::nullopt;
}

inline std::vector<Tensor> channels_last(const std::vector<Tensor>& levels) {
    std::vector<Tensor> dense;
    for (const Tensor& level : levels) {
        dense.push_back(to_contiguous(level, MemoryFormat::ChannelsLast));
    }
    return dense;
}

inline std::vector<Tensor> empty_channels_last(const std::vector<Tensor>& like, int64_t channels) {
    std::vector<Tensor> levels;
    for (const Tensor& level : like) {
        levels.push_back(empty_like_sized(
            level, {level.size(0), channels, level.size(2), level.size(3)}, std::nullopt, MemoryFormat::ChannelsLast));
        const size_t bytes = static_cast<size_t>(levels.back().numel()) * levels.back().element_size();
        advise_huge_pages(levels.back().mutable_data_ptr(), bytes);
    }
    return levels;
}

// Convert each level to contiguous if the tensor with the same index in `like` is not channels-last.
inline std::vector<Tensor> in_format_of(const std::vector<Tensor>& like, std::vector<Tensor> levels) {
    for (size_t i = 0; i < levels.size(); ++i) {
        if (!prefers_channels_last(like[i])) {
            levels[i] = to_contiguous(levels[i]);
        }
    }
    return levels;
}

// Views of dense channels-last tensors; `flow` may be empty. The tensors must outlive them.
template <typename scalar_t>
std::vector<ConvLevel<scalar_t>> conv_levels(const std::vector<Tensor>& x, const std::vector<Tensor>& flow) {
    std::vector<ConvLevel<scalar_t>> levels;
    for (size_t i = 0; i < x.size(); ++i) {
        levels.push_back(
            {x[i].size(0), x[i].size(2), x[i].size(3), data<scalar_t>(x[i]),
             flow.empty() ? nullptr : data<scalar_t>(flow[i])});
    }
    return levels;
}

template <typename scalar_t>
std::vector<scalar_t*> output_pointers(const std::vector<Tensor>& levels) {
    std::vector<scalar_t*> pointers;
    for (const Tensor& level : levels) {
        pointers.push_back(mutable_data<scalar_t>(level));
    }
    return pointers;
}

template <typename scalar_t>
void run_conv3x3(int64_t resolved, const std::vector<ConvGroup<scalar_t>>& groups) {
    if (resolved == kConvWinograd) {
        if constexpr (!std::is_same_v<scalar_t, double>) {
            return conv3x3_winograd(groups);
        }
    }
    conv3x3_direct(groups);
}

}  // namespace spatialflow
