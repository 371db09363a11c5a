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

// A group (conv3x3.h) as tensors, so that callers need not know the dtype. All maps are dense, channels-last, and of one
// dtype; weights and biases are of its accumulation dtype.
struct ConvTensors {
    struct Branch {
        Tensor packed;  // pack_conv3x3
        std::optional<Tensor> bias;
        bool relu;
        std::vector<Tensor> out;       // of all or of the first levels of the group
        std::vector<Tensor> residual;  // empty, or per level of `out`; may be `out` itself
    };
    std::vector<Tensor> x, flow;  // `flow` may be empty
    std::vector<Branch> branches;
    std::optional<Tensor>
        active;  // (N) bool, contiguous, for groups of one branch; results of inactive images are zero
};

// Pack a weight (C_out, C_in, 3, 3) for kConvWinograd or kConvDirect.
Tensor pack_conv3x3(const Tensor& weight, int64_t resolved);

// Run groups whose weights were packed for the algorithm `resolved`.
void run_conv3x3(int64_t resolved, const std::vector<ConvTensors>& groups);

}  // namespace spatialflow
