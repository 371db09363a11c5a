// SPDX-License-Identifier: Apache-2.0
//
// Host functions for 3x3 convolutions over pyramids, shared by flow_conv2d, its gradient and fused_subnets. The kernels
// are described in conv3x3.cu.
#pragma once

#include "cuda/conv3x3_tiles.cuh"
#include "cuda/conv_operand.cuh"
#include "cuda/launch.h"
#include "ops/flow_conv2d.h"

namespace spatialflow {

// Offset of the 16-bit weights in packed float32 weights, in floats. Packed weights are 9 * C * O floats (O padded),
// then the weights in float16 and in bfloat16. The rows of both 16-bit copies have the order of packed_position. Zeros
// follow up to packed_conv_size, then the tag (packed_tag).
inline int64_t packed_halves(ScalarType dtype, int64_t in_channels, int64_t out_channels) {
    const int64_t floats = 9 * packed_tap_size(in_channels, out_channels);
    return dtype == ScalarType::Half ? floats : floats + floats / 2;
}

// See packed_tag. The layout is the same on every CUDA device.
constexpr int64_t kPackedColumns = 1;

// Arguments of out = relu?(conv3x3(x + flow) + bias + residual), on the levels of `out`; `x` and `flow` may have more
// levels.
struct Convolution {
    std::vector<Tensor> x;         // (N, C, H, W), channels adjacent
    std::vector<Tensor> flow;      // the same; or empty
    std::vector<Tensor> residual;  // (N, O, H, W), dense channels-last; or empty
    std::vector<Tensor> out;       // (N, O, H, W), dense channels-last
    Tensor packed;                 // weights from _pack_conv3x3, or (9, C, O padded) in the type of x; any alignment
    std::optional<Tensor> bias;    // (O) in the type of sums, dense
    bool relu;
    int64_t algorithm;  // as in the operator schemas
};

// Weights of a convolution in the type that its kernel reads.
template <typename scalar_t>
inline Global<const scalar_t> kernel_weights(const Convolution& conv) {
    const ScalarType dtype = conv.x[0].scalar_type();
    const int64_t in_channels = conv.x[0].size(1), out_channels = conv.out[0].size(1);
    check(
        packed_tap_size(in_channels, out_channels) <= 0x7fffffff,
        "flow_conv2d: input times output channels must be below 2^31, got ", in_channels, " and ", out_channels);
    if (conv.packed.scalar_type() == dtype) {
        return data<scalar_t>(conv.packed);
    }
    return pointer_cast<const scalar_t>(data<float>(conv.packed) + packed_halves(dtype, in_channels, out_channels));
}

// Run convolutions that are independent of each other, in one launch if possible. Each algorithm has its own launch.
// What does not fit into the table of a launch (ConvTable, Sm90Table) requires more launches. On compute capability
// 9.0, the convolutions that sm90_conv3x3.cu does not support have another launch, and the last tiles may have one
// (Sm90Rounds). `active` is a dense bool tensor (N) with a flag for each image, valid for all levels. Results of
// inactive images are zero for any inputs. A tile without an active image is set to zero without being computed.
void convolve3x3(
    const char* op, std::vector<Convolution> convolutions, Stream stream,
    const std::optional<Tensor>& active = std::nullopt);

inline std::vector<Tensor> channels_adjacent(const std::vector<Tensor>& levels) {
    std::vector<Tensor> adjacent;
    for (const Tensor& level : levels) {
        adjacent.push_back(channels_adjacent(level));
    }
    return adjacent;
}

// Uninitialized channels-last maps with `channels` channels for the first `count` levels.
inline std::vector<Tensor> empty_channels_last(const std::vector<Tensor>& like, size_t count, int64_t channels) {
    std::vector<Tensor> maps;
    for (size_t i = 0; i < count; ++i) {
        maps.push_back(empty_like_sized(
            like[i], {like[i].size(0), channels, like[i].size(2), like[i].size(3)}, std::nullopt,
            MemoryFormat::ChannelsLast));
    }
    return maps;
}

// Convert dense channels-last maps to the memory formats of `like`.
inline std::vector<Tensor> in_format_of(const std::vector<Tensor>& like, std::vector<Tensor> maps) {
    for (size_t i = 0; i < maps.size(); ++i) {
        if (memory_format_of(like[i]) == MemoryFormat::Contiguous) {
            maps[i] = to_contiguous(maps[i]);
        }
    }
    return maps;
}

// Return whether the channels of all `levels` can be loaded 16 bytes at a time.
template <typename scalar_t>
inline bool has_vectorizable_channels(const std::vector<Tensor>& levels) {
    constexpr int64_t kWidth = kVectorElements<scalar_t>;
    for (const Tensor& level : levels) {
        if (level.size(1) % kWidth != 0 || stride_of(level, 0) % kWidth != 0 || stride_of(level, 2) % kWidth != 0 ||
            stride_of(level, 3) % kWidth != 0 || !is_aligned(level.const_data_ptr(), 16)) {
            return false;
        }
    }
    return true;
}

template <typename scalar_t>
inline ConvSource<scalar_t> conv_source(const char* op, const Tensor& x, const Tensor* flow) {
    check(
        x.size(1) <= 0x7fffffff && x.size(2) <= 0x7fffffff && x.size(3) <= 0x7fffffff, op,
        ": channels and sides must be below 2^31, got shape ", x);
    const Tensor& added = flow ? *flow : x;
    return {
        data<scalar_t>(x),
        flow ? data<scalar_t>(added) : Global<const scalar_t>(nullptr),
        stride_of(x, 0),
        stride_of(x, 2),
        stride_of(x, 3),
        stride_of(added, 0),
        stride_of(added, 2),
        stride_of(added, 3),
        static_cast<int>(x.size(2)),
        static_cast<int>(x.size(3)),
        static_cast<int>(x.size(1))};
}

}  // namespace spatialflow
