// SPDX-License-Identifier: Apache-2.0
//
// Code shared by the forward and backward pass of deformable convolution: sampling positions, column gather, packed
// weights (device), and operands (host).
//
// A cell is a position of the input map with all its channels. Columns, as in im2col, are the sampled values of an
// output pixel by tap and channel. Outputs are output channels.
//
// A run is a block of adjacent input channels with the same weight group and the same offset group. All runs have the
// same length, `run` = gcd(C / groups, C / offset_groups) channels. A run contributes taps * run values to the sum of
// an output, in the order (tap, channel of the run). `flat` is an index into these values. Packed weights have the
// order (run, tap, channel of the run). The outputs of the group are adjacent, padded with zeros to whole 16-byte
// items. If deform_chunk allows, the forward pass splits runs into chunks of 128 bytes. Its packed weights then have
// the order (chunk, tap, channel of the chunk). It processes all taps of a chunk before the next chunk, so that a cell
// that several taps read is still in the cache.
#pragma once

#include "common/deform_conv2d.h"
#include "cuda/conv_operand.cuh"
#include "cuda/launch.h"
#include "cuda/tile_product.cuh"
#include "ops/deform_conv2d.h"

#include <cstring>

namespace spatialflow {

template <typename value_t>
struct StridedImages {  // (N, C, H, W)
    Global<const value_t> data;
    int64_t stride[4];

    __device__ __forceinline__ value_t at(int n, int c, int y, int x) const {
        return data[n * stride[0] + y * stride[2] + x * stride[3] + c * stride[1]];
    }
};

template <typename scalar_t>
struct DeformProblem {
    Global<const scalar_t> input;                                   // (N, H, W, C)
    StridedImages<accum_t<scalar_t>> offset, mask, offset_tangent;  // mask, offset_tangent: null for none
    int stride[2], padding[2], dilation[2];
    int pixels;  // of the output: N * H_out * W_out
    int height, width, out_height, out_width, kernel_width, taps;
    int channels, groups, group_channels, offset_group_channels, run, chunk;
    unsigned cell_bytes, sums_cell_bytes;  // of all channels of a cell, in scalar_t and in accum_t
    int out_channels, group_outputs, packed_outputs;
    bool relu;  // only in the forward pass
};

// Order of packed weights and of the partial sums of their gradient, (C * taps, packed_outputs).
struct WeightOrder {
    int taps, run, group_channels, group_outputs, packed_outputs;

    // Row of a weight in the packed order; `value` is an index into (C / groups, taps) of the group.
    __device__ __forceinline__ int row(int group, int value) const {
        const int channel = value / taps, tap = value - channel * taps, first = channel / run * run;
        return (group * group_channels + first) * taps + tap * run + channel - first;
    }

    // Index into (O, C / groups, taps) of a packed weight, or -1 for padding.
    __device__ __forceinline__ int weight_index(int index) const {
        const int row = index / packed_outputs, output = index - row * packed_outputs;
        const int tap = row / run % taps, channel = row / run / taps * run + row % run;
        const int o = channel / group_channels * group_outputs + output;
        return output < group_outputs ? (o * group_channels + channel % group_channels) * taps + tap : -1;
    }
};

// ---- device ------------------------------------------------------------------------------------------------------

// Pointer to a channel of a cell; `base` points to the channel in cell 0. Unsigned offsets make the address a single
// multiply-add.
template <typename T>
__device__ __forceinline__ Global<T> in_cell(Global<T> base, int cell, unsigned cell_bytes) {
    using Byte = std::conditional_t<std::is_const_v<T>, const unsigned char, unsigned char>;
    const uint64_t bytes = static_cast<uint64_t>(static_cast<unsigned>(cell)) * cell_bytes;
    return pointer_cast<T>(pointer_cast<Byte>(base) + static_cast<int64_t>(bytes));
}

// Position of an output pixel. For an index beyond the last pixel, it is the position of the last pixel, and `present`
// is false.
struct OutputPixel {
    int image, y, x;
    bool present;
};

template <typename scalar_t>
__device__ __forceinline__ OutputPixel output_pixel(const DeformProblem<scalar_t>& problem, int pixel) {
    const bool present = pixel < problem.pixels;
    pixel = present ? pixel : problem.pixels - 1;
    const int row = pixel / problem.out_width, image = row / problem.out_height;
    return {image, row - image * problem.out_height, pixel - row * problem.out_width, present};
}

// Return the output pixel at `index` in the order of tiles, as an index over all images. This order goes through strips
// of eight rows, column by column, so that the taps of a tile share input cells.
template <typename scalar_t>
__device__ __forceinline__ int tiled_pixel(const DeformProblem<scalar_t>& problem, int index) {
    constexpr int kStripRows = 8;
    const int image_pixels = problem.out_height * problem.out_width, image_pixel = index % image_pixels;
    const int top = image_pixel / problem.out_width / kStripRows * kStripRows,
              position = image_pixel - top * problem.out_width;
    const int rows = problem.out_height - top < kStripRows ? problem.out_height - top : kStripRows;
    const int x = position / rows;
    return index - position + (position - x * rows) * problem.out_width + x;
}

// Offset and mask of a tap of an output pixel.
template <typename real_t>
struct TapOperands {
    real_t offset_y, offset_x, mask;

    template <typename scalar_t>
    __device__ __forceinline__ void read(
        const DeformProblem<scalar_t>& problem, const OutputPixel& output, int offset_group, int tap) {
        const int index = offset_group * problem.taps + tap;
        offset_y = problem.offset.at(output.image, 2 * index, output.y, output.x);
        offset_x = problem.offset.at(output.image, 2 * index + 1, output.y, output.x);
        mask = problem.mask.data ? problem.mask.at(output.image, index, output.y, output.x) : real_t(1);
    }
};

// Sample of a tap of an output pixel. The sample reads at least one cell.
template <typename real_t>
struct DeformSample {
    DeformTap<real_t> tap;
    int first_cell;  // index over all images of cell (0, 0) of the image
    real_t mask, tangent_y, tangent_x;
};

// Compute the sample of a tap. Return false if the sample reads no cell. In this case the pixel does not exist, the
// position is too far outside the map (deform_tap), or offset or mask is not finite.
template <typename scalar_t, typename real_t>
__device__ __forceinline__ bool deform_sample(
    const DeformProblem<scalar_t>& problem, const OutputPixel& output, int offset_group, int tap,
    const TapOperands<real_t>& operands, DeformSample<real_t>& sample) {
    if (!output.present) {
        return false;
    }
    const int kernel_y = tap / problem.kernel_width, kernel_x = tap - kernel_y * problem.kernel_width;
    const real_t y =
        real_t(output.y * problem.stride[0] - problem.padding[0] + kernel_y * problem.dilation[0]) + operands.offset_y;
    const real_t x =
        real_t(output.x * problem.stride[1] - problem.padding[1] + kernel_x * problem.dilation[1]) + operands.offset_x;
    sample.mask = operands.mask;
    if (!deform_tap(y, x, problem.height, problem.width, sample.tap) || !(sample.mask - sample.mask == real_t(0))) {
        return false;
    }
    sample.first_cell = output.image * problem.height * problem.width;
    if (problem.offset_tangent.data) {
        const int index = offset_group * problem.taps + tap;
        sample.tangent_y = problem.offset_tangent.at(output.image, 2 * index, output.y, output.x);
        sample.tangent_x = problem.offset_tangent.at(output.image, 2 * index + 1, output.y, output.x);
    }
    return true;
}

// Compute the weights of the corners, without the mask: the sample is the sum over corners of values[corner] *
// input[corner]. With an offset tangent, the derivative along the tangent replaces the sample.
template <typename scalar_t, typename real_t>
__device__ __forceinline__ void sample_values(
    const DeformProblem<scalar_t>& problem, const DeformSample<real_t>& sample, real_t (&values)[4]) {
    if (problem.offset_tangent.data) {
        deform_tangent_values(sample.tap, sample.tangent_y, sample.tangent_x, values);
    } else {
        deform_values(sample.tap, values);
    }
}

// Compute the derivatives of the weights of sample_values w.r.t. the offset.
template <typename scalar_t, typename real_t>
__device__ __forceinline__ void sample_slopes(
    const DeformProblem<scalar_t>& problem, const DeformSample<real_t>& sample, real_t (&slope_y)[4],
    real_t (&slope_x)[4]) {
    if (problem.offset_tangent.data) {
        deform_tangent_slopes(sample.tangent_y, sample.tangent_x, slope_y, slope_x);
    } else {
        deform_slopes(sample.tap, slope_y, slope_x);
    }
}

// Table in shared memory of the taps of a tile's pixels: the four cells that each tap reads, and their weights. With
// `count` positions of pixels, entry slot * count + position is tap first_tap + slot of the pixel at `position`.
template <typename real_t, int kEntries>
class TapTable {
public:
    static constexpr int kSize = kEntries * 4 * static_cast<int>(sizeof(real_t) + sizeof(int)) / sizeof(real_t);

    __device__ __forceinline__ explicit TapTable(Shared<real_t> memory)
        : weights_(memory), cells_(pointer_cast<int>(memory + kEntries * 4)) {}

    // Fill the table for kCount positions with the output pixels pixel(position), as indices over all images.
    template <int kCount, int kThreads = kProductThreads, typename scalar_t, typename Pixel>
    __device__ __forceinline__ void fill_tile(
        const DeformProblem<scalar_t>& problem, int offset_group, int first_tap, int slots, Pixel pixel) const {
        // A thread has the same position in all its slots. It first stores the operands in place of the weights, so
        // that loads of three taps are in flight at once.
        constexpr int kStep = kThreads / kCount, kInFlight = 3;
        static_assert(kThreads % kCount == 0, "all positions have the same number of threads");
        const int position = static_cast<int>(threadIdx.x) % kCount;
        const int first_slot = static_cast<int>(threadIdx.x) / kCount;
        const OutputPixel output = output_pixel(problem, pixel(position));
        for (int first = first_slot; first < slots; first += kStep * kInFlight) {
            TapOperands<real_t> operands[kInFlight];
#pragma unroll
            for (int i = 0; i < kInFlight; ++i) {
                const int slot = first + i * kStep;
                operands[i].read(problem, output, offset_group, first_tap + (slot < slots ? slot : first));
            }
#pragma unroll
            for (int i = 0; i < kInFlight; ++i) {
                const int slot = first + i * kStep, entry = slot * kCount + position;
                if (slot < slots) {
                    weights_[entry * 4] = operands[i].offset_y;
                    weights_[entry * 4 + 1] = operands[i].offset_x;
                    weights_[entry * 4 + 2] = operands[i].mask;
                }
            }
        }
#pragma unroll 1
        for (int slot = first_slot; slot < slots; slot += kStep) {
            const int entry = slot * kCount + position;
            const TapOperands<real_t> operands = {
                weights_[entry * 4], weights_[entry * 4 + 1], weights_[entry * 4 + 2]};
            fill_entry(problem, output, offset_group, first_tap + slot, operands, entry);
        }
    }

    // Fill the table for `count` positions with the output pixels from first_pixel on.
    template <typename scalar_t>
    __device__ __forceinline__ void fill(
        const DeformProblem<scalar_t>& problem, int offset_group, int first_tap, int slots, int first_pixel,
        int count) const {
#pragma unroll 1
        for (int entry = static_cast<int>(threadIdx.x); entry < slots * count; entry += kProductThreads) {
            const int slot = entry / count, tap = first_tap + slot;
            const OutputPixel output = output_pixel(problem, first_pixel + entry - slot * count);
            TapOperands<real_t> operands;
            operands.read(problem, output, offset_group, tap);
            fill_entry(problem, output, offset_group, tap, operands, entry);
        }
    }

    // The four cells that an entry reads, as indices over all images; -1 for a cell that is not read.
    __device__ __forceinline__ Vec<int, 4> cells(int entry) const { return load_vector<4>(cells_ + entry * 4); }

    // Weights of the four cells, mask included.
    __device__ __forceinline__ void weights(int entry, real_t (&weights)[4]) const {
        constexpr int kItem = kVectorElements<real_t>;
#pragma unroll
        for (int corner = 0; corner < 4; corner += kItem) {
            const auto vector = load_vector<kItem>(weights_ + (entry * 4 + corner));
#pragma unroll
            for (int i = 0; i < kItem; ++i) {
                weights[corner + i] = vector[i];
            }
        }
    }

private:
    template <typename scalar_t>
    __device__ __forceinline__ void fill_entry(
        const DeformProblem<scalar_t>& problem, const OutputPixel& output, int offset_group, int tap,
        const TapOperands<real_t>& operands, int entry) const {
        DeformSample<real_t> sample;
        real_t values[4] = {};
        Vec<int, 4> cells = {{-1, -1, -1, -1}};
        real_t mask = 0;
        if (deform_sample(problem, output, offset_group, tap, operands, sample)) {
            sample_values(problem, sample, values);
            mask = sample.mask;
#pragma unroll
            for (int corner = 0; corner < 4; ++corner) {
                const int64_t cell = deform_corner<real_t>(sample.tap, corner, problem.height, problem.width);
                cells[corner] = cell < 0 ? -1 : sample.first_cell + static_cast<int>(cell);
            }
        }
        store_vector(cells_ + entry * 4, cells);
#pragma unroll
        for (int corner = 0; corner < 4; ++corner) {
            weights_[entry * 4 + corner] = mask * values[corner];
        }
    }

    Shared<real_t> weights_;  // (entry, corner)
    Shared<int> cells_;       // (entry, corner)
};

// Load 16 bytes of grad_output to shared memory: the outputs of a group from `output` on. Pixels from `end` on are
// zeros. With kWidth > 1, the load uses cp.async.
template <int kWidth, typename scalar_t>
__device__ __forceinline__ void load_outputs(
    const DeformProblem<scalar_t>& problem, Global<const scalar_t> grad_output, int pixel, int end, int group,
    int output, Shared<scalar_t> target) {
    constexpr int kItem = kVectorElements<scalar_t>;
    Global<const scalar_t> source =
        grad_output + (static_cast<int64_t>(pixel) * problem.out_channels + group * problem.group_outputs + output);
    if constexpr (kWidth == 1) {
        Vec<scalar_t, kItem> values{};
#pragma unroll
        for (int i = 0; i < kItem; ++i) {
            if (pixel < end && output + i < problem.group_outputs) {
                values[i] = source[i];
            }
        }
        store_vector(target, values);
    } else {
        cp_async_16(target, source, pixel < end && output < problem.group_outputs);
    }
}

// Maximum number of taps in a table, and entries of a table for the 64 pixels of a tile.
constexpr int kTableTaps = 9;
constexpr int kTableEntries = kTableTaps * kProductRows;

// Item of 16 bytes of the columns of a pixel. With kWidth > 1 all values of an item are of one tap. Its four cells are
// read by 16-byte loads, which are in flight between `begin` and `finish`.
template <typename scalar_t, int kWidth>
class ColumnItem {
    using real_t = accum_t<scalar_t>;
    static constexpr int kItem = kVectorElements<scalar_t>;
    static_assert(kWidth == kItem || kWidth == 1, "an item is one access or single elements");

public:
    // Begin an item with kWidth > 1: the channels from `channel` on, for an entry of the table.
    template <int kEntries>
    __device__ __forceinline__ void begin(
        const DeformProblem<scalar_t>& problem, const TapTable<real_t, kEntries>& table, int channel, int entry,
        bool present) {
        entry_ = entry;
        const Vec<int, 4> cells = table.cells(entry);
#pragma unroll
        for (int corner = 0; corner < 4; ++corner) {
            corners_[corner] = {};
            if (present && cells[corner] >= 0) {
                corners_[corner] = load_vector<4>(pointer_cast<const unsigned>(
                    in_cell<const scalar_t>(problem.input + channel, cells[corner], problem.cell_bytes)));
            }
        }
    }

    // Compute an item with kWidth 1: the values from flat to min(flat + kItem, limit) of the run that begins at
    // first_channel. The other values are zero. Slot 0 of the table is tap first_tap; `count` and `position` are those
    // of the table.
    template <int kEntries>
    __device__ __forceinline__ void begin_elements(
        const DeformProblem<scalar_t>& problem, const TapTable<real_t, kEntries>& table, int first_channel, int flat,
        int limit, int first_tap, int count, int position) {
#pragma unroll
        for (int i = 0; i < kItem; ++i) {
            real_t sum = 0;
            if (flat + i < limit) {
                const int tap = (flat + i) / problem.run, channel = first_channel + (flat + i) - tap * problem.run;
                const int entry = (tap - first_tap) * count + position;
                const Vec<int, 4> cells = table.cells(entry);
                real_t weights[4];
                table.weights(entry, weights);
#pragma unroll
                for (int corner = 0; corner < 4; ++corner) {
                    if (cells[corner] >= 0) {
                        const scalar_t value =
                            problem.input[static_cast<int64_t>(cells[corner]) * problem.channels + channel];
                        sum += weights[corner] * load(value);
                    }
                }
            }
            store(result_[i], sum);
        }
    }

    template <int kEntries>
    __device__ __forceinline__ Vec<scalar_t, kItem> finish(const TapTable<real_t, kEntries>& table) const {
        if constexpr (kWidth == 1) {
            return result_;
        } else {
            real_t weights[4], sums[kItem] = {};
            table.weights(entry_, weights);
#pragma unroll
            for (int corner = 0; corner < 4; ++corner) {
                Vec<scalar_t, kItem> values;
                std::memcpy(static_cast<void*>(&values), &corners_[corner], sizeof(values));
#pragma unroll
                for (int i = 0; i < kItem; ++i) {
                    sums[i] += weights[corner] * load(values[i]);
                }
            }
            Vec<scalar_t, kItem> result;
#pragma unroll
            for (int i = 0; i < kItem; ++i) {
                store(result[i], sums[i]);
            }
            return result;
        }
    }

private:
    Vec<unsigned, 4> corners_[4];  // as words, so that two 16-bit values take one register
    int entry_ = 0;
    Vec<scalar_t, kItem> result_;  // with kWidth 1, instead of corners_
};

// ---- host --------------------------------------------------------------------------------------------------------

// Order of packed weights (see the top of this file), for runs or chunks of `run` channels.
WeightOrder deform_weight_order(const DeformConvShape& shape, ScalarType dtype, int64_t run);

// Pack the weight (O, C / groups, kernel height, kernel width) in the order of deform_weight_order. Its values are
// converted for the algorithm by prepared(). The result is a vector of C * taps * packed_outputs values, then `tag`
// zeros.
Tensor pack_deform_weight(
    const char* op, const Tensor& weight, const DeformConvShape& shape, int64_t run, int64_t algorithm, int64_t tag,
    Stream stream);

// Return offset and mask in the dtype `accum`, with the sigmoid of the mask if `mask_sigmoid`. This takes at most one
// launch if both have the same dtype and its accum_dtype is `accum`.
std::pair<Tensor, std::optional<Tensor>> sample_operands(
    const char* op, const DeformConvShape& shape, ScalarType accum, const Tensor& offset,
    const std::optional<Tensor>& mask, bool mask_sigmoid, Stream stream);

// Maximum number of cells, of pixels and of weights, whose indices have 32 bits. Indices of feature values have 64
// bits.
constexpr int64_t kMaxDeformIndex = 0x7ffffeff;
void check_deform_weight_size(const char* op, const DeformConvShape& shape);
void check_deform_sizes(const char* op, const DeformConvShape& shape);  // of the weight, cells and pixels

// Number of adjacent channels that share weight group and offset group.
int64_t deform_run(const DeformConvShape& shape);

// Number of channels of a chunk. A chunk has 128 bytes if the items are vectorizable, whole chunks fill a run, and a
// table holds all taps. Otherwise a chunk is a whole run.
template <typename scalar_t>
int64_t deform_chunk(const DeformConvShape& shape, bool is_vectorizable) {
    constexpr int64_t kChunk = 8 * kVectorElements<scalar_t>;
    const int64_t run = deform_run(shape);
    return is_vectorizable && run % kChunk == 0 && shape.taps() <= kTableTaps ? kChunk : run;
}

// Launch grid with the tiles in x.
dim3 deform_grid(const char* op, int64_t tiles, int64_t y, int64_t z);

template <typename value_t>
StridedImages<value_t> strided_images(const Tensor& tensor) {
    return {
        data<value_t>(tensor),
        {stride_of(tensor, 0), stride_of(tensor, 1), stride_of(tensor, 2), stride_of(tensor, 3)}};
}

// Tensors of a call in the layouts of the kernels. They must outlive the launches.
class DeformOperands {
public:
    DeformOperands(
        const char* op, const DeformConvShape& shape, const DeformConvOptions& options, const Tensor& input,
        const Tensor& offset, const std::optional<Tensor>& mask, const std::optional<Tensor>& offset_tangent);

    template <typename scalar_t>
    DeformProblem<scalar_t> problem() const {
        using real_t = accum_t<scalar_t>;
        DeformProblem<scalar_t> problem{};
        problem.input = data<scalar_t>(input_);
        problem.offset = strided_images<real_t>(offset_);
        if (mask_) {
            problem.mask = strided_images<real_t>(*mask_);
        }
        if (offset_tangent_) {
            problem.offset_tangent = strided_images<real_t>(*offset_tangent_);
        }
        for (int axis = 0; axis < 2; ++axis) {
            problem.stride[axis] = static_cast<int>(options_.stride[axis]);
            problem.padding[axis] = static_cast<int>(options_.padding[axis]);
            problem.dilation[axis] = static_cast<int>(options_.dilation[axis]);
        }
        problem.pixels = static_cast<int>(shape_.batch * shape_.pixels());
        problem.height = static_cast<int>(shape_.height);
        problem.width = static_cast<int>(shape_.width);
        problem.out_height = static_cast<int>(shape_.out_height);
        problem.out_width = static_cast<int>(shape_.out_width);
        problem.kernel_width = static_cast<int>(shape_.kernel_width);
        problem.taps = static_cast<int>(shape_.taps());
        problem.channels = static_cast<int>(shape_.channels);
        problem.groups = static_cast<int>(shape_.groups);
        problem.group_channels = static_cast<int>(shape_.group_channels());
        problem.offset_group_channels = static_cast<int>(shape_.offset_group_channels());
        problem.run = static_cast<int>(deform_run(shape_));
        problem.chunk = static_cast<int>(deform_chunk<scalar_t>(shape_, is_vectorizable<scalar_t>()));
        problem.cell_bytes = static_cast<unsigned>(shape_.channels * sizeof(scalar_t));
        problem.sums_cell_bytes = static_cast<unsigned>(shape_.channels * sizeof(real_t));
        problem.out_channels = static_cast<int>(shape_.out_channels);
        problem.group_outputs = static_cast<int>(shape_.group_outputs());
        problem.packed_outputs = deform_weight_order(shape_, input_.scalar_type(), problem.run).packed_outputs;
        problem.relu = options_.relu;
        return problem;
    }

    // True if 16-byte items are aligned and never contain channels of two runs.
    template <typename scalar_t>
    bool is_vectorizable() const {
        return deform_run(shape_) % kVectorElements<scalar_t> == 0 && is_aligned(input_.const_data_ptr(), 16);
    }

private:
    DeformConvShape shape_;
    DeformConvOptions options_;
    Tensor input_, offset_;
    std::optional<Tensor> mask_, offset_tangent_;
};

// Call run(tile_columns, width) with two integral constants: the number of columns of a tile, and the elements per
// access. The tile is chosen for a product with `columns` columns.
template <typename scalar_t, int kMaxColumns, typename Run>
inline void with_tile(bool vectorized, int64_t columns, Run run) {
    constexpr int kWidth = kVectorElements<scalar_t>;
    if (!vectorized) {
        run(std::integral_constant<int, 64>{}, std::integral_constant<int, 1>{});
        return;
    }
    if constexpr (kMaxColumns >= 256) {
        if (columns > 128) {
            run(std::integral_constant<int, 256>{}, std::integral_constant<int, kWidth>{});
            return;
        }
    }
    if constexpr (kMaxColumns >= 128) {
        if (columns > 64) {
            run(std::integral_constant<int, 128>{}, std::integral_constant<int, kWidth>{});
            return;
        }
    }
    run(std::integral_constant<int, 64>{}, std::integral_constant<int, kWidth>{});
}

// Maximum number of columns of a tile, limited by registers. The sums of a 64 x 256 tile in float32 need 64 registers
// per thread; those of a 64 x 64 tile in float64 need 32. Operands of multiply-adds need more registers than those of a
// tensor-core product. Operands of Tf32x3 need twice as many as those of Tf32.
template <typename operand_t>
constexpr int kMaxTileColumns = std::is_same_v<operand_t, double>                                       ? 64
                                : std::is_same_v<operand_t, float> || std::is_same_v<operand_t, Tf32x3> ? 128
                                                                                                        : 256;

}  // namespace spatialflow
