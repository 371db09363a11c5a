// SPDX-License-Identifier: Apache-2.0
//
// Deformable convolution (v1, and v2 with a mask) on CUDA.
//
//   output[n, p, o] = bias[o] + sum over taps k and channels c of
//                     weight[k, c, o] * mask[n, k, p] * bilinear(input[n, :, :, c], position(p, k) + offset[n, k, p])
//
// With an offset tangent, the sample's derivative along it takes the sample's place: four other factors.
//
// An implicit GEMM: rows are output pixels of all images, columns the outputs of a group, and the sum runs over taps
// and channels. input (N, H, W, C), others are copied into it; offset and mask by strides; output (N, H_out, W_out, O).
// Columns are gathered into shared memory, 64 bytes of 64 pixels a step, and never leave it. Where a tap reads, and how
// much, is worked out once for each pixel, tap and offset group, and kept for nine taps in shared memory.
//
//   16-bit types   64 pixels x 64, 128 or 256 outputs a block, by mma.sync with float32 sums: with 256, every column is
//                  gathered once in all. The blended sample is rounded to the 16-bit type once.
//   float32, 64    64 pixels x 64 or 128 outputs, by fused multiply-adds
// The cells of the next step are loaded to registers, and its weights by cp.async, while this one is computed.
//
// Floor (H100, 790 TFLOP/s bf16, 3.0 TB/s), 1 x 256 x 100 x 168, 3 x 3, 256 outputs: 19.8 GFLOP: 25 us; input, offset,
// mask, output 19 MB: 6 us. The gather reads 4 cells a sample, 310 MB, from the caches.
#include "cuda/deform_conv2d.h"

#include <numeric>

namespace spatialflow {
namespace {

// ---- device ------------------------------------------------------------------------------------------------------

template <typename scalar_t, int kColumns>
using ForwardProduct = TileProduct<scalar_t, kColumns, false, true>;

template <typename scalar_t, int kColumns>
constexpr size_t kForwardSharedBytes =
    TapTable<accum_t<scalar_t>, kTableEntries>::kSize * sizeof(accum_t<scalar_t>) +
    2 * ForwardProduct<scalar_t, kColumns>::kTilesSize * sizeof(scalar_t);

template <typename scalar_t, int kColumns, int kWidth>
__global__ void __launch_bounds__(kProductThreads, 2) deform_conv2d_kernel(
    const __grid_constant__ DeformProblem<scalar_t> problem,
    Global<const scalar_t> packed,  // (C * taps, packed_outputs)
    Global<const scalar_t> bias,    // (O) or null
    Global<scalar_t> output) {      // (pixels, O)
    using real_t = accum_t<scalar_t>;
    using Product = ForwardProduct<scalar_t, kColumns>;
    using Table = TapTable<real_t, kTableEntries>;
    constexpr int kItem = Product::kItem, kDepth = Product::kDepth;
    SPATIALFLOW_DYNAMIC_SHARED(real_t, shared);
    const Table table(shared);
    const Shared<scalar_t> left = pointer_cast<scalar_t>(shared + Table::kSize);
    const Shared<scalar_t> right = left + 2 * Product::kLeftSize;
    const int first_pixel = static_cast<int>(blockIdx.x) * kProductRows;
    const int first_output = static_cast<int>(blockIdx.y) * kColumns, group = static_cast<int>(blockIdx.z);
    const int own_row = static_cast<int>(threadIdx.x) / 4, own_item = static_cast<int>(threadIdx.x) % 4 * kItem;

    Product product;
    for (int run = 0; run < problem.group_channels; run += problem.run) {
        const int first_channel = group * problem.group_channels + run;
        for (int first_tap = 0; first_tap < problem.taps; first_tap += kTableTaps) {
            const int taps = problem.taps - first_tap < kTableTaps ? problem.taps - first_tap : kTableTaps;
            table.fill(
                problem, first_channel / problem.offset_group_channels, first_tap, taps, first_pixel, kProductRows);
            __syncthreads();
            const int flat = first_tap * problem.run, limit = (first_tap + taps) * problem.run;
            const int weights = first_channel * problem.taps * problem.packed_outputs + first_output;
            ColumnItem<scalar_t, kWidth> item;
            run_steps<kDepth>(
                limit - flat,
                [&](int k, int buffer) {
                    item.begin(
                        problem, table, first_channel, flat + k + own_item, limit, first_tap, kProductRows, own_row);
                    load_items<kDepth, kColumns / kItem>(
                        right + buffer * Product::kRightSize, Product::kRightRow,
                        [&](int row, int element, Shared<scalar_t> target) {
                            const bool present =
                                flat + k + row < limit && first_output + element < problem.packed_outputs;
                            const int at = weights + (flat + k + row) * problem.packed_outputs + element;
                            cp_async_16(target, packed + at, present);
                        });
                },
                [&](int buffer) {
                    product.accumulate(left + buffer * Product::kLeftSize, right + buffer * Product::kRightSize);
                },
                [&](int buffer) {
                    store_vector(
                        left + (buffer * Product::kLeftSize + own_row * Product::kLeftRow + own_item),
                        item.finish(table));
                });
        }
    }
    const bool adjacent = problem.group_outputs % Product::kVisited == 0;
    product.for_each([&](int row, int column, const Vec<real_t, Product::kVisited>& sums) {
        const int pixel = first_pixel + row;
        Vec<scalar_t, Product::kVisited> results;
        const int first = group * problem.group_outputs + first_output + column;
        const int count = problem.group_outputs - first_output - column;
#pragma unroll
        for (int i = 0; i < Product::kVisited; ++i) {
            real_t sum = sums[i];
            if (bias && i < count) {
                const scalar_t value = bias[first + i];
                sum += load(value);
            }
            store(results[i], sum);
        }
        if (pixel >= problem.pixels || count <= 0) {
            return;
        }
        Global<scalar_t> target = output + (static_cast<int64_t>(pixel) * problem.out_channels + first);
        if (adjacent) {
            store_vector(target, results);
            return;
        }
#pragma unroll
        for (int i = 0; i < Product::kVisited; ++i) {
            if (i < count) {
                target[i] = results[i];
            }
        }
    });
}

template <typename scalar_t>
__global__ void __launch_bounds__(256) pack_deform_weight_kernel(
    Global<const scalar_t> weight,  // (O, C / groups, taps)
    Global<scalar_t> packed,        // (C * taps, packed_outputs)
    const WeightOrder order, const int size) {
    const int64_t index = static_cast<int64_t>(blockIdx.x) * 256 + static_cast<int>(threadIdx.x);
    if (index >= size) {
        return;
    }
    const int place = order.place(static_cast<int>(index));
    scalar_t value{};
    if (place >= 0) {
        value = weight[place];
    }
    packed[index] = value;
}

// ---- host --------------------------------------------------------------------------------------------------------

Tensor deform_conv2d_cuda(
    const Tensor& input, const Tensor& offset, const Tensor& weight, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& mask, const std::optional<Tensor>& offset_tangent, int64_t stride_h, int64_t stride_w,
    int64_t padding_h, int64_t padding_w, int64_t dilation_h, int64_t dilation_w) {
    const char* op = "deform_conv2d";
    const DeformConvOptions options{{stride_h, stride_w}, {padding_h, padding_w}, {dilation_h, dilation_w}};
    const DeformConvShape shape = check_deform_conv2d(input, offset, weight, bias, mask, offset_tangent, options);
    const DeviceScope device(input);
    Tensor output = empty_like_sized(
        input, {shape.batch, shape.out_channels, shape.out_height, shape.out_width}, std::nullopt,
        MemoryFormat::ChannelsLast);
    if (output.numel() != 0) {
        const DeformOperands operands(op, shape, options, input, offset, mask, offset_tangent);
        const Tensor packed = pack_deform_weight(weight, shape, device.stream());
        const std::optional<Tensor> dense_bias = bias ? std::make_optional(to_contiguous(*bias)) : std::nullopt;
        dispatch_floating(op, input.scalar_type(), [&](auto zero) {
            using scalar_t = decltype(zero);
            const DeformProblem<scalar_t> problem = operands.problem<scalar_t>();
            with_tile<scalar_t, kMostTileColumns<scalar_t>>(
                operands.is_wide<scalar_t>(), shape.group_outputs(), [&](auto columns, auto width) {
                    constexpr int kColumns = decltype(columns)::value;
                    launch<deform_conv2d_kernel<scalar_t, kColumns, decltype(width)::value>>(
                        deform_grid(op, problem.pixels, ceil_div(shape.group_outputs(), kColumns), shape.groups),
                        dim3(kProductThreads), kForwardSharedBytes<scalar_t, kColumns>, device.stream(), problem,
                        data<scalar_t>(packed),
                        dense_bias ? data<scalar_t>(*dense_bias) : Global<const scalar_t>(nullptr),
                        mutable_data<scalar_t>(output));
                });
        });
    }
    return memory_format_of(input) == MemoryFormat::Contiguous ? to_contiguous(output) : output;
}

}  // namespace

int64_t deform_run(const DeformConvShape& shape) {
    return std::gcd(shape.group_channels(), shape.offset_group_channels());
}

WeightOrder deform_weight_order(const DeformConvShape& shape, ScalarType dtype) {
    const int64_t item = dtype == ScalarType::Double ? 2 : dtype == ScalarType::Float ? 4 : 8;
    return {static_cast<int>(shape.taps()), static_cast<int>(deform_run(shape)),
            static_cast<int>(shape.group_channels()), static_cast<int>(shape.group_outputs()),
            static_cast<int>(ceil_div(shape.group_outputs(), item) * item)};
}

dim3 deform_grid(const char* op, int64_t rows, int64_t y, int64_t z) {
    check(y <= 65535 && z <= 65535, op, ": groups and taps make too many blocks for CUDA, ", y, " x ", z);
    return dim3(grid_size(op, ceil_div(rows, kProductRows)), static_cast<unsigned>(y), static_cast<unsigned>(z));
}

Tensor pack_deform_weight(const Tensor& weight, const DeformConvShape& shape, Stream stream) {
    const WeightOrder order = deform_weight_order(shape, weight.scalar_type());
    const Tensor packed = empty_like_sized(weight, {shape.channels * shape.taps(), order.packed_outputs});
    const Tensor dense = to_contiguous(weight);
    dispatch_floating("deform_conv2d", weight.scalar_type(), [&](auto zero) {
        using scalar_t = decltype(zero);
        launch<pack_deform_weight_kernel<scalar_t>>(
            dim3(grid_size("deform_conv2d", ceil_div(packed.numel(), 256))), dim3(256), 0, stream,
            data<scalar_t>(dense), mutable_data<scalar_t>(packed), order, static_cast<int>(packed.numel()));
    });
    return packed;
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
    // Kernels count cells, pixels and weights in 32 bits, values of features in 64.
    constexpr int64_t kMost = 0x7ffffeff;
    const int64_t cells = shape.batch * shape.height * shape.width, pixels = shape.batch * shape.pixels();
    check(cells <= kMost, op, ": input must have at most ", kMost, " cells on CUDA, got ", cells);
    check(pixels <= kMost, op, ": the output must have at most ", kMost, " cells on CUDA, got ", pixels);
    check((shape.channels + 1) * shape.taps() * (shape.group_outputs() + 8) <= kMost &&
              (shape.out_channels + 1) * shape.taps() * (shape.group_channels() + 1) <= kMost,
          op, ": weight must have fewer than 2^31 values on CUDA");
}

}  // namespace spatialflow

SPATIALFLOW_DEVICE_IMPL(library) { library.impl("deform_conv2d", TORCH_BOX(&spatialflow::deform_conv2d_cuda)); }
