// SPDX-License-Identifier: Apache-2.0
//
// Deformable convolution (v1, and v2 with a mask) on CUDA, as an implicit GEMM.
//
//   output[n, p, o] = bias[o] + sum over taps k and channels c of
//                     weight[k, c, o] * mask[n, k, p] * bilinear(input[n, :, :, c], position(p, k) + offset[n, k, p])
//
// ReLU may follow. input is (N, H, W, C), and is copied if it has another layout. offset and mask have any strides;
// output is (N, H_out, W_out, O). A block computes 64 or 128 pixels by 64 to 256 outputs of a group, by mma.sync with
// float32 sums. For float64, and for float32 with "direct", it computes 64 pixels by at most 128 outputs, by
// multiply-adds. During the product of a step, the cells of the next step are loaded. Their samples, the columns, are
// then rounded once to the operand type and stored in shared memory, 64 bytes per pixel and step. For few pixels,
// blocks split the steps of a tile, and another kernel adds their partial sums. 16-bit types on compute capability 9.0a
// use sm90_deform_conv2d.cu, if it supports the sizes.
#include "cuda/deform_conv2d.cuh"

#include <algorithm>

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

// Position of a thread's item in the columns of a step, for kWidth > 1. The columns have the order (chunk, tap,
// channel).
struct ColumnCursor {
    int channel, chunk, entry;  // channel in the chunk; first channel of the chunk; entry of the table

    // `flat` is an index into a run with `taps` taps, in the same order.
    __device__ __forceinline__
    ColumnCursor(int first_channel, int chunk_channels, int taps, int flat, int count, int position) {
        const int index = flat / (taps * chunk_channels), within_chunk = flat - index * taps * chunk_channels;
        const int tap = within_chunk / chunk_channels;
        channel = within_chunk - tap * chunk_channels;
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

// Store adjacent outputs of a pixel, of which the first `count` exist. With `adjacent`, either all or none exist, and
// they are stored by one access.
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
    // First step of this block, counted from the first step of the current batch of taps. In later batches it may be
    // negative.
    int begin = static_cast<int>(blockIdx.z) / problem.groups * part_steps;
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
            // The weights of these steps are adjacent rows: a run has several chunks only if one table holds all taps.
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

// Add the parts in order, then the bias, and apply ReLU if `relu`. A thread computes kWidth outputs of a pixel.
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

// ---- host --------------------------------------------------------------------------------------------------------

const char* const kOp = "deform_conv2d";

// Compute the output from its partial sums `parts`, (number of parts, pixels * O).
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
    // The number of parts depends on shapes only, so the number of multiprocessors does not change results. If there
    // are several parts, they have about kMinSteps steps or more, so that adding the sums does not cost more than the
    // products.
    constexpr int64_t kWantedBlocks = 264, kMinSteps = 8, kMinLargeTiles = 100;
    const int64_t tiles = ceil_div(problem.pixels, kProductRows);
    const int64_t whole_batches = (shape.taps() - 1) / kTableTaps;
    const int64_t last_taps = shape.taps() - whole_batches * kTableTaps;
    const int64_t run_steps =
        whole_batches * ceil_div(kTableTaps * problem.run, kDepth) + ceil_div(last_taps * problem.run, kDepth);
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

// Compute the output, which is not empty. `weight` is packed in chunks of problem.chunk channels.
template <typename scalar_t>
void convolve_dtype(
    const DeformConvShape& shape, int64_t algorithm, bool vectorized, const DeformProblem<scalar_t>& problem,
    const Tensor& weight, const std::optional<Tensor>& dense_bias, const Tensor& output, Stream stream) {
    if constexpr (sizeof(scalar_t) == 2) {
        std::optional<Tensor> parts;
        if (deform_conv2d_sm90(kOp, problem, weight, dense_bias, output, parts, stream)) {
            if (parts) {
                add_parts<scalar_t>(
                    kOp, *parts, dense_bias ? data<scalar_t>(*dense_bias) : Global<const scalar_t>(nullptr),
                    problem.relu, output, stream);
            }
            return;
        }
    }
    dispatch_operand<scalar_t>(cuda_algorithm(algorithm, output.scalar_type()), [&](auto operand) {
        using operand_t = decltype(operand);
        with_tile<scalar_t, kMaxTileColumns<operand_t>>(
            vectorized, shape.group_outputs(), [&](auto columns, auto width) {
                convolve_tiles<operand_t, decltype(columns)::value, decltype(width)::value>(
                    kOp, shape, problem, weight, dense_bias, output, stream);
            });
    });
}

// Compute the output for checked arguments. `packed(chunk)` returns the weight packed in chunks of `chunk` channels.
template <typename Packed>
Tensor convolve(
    const DeformConvShape& shape, const DeformConvOptions& options, const Tensor& input, const Tensor& offset,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& mask, const std::optional<Tensor>& offset_tangent,
    Stream stream, const Packed& packed) {
    Tensor output = empty_like_sized(
        input, {shape.batch, shape.out_channels, shape.out_height, shape.out_width}, std::nullopt,
        MemoryFormat::ChannelsLast);
    if (output.numel() != 0) {
        const DeformOperands operands(kOp, shape, options, input, offset, mask, offset_tangent);
        const std::optional<Tensor> dense_bias = bias ? std::make_optional(to_contiguous(*bias)) : std::nullopt;
        dispatch_floating(kOp, input.scalar_type(), [&](auto zero) {
            using scalar_t = decltype(zero);
            const DeformProblem<scalar_t> problem = operands.problem<scalar_t>();
            convolve_dtype<scalar_t>(
                shape, options.algorithm, operands.is_vectorizable<scalar_t>(), problem, packed(problem.chunk),
                dense_bias, output, stream);
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
        return pack_deform_weight(kOp, weight, shape, chunk, algorithm, 0, device.stream());
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
    check_deform_sizes(kOp, shape);
    const ScalarType dtype = input.scalar_type();
    const int64_t row = deform_weight_order(shape, dtype, deform_run(shape)).packed_outputs;
    check_packed_deform_weight(packed, input, dtype, shape.channels * shape.taps() * row, kPackedColumns);
    const DeviceScope device(input);
    // The weight was packed for an aligned input, so other inputs are copied.
    const Tensor dense = aligned(to_contiguous(input, MemoryFormat::ChannelsLast)), weight = aligned(packed);
    const auto operands = sample_operands(kOp, shape, accum_dtype(dtype), offset, mask, mask_sigmoid, device.stream());
    const Tensor output = convolve(
        shape, options, dense, operands.first, bias, operands.second, std::nullopt, device.stream(),
        [&](int64_t) { return weight; });
    return memory_format_of(input) == MemoryFormat::Contiguous ? to_contiguous(output) : output;
}

}  // namespace
}  // namespace spatialflow

SPATIALFLOW_DEVICE_IMPL(library) {
    library.impl("deform_conv2d", TORCH_BOX(&spatialflow::deform_conv2d_cuda));
    library.impl("_pack_deform_conv2d", TORCH_BOX(&spatialflow::pack_deform_conv2d_cuda));
    library.impl("_deform_conv2d_packed", TORCH_BOX(&spatialflow::deform_conv2d_packed_cuda));
}
