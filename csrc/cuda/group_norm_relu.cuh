// SPDX-License-Identifier: Apache-2.0
//
// Code shared by the forward and backward kernels of group_norm_relu: layouts, division into blocks, block sums.
//
// Layouts: a map is read as (N, H, W, C) with adjacent channels and any other strides; other layouts are copied first.
// Results and the tables of partial sums are dense. A block of 256 threads processes a slice of channels and some
// pixels, 8 vectors of channels by 32 pixels at a time. A vector has 16 bytes if all pixels consist of aligned
// 16-byte vectors, else one channel. Both slices and pixels are distributed over blocks, so that small maps occupy a
// large GPU too.
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
constexpr int kVectorLanes = 8;                       // threads along channels, a vector each
constexpr int kPixelLanes = kThreads / kVectorLanes;  // threads along pixels or columns
constexpr int kPixelsAhead = 4;                       // vectors that a thread loads before it uses the first
constexpr int64_t kBlocks = 256;                      // target number of blocks per launch, for a large GPU

template <int kWidth>
constexpr int kSlice = kVectorLanes * kWidth;  // channels of a block

struct NormShape {
    int batch, channels, groups, group_channels, height, width;
    int slices, pieces;          // number of slices; largest number of slices that a group spans
    int sum_blocks, sum_pixels;  // blocks per image and slice in the launch of the sums; pixels of each block
    double eps;

    __host__ __device__ int pixels() const { return height * width; }
    __host__ __device__ double group_size() const { return static_cast<double>(group_channels) * pixels(); }
};

// Division of one slice of an image into blocks. A block has consecutive pixels, or kPixelLanes columns of some rows.
struct NormParts {
    int blocks, extent;  // extent: pixels or rows of a block
    int column_blocks;   // blocks side by side in a row; 0 for blocks of consecutive pixels
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

// Image, slice of channels, block and first channel of a thread.
template <int kWidth>
struct NormPlace {
    int image, slice, block;
    int channel;  // first channel of the thread
    int pixel_lane;
    int first_group, end_group;  // groups with channels in the slice

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

// Pixels of a thread in a block of consecutive pixels: every kPixelLanes-th one in [begin, end).
struct PixelRange {
    int begin, end;

    template <int kWidth>
    __device__ __forceinline__
    PixelRange(const NormShape& shape, const NormPlace<kWidth>& place, const NormParts& parts)
        : begin(place.block * parts.extent + place.pixel_lane),
          end(place.block + 1 < parts.blocks ? (place.block + 1) * parts.extent : shape.pixels()) {}
};

// Call use(pixel, load(pixel), is_first) for the pixels of a range. kPixelsAhead pixels are loaded before the first of
// them is used.
template <typename Load, typename Use>
__device__ __forceinline__ void for_pixels(const PixelRange& range, const Load& load, const Use& use) {
    for (int first = range.begin; first < range.end; first += kPixelsAhead * kPixelLanes) {
        decltype(load(first)) loaded[kPixelsAhead];
#pragma unroll
        for (int t = 0; t < kPixelsAhead; ++t) {
            if (first + t * kPixelLanes < range.end) {
                loaded[t] = load(first + t * kPixelLanes);
            }
        }
#pragma unroll
        for (int t = 0; t < kPixelsAhead; ++t) {
            if (first + t * kPixelLanes < range.end) {
                use(first + t * kPixelLanes, loaded[t], t == 0 && first == range.begin);
            }
        }
    }
}

// Sum over the lanes of a warp whose indices are equal modulo `from`, a power of two. The order of the additions is
// fixed, and all of these lanes get the sum.
__device__ __forceinline__ double sum_lanes(double value, int from) {
    for (int step = from; step < kWarpSize; step *= 2) {
        value += __shfl_xor_sync(kAllLanes, value, step);
    }
    return value;
}

// Sum `first` and `second` over the block for each channel c of the slice: total[2 * c] and total[2 * c + 1].
// `of_warps` is scratch for the sums of each warp.
template <int kWidth>
__device__ __forceinline__ void sum_block(
    const double (&first)[kWidth], const double (&second)[kWidth], Shared<double> of_warps, Shared<double> total) {
    constexpr int kChannels = kSlice<kWidth>;
    const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarpSize;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
        const double first_sum = sum_lanes(first[i], kVectorLanes), second_sum = sum_lanes(second[i], kVectorLanes);
        if (thread % kWarpSize < kVectorLanes) {
            const int at = (warp * kChannels + thread % kVectorLanes * kWidth + i) * 2;
            of_warps[at] = first_sum;
            of_warps[at + 1] = second_sum;
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
    GroupAffine<real_t> channels[kWidth];

    __device__ __forceinline__ real_t before_relu(int i, real_t x) const {
        return (x - channels[i].shift) * channels[i].scale + channels[i].offset;
    }
};

// Affine parameters of the channels of this thread. `row` is the row of `statistics` for group 0 of the image. It is
// negative if `statistics` begins with a later group.
template <typename real_t, int kWidth, typename Statistics, typename Row>
__device__ __forceinline__ AffineVector<real_t, kWidth> affine_of(
    const Statistics& statistics, Row row, const ByChannel<real_t>& by_channel, const NormShape& shape,
    const NormPlace<kWidth>& place) {
    AffineVector<real_t, kWidth> affine;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
        const int c = place.channel + i;
        const Row at = (c / shape.group_channels + row) * 2;
        affine.channels[i] =
            group_affine<real_t>({statistics[at], statistics[at + 1]}, by_channel.weight_of(c), by_channel.bias_of(c));
    }
    return affine;
}

// Iterator over the outputs of an axis that is upsampled 2x. Cells are those of `doubled_cell`
// (common/group_norm_relu.h). Weights may differ by rounding, as they are computed without a division per output.
template <typename real_t>
struct DoubledWalk {
    int low, remainder, size;
    real_t part_weight;

    __device__ __forceinline__ DoubledWalk(int64_t index, int of_size)
        : size(of_size), part_weight(real_t(1) / static_cast<real_t>(2 * static_cast<int64_t>(of_size) - 1)) {
        const int64_t position = index * (size - 1), parts = 2 * static_cast<int64_t>(size) - 1;
        low = static_cast<int>(position / parts);
        remainder = static_cast<int>(position - low * parts);
    }
    __device__ __forceinline__ int high() const { return low + 1 < size ? low + 1 : low; }
    __device__ __forceinline__ real_t high_weight() const { return static_cast<real_t>(remainder) * part_weight; }
    __device__ __forceinline__ void step() {
        remainder += size - 1;
        if (remainder >= 2 * size - 1) {
            remainder -= 2 * size - 1;
            ++low;
        }
    }
};

// ---- host --------------------------------------------------------------------------------------------------------

template <typename scalar_t>
NormMap<const scalar_t> map_of(const Tensor& tensor) {
    return {data<scalar_t>(tensor), stride_of(tensor, 0), stride_of(tensor, 2), stride_of(tensor, 3)};
}

// Blocks of consecutive pixels. The launch has about kBlocks blocks; more if a thread would have more than `most`
// pixels, fewer if the map is small.
inline NormParts pixel_parts(const NormShape& shape, int64_t most) {
    const int64_t pixels = shape.pixels(), slices = static_cast<int64_t>(shape.batch) * shape.slices;
    const int64_t wanted = ceil_div(pixels, ceil_div(kBlocks, slices));
    const int64_t extent = std::min(ceil_div(wanted, kPixelLanes), most) * kPixelLanes;
    return {static_cast<int>(ceil_div(pixels, extent)), static_cast<int>(extent), 0};
}

// Blocks of kPixelLanes columns by 2 to 32 rows, for maps of `height` x `width`. Rows are halved until the launch has
// kBlocks blocks.
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
        "group_norm_relu: sizes of input and pixels of an image must be below 2^29 on CUDA, got ", input);
    const int channels = static_cast<int>(input.size(1)), groups = static_cast<int>(num_groups);
    NormShape shape{};
    shape.batch = static_cast<int>(input.size(0));
    shape.channels = channels;
    shape.groups = groups;
    shape.group_channels = channels / groups;
    shape.height = static_cast<int>(input.size(2));
    shape.width = static_cast<int>(input.size(3));
    shape.slices = static_cast<int>(ceil_div(channels, kChannels));
    // Only kChannels groups are visited: the next kChannels groups lie at the same positions within their slices.
    for (int group = 0; group < std::min(groups, kChannels); ++group) {
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

// Call run(width), where `width` is the number of channels of a vector. A vector has 16 bytes if all pixels of
// `tensors` consist of aligned 16-byte vectors, else one channel.
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
