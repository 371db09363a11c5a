// SPDX-License-Identifier: Apache-2.0
//
// Gradient w.r.t. the weight of a deformable convolution:
//
//   grad_weight[k, c, o] = sum over p of columns[p, k, c] * grad_output[p, o]
//
// An implicit GEMM over output pixels, with columns gathered into shared memory. A position of a run (see
// deform_conv2d.cuh) is a pair of a tap and a channel of the run. A block computes at most 64 positions by 64 to 256
// outputs, over a part of the pixels. A second kernel adds the partial sums in order, so results are deterministic.
#pragma once

#include <algorithm>

#include "cuda/deform_conv2d.cuh"

namespace spatialflow {
namespace {

// ---- device ------------------------------------------------------------------------------------------------------

template <typename operand_t, int kColumns>
using WeightProduct = TileProduct<operand_t, kColumns, true, true>;

template <typename operand_t, int kColumns>
constexpr size_t kWeightSharedBytes =
    TapTable<accum_t<element_t<operand_t>>, kTableEntries>::kSize * sizeof(accum_t<element_t<operand_t>>) +
    2 * WeightProduct<operand_t, kColumns>::kTilesSize * sizeof(element_t<operand_t>);

// Number of positions of a run that a block computes: at most 64, and so few that a table holds their taps.
__host__ __device__ __forceinline__ int weight_tile_rows(int run) {
    return run * (kTableTaps - 1) < kProductRows ? run * (kTableTaps - 1) : kProductRows;
}

template <typename operand_t, int kColumns, int kWidth>
__global__ void __launch_bounds__(kProductThreads, 2) deform_conv2d_backward_weight_kernel(
    const __grid_constant__ DeformProblem<element_t<operand_t>> problem,
    Global<const element_t<operand_t>> grad_output,  // (pixels, O)
    Global<accum_t<element_t<operand_t>>> parts,     // (parts, C * taps, packed_outputs); blockIdx.z: part, run
    const int part_pixels) {
    using scalar_t = element_t<operand_t>;
    using real_t = accum_t<scalar_t>;
    using Product = WeightProduct<operand_t, kColumns>;
    using Table = TapTable<real_t, kTableEntries>;
    constexpr int kItem = Product::kItem, kDepth = Product::kDepth, kRowItems = kProductRows / kItem;
    SPATIALFLOW_DYNAMIC_SHARED(real_t, shared);
    const Table table(shared);
    const Shared<scalar_t> left = pointer_cast<scalar_t>(shared + Table::kSize);
    const Shared<scalar_t> right = left + 2 * Product::kLeftSize;
    const int tile_rows = weight_tile_rows(problem.run), length = problem.taps * problem.run;
    const int runs = problem.channels / problem.run, part = static_cast<int>(blockIdx.z) / runs;
    const int first_channel = (static_cast<int>(blockIdx.z) - part * runs) * problem.run;
    const int first_flat = static_cast<int>(blockIdx.x) * tile_rows;
    const int limit = first_flat + tile_rows < length ? first_flat + tile_rows : length;
    const int first_tap = first_flat / problem.run, slots = (limit - 1) / problem.run - first_tap + 1;
    const int batch = kTableEntries / slots / kDepth * kDepth;
    const int group = first_channel / problem.group_channels;
    const int first_output = static_cast<int>(blockIdx.y) * kColumns;
    const int begin = part * part_pixels;
    const int end = begin + part_pixels < problem.pixels ? begin + part_pixels : problem.pixels;
    const int thread_pixel = static_cast<int>(threadIdx.x) / kRowItems;
    const int thread_item = static_cast<int>(threadIdx.x) % kRowItems * kItem;
    // With kWidth > 1, a thread beyond the last position of the block gathers the first positions again. The sums of
    // its positions are not stored.
    const int thread_flat = first_flat + thread_item < limit ? first_flat + thread_item : first_flat;
    const int thread_tap = thread_flat / problem.run,
              thread_channel = first_channel + thread_flat - thread_tap * problem.run;

    Product product;
    for (int first_pixel = begin; first_pixel < end; first_pixel += batch) {
        const int rest = (end - first_pixel + kDepth - 1) / kDepth * kDepth, count = rest < batch ? rest : batch;
        table.fill(problem, first_channel / problem.offset_group_channels, first_tap, slots, first_pixel, count);
        __syncthreads();
        const int thread_entry = (thread_tap - first_tap) * count + thread_pixel;
        ColumnItem<scalar_t, kWidth> item;
        run_steps<kDepth>(
            count,
            [&](int k, int buffer) {
                if constexpr (kWidth == 1) {
                    item.begin_elements(
                        problem, table, first_channel, first_flat + thread_item, limit, first_tap, count,
                        k + thread_pixel);
                } else {
                    item.begin(problem, table, thread_channel, thread_entry + k, true);
                }
                load_items<kDepth, kColumns / kItem>(
                    right + buffer * Product::kRightSize, Product::kRightRow,
                    [&](int row, int element, Shared<scalar_t> target) {
                        load_outputs<kWidth>(
                            problem, grad_output, first_pixel + k + row, end, group, first_output + element, target);
                    });
            },
            [&](int buffer) {
                product.accumulate(left + buffer * Product::kLeftSize, right + buffer * Product::kRightSize);
            },
            [&](int buffer) {
                store_vector(
                    left + (buffer * Product::kLeftSize + thread_pixel * Product::kLeftRow + thread_item),
                    prepared(item.finish(table), operand_t{}));
                prepare_items<operand_t, kDepth, kColumns / kItem>(
                    right + buffer * Product::kRightSize, Product::kRightRow);
            });
    }
    const int64_t first_row = static_cast<int64_t>(blockIdx.z) * length + first_flat;
    product.for_each([&](int row, int column, const Vec<real_t, Product::kVisitColumns>& sums) {
        const int output = first_output + column;
        if (first_flat + row < limit && output < problem.packed_outputs) {
            store_vector(parts + ((first_row + row) * problem.packed_outputs + output), sums);
        }
    });
}

template <typename scalar_t>
__global__ void __launch_bounds__(256) deform_conv2d_add_weight_parts_kernel(
    Global<const accum_t<scalar_t>> parts,                           // (num_parts, C * taps, packed_outputs)
    Global<scalar_t> grad_weight,                                    // (O, C / groups, taps)
    const WeightOrder order, const int num_parts, const int size) {  // size: of a part
    const int64_t index = static_cast<int64_t>(blockIdx.x) * 256 + static_cast<int>(threadIdx.x);
    if (index >= size) {
        return;
    }
    const int position = order.weight_index(static_cast<int>(index));
    if (position < 0) {
        return;
    }
    accum_t<scalar_t> sum = 0;
    for (int part = 0; part < num_parts; ++part) {
        sum += parts[static_cast<int64_t>(part) * size + index];
    }
    scalar_t result;
    store(result, sum);
    grad_weight[position] = result;
}

// ---- host --------------------------------------------------------------------------------------------------------

template <typename operand_t, int kColumns, int kWidth>
void compute_weight_gradient(
    const char* op, const DeformConvShape& shape, const DeformProblem<element_t<operand_t>>& problem,
    const Tensor& grad_output, const Tensor& grad_weight, Stream stream) {
    using scalar_t = element_t<operand_t>;
    using real_t = accum_t<scalar_t>;
    const int64_t run_tiles = ceil_div(shape.taps() * problem.run, weight_tile_rows(problem.run));
    const int64_t runs = shape.channels / problem.run;
    const int64_t column_tiles = ceil_div(problem.packed_outputs, kColumns);
    // Pixels are split into parts to occupy a large GPU. The number of parts is the same on every device. Every part
    // except the last has a multiple of kMinPixels pixels, so that adding the sums does not cost more than the
    // products.
    constexpr int64_t kWantedBlocks = 264, kMinPixels = 512;
    const int64_t wanted =
        std::min(ceil_div(kWantedBlocks, runs * run_tiles * column_tiles), ceil_div(problem.pixels, kMinPixels));
    const int64_t part_pixels = ceil_div(ceil_div(problem.pixels, wanted), kMinPixels) * kMinPixels;
    const int64_t num_parts = ceil_div(problem.pixels, part_pixels);
    const int64_t size = shape.channels * shape.taps() * problem.packed_outputs;
    const Tensor parts = empty_like_sized(grad_weight, {num_parts, size}, accum_dtype(grad_weight.scalar_type()));
    launch<deform_conv2d_backward_weight_kernel<operand_t, kColumns, kWidth>>(
        deform_grid(op, run_tiles, column_tiles, num_parts * runs), dim3(kProductThreads),
        kWeightSharedBytes<operand_t, kColumns>, stream, problem, data<scalar_t>(grad_output),
        mutable_data<real_t>(parts), static_cast<int>(part_pixels));
    launch<deform_conv2d_add_weight_parts_kernel<scalar_t>>(
        dim3(grid_size(op, ceil_div(size, 256))), dim3(256), 0, stream, data<real_t>(parts),
        mutable_data<scalar_t>(grad_weight), deform_weight_order(shape, grad_weight.scalar_type(), problem.run),
        static_cast<int>(num_parts), static_cast<int>(size));
}

}  // namespace
}  // namespace spatialflow
