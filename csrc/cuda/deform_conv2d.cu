// SPDX-License-Identifier: Apache-2.0
//
// Deformable convolution (v1, and v2 with a mask) on CUDA, as an implicit GEMM.
//
//   output[n, p, o] = bias[o] + sum over taps k and channels c of
//                     weight[k, c, o] * mask[n, k, p] * bilinear(input[n, :, :, c], position(p, k) + offset[n, k, p])
//
// input (N, H, W, C), copied if it has another layout; offset and mask by strides; output (N, H_out, W_out, O). A block
// computes 64 or 128 pixels by 64 to 256 outputs of a group: mma.sync with float32 sums, or multiply-adds (float64 and
// "direct": 64 pixels, at most 128 outputs). Columns are gathered into shared memory, 64 bytes per step, during the
// product of the previous step, and rounded to the operand type once. For few pixels, blocks split the steps of a tile,
// and another kernel adds their partial sums.
#include "cuda/deform_conv2d.cuh"

#include <algorithm>
#include <numeric>

#include "common/sigmoid.h"
#include "cuda/device_exp.cuh"
#include "cuda/sm90_deform_conv2d.h"

namespace spatialflow {
namespace {

// ---- device ------------------------------------------------------------------------------------------------------

template <typename operand_t, int kRows, int kColumns>
struct ForwardMemory {
    using scalar_t = element_t<operand_t>;
    using real_t = accum_t<scalar_t>;
    using Product = TileProduct<operand_t, kColumns, false, true, kRows>;
    using Table = TapTable<real_t, kTableTaps * kRows>;
    static constexpr int kThreads = 4 * kRows;
    static constexpr int kPixelsBegin = Table::kSize;  // in values of accum_t
    static constexpr int kLeftBegin = kPixelsBegin + kRows * static_cast<int>(sizeof(int)) / sizeof(real_t);
    static constexpr size_t kBytes = kLeftBegin * sizeof(real_t) + 2 * Product::kTilesSize * sizeof(scalar_t);
};

// Position of a thread's items of the columns in each step, with kWidth > 1, in the order of chunks, then taps.
struct ColumnCursor {
    int channel, chunk, entry;  // channel in the chunk; first channel of the chunk; entry of the table

    // `flat` is an index into a run with `taps` taps, in the order of chunks.
    __device__ __forceinline__
    ColumnCursor(int first_channel, int chunk_channels, int taps, int flat, int count, int position) {
        const int index = flat / (taps * chunk_channels), rest = flat - index * taps * chunk_channels;
        const int tap = rest / chunk_channels;
        channel = rest - tap * chunk_channels;
        chunk = first_channel + index * chunk_channels;
        entry = tap * count + position;
    }

    template <int kDepth>
    __device__ __forceinline__ void advance(int chunk_channels, int taps, int count) {
        channel += kDepth;
        while (channel >= chunk_channels) {
            channel -= chunk_channels;
            entry += count;
            if (entry >= taps * count) {
                entry -= taps * count;
                chunk += chunk_channels;
            }
        }
    }
};

// Store adjacent outputs of a pixel, of which the first `count` exist. With `adjacent` either all or none exist.
template <typename T, int kWidth>
__device__ __forceinline__ void store_outputs(
    Global<T> target, const Vec<T, kWidth>& values, bool adjacent, int count) {
    if (adjacent) {
        if (count > 0) {
            store_vector(target, values);
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
        if (i < count) {
            target[i] = values[i];
        }
    }
}

template <typename operand_t, int kRows, int kColumns, int kWidth>
__global__ void __launch_bounds__(4 * kRows, 128 / kRows) deform_conv2d_kernel(
    const __grid_constant__ DeformProblem<element_t<operand_t>> problem,
    Global<const element_t<operand_t>> packed,    // (C * taps, packed_outputs), by chunks
    Global<const element_t<operand_t>> bias,      // (O) or null
    Global<element_t<operand_t>> output,          // (pixels, O); not written if `parts` is given
    Global<accum_t<element_t<operand_t>>> parts,  // (parts, pixels, O) or null
    const int part_steps) {
    using scalar_t = element_t<operand_t>;
    using real_t = accum_t<scalar_t>;
    using Memory = ForwardMemory<operand_t, kRows, kColumns>;
    using Product = typename Memory::Product;
    constexpr int kItem = Product::kItem, kDepth = Product::kDepth, kThreads = Memory::kThreads;
    SPATIALFLOW_DYNAMIC_SHARED(real_t, shared);
    const typename Memory::Table table(shared);
    const Shared<int> pixels = pointer_cast<int>(shared + Memory::kPixelsBegin);
    const Shared<scalar_t> left = pointer_cast<scalar_t>(shared + Memory::kLeftBegin);
    const Shared<scalar_t> right = left + 2 * Product::kLeftSize;
    const int thread = static_cast<int>(threadIdx.x), first_output = static_cast<int>(blockIdx.y) * kColumns;
    const int group = static_cast<int>(blockIdx.z) % problem.groups;
    const int thread_row = thread / 4, thread_item = thread % 4 * kItem;
    constexpr int kRowItems = kColumns / kItem;
    const int thread_weight_row = thread / kRowItems, thread_weight = thread % kRowItems * kItem;
    const bool thread_weight_present = first_output + thread_weight < problem.packed_outputs;

    if (thread < kRows) {
        const int index = static_cast<int>(blockIdx.x) * kRows + thread;
        pixels[thread] = index < problem.pixels ? tiled_pixel(problem, index) : problem.pixels;
    }
    __syncthreads();
    Product product;
    int begin = static_cast<int>(blockIdx.z) / problem.groups *
                part_steps;  // first step of this block; then minus the steps already passed
    for (int run = 0; run < problem.group_channels; run += problem.run) {
        const int first_channel = group * problem.group_channels + run;
        for (int first_tap = 0; first_tap < problem.taps; first_tap += kTableTaps) {
            const int taps = problem.taps - first_tap < kTableTaps ? problem.taps - first_tap : kTableTaps;
            const int length = taps * problem.run, steps = (length + kDepth - 1) / kDepth;
            const int end = begin + part_steps;
            const int first = begin > 0 ? begin * kDepth : 0, last = (end < steps ? end : steps) * kDepth;
            begin -= steps;
            if (first >= last) {
                continue;
            }
            table.template fill_tile<kRows, kThreads>(
                problem, first_channel / problem.offset_group_channels, first_tap, taps,
                [&](int position) -> int { return pixels[position]; });
            __syncthreads();
            ColumnItem<scalar_t, kWidth> item;
            ColumnCursor cursor(first_channel, problem.chunk, taps, first + thread_item, kRows, thread_row);
            // A chunk has all taps, so the rows of its weights are adjacent.
            int weights = (first_channel * problem.taps + first_tap * problem.run + first + thread_weight_row) *
                              problem.packed_outputs +
                          first_output + thread_weight;
            run_steps<kDepth>(
                last - first,
                [&](int k, int buffer) {
                    load_items<kDepth, kColumns / kItem, kThreads>(
                        right + buffer * Product::kRightSize, Product::kRightRow,
                        [&](int row, int, Shared<scalar_t> target) {
                            cp_async_16(
                                target, packed + (weights + (row - thread_weight_row) * problem.packed_outputs),
                                thread_weight_present && k + row < length - first);
                        });
                    weights += kDepth * problem.packed_outputs;
                    if constexpr (kWidth == 1) {
                        const int flat = first_tap * problem.run;
                        item.begin_elements(
                            problem, table, first_channel, flat + first + k + thread_item, flat + length, first_tap,
                            kRows, thread_row);
                    } else {
                        item.begin(
                            problem, table, cursor.chunk + cursor.channel, cursor.entry,
                            k + thread_item < length - first);
                    }
                },
                [&](int buffer) {
                    product.accumulate(left + buffer * Product::kLeftSize, right + buffer * Product::kRightSize);
                },
                [&](int buffer) {
                    store_vector(
                        left + (buffer * Product::kLeftSize + thread_row * Product::kLeftRow + thread_item),
                        prepared(item.finish(table), operand_t{}));
                    cursor.advance<kDepth>(problem.chunk, taps, kRows);
                });
        }
    }
    using Sums = Vec<real_t, Product::kVisitColumns>;
    const bool adjacent = problem.group_outputs % Product::kVisitColumns == 0;
    const int first_channel = group * problem.group_outputs + first_output;
    const int outputs = problem.group_outputs - first_output;
    if (parts) {
        const int64_t first_pixel =
            static_cast<int64_t>(static_cast<int>(blockIdx.z) / problem.groups) * problem.pixels;
        product.for_each(
            [&](int row) {
                const int pixel = pixels[row];
                return pixel < problem.pixels ? parts + ((first_pixel + pixel) * problem.out_channels + first_channel)
                                              : Global<real_t>(nullptr);
            },
            [](int) { return 0; },
            [&](const Global<real_t>& target, int, int column, const Sums& sums) {
                if (target) {
                    store_outputs(target + column, sums, adjacent, outputs - column);
                }
            });
        return;
    }
    product.for_each(
        [&](int row) {
            const int pixel = pixels[row];
            return pixel < problem.pixels
                       ? output + (static_cast<int64_t>(pixel) * problem.out_channels + first_channel)
                       : Global<scalar_t>(nullptr);
        },
        [&](int column) {
            Sums biases{};
#pragma unroll
            for (int i = 0; i < Product::kVisitColumns; ++i) {
                if (bias && column + i < outputs) {
                    const scalar_t value = bias[first_channel + column + i];
                    biases[i] = load(value);
                }
            }
            return biases;
        },
        [&](const Global<scalar_t>& target, const Sums& biases, int column, const Sums& sums) {
            Vec<scalar_t, Product::kVisitColumns> results;
#pragma unroll
            for (int i = 0; i < Product::kVisitColumns; ++i) {
                store(results[i], rectified(sums[i] + biases[i], problem.relu));
            }
            if (target) {
                store_outputs(target + column, results, adjacent, outputs - column);
            }
        });
}

// Add the parts in order: kWidth outputs of a pixel per thread.
template <typename scalar_t, int kWidth>
__global__ void __launch_bounds__(256) deform_conv2d_add_parts_kernel(
    Global<const accum_t<scalar_t>> parts,                            // (num_parts, pixels, O)
    Global<const scalar_t> bias,                                      // (O) or null
    Global<scalar_t> output,                                          // (pixels, O)
    const int num_parts, const int out_channels, const int64_t size,  // size: pixels * O
    const bool relu) {
    using real_t = accum_t<scalar_t>;
    const int64_t index = (static_cast<int64_t>(blockIdx.x) * 256 + static_cast<int>(threadIdx.x)) * kWidth;
    if (index >= size) {
        return;
    }
    real_t sums[kWidth] = {};
#pragma unroll 4
    for (int part = 0; part < num_parts; ++part) {
        const auto values = load_vector<kWidth>(parts + (part * size + index));
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
            sums[i] += values[i];
        }
    }
    const int first = static_cast<int>(index % out_channels);
    Vec<scalar_t, kWidth> results;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
        if (bias) {
            const scalar_t value = bias[first + i];
            sums[i] += load(value);
        }
        store(results[i], rectified(sums[i], relu));
    }
    store_vector(output + index, results);
}

constexpr int kPackTile = 64;

// Transpose a tile of the weight, 64 values of 64 outputs of a group, and prepare its values for the operand type.
template <typename operand_t>
__global__ void __launch_bounds__(256) pack_deform_weight_kernel(
    Global<const element_t<operand_t>> weight,  // (O, C / groups, taps)
    Global<element_t<operand_t>> packed,        // (C * taps, packed_outputs)
    const WeightOrder order) {
    using scalar_t = element_t<operand_t>;
    constexpr int kTileRow = kPackTile + 4 / static_cast<int>(sizeof(scalar_t) < 4 ? sizeof(scalar_t) : 4);
    SPATIALFLOW_SHARED(scalar_t, tile, kPackTile * kTileRow);
    const int length = order.group_channels * order.taps, group = static_cast<int>(blockIdx.z);
    const int first_value = static_cast<int>(blockIdx.x) * kPackTile;
    const int first_output = static_cast<int>(blockIdx.y) * kPackTile;
    const int column = static_cast<int>(threadIdx.x) % kPackTile, first_row = static_cast<int>(threadIdx.x) / kPackTile;
#pragma unroll
    for (int i = first_row; i < kPackTile; i += 256 / kPackTile) {
        scalar_t value{};
        if (first_output + i < order.group_outputs && first_value + column < length) {
            value = weight[(group * order.group_outputs + first_output + i) * length + first_value + column];
        }
        tile[i * kTileRow + column] = prepared(value, operand_t{});
    }
    __syncthreads();
#pragma unroll
    for (int i = first_row; i < kPackTile; i += 256 / kPackTile) {
        if (first_output + column < order.packed_outputs && first_value + i < length) {
            const int row = order.row(group, first_value + i);
            packed[row * order.packed_outputs + first_output + column] = tile[column * kTileRow + i];
        }
    }
}

template <typename value_t>
struct SampleOperands {
    StridedImages<value_t> offset, mask;  // (N, 2 * samples, H, W) and (N, samples, H, W), or null
    int samples, height, width;           // samples: offset groups * taps
    bool sigmoid;                         // apply sigmoid to the mask
};

// Convert offsets and masks to accum_t, with the pixels of a channel adjacent. One value per thread.
template <typename value_t>
__global__ void __launch_bounds__(256) deform_operands_kernel(
    const __grid_constant__ SampleOperands<value_t> operands,
    Global<accum_t<value_t>> offset,  // (N, 2 * samples, pixels) or null
    Global<accum_t<value_t>> mask,    // (N, samples, pixels) or null
    const int64_t size) {             // of both together
    using real_t = accum_t<value_t>;
    const int64_t index = static_cast<int64_t>(blockIdx.x) * 256 + static_cast<int>(threadIdx.x);
    if (index >= size) {
        return;
    }
    const int pixels = operands.height * operands.width;
    const int offsets = offset ? 2 * operands.samples : 0, channels = offsets + (mask ? operands.samples : 0);
    const int64_t row = index / pixels;
    const int pixel = static_cast<int>(index - row * pixels), y = pixel / operands.width,
              x = pixel - y * operands.width;
    const int image = static_cast<int>(row / channels), channel = static_cast<int>(row % channels);
    if (channel < offsets) {
        const value_t value = operands.offset.at(image, channel, y, x);
        offset[(static_cast<int64_t>(image) * offsets + channel) * pixels + pixel] = load(value);
        return;
    }
    const int sample = channel - offsets;
    const value_t value = operands.mask.at(image, sample, y, x);
    const real_t factor = load(value);
    mask[(static_cast<int64_t>(image) * operands.samples + sample) * pixels + pixel] =
        operands.sigmoid ? sigmoid<real_t, DeviceExp>(factor) : factor;
}

// ---- host --------------------------------------------------------------------------------------------------------

// Return offset and mask in accum_dtype, with the sigmoid of the mask if `mask_sigmoid`: at most one launch.
std::pair<Tensor, std::optional<Tensor>> sample_operands(
    const char* op, const DeformConvShape& shape, ScalarType accum, const Tensor& offset,
    const std::optional<Tensor>& mask, bool mask_sigmoid, Stream stream) {
    const bool same_dtype =
        accum_dtype(offset.scalar_type()) == accum && (!mask || mask->scalar_type() == offset.scalar_type());
    const Tensor accum_offset = same_dtype ? offset : as_dtype(offset, accum);
    const std::optional<Tensor> accum_mask = same_dtype || !mask ? mask : std::make_optional(as_dtype(*mask, accum));
    if ((accum_offset.scalar_type() == accum && !mask_sigmoid) || accum_offset.numel() == 0) {
        return {accum_offset, accum_mask};
    }
    const int64_t samples = shape.offset_groups * shape.taps();
    const auto empty_channels_first = [&](const Tensor& like, int64_t channels) {
        return empty_like_sized(like, {shape.batch, channels, shape.out_height, shape.out_width}, accum);
    };
    const bool converts = accum_offset.scalar_type() != accum;
    const Tensor offsets = converts ? empty_channels_first(accum_offset, 2 * samples) : accum_offset;
    const std::optional<Tensor> factors =
        mask ? std::make_optional(empty_channels_first(*accum_mask, samples)) : std::nullopt;
    const int64_t size = (converts ? offsets.numel() : 0) + (factors ? factors->numel() : 0);
    dispatch_floating(op, accum_offset.scalar_type(), [&](auto zero) {
        using value_t = decltype(zero);
        using real_t = accum_t<value_t>;
        SampleOperands<value_t> operands{};
        operands.offset = strided_images<value_t>(accum_offset);
        if (accum_mask) {
            operands.mask = strided_images<value_t>(*accum_mask);
        }
        operands.samples = static_cast<int>(samples);
        operands.height = static_cast<int>(shape.out_height);
        operands.width = static_cast<int>(shape.out_width);
        operands.sigmoid = mask_sigmoid;
        launch<deform_operands_kernel<value_t>>(
            dim3(grid_size(op, ceil_div(size, 256))), dim3(256), 0, stream, operands,
            converts ? mutable_data<real_t>(offsets) : Global<real_t>(nullptr),
            factors ? mutable_data<real_t>(*factors) : Global<real_t>(nullptr), size);
    });
    return {offsets, factors};
}

// Compute the output from its parts, (parts, pixels * O).
template <typename scalar_t>
void add_parts(
    const char* op, const Tensor& parts, Global<const scalar_t> bias, bool relu, const Tensor& output, Stream stream) {
    using real_t = accum_t<scalar_t>;
    const int64_t out_channels = output.size(1);
    const auto add = [&](auto elements) {
        constexpr int kElements = decltype(elements)::value;
        launch<deform_conv2d_add_parts_kernel<scalar_t, kElements>>(
            dim3(grid_size(op, ceil_div(output.numel(), 256 * kElements))), dim3(256), 0, stream, data<real_t>(parts),
            bias, mutable_data<scalar_t>(output), static_cast<int>(parts.size(0)), static_cast<int>(out_channels),
            output.numel(), relu);
    };
    constexpr int kElements = kVectorElements<real_t>;
    if (out_channels % kElements == 0) {
        add(std::integral_constant<int, kElements>{});
    } else {
        add(std::integral_constant<int, 1>{});
    }
}

template <typename operand_t, int kColumns, int kWidth>
void convolve_tiles(
    const char* op, const DeformConvShape& shape, const DeformProblem<element_t<operand_t>>& problem,
    const Tensor& packed, const std::optional<Tensor>& dense_bias, const Tensor& output, Stream stream) {
    using scalar_t = element_t<operand_t>;
    using real_t = accum_t<scalar_t>;
    constexpr int kDepth = 4 * kVectorElements<scalar_t>;
    const Global<const scalar_t> bias = dense_bias ? data<scalar_t>(*dense_bias) : Global<const scalar_t>(nullptr);
    const int64_t column_tiles = ceil_div(shape.group_outputs(), kColumns);
    const int64_t blocks_per_tile = column_tiles * shape.groups;  // blocks with the same pixels
    // The number of parts depends on shapes only, so results do not depend on the device. If there are several
    // parts, they have about kMinSteps steps or more, so that adding the sums does not cost more than the products.
    constexpr int64_t kWantedBlocks = 264, kMinSteps = 8, kMinLargeTiles = 100;
    const int64_t tiles = ceil_div(problem.pixels, kProductRows);
    const int64_t whole_batches = (shape.taps() - 1) / kTableTaps;
    const int64_t rest_taps = shape.taps() - whole_batches * kTableTaps;
    const int64_t run_steps =
        whole_batches * ceil_div(kTableTaps * problem.run, kDepth) + ceil_div(rest_taps * problem.run, kDepth);
    const int64_t steps = problem.run > 0 ? shape.group_channels() / problem.run * run_steps : 1;
    const int64_t wanted = std::max<int64_t>(1, std::min(kWantedBlocks / (tiles * blocks_per_tile), steps / kMinSteps));
    const int64_t part_steps = ceil_div(steps, wanted), num_parts = ceil_div(steps, part_steps);
    check(steps <= 0x3fffffff, op, ": weight has too many channels and taps for CUDA");
    std::optional<Tensor> parts;
    if (num_parts > 1) {
        parts = empty_like_sized(output, {num_parts, output.numel()}, accum_dtype(output.scalar_type()));
    }
    const auto launch_tiles = [&](auto rows) {
        constexpr int kRows = decltype(rows)::value;
        using Memory = ForwardMemory<operand_t, kRows, kColumns>;
        launch<deform_conv2d_kernel<operand_t, kRows, kColumns, kWidth>>(
            deform_grid(op, ceil_div(problem.pixels, kRows), column_tiles, shape.groups * num_parts),
            dim3(Memory::kThreads), Memory::kBytes, stream, problem, data<scalar_t>(packed), bias,
            mutable_data<scalar_t>(output), parts ? mutable_data<real_t>(*parts) : Global<real_t>(nullptr),
            static_cast<int>(part_steps));
    };
    // Tiles of 128 pixels halve the weights that blocks read; they are used if there are enough tiles for a large GPU.
    constexpr bool kLargeTiles = kColumns == 256;
    if (kLargeTiles && num_parts == 1 && ceil_div(tiles, 2) * blocks_per_tile >= kMinLargeTiles) {
        launch_tiles(std::integral_constant<int, kLargeTiles ? 2 * kProductRows : kProductRows>{});
    } else {
        launch_tiles(std::integral_constant<int, kProductRows>{});
    }
    if (parts) {
        add_parts<scalar_t>(op, *parts, bias, problem.relu, output, stream);
    }
}

// Compute the output for checked arguments. `packed(chunk)` returns the weight packed in chunks of `chunk` channels.
template <typename Packed>
Tensor convolve(
    const DeformConvShape& shape, const DeformConvOptions& options, const Tensor& input, const Tensor& offset,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& mask, const std::optional<Tensor>& offset_tangent,
    Stream stream, const Packed& packed) {
    const char* op = "deform_conv2d";
    Tensor output = empty_like_sized(
        input, {shape.batch, shape.out_channels, shape.out_height, shape.out_width}, std::nullopt,
        MemoryFormat::ChannelsLast);
    if (output.numel() != 0) {
        const DeformOperands operands(op, shape, options, input, offset, mask, offset_tangent);
        const std::optional<Tensor> dense_bias = bias ? std::make_optional(to_contiguous(*bias)) : std::nullopt;
        dispatch_floating(op, input.scalar_type(), [&](auto zero) {
            using scalar_t = decltype(zero);
            const DeformProblem<scalar_t> problem = operands.problem<scalar_t>();
            const Tensor weight = packed(problem.chunk);
            if constexpr (sizeof(scalar_t) == 2) {
                std::optional<Tensor> parts;
                if (deform_conv2d_sm90(op, problem, weight, dense_bias, output, parts, stream)) {
                    if (parts) {
                        add_parts<scalar_t>(
                            op, *parts, dense_bias ? data<scalar_t>(*dense_bias) : Global<const scalar_t>(nullptr),
                            options.relu, output, stream);
                    }
                    return;
                }
            }
            dispatch_operand<scalar_t>(cuda_algorithm(options.algorithm, input.scalar_type()), [&](auto operand) {
                using operand_t = decltype(operand);
                with_tile<scalar_t, kMaxTileColumns<operand_t>>(
                    operands.is_vectorizable<scalar_t>(), shape.group_outputs(), [&](auto columns, auto width) {
                        convolve_tiles<operand_t, decltype(columns)::value, decltype(width)::value>(
                            op, shape, problem, weight, dense_bias, output, stream);
                    });
            });
        });
    }
    return memory_format_of(input) == MemoryFormat::Contiguous ? to_contiguous(output) : output;
}

Tensor deform_conv2d_cuda(
    const Tensor& input, const Tensor& offset, const Tensor& weight, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& mask, const std::optional<Tensor>& offset_tangent, int64_t stride_h, int64_t stride_w,
    int64_t padding_h, int64_t padding_w, int64_t dilation_h, int64_t dilation_w, int64_t algorithm) {
    const DeformConvOptions options{{stride_h, stride_w}, {padding_h, padding_w}, {dilation_h, dilation_w}, algorithm};
    const DeformConvShape shape = check_deform_conv2d(input, offset, weight, bias, mask, offset_tangent, options);
    const DeviceScope device(input);
    return convolve(shape, options, input, offset, bias, mask, offset_tangent, device.stream(), [&](int64_t chunk) {
        return pack_deform_weight("deform_conv2d", weight, shape, chunk, algorithm, 0, device.stream());
    });
}

constexpr int64_t kPackedColumns = 1;  // see packed_tag

Tensor pack_deform_conv2d_cuda(const Tensor& weight, int64_t groups, int64_t offset_groups, int64_t algorithm) {
    const char* op = "pack_deform_conv2d";
    const DeformConvShape shape = check_pack_deform_conv2d(weight, groups, offset_groups, algorithm);
    check_deform_weight_size(op, shape);
    const DeviceScope device(weight);
    int64_t chunk = 0;
    dispatch_floating(op, weight.scalar_type(), [&](auto zero) {
        using scalar_t = decltype(zero);
        chunk = deform_chunk<scalar_t>(shape, deform_run(shape) % kVectorElements<scalar_t> == 0);
    });
    const int64_t tag = packed_tag(kPackedColumns, weight.scalar_type() == ScalarType::Double);
    return pack_deform_weight(op, weight, shape, chunk, algorithm, tag, device.stream());
}

Tensor deform_conv2d_packed_cuda(
    const Tensor& input, const Tensor& offset, const Tensor& packed, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& mask, int64_t stride_h, int64_t stride_w, int64_t padding_h, int64_t padding_w,
    int64_t dilation_h, int64_t dilation_w, int64_t algorithm, int64_t out_channels, int64_t groups,
    int64_t offset_groups, int64_t kernel_h, int64_t kernel_w, bool mask_sigmoid, bool relu) {
    const DeformConvOptions options{
        {stride_h, stride_w}, {padding_h, padding_w}, {dilation_h, dilation_w}, algorithm, mask_sigmoid, relu};
    const DeformConvShape shape = check_deform_conv2d_packed(
        input, offset, bias, mask, options, {out_channels, groups, offset_groups, kernel_h, kernel_w});
    check_deform_sizes("deform_conv2d", shape);
    const ScalarType dtype = input.scalar_type();
    const int64_t row = deform_weight_order(shape, dtype, deform_run(shape)).packed_outputs;
    check_packed_deform_weight(packed, input, dtype, shape.channels * shape.taps() * row, kPackedColumns);
    const DeviceScope device(input);
    // The weight was packed for an aligned input.
    const Tensor dense = aligned(to_contiguous(input, MemoryFormat::ChannelsLast)), weight = aligned(packed);
    const auto operands =
        sample_operands("deform_conv2d", shape, accum_dtype(dtype), offset, mask, mask_sigmoid, device.stream());
    const Tensor output = convolve(
        shape, options, dense, operands.first, bias, operands.second, std::nullopt, device.stream(),
        [&](int64_t) { return weight; });
    return memory_format_of(input) == MemoryFormat::Contiguous ? to_contiguous(output) : output;
}

}  // namespace

int64_t deform_run(const DeformConvShape& shape) {
    return std::gcd(shape.group_channels(), shape.offset_group_channels());
}

WeightOrder deform_weight_order(const DeformConvShape& shape, ScalarType dtype, int64_t run) {
    const int64_t item = dtype == ScalarType::Double ? 2 : dtype == ScalarType::Float ? 4 : 8;
    return {
        static_cast<int>(shape.taps()), static_cast<int>(run), static_cast<int>(shape.group_channels()),
        static_cast<int>(shape.group_outputs()), static_cast<int>(ceil_div(shape.group_outputs(), item) * item)};
}

dim3 deform_grid(const char* op, int64_t tiles, int64_t y, int64_t z) {
    check(y <= 65535 && z <= 65535, op, ": groups and taps make too many blocks for CUDA, ", y, " x ", z);
    return dim3(grid_size(op, tiles), static_cast<unsigned>(y), static_cast<unsigned>(z));
}

Tensor pack_deform_weight(
    const char* op, const Tensor& weight, const DeformConvShape& shape, int64_t run, int64_t algorithm, int64_t tag,
    Stream stream) {
    const WeightOrder order = deform_weight_order(shape, weight.scalar_type(), run);
    Tensor packed = empty_like_sized(weight, {shape.channels * shape.taps() * order.packed_outputs + tag});
    if (tag > 0) {
        torch::stable::zero_(packed);  // equal weights give equal packed tensors, including the tag
    }
    if (weight.numel() == 0) {
        return packed;
    }
    const Tensor dense = to_contiguous(weight);
    const dim3 grid = deform_grid(
        op, ceil_div(shape.group_channels() * shape.taps(), kPackTile), ceil_div(order.packed_outputs, kPackTile),
        shape.groups);
    dispatch_floating(op, weight.scalar_type(), [&](auto zero) {
        using scalar_t = decltype(zero);
        dispatch_operand<scalar_t>(cuda_algorithm(algorithm, weight.scalar_type()), [&](auto operand) {
            launch<pack_deform_weight_kernel<decltype(operand)>>(
                grid, dim3(256), 0, stream, data<scalar_t>(dense), mutable_data<scalar_t>(packed), order);
        });
    });
    return packed;
}

void check_deform_weight_size(const char* op, const DeformConvShape& shape) {
    const double taps = static_cast<double>(shape.taps());  // in double, as products of integers may overflow
    check(
        taps * (shape.channels + 1) * (shape.group_outputs() + 8) <= kMaxDeformIndex &&
            taps * (shape.out_channels + 1) * (shape.group_channels() + 1) <= kMaxDeformIndex,
        op, ": weight must have fewer than 2^31 values on CUDA");
}

void check_deform_sizes(const char* op, const DeformConvShape& shape) {
    const int64_t cells = shape.batch * shape.height * shape.width, pixels = shape.batch * shape.pixels();
    check(cells <= kMaxDeformIndex, op, ": input must have at most ", kMaxDeformIndex, " cells on CUDA, got ", cells);
    check(
        pixels <= kMaxDeformIndex, op, ": the output must have at most ", kMaxDeformIndex, " cells on CUDA, got ",
        pixels);
    check_deform_weight_size(op, shape);
}

DeformOperands::DeformOperands(
    const char* op, const DeformConvShape& shape, const DeformConvOptions& options, const Tensor& input,
    const Tensor& offset, const std::optional<Tensor>& mask, const std::optional<Tensor>& offset_tangent)
    : shape_(shape),
      options_(options),
      input_(to_contiguous(input, MemoryFormat::ChannelsLast)),
      offset_(as_dtype(offset, accum_dtype(input.scalar_type()))) {
    const ScalarType accum = accum_dtype(input.scalar_type());
    if (mask) {
        mask_ = as_dtype(*mask, accum);
    }
    if (offset_tangent) {
        offset_tangent_ = as_dtype(*offset_tangent, accum);
    }
    check_deform_sizes(op, shape);
}

}  // namespace spatialflow

SPATIALFLOW_DEVICE_IMPL(library) {
    library.impl("deform_conv2d", TORCH_BOX(&spatialflow::deform_conv2d_cuda));
    library.impl("_pack_deform_conv2d", TORCH_BOX(&spatialflow::pack_deform_conv2d_cuda));
    library.impl("_deform_conv2d_packed", TORCH_BOX(&spatialflow::deform_conv2d_packed_cuda));
}
