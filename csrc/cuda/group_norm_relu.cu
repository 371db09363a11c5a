// SPDX-License-Identifier: Apache-2.0
//
// GroupNorm, ReLU and optional 2x upsampling on CUDA, channels-last, in two launches; the backward pass in three.
//
//   y = relu((x - mean) * rstd * weight + bias), mean and rstd of a group in its image (common/group_norm_relu.h)
//
// Layouts: input (N, H, W, C) by strides, channels adjacent (others are copied into it first); all else dense.
// A block takes a slice of channels, 8 vectors of 16 bytes (one channel each where rows of them do not align), and some
// pixels, 32 at a time; 256 threads are 8 vectors x 32 pixels. So a small map fills the card by slices and pixels.
//
//   sums        a thread adds its pixels around the first of them, at most 64; float64 from there on. A block's groups
//               go to a table (N, groups, blocks x slices of a group).
//   normalize   a block first adds up the table of its groups, in order: no atomics, two runs agree to the last bit.
//               Upsampling: a thread walks down a column of the result and keeps the two rows it lies between.
//   backward    First the sums of g and g * (x - mean) by channel, where g is the gradient of the input of ReLU. The
//               transpose of upsampling gathers down the columns of the input, and stores g. Then a warp per channel
//               adds the sums of the blocks. Then the gradient of the input, from the sums of its groups.
//
// Floor (H100, 3.0 TB/s), bfloat16, 128 x 100 x 168: 4.3 MB read, 4.3 MB written: 2.9 us; 17.2 MB written with
// upsampling: 7.2 us. The second reading of the input is from L2. Backward: 13 MB, 4.3 us; with upsampling 26 MB, 8.6
// us.
#include "common/group_norm_relu.h"

#include <algorithm>
#include <initializer_list>

#include "cuda/launch.h"
#include "cuda/raw_channels.h"
#include "ops/group_norm_relu.h"

namespace spatialflow {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kVectorLanes = 8;                        // vectors of channels
constexpr int kPixelLanes = kThreads / kVectorLanes;   // pixels, or columns
constexpr int kTurns = 4;                              // vectors that a thread loads before it uses the first
constexpr int kReaders = 5;                            // results of doubling that read one cell of an axis, at most
constexpr int64_t kBlocks = 256;                       // that fill a card

template <int kWidth>
constexpr int kSlice = kVectorLanes * kWidth;  // channels

struct NormShape {
    int batch, channels, groups, group_channels, height, width;
    int slices, pieces;              // of the channels; slices that a group lies in, at most
    int sum_blocks, sum_pixels;      // of an image and slice in the launch of the sums; pixels of each
    double eps;

    __host__ __device__ int pixels() const { return height * width; }
    __host__ __device__ double group_size() const { return static_cast<double>(group_channels) * pixels(); }
};

// How an image and a slice are parted into blocks: pixels in order, or columns x segments of rows.
struct Parts {
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
struct Place {
    int image, slice, block;
    int channel;      // the first of the thread's
    int pixel_lane;
    int first_group, end_group;  // that the slice touches

    __device__ __forceinline__ Place(const NormShape& shape, int blocks) {
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

template <typename scalar_t, int kWidth>
__global__ void __launch_bounds__(kThreads) group_norm_sums_kernel(
    const NormMap<const scalar_t> input,
    Global<double> table,  // (N, groups, blocks, pieces, 2)
    const NormShape shape) {
    using real_t = accum_t<scalar_t>;
    constexpr int kChannels = kSlice<kWidth>;
    SPATIALFLOW_SHARED(double, of_warps, kWarps * 2 * kChannels);
    SPATIALFLOW_SHARED(double, total, 2 * kChannels);
    const Place<kWidth> place(shape, shape.sum_blocks);
    const int begin = place.block * shape.sum_pixels + place.pixel_lane;
    const int end = place.block + 1 < shape.sum_blocks ? (place.block + 1) * shape.sum_pixels : shape.pixels();
    double sums[kWidth] = {}, squares[kWidth] = {};
    if (place.has_channels(shape) && begin < end) {
        real_t pivot[kWidth], sum[kWidth] = {}, square[kWidth] = {};
        for (int first = begin; first < end; first += kTurns * kPixelLanes) {
            RawChannels<scalar_t, kWidth> values[kTurns];
#pragma unroll
            for (int t = 0; t < kTurns; ++t) {
                if (first + t * kPixelLanes < end) {
                    values[t] = load_channels<kWidth>(
                        pixel_of(input, shape, place.image, first + t * kPixelLanes) + place.channel);
                }
            }
#pragma unroll
            for (int t = 0; t < kTurns; ++t) {
                if (first + t * kPixelLanes < end) {
#pragma unroll
                    for (int i = 0; i < kWidth; ++i) {
                        const real_t value = values[t].value(i);
                        pivot[i] = t == 0 && first == begin ? value : pivot[i];
                        const real_t from = value - pivot[i];
                        sum[i] += from;
                        square[i] += from * from;
                    }
                }
            }
        }
        const double count = (end - begin + kPixelLanes - 1) / kPixelLanes;
        const Global<const scalar_t> origin = input.data + place.image * input.stride_n;
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
            const int group = (place.channel + i) / shape.group_channels;
            GroupSums own{0, 0};
            add_run(own, load(origin[group * shape.group_channels]), pivot[i], count, sum[i], square[i]);
            sums[i] = own.sum;
            squares[i] = own.square;
        }
    }
    sum_block(sums, squares, of_warps, total);
    const int group = place.first_group + static_cast<int>(threadIdx.x);
    if (group < place.end_group) {
        const int slice_begin = place.slice * kChannels, group_begin = group * shape.group_channels;
        const int first = group_begin > slice_begin ? group_begin - slice_begin : 0;
        int last = group_begin + shape.group_channels - slice_begin;
        last = last < kChannels ? last : kChannels;
        double sum = 0, square = 0;
        for (int c = first; c < last; ++c) {
            sum += total[2 * c];
            square += total[2 * c + 1];
        }
        const int piece = place.slice - group_begin / kChannels;
        const int64_t row = (static_cast<int64_t>(place.image) * shape.groups + group) * shape.sum_blocks + place.block;
        store_vector(table + (row * shape.pieces + piece) * 2, Vec<double, 2>{{sum, square}});
    }
}

// Mean and rstd of the groups of this block's slice, from the sums of all blocks; valid after the barrier within. The
// block that `is_first` in its slice writes those of the groups that begin there to `statistics` too.
template <int kWidth, typename scalar_t>
__device__ __forceinline__ void collect_statistics(
    const NormMap<const scalar_t>& input, Global<const double> table, const NormShape& shape,
    const Place<kWidth>& place, bool is_first, Shared<double> shared, Global<double> statistics) {
    constexpr int kChannels = kSlice<kWidth>;
    const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarpSize;
    for (int group = place.first_group + thread / kWarpSize; group < place.end_group; group += kWarps) {
        const int begin = group * shape.group_channels, first_slice = begin / kChannels;
        const int pieces = (begin + shape.group_channels - 1) / kChannels - first_slice + 1;
        const int64_t row = static_cast<int64_t>(place.image) * shape.groups + group;
        GroupSums sums{0, 0};
        for (int entry = lane; entry < shape.sum_blocks * pieces; entry += kWarpSize) {
            const int block = entry / pieces;
            const int64_t at = (row * shape.sum_blocks + block) * shape.pieces + (entry - block * pieces);
            const Vec<double, 2> found = load_vector<2>(table + at * 2);
            sums.sum += found[0];
            sums.square += found[1];
        }
        sums.sum = sum_lanes(sums.sum, 1);
        sums.square = sum_lanes(sums.square, 1);
        if (lane == 0) {
            const scalar_t pivot = input.data[place.image * input.stride_n + begin];
            const GroupStatistics found = group_statistics(sums, load(pivot), shape.group_size(), shape.eps);
            shared[(group - place.first_group) * 2] = found.mean;
            shared[(group - place.first_group) * 2 + 1] = found.rstd;
            if (is_first && first_slice == place.slice) {
                statistics[row * 2] = found.mean;
                statistics[row * 2 + 1] = found.rstd;
            }
        }
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

template <typename real_t>
__device__ __forceinline__ real_t relu(real_t value) {
    return value < real_t(0) ? real_t(0) : value;  // NaN stays
}

template <typename scalar_t, int kWidth>
__global__ void __launch_bounds__(kThreads) group_norm_relu_kernel(
    const NormMap<const scalar_t> input, Global<const double> table, const ByChannel<accum_t<scalar_t>> by_channel,
    Global<double> statistics,  // (N, groups, 2)
    Global<scalar_t> output,    // (N, H, W, C)
    const NormShape shape, const Parts parts) {
    using real_t = accum_t<scalar_t>;
    SPATIALFLOW_SHARED(double, shared, 2 * kSlice<kWidth>);
    const Place<kWidth> place(shape, parts.blocks);
    collect_statistics(input, table, shape, place, place.block == 0, shared, statistics);
    if (!place.has_channels(shape)) {
        return;
    }
    AffineVector<real_t, kWidth> affine;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
        const int c = place.channel + i, at = (c / shape.group_channels - place.first_group) * 2;
        affine.of[i] = group_affine<real_t>(
            {shared[at], shared[at + 1]}, by_channel.weight_of(c), by_channel.bias_of(c));
    }
    const int begin = place.block * parts.extent + place.pixel_lane;
    const int end = place.block + 1 < parts.blocks ? (place.block + 1) * parts.extent : shape.pixels();
    const Global<scalar_t> target =
        output + (static_cast<int64_t>(place.image) * shape.pixels() * shape.channels + place.channel);
    for (int first = begin; first < end; first += kTurns * kPixelLanes) {
        RawChannels<scalar_t, kWidth> values[kTurns];
#pragma unroll
        for (int t = 0; t < kTurns; ++t) {
            if (first + t * kPixelLanes < end) {
                values[t] = load_channels<kWidth>(
                    pixel_of(input, shape, place.image, first + t * kPixelLanes) + place.channel);
            }
        }
#pragma unroll
        for (int t = 0; t < kTurns; ++t) {
            if (first + t * kPixelLanes < end) {
                Vec<scalar_t, kWidth> result;
#pragma unroll
                for (int i = 0; i < kWidth; ++i) {
                    store(result[i], relu<real_t>(affine.before_relu(i, values[t].value(i))));
                }
                store_vector(target + static_cast<int64_t>(first + t * kPixelLanes) * shape.channels, result);
            }
        }
    }
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

template <typename scalar_t, int kWidth>
__global__ void __launch_bounds__(kThreads) group_norm_relu_upsample_kernel(
    const NormMap<const scalar_t> input, Global<const double> table, const ByChannel<accum_t<scalar_t>> by_channel,
    Global<double> statistics,  // (N, groups, 2)
    Global<scalar_t> output,    // (N, 2 H, 2 W, C)
    const NormShape shape, const Parts parts) {
    using real_t = accum_t<scalar_t>;
    SPATIALFLOW_SHARED(double, shared, 2 * kSlice<kWidth>);
    const Place<kWidth> place(shape, parts.blocks);
    collect_statistics(input, table, shape, place, place.block == 0, shared, statistics);
    const int column = place.block % parts.column_blocks * kPixelLanes + place.pixel_lane;
    if (!place.has_channels(shape) || column >= 2 * shape.width) {
        return;
    }
    AffineVector<real_t, kWidth> affine;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
        const int c = place.channel + i, at = (c / shape.group_channels - place.first_group) * 2;
        affine.of[i] = group_affine<real_t>(
            {shared[at], shared[at + 1]}, by_channel.weight_of(c), by_channel.bias_of(c));
    }
    const DoubledCell<real_t> cell = doubled_cell<real_t>(column, shape.width);
    const Global<const scalar_t> source = input.data + (place.image * input.stride_n + place.channel);
    // A row of the input, normalized, at the place of the column.
    const auto at_row = [&](int y, real_t(&result)[kWidth]) {
        const Global<const scalar_t> row = source + y * input.stride_h;
        const auto low = load_channels<kWidth>(row + cell.low * input.stride_w);
        const auto high = load_channels<kWidth>(row + cell.high * input.stride_w);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
            result[i] = relu<real_t>(affine.before_relu(i, low.value(i))) * cell.low_weight +
                        relu<real_t>(affine.before_relu(i, high.value(i))) * cell.high_weight;
        }
    };
    const int begin = place.block / parts.column_blocks * parts.extent;
    const int end = begin + parts.extent < 2 * shape.height ? begin + parts.extent : 2 * shape.height;
    Global<scalar_t> target = output +
        ((static_cast<int64_t>(place.image) * 2 * shape.height + begin) * 2 * shape.width + column) * shape.channels +
        place.channel;
    DoubledWalk<real_t> walk(begin, shape.height);
    real_t above[kWidth], below[kWidth];
    at_row(walk.low, above);
    at_row(walk.high(), below);
    int low = walk.low;
    for (int y = begin; y < end; ++y) {
        if (walk.low != low) {
            low = walk.low;
#pragma unroll
            for (int i = 0; i < kWidth; ++i) {
                above[i] = below[i];
            }
            at_row(walk.high(), below);
        }
        const real_t weight = walk.high_weight();
        Vec<scalar_t, kWidth> result;
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
            store(result[i], above[i] * (real_t(1) - weight) + below[i] * weight);
        }
        store_vector(target, result);
        target += static_cast<int64_t>(2) * shape.width * shape.channels;
        walk.step();
    }
}

// ---- backward ----

// Sums by channel of one block: of g and g * (x - shift), where g is the gradient by what ReLU takes.
template <typename real_t, int kWidth>
struct GradientSums {
    real_t gradient[kWidth] = {}, product[kWidth] = {};

    // Clears what ReLU stops, and adds the rest.
    template <typename scalar_t>
    __device__ __forceinline__ void add(
        const AffineVector<real_t, kWidth>& affine, const RawChannels<scalar_t, kWidth>& input, real_t (&g)[kWidth]) {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
            const real_t x = input.value(i);
            g[i] = affine.before_relu(i, x) <= real_t(0) ? real_t(0) : g[i];  // NaN passes
            gradient[i] += g[i];
            product[i] += g[i] * (x - affine.of[i].shift);
        }
    }
};

template <typename real_t, int kWidth>
__device__ __forceinline__ AffineVector<real_t, kWidth> affine_of(
    Global<const double> statistics, const ByChannel<real_t>& by_channel, const NormShape& shape,
    const Place<kWidth>& place) {
    AffineVector<real_t, kWidth> affine;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
        const int c = place.channel + i;
        const int64_t at = (static_cast<int64_t>(place.image) * shape.groups + c / shape.group_channels) * 2;
        affine.of[i] = group_affine<real_t>(
            {statistics[at], statistics[at + 1]}, by_channel.weight_of(c), by_channel.bias_of(c));
    }
    return affine;
}

// The transpose of upsampling: a thread goes down a column of the input, sums each row of the incoming gradient over
// the pixels that read the column, and adds it to the two cells that it lies between.
template <typename scalar_t, int kWidth>
__device__ __forceinline__ void gather_column(
    const NormMap<const scalar_t>& grad_output, const NormMap<const scalar_t>& input,
    Global<accum_t<scalar_t>> masked,  // (N, H, W, C)
    const AffineVector<accum_t<scalar_t>, kWidth>& affine, const NormShape& shape, const Parts& parts,
    const Place<kWidth>& place, GradientSums<accum_t<scalar_t>, kWidth>& sums) {
    using real_t = accum_t<scalar_t>;
    const int column = place.block % parts.column_blocks * kPixelLanes + place.pixel_lane;
    if (column >= shape.width) {
        return;
    }
    const int begin = place.block / parts.column_blocks * parts.extent;
    const int end = begin + parts.extent < shape.height ? begin + parts.extent : shape.height;
    const int first_column = static_cast<int>(first_doubled(column - 1, shape.width));
    const int columns = static_cast<int>(first_doubled(column + 1, shape.width)) - first_column;
    real_t weights[kReaders];
#pragma unroll
    for (int r = 0; r < kReaders; ++r) {
        weights[r] = weight_of_cell(doubled_cell<real_t>(first_column + r, shape.width), column);
    }
    const Global<const scalar_t> source =
        input.data + (place.image * input.stride_n + column * input.stride_w + place.channel);
    const Global<const scalar_t> incoming =
        grad_output.data +
        (place.image * grad_output.stride_n + first_column * grad_output.stride_w + place.channel);
    const Global<real_t> target =
        masked + (static_cast<int64_t>(place.image) * shape.pixels() + column) * shape.channels + place.channel;
    real_t above[kWidth] = {}, below[kWidth] = {};  // of the rows walk.low and the next
    const auto finish = [&](int y, real_t(&g)[kWidth]) {
        if (y < begin || y >= end) {
            return;
        }
        sums.add(affine, load_channels<kWidth>(source + y * input.stride_h), g);
        const Global<real_t> pixel = target + static_cast<int64_t>(y) * shape.width * shape.channels;
        constexpr int kStore = kWidth < kWideElements<real_t> ? kWidth : kWideElements<real_t>;
#pragma unroll
        for (int i = 0; i < kWidth; i += kStore) {
            Vec<real_t, kStore> part;
#pragma unroll
            for (int j = 0; j < kStore; ++j) {
                part[j] = g[i + j];
            }
            store_vector(pixel + i, part);
        }
    };
    const int first_row = static_cast<int>(first_doubled(begin - 1, shape.height));
    const int end_row = static_cast<int>(first_doubled(end, shape.height));
    DoubledWalk<real_t> walk(first_row, shape.height);
    int low = walk.low;
    for (int y = first_row; y < end_row; ++y) {
        if (walk.low != low) {
            finish(low, above);
            low = walk.low;
#pragma unroll
            for (int i = 0; i < kWidth; ++i) {
                above[i] = below[i];
                below[i] = 0;
            }
        }
        RawChannels<scalar_t, kWidth> values[kReaders];
#pragma unroll
        for (int r = 0; r < kReaders; ++r) {
            if (r < columns) {
                values[r] = load_channels<kWidth>(incoming + (y * grad_output.stride_h + r * grad_output.stride_w));
            }
        }
        real_t row[kWidth] = {};
#pragma unroll
        for (int r = 0; r < kReaders; ++r) {
            if (r < columns) {
                values[r].add_to(row, weights[r]);
            }
        }
        const real_t weight = walk.high_weight();
        if (walk.high() == low) {  // the last cell
#pragma unroll
            for (int i = 0; i < kWidth; ++i) {
                above[i] += row[i] * (real_t(1) - weight) + row[i] * weight;
            }
        } else {
#pragma unroll
            for (int i = 0; i < kWidth; ++i) {
                above[i] += row[i] * (real_t(1) - weight);
                below[i] += row[i] * weight;
            }
        }
        walk.step();
    }
    finish(low, above);
    finish(low + 1, below);
}

template <typename scalar_t, bool kUpsample, int kWidth>
__global__ void __launch_bounds__(kThreads, kUpsample ? 1 : 2) group_norm_relu_gradient_sums_kernel(
    const NormMap<const scalar_t> grad_output, const NormMap<const scalar_t> input,
    Global<const double> statistics, const ByChannel<accum_t<scalar_t>> by_channel,
    Global<accum_t<scalar_t>> masked,  // (N, H, W, C), where upsampled
    Global<double> table,              // (N, blocks, C, 2)
    const NormShape shape, const Parts parts) {
    using real_t = accum_t<scalar_t>;
    constexpr int kChannels = kSlice<kWidth>;
    SPATIALFLOW_SHARED(double, of_warps, kWarps * 2 * kChannels);
    SPATIALFLOW_SHARED(double, total, 2 * kChannels);
    const Place<kWidth> place(shape, parts.blocks);
    GradientSums<real_t, kWidth> sums;
    if (place.has_channels(shape)) {
        const AffineVector<real_t, kWidth> affine = affine_of(statistics, by_channel, shape, place);
        if constexpr (kUpsample) {
            gather_column(grad_output, input, masked, affine, shape, parts, place, sums);
        } else {
            const int begin = place.block * parts.extent + place.pixel_lane;
            const int end = place.block + 1 < parts.blocks ? (place.block + 1) * parts.extent : shape.pixels();
            for (int first = begin; first < end; first += kTurns * kPixelLanes) {
                RawChannels<scalar_t, kWidth> values[kTurns], gradients[kTurns];
#pragma unroll
                for (int t = 0; t < kTurns; ++t) {
                    const int pixel = first + t * kPixelLanes;
                    if (pixel < end) {
                        values[t] = load_channels<kWidth>(pixel_of(input, shape, place.image, pixel) + place.channel);
                        gradients[t] =
                            load_channels<kWidth>(pixel_of(grad_output, shape, place.image, pixel) + place.channel);
                    }
                }
#pragma unroll
                for (int t = 0; t < kTurns; ++t) {
                    if (first + t * kPixelLanes < end) {
                        real_t g[kWidth];
#pragma unroll
                        for (int i = 0; i < kWidth; ++i) {
                            g[i] = gradients[t].value(i);
                        }
                        sums.add(affine, values[t], g);
                    }
                }
            }
        }
    }
    double gradient[kWidth], product[kWidth];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
        gradient[i] = sums.gradient[i];
        product[i] = sums.product[i];
    }
    sum_block(gradient, product, of_warps, total);
    const int c = place.slice * kChannels + static_cast<int>(threadIdx.x);
    if (static_cast<int>(threadIdx.x) < kChannels && c < shape.channels) {
        const int64_t row = static_cast<int64_t>(place.image) * parts.blocks + place.block;
        const double first = total[2 * threadIdx.x], second = total[2 * threadIdx.x + 1];
        store_vector(table + (row * shape.channels + c) * 2, Vec<double, 2>{{first, second}});
    }
}

// A warp per channel.
template <typename real_t>
__global__ void __launch_bounds__(kThreads) group_norm_relu_channel_sums_kernel(
    Global<const double> table,       // (N, blocks, C, 2)
    Global<const double> statistics,  // (N, groups, 2)
    Global<double> sums,              // (N, C, 2): of g and g * (x - mean) * rstd
    Global<real_t> grad_weight, Global<real_t> grad_bias, const NormShape shape, const int blocks) {
    const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarpSize;
    const int c = static_cast<int>(blockIdx.x) * kWarps + thread / kWarpSize;
    if (c >= shape.channels) {
        return;
    }
    double by_weight = 0, by_bias = 0;
    for (int image = 0; image < shape.batch; ++image) {
        double gradient = 0, product = 0;
        for (int block = lane; block < blocks; block += kWarpSize) {
            const Vec<double, 2> found =
                load_vector<2>(table + ((static_cast<int64_t>(image) * blocks + block) * shape.channels + c) * 2);
            gradient += found[0];
            product += found[1];
        }
        gradient = sum_lanes(gradient, 1);
        product = sum_lanes(product, 1);
        const int64_t group = static_cast<int64_t>(image) * shape.groups + c / shape.group_channels;
        const double mean = statistics[group * 2];
        product = normalized_product(
            gradient, product, static_cast<double>(static_cast<real_t>(mean)), {mean, statistics[group * 2 + 1]});
        if (lane == 0) {
            const int64_t at = static_cast<int64_t>(image) * shape.channels + c;
            store_vector(sums + at * 2, Vec<double, 2>{{gradient, product}});
        }
        by_weight += product;
        by_bias += gradient;
    }
    if (lane == 0) {
        grad_weight[c] = static_cast<real_t>(by_weight);
        grad_bias[c] = static_cast<real_t>(by_bias);
    }
}

// gradient_t: that of the features, or of what ReLU takes, kept by the sums (kMasked).
template <typename scalar_t, typename gradient_t, bool kMasked, int kWidth>
__global__ void __launch_bounds__(kThreads) group_norm_relu_input_gradient_kernel(
    const NormMap<const gradient_t> gradient, const NormMap<const scalar_t> input, Global<const double> statistics,
    const ByChannel<accum_t<scalar_t>> by_channel,
    Global<const double> sums,     // (N, C, 2)
    Global<scalar_t> grad_input,   // (N, H, W, C)
    const NormShape shape, const Parts parts) {
    using real_t = accum_t<scalar_t>;
    SPATIALFLOW_SHARED(double, means, 2 * kSlice<kWidth>);
    const Place<kWidth> place(shape, parts.blocks);
    const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarpSize;
    for (int group = place.first_group + thread / kWarpSize; group < place.end_group; group += kWarps) {
        double mean_gradient = 0, mean_product = 0;
        for (int i = lane; i < shape.group_channels; i += kWarpSize) {
            const int c = group * shape.group_channels + i;
            const Vec<double, 2> found =
                load_vector<2>(sums + (static_cast<int64_t>(place.image) * shape.channels + c) * 2);
            mean_gradient += by_channel.weight_of(c) * found[0];
            mean_product += by_channel.weight_of(c) * found[1];
        }
        mean_gradient = sum_lanes(mean_gradient, 1) / shape.group_size();
        mean_product = sum_lanes(mean_product, 1) / shape.group_size();
        if (lane == 0) {
            means[(group - place.first_group) * 2] = mean_gradient;
            means[(group - place.first_group) * 2 + 1] = mean_product;
        }
    }
    __syncthreads();
    if (!place.has_channels(shape)) {
        return;
    }
    const AffineVector<real_t, kWidth> affine = affine_of(statistics, by_channel, shape, place);
    GroupGradient<real_t> factors[kWidth];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
        const int c = place.channel + i, group = c / shape.group_channels, at = (group - place.first_group) * 2;
        const int64_t of_group = (static_cast<int64_t>(place.image) * shape.groups + group) * 2;
        factors[i] = group_gradient<real_t>(
            {statistics[of_group], statistics[of_group + 1]}, by_channel.weight_of(c), means[at], means[at + 1]);
    }
    constexpr int kLoad = kWidth < kWideElements<gradient_t> ? kWidth : kWideElements<gradient_t>;
    const int begin = place.block * parts.extent + place.pixel_lane;
    const int end = place.block + 1 < parts.blocks ? (place.block + 1) * parts.extent : shape.pixels();
    const Global<scalar_t> target =
        grad_input + (static_cast<int64_t>(place.image) * shape.pixels() * shape.channels + place.channel);
    for (int pixel = begin; pixel < end; pixel += kPixelLanes) {
        Vec<scalar_t, kWidth> value = load_vector<kWidth>(pixel_of(input, shape, place.image, pixel) + place.channel);
        const Global<const gradient_t> incoming = pixel_of(gradient, shape, place.image, pixel) + place.channel;
        Vec<gradient_t, kLoad> loaded[kWidth / kLoad];
#pragma unroll
        for (int i = 0; i < kWidth / kLoad; ++i) {
            loaded[i] = load_vector<kLoad>(incoming + i * kLoad);
        }
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
            const real_t x = load(value[i]);
            real_t g = load(loaded[i / kLoad][i % kLoad]);
            if (!kMasked) {
                g = affine.before_relu(i, x) <= real_t(0) ? real_t(0) : g;
            }
            store(value[i], (x - factors[i].shift) * factors[i].by_input +
                                (g * factors[i].by_gradient + factors[i].constant));
        }
        store_vector(target + static_cast<int64_t>(pixel) * shape.channels, value);
    }
}

// ---- host --------------------------------------------------------------------------------------------------------

template <typename scalar_t>
NormMap<const scalar_t> map_of(const Tensor& tensor) {
    return {data<scalar_t>(tensor), stride_of(tensor, 0), stride_of(tensor, 2), stride_of(tensor, 3)};
}

// Pixels in order, as many in a block as leave kBlocks of them, at most `most` for a thread.
Parts pixel_parts(const NormShape& shape, int64_t most) {
    const int64_t pixels = shape.pixels(), slices = static_cast<int64_t>(shape.batch) * shape.slices;
    const int64_t wanted = ceil_div(pixels, ceil_div(kBlocks, slices));
    const int64_t extent = std::min(ceil_div(wanted, kPixelLanes), most) * kPixelLanes;
    return {static_cast<int>(ceil_div(pixels, extent)), static_cast<int>(extent), 0};
}

// Columns by segments of `height` rows.
Parts column_parts(const NormShape& shape, int64_t height, int64_t width) {
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
    check(fits && input.size(2) * input.size(3) < kMost,
          "group_norm_relu: sizes of input and pixels of an image must be below 2^29 on CUDA, got ",
          shape_string(input));
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
        shape.pieces =
            std::max(shape.pieces, (begin + shape.group_channels - 1) / kChannels - begin / kChannels + 1);
    }
    shape.eps = eps;
    const Parts sums = pixel_parts(shape, kGroupNormRun);
    shape.sum_blocks = sums.blocks;
    shape.sum_pixels = sums.extent;
    return shape;
}

dim3 grid_of(const NormShape& shape, const Parts& parts) {
    return dim3(grid_size("group_norm_relu", static_cast<int64_t>(shape.batch) * shape.slices * parts.blocks));
}

// Calls run(width) with the channels of a vector: 16 bytes if all pixels of `tensors` are made of those, else one.
template <typename scalar_t, typename Run>
void dispatch_width(std::initializer_list<const Tensor*> tensors, const Run& run) {
    constexpr int kWidth = kWideElements<scalar_t>;
    const auto is_wide = [](const Tensor* tensor) {
        return tensor->size(1) % kWidth == 0 && stride_of(*tensor, 0) % kWidth == 0 &&
               stride_of(*tensor, 2) % kWidth == 0 && stride_of(*tensor, 3) % kWidth == 0 &&
               is_aligned(tensor->const_data_ptr(), 16);
    };
    if (std::all_of(tensors.begin(), tensors.end(), is_wide)) {
        run(std::integral_constant<int, kWidth>{});
    } else {
        run(std::integral_constant<int, 1>{});
    }
}

std::optional<Tensor> in_dtype(const std::optional<Tensor>& tensor, ScalarType dtype) {
    return tensor ? std::optional<Tensor>(contiguous_as(*tensor, dtype)) : std::nullopt;
}

template <typename real_t>
ByChannel<real_t> by_channel_of(const std::optional<Tensor>& weight, const std::optional<Tensor>& bias) {
    const auto pointer = [](const std::optional<Tensor>& tensor) {
        return tensor ? data<real_t>(*tensor) : Global<const real_t>(nullptr);
    };
    return {pointer(weight), pointer(bias)};
}

std::tuple<Tensor, Tensor> group_norm_relu_cuda(
    const Tensor& input, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, int64_t num_groups,
    double eps, bool upsample) {
    check_group_norm_relu(input, weight, bias, num_groups, eps);
    const DeviceScope device(input);
    const int64_t factor = upsample ? 2 : 1;
    Tensor statistics = empty_like_sized(input, {input.size(0), num_groups, 2}, ScalarType::Double);
    const MemoryFormat format = memory_format_of(input);
    const Tensor output = empty_like_sized(
        input, {input.size(0), input.size(1), factor * input.size(2), factor * input.size(3)}, std::nullopt,
        input.numel() ? MemoryFormat::ChannelsLast : format);
    if (input.numel() == 0) {
        return {output, torch::stable::zero_(statistics)};
    }
    const Tensor source = channels_adjacent(input);
    const ScalarType accumulated = accum_dtype(input.scalar_type());
    const std::optional<Tensor> scale = in_dtype(weight, accumulated), shift = in_dtype(bias, accumulated);
    dispatch_floating("group_norm_relu", input.scalar_type(), [&](auto zero) {
        using scalar_t = decltype(zero);
        dispatch_width<scalar_t>({&source, &output}, [&](auto width) {
            constexpr int kWidth = decltype(width)::value;
            const NormShape shape = shape_of<kWidth>(source, num_groups, eps);
            const Tensor table = empty_like_sized(
                input, {shape.batch, shape.groups, shape.sum_blocks, shape.pieces, 2}, ScalarType::Double);
            const NormMap<const scalar_t> map = map_of<scalar_t>(source);
            launch<group_norm_sums_kernel<scalar_t, kWidth>>(
                grid_of(shape, {shape.sum_blocks, shape.sum_pixels, 0}), dim3(kThreads), 0, device.stream(), map,
                mutable_data<double>(table), shape);
            const ByChannel<accum_t<scalar_t>> by_channel = by_channel_of<accum_t<scalar_t>>(scale, shift);
            if (upsample) {
                const Parts parts = column_parts(shape, 2 * shape.height, 2 * shape.width);
                launch<group_norm_relu_upsample_kernel<scalar_t, kWidth>>(
                    grid_of(shape, parts), dim3(kThreads), 0, device.stream(), map, data<double>(table), by_channel,
                    mutable_data<double>(statistics), mutable_data<scalar_t>(output), shape, parts);
            } else {
                const Parts parts = pixel_parts(shape, kGroupNormRun);
                launch<group_norm_relu_kernel<scalar_t, kWidth>>(
                    grid_of(shape, parts), dim3(kThreads), 0, device.stream(), map, data<double>(table), by_channel,
                    mutable_data<double>(statistics), mutable_data<scalar_t>(output), shape, parts);
            }
        });
    });
    return {to_contiguous(output, format), statistics};
}

std::tuple<Tensor, Tensor, Tensor> group_norm_relu_backward_cuda(
    const Tensor& grad_output, const Tensor& input, const Tensor& statistics, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& bias, int64_t num_groups, bool upsample) {
    check_group_norm_relu_backward(grad_output, input, statistics, weight, bias, num_groups, upsample);
    const DeviceScope device(input);
    const ScalarType dtype = input.scalar_type(), accumulated = accum_dtype(dtype);
    const MemoryFormat format = memory_format_of(input);
    const std::vector<int64_t> size(input.sizes().begin(), input.sizes().end());
    const Tensor grad_input =
        empty_like_sized(input, size, std::nullopt, input.numel() ? MemoryFormat::ChannelsLast : format);
    Tensor grad_weight = empty_like_sized(input, {input.size(1)}, accumulated);
    Tensor grad_bias = empty_like_sized(input, {input.size(1)}, accumulated);
    if (input.numel() == 0) {
        torch::stable::zero_(grad_weight);
        torch::stable::zero_(grad_bias);
    } else {
        const Tensor source = channels_adjacent(input), gradient = channels_adjacent(as_dtype(grad_output, dtype));
        const Tensor own_statistics = to_contiguous(statistics);
        const std::optional<Tensor> scale = in_dtype(weight, accumulated), shift = in_dtype(bias, accumulated);
        dispatch_floating("group_norm_relu_backward", dtype, [&](auto zero) {
            using scalar_t = decltype(zero);
            using real_t = accum_t<scalar_t>;
            // The gradient by what ReLU takes, where it is not the incoming one masked.
            const std::optional<Tensor> masked = upsample
                ? std::optional<Tensor>(empty_like_sized(input, size, accumulated, MemoryFormat::ChannelsLast))
                : std::nullopt;
            dispatch_width<scalar_t>({&source, &gradient, &grad_input}, [&](auto width) {
                constexpr int kWidth = decltype(width)::value;
                const NormShape shape = shape_of<kWidth>(source, num_groups, 0);
                const ByChannel<real_t> by_channel = by_channel_of<real_t>(scale, shift);
                const Parts parts = upsample ? column_parts(shape, shape.height, shape.width)
                                             : pixel_parts(shape, kGroupNormRun);
                const Tensor table =
                    empty_like_sized(input, {shape.batch, parts.blocks, shape.channels, 2}, ScalarType::Double);
                const Tensor sums = empty_like_sized(input, {shape.batch, shape.channels, 2}, ScalarType::Double);
                const auto run_sums = [&](auto upsampled, Global<real_t> kept) {
                    launch<group_norm_relu_gradient_sums_kernel<scalar_t, decltype(upsampled)::value, kWidth>>(
                        grid_of(shape, parts), dim3(kThreads), 0, device.stream(), map_of<scalar_t>(gradient),
                        map_of<scalar_t>(source), data<double>(own_statistics), by_channel, kept,
                        mutable_data<double>(table), shape, parts);
                };
                if (masked) {
                    run_sums(std::true_type{}, mutable_data<real_t>(*masked));
                } else {
                    run_sums(std::false_type{}, Global<real_t>(nullptr));
                }
                launch<group_norm_relu_channel_sums_kernel<real_t>>(
                    dim3(grid_size("group_norm_relu", ceil_div(shape.channels, kWarps))), dim3(kThreads), 0,
                    device.stream(), data<double>(table), data<double>(own_statistics), mutable_data<double>(sums),
                    mutable_data<real_t>(grad_weight), mutable_data<real_t>(grad_bias), shape, parts.blocks);
                const Parts pixels = pixel_parts(shape, kGroupNormRun);
                const auto run_gradient = [&](auto is_masked, const auto& map) {
                    constexpr bool kMasked = decltype(is_masked)::value;
                    using gradient_t = std::conditional_t<kMasked, real_t, scalar_t>;
                    launch<group_norm_relu_input_gradient_kernel<scalar_t, gradient_t, kMasked, kWidth>>(
                        grid_of(shape, pixels), dim3(kThreads), 0, device.stream(), map, map_of<scalar_t>(source),
                        data<double>(own_statistics), by_channel, data<double>(sums),
                        mutable_data<scalar_t>(grad_input), shape, pixels);
                };
                if (masked) {
                    run_gradient(std::true_type{}, map_of<real_t>(*masked));
                } else {
                    run_gradient(std::false_type{}, map_of<scalar_t>(gradient));
                }
            });
        });
    }
    return {to_contiguous(grad_input, format), as_dtype(grad_weight, weight ? weight->scalar_type() : dtype),
            as_dtype(grad_bias, bias ? bias->scalar_type() : dtype)};
}

}  // namespace
}  // namespace spatialflow

SPATIALFLOW_DEVICE_IMPL(library) {
    library.impl("group_norm_relu", TORCH_BOX(&spatialflow::group_norm_relu_cuda));
    library.impl("_group_norm_relu_backward", TORCH_BOX(&spatialflow::group_norm_relu_backward_cuda));
}
