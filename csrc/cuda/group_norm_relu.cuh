// SPDX-License-Identifier: Apache-2.0
//
// What the CUDA kernels of group_norm_relu share, forward and backward: layouts, how work is parted, sums over a block.
//
// Layouts: input (N, H, W, C) by strides, channels adjacent (others are copied into it first); all else dense.
// A block takes a slice of channels and some pixels, 32 at a time. A slice is 8 vectors of 16 bytes, or of one channel
// each where these do not align. 256 threads are 8 vectors x 32 pixels. So a small map fills the card by slices and
// pixels.
#pragma once

#include "common/group_norm_relu.h"

#include <algorithm>
#include <initializer_list>

#include "cuda/launch.h"
#include "cuda/raw_channels.cuh"
#include "ops/group_norm_relu.h"

namespace spatialflow {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kVectorLanes = 8;                       // vectors of channels
constexpr int kPixelLanes = kThreads / kVectorLanes;  // pixels, or columns
constexpr int kTurns = 4;                             // vectors that a thread loads before it uses the first
constexpr int64_t kBlocks = 256;                      // that fill a card

template <int kWidth>
constexpr int kSlice = kVectorLanes * kWidth;  // channels

struct NormShape {
    int batch, channels, groups, group_channels, height, width;
    int slices, pieces;          // of the channels; slices that a group lies in, at most
    int sum_blocks, sum_pixels;  // of an image and slice in the launch of the sums; pixels of each
    double eps;

    __host__ __device__ int pixels() const { return height * width; }
    __host__ __device__ double group_size() const { return static_cast<double>(group_channels) * pixels(); }
};

// How an image and a slice are parted into blocks: pixels in order, or columns x segments of rows.
struct NormParts {
    int blocks, extent;  // pixels, or rows, of a block
    int column_blocks;   // 0: pixels in order
};

template <typename scalar_t>
struct NormMap {
    Global<scalar_t> data;
    int64_t stride_n, stride_h, stride_w;
};

template <typename real_t>
struct ByChannel {
    Global<const real_t> weight, bias;  // null: 1 and 0

    __device__ __forceinline__ double weight_of(int c) const { return weight ? static_cast<double>(weight[c]) : 1.0; }
    __device__ __forceinline__ double bias_of(int c) const { return bias ? static_cast<double>(bias[c]) : 0.0; }
};

// ---- device ------------------------------------------------------------------------------------------------------

// What a thread works on.
template <int kWidth>
struct NormPlace {
    int image, slice, block;
    int channel;  // the first of the thread's
    int pixel_lane;
    int first_group, end_group;  // that the slice touches

    __device__ __forceinline__ NormPlace(const NormShape& shape, int blocks) {
        const int index = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x);
        block = index % blocks;
        slice = index / blocks % shape.slices;
        image = index / blocks / shape.slices;
        channel = slice * kSlice<kWidth> + thread % kVectorLanes * kWidth;
        pixel_lane = thread / kVectorLanes;
        const int begin = slice * kSlice<kWidth>, end = begin + kSlice<kWidth>;
        first_group = begin / shape.group_channels;
        end_group = ((end < shape.channels ? end : shape.channels) - 1) / shape.group_channels + 1;
    }
    __device__ __forceinline__ bool has_channels(const NormShape& shape) const { return channel < shape.channels; }
};

template <typename scalar_t>
__device__ __forceinline__ Global<scalar_t> pixel_of(
    const NormMap<scalar_t>& map, const NormShape& shape, int image, int pixel) {
    const int y = pixel / shape.width;
    return map.data + (image * map.stride_n + y * map.stride_h + (pixel - y * shape.width) * map.stride_w);
}

// The pixels of a thread, where a block has pixels in order: from `begin` on, every kPixelLanes-th.
struct PixelRange {
    int begin, end;

    template <int kWidth>
    __device__ __forceinline__
    PixelRange(const NormShape& shape, const NormPlace<kWidth>& place, const NormParts& parts)
        : begin(place.block * parts.extent + place.pixel_lane),
          end(place.block + 1 < parts.blocks ? (place.block + 1) * parts.extent : shape.pixels()) {}
};

// Calls use(pixel, load(pixel), whether it is the first) for a range of pixels; kTurns of them are loaded before the
// first of these is used.
template <typename Load, typename Use>
__device__ __forceinline__ void for_pixels(const PixelRange& range, const Load& load, const Use& use) {
    for (int first = range.begin; first < range.end; first += kTurns * kPixelLanes) {
        decltype(load(first)) loaded[kTurns];
#pragma unroll
        for (int t = 0; t < kTurns; ++t) {
            if (first + t * kPixelLanes < range.end) {
                loaded[t] = load(first + t * kPixelLanes);
            }
        }
#pragma unroll
        for (int t = 0; t < kTurns; ++t) {
            if (first + t * kPixelLanes < range.end) {
                use(first + t * kPixelLanes, loaded[t], t == 0 && first == range.begin);
            }
        }
    }
}

// The sum over the lanes of a warp that differ in the bits of `from` and above, in a fixed order; all of them get it.
__device__ __forceinline__ double sum_lanes(double value, int from) {
    for (int step = from; step < kWarpSize; step *= 2) {
        value += __shfl_xor_sync(kAllLanes, value, step);
    }
    return value;
}

// Sums over the block of two numbers by channel: first[c] and second[c] of the slice, valid after the barrier within.
template <int kWidth>
__device__ __forceinline__ void sum_block(
    const double (&first)[kWidth], const double (&second)[kWidth], Shared<double> of_warps, Shared<double> total) {
    constexpr int kChannels = kSlice<kWidth>;
    const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarpSize;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
        const double one = sum_lanes(first[i], kVectorLanes), other = sum_lanes(second[i], kVectorLanes);
        if (thread % kWarpSize < kVectorLanes) {
            const int at = (warp * kChannels + thread % kVectorLanes * kWidth + i) * 2;
            of_warps[at] = one;
            of_warps[at + 1] = other;
        }
    }
    __syncthreads();
    if (thread < 2 * kChannels) {
        double sum = 0;
        for (int w = 0; w < kWarps; ++w) {
            sum += of_warps[w * 2 * kChannels + thread];
        }
        total[thread] = sum;
    }
    __syncthreads();
}

template <typename real_t, int kWidth>
struct AffineVector {
    GroupAffine<real_t> of[kWidth];

    __device__ __forceinline__ real_t before_relu(int i, real_t x) const {
        return (x - of[i].shift) * of[i].scale + of[i].offset;
    }
};

// Of the thread's channels. Group 0 of the image is, or would be, at `row` of the statistics.
template <typename real_t, int kWidth, typename Statistics, typename Row>
__device__ __forceinline__ AffineVector<real_t, kWidth> affine_of(
    const Statistics& statistics, Row row, const ByChannel<real_t>& by_channel, const NormShape& shape,
    const NormPlace<kWidth>& place) {
    AffineVector<real_t, kWidth> affine;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
        const int c = place.channel + i;
        const Row at = (c / shape.group_channels + row) * 2;
        affine.of[i] =
            group_affine<real_t>({statistics[at], statistics[at + 1]}, by_channel.weight_of(c), by_channel.bias_of(c));
    }
    return affine;
}

// A walk along a doubled axis, cell by cell: doubled_cell without a division each.
template <typename real_t>
struct DoubledWalk {
    int low, rest, size;
    real_t share;

    __device__ __forceinline__ DoubledWalk(int64_t index, int of_size)
        : size(of_size), share(real_t(1) / static_cast<real_t>(2 * static_cast<int64_t>(of_size) - 1)) {
        const int64_t place = index * (size - 1), parts = 2 * static_cast<int64_t>(size) - 1;
        low = static_cast<int>(place / parts);
        rest = static_cast<int>(place - low * parts);
    }
    __device__ __forceinline__ int high() const { return low + 1 < size ? low + 1 : low; }
    __device__ __forceinline__ real_t high_weight() const { return static_cast<real_t>(rest) * share; }
    __device__ __forceinline__ void step() {
        rest += size - 1;
        if (rest >= 2 * size - 1) {
            rest -= 2 * size - 1;
            ++low;
        }
    }
};

// ---- host --------------------------------------------------------------------------------------------------------

template <typename scalar_t>
NormMap<const scalar_t> map_of(const Tensor& tensor) {
    return {data<scalar_t>(tensor), stride_of(tensor, 0), stride_of(tensor, 2), stride_of(tensor, 3)};
}

// Pixels in order, as many in a block as leave kBlocks of them, at most `most` for a thread.
inline NormParts pixel_parts(const NormShape& shape, int64_t most) {
    const int64_t pixels = shape.pixels(), slices = static_cast<int64_t>(shape.batch) * shape.slices;
    const int64_t wanted = ceil_div(pixels, ceil_div(kBlocks, slices));
    const int64_t extent = std::min(ceil_div(wanted, kPixelLanes), most) * kPixelLanes;
    return {static_cast<int>(ceil_div(pixels, extent)), static_cast<int>(extent), 0};
}

// Columns by segments of `height` rows.
inline NormParts column_parts(const NormShape& shape, int64_t height, int64_t width) {
    const int64_t columns = ceil_div(width, kPixelLanes);
    int64_t rows = 32;
    while (rows > 2 && shape.batch * shape.slices * columns * ceil_div(height, rows) < kBlocks) {
        rows /= 2;
    }
    return {static_cast<int>(columns * ceil_div(height, rows)), static_cast<int>(rows), static_cast<int>(columns)};
}

template <int kWidth>
NormShape shape_of(const Tensor& input, int64_t num_groups, double eps) {
    constexpr int kChannels = kSlice<kWidth>;
    constexpr int64_t kMost = int64_t(1) << 29;
    const bool fits = input.size(0) < kMost && input.size(1) < kMost && input.size(2) < kMost && input.size(3) < kMost;
    check(
        fits && input.size(2) * input.size(3) < kMost,
        "group_norm_relu: sizes of input and pixels of an image must be below 2^29 on CUDA, got ", shape_string(input));
    const int channels = static_cast<int>(input.size(1)), groups = static_cast<int>(num_groups);
    NormShape shape{};
    shape.batch = static_cast<int>(input.size(0));
    shape.channels = channels;
    shape.groups = groups;
    shape.group_channels = channels / groups;
    shape.height = static_cast<int>(input.size(2));
    shape.width = static_cast<int>(input.size(3));
    shape.slices = static_cast<int>(ceil_div(channels, kChannels));
    for (int group = 0; group < std::min(groups, kChannels); ++group) {  // from there on they lie as before
        const int begin = group * shape.group_channels;
        shape.pieces = std::max(shape.pieces, (begin + shape.group_channels - 1) / kChannels - begin / kChannels + 1);
    }
    shape.eps = eps;
    const NormParts sums = pixel_parts(shape, kGroupNormRun);
    shape.sum_blocks = sums.blocks;
    shape.sum_pixels = sums.extent;
    return shape;
}

inline dim3 grid_of(const NormShape& shape, const NormParts& parts) {
    return dim3(grid_size("group_norm_relu", static_cast<int64_t>(shape.batch) * shape.slices * parts.blocks));
}

// Calls run(width) with the channels of a vector: 16 bytes if all pixels of `tensors` are made of those, else one.
template <typename scalar_t, typename Run>
void dispatch_width(std::initializer_list<const Tensor*> tensors, const Run& run) {
    constexpr int kWidth = kVectorElements<scalar_t>;
    const auto is_vectorizable = [](const Tensor* tensor) {
        return tensor->size(1) % kWidth == 0 && stride_of(*tensor, 0) % kWidth == 0 &&
               stride_of(*tensor, 2) % kWidth == 0 && stride_of(*tensor, 3) % kWidth == 0 &&
               is_aligned(tensor->const_data_ptr(), 16);
    };
    if (std::all_of(tensors.begin(), tensors.end(), is_vectorizable)) {
        run(std::integral_constant<int, kWidth>{});
    } else {
        run(std::integral_constant<int, 1>{});
    }
}

inline std::optional<Tensor> in_dtype(const std::optional<Tensor>& tensor, ScalarType dtype) {
    return tensor ? std::optional<Tensor>(contiguous_as(*tensor, dtype)) : std::nullopt;
}

template <typename real_t>
ByChannel<real_t> by_channel_of(const std::optional<Tensor>& weight, const std::optional<Tensor>& bias) {
    const auto pointer = [](const std::optional<Tensor>& tensor) {
        return tensor ? data<real_t>(*tensor) : Global<const real_t>(nullptr);
    };
    return {pointer(weight), pointer(bias)};
}

}  // namespace spatialflow
