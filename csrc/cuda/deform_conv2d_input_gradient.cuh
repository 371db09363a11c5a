// SPDX-License-Identifier: Apache-2.0
//
// Gradient w.r.t. the input of a deformable convolution, deterministic (without atomics on features):
//
//   grad_input[cell, c] = sum over taps k and outputs o of weight[k, c, o] * spread[cell, k, o]
//   spread[cell, k, o]  = sum of mask * value * grad_output[p, o] over the pixels p whose tap k reads the cell,
//                         in ascending order within each corner; value is the bilinear weight of the corner
//
// This is the transpose of the forward pass: an implicit GEMM over input cells, with `spread` gathered into shared
// memory. A block computes 64 cells by 64 to 256 channels of a run (see deform_conv2d.cuh). A reader of a cell is an
// output pixel whose sample reads it. First, a counting sort builds lists of output pixels by the top left cell of
// their samples. Each slice (image, offset group, tap) has its lists, which are then sorted. The readers of a cell are
// in four lists: those of the cell and of its left, upper and upper left neighbors.
#pragma once

#include "cuda/deform_conv2d.cuh"

namespace spatialflow {
namespace {

constexpr int kListThreads = 256;

// Lists of all slices; slice = (image * offset_groups + offset group) * taps + tap.
struct ReaderLists {
    Global<int> list;                                // (slice, pixel): list that contains the sample, or -1
    Global<int> rank;                                // (slice, pixel): position in the list before sorting
    Global<int> starts;                              // (slice, lists + 1)
    Global<int> pixels;                              // (slice, image_pixels): pixels, list after list
    int slices, lists, image_pixels, offset_groups;  // lists: (H + 1) * (W + 1), one per cell from (-1, -1) on
};

// ---- device ------------------------------------------------------------------------------------------------------

template <typename scalar_t>
__global__ void __launch_bounds__(kListThreads) deform_count_readers_kernel(
    const __grid_constant__ DeformProblem<scalar_t> problem, const __grid_constant__ ReaderLists readers,
    Global<accum_t<scalar_t>> weights) {  // (slice, pixel, corner): weight of the corner, mask included
    using real_t = accum_t<scalar_t>;
    const int64_t index = static_cast<int64_t>(blockIdx.x) * kListThreads + static_cast<int>(threadIdx.x);
    if (index >= static_cast<int64_t>(readers.slices) * readers.image_pixels) {
        return;
    }
    const int slice = static_cast<int>(index / readers.image_pixels);
    const int pixel = static_cast<int>(index % readers.image_pixels);
    const int tap = slice % problem.taps, offset_group = slice / problem.taps % readers.offset_groups;
    const int image = slice / problem.taps / readers.offset_groups;
    const OutputPixel output = output_pixel(problem, image * readers.image_pixels + pixel);
    TapOperands<real_t> operands;
    operands.read(problem, output, offset_group, tap);
    DeformSample<real_t> sample;
    if (!deform_sample(problem, output, offset_group, tap, operands, sample)) {
        readers.list[index] = -1;
        return;
    }
    real_t values[4];
    sample_values(problem, sample, values);
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
        weights[index * 4 + corner] = sample.mask * values[corner];
    }
    const int list = static_cast<int>((sample.tap.y + 1) * (problem.width + 1) + sample.tap.x + 1);
    readers.list[index] = list;
    readers.rank[index] = atomicAdd(readers.starts + (static_cast<int64_t>(slice) * (readers.lists + 1) + list + 1), 1);
}

// Turn counts into start positions by a prefix sum: one block per slice.
__global__ void __launch_bounds__(kListThreads) deform_sum_counts_kernel(const __grid_constant__ ReaderLists readers) {
    constexpr int kWarps = kListThreads / kWarpSize;
    SPATIALFLOW_SHARED(int, totals, kWarps);
    const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarpSize, warp = thread / kWarpSize;
    Global<int> counts = readers.starts + (static_cast<int64_t>(blockIdx.x) * (readers.lists + 1) + 1);
    int before = 0;
    for (int first = 0; first < readers.lists; first += kListThreads) {
        int sum = first + thread < readers.lists ? static_cast<int>(counts[first + thread]) : 0;
#pragma unroll
        for (int distance = 1; distance < kWarpSize; distance *= 2) {
            const int left = __shfl_up_sync(kAllLanes, sum, distance);
            sum += lane >= distance ? left : 0;
        }
        if (lane == kWarpSize - 1) {
            totals[warp] = sum;
        }
        __syncthreads();
        int all = 0;
        for (int distance = 0; distance < kWarps; ++distance) {
            const int total = totals[distance];
            sum += distance < warp ? total : 0;
            all += total;
        }
        if (first + thread < readers.lists) {
            counts[first + thread] = before + sum;
        }
        before += all;
        __syncthreads();
    }
}

__global__ void __launch_bounds__(kListThreads)
    deform_list_readers_kernel(const __grid_constant__ ReaderLists readers) {
    const int64_t index = static_cast<int64_t>(blockIdx.x) * kListThreads + static_cast<int>(threadIdx.x);
    if (index >= static_cast<int64_t>(readers.slices) * readers.image_pixels) {
        return;
    }
    const int64_t slice = index / readers.image_pixels;
    const int list = readers.list[index];
    if (list >= 0) {
        const int position = readers.starts[slice * (readers.lists + 1) + list] + readers.rank[index];
        readers.pixels[slice * readers.image_pixels + position] = static_cast<int>(index % readers.image_pixels);
    }
}

// Sort each list by heap sort. Most lists are short, but offsets can make a long one, and the time to sort it must not
// be quadratic.
__global__ void __launch_bounds__(kListThreads)
    deform_sort_readers_kernel(const __grid_constant__ ReaderLists readers) {
    const int64_t index = static_cast<int64_t>(blockIdx.x) * kListThreads + static_cast<int>(threadIdx.x);
    if (index >= static_cast<int64_t>(readers.slices) * readers.lists) {
        return;
    }
    const int64_t slice = index / readers.lists, start = slice * (readers.lists + 1) + index % readers.lists;
    const int begin = readers.starts[start], count = readers.starts[start + 1] - begin;
    Global<int> list = readers.pixels + (slice * readers.image_pixels + begin);
    // While `next` is positive, the heap is built from its last inner node to its root. Then the greatest value moves
    // to the end in each iteration.
    for (int next = count / 2, size = count; size > 1;) {
        int value, node;
        if (next > 0) {
            node = --next;
            value = list[node];
        } else {
            node = 0;
            value = list[--size];
            list[size] = static_cast<int>(list[0]);
        }
        for (int child = 2 * node + 1; child < size; child = 2 * node + 1) {
            int greater = list[child];
            if (child + 1 < size && list[child + 1] > greater) {
                greater = list[++child];
            }
            if (greater <= value) {
                break;
            }
            list[node] = greater;
            node = child;
        }
        list[node] = value;
    }
}

// A cell of the input.
struct Cell {
    int image, y, x;
};

// Add to `sums` an item of grad_output at `source`, multiplied by `weight`. Its first value is output `output` of the
// group; outputs from `end` on do not exist. One access loads kWidth outputs.
template <int kWidth, int kItem, typename scalar_t, typename real_t>
__device__ __forceinline__ void add_weighted(
    Global<const scalar_t> source, real_t weight, int output, int end, real_t (&sums)[kItem]) {
#pragma unroll
    for (int part = 0; part < kItem; part += kWidth) {
        if (output + part < end) {
            const auto values = load_vector<kWidth>(source + part);
#pragma unroll
            for (int v = 0; v < kWidth; ++v) {
                sums[part + v] += weight * static_cast<real_t>(load(values[v]));
            }
        }
    }
}

// Item of 16 bytes of `spread`: adjacent outputs of the group from `output` on, at one tap.
template <int kWidth, typename scalar_t>
__device__ __forceinline__ Vec<scalar_t, kVectorElements<scalar_t>> spread_item(
    const DeformProblem<scalar_t>& problem, const ReaderLists& readers, Global<const accum_t<scalar_t>> weights,
    Global<const scalar_t> grad_output, const Cell& cell, int offset_group, int group, int tap, int output) {
    using real_t = accum_t<scalar_t>;
    constexpr int kItem = kVectorElements<scalar_t>;
    real_t sums[kItem] = {};
    const int64_t slice =
        (static_cast<int64_t>(cell.image) * readers.offset_groups + offset_group) * problem.taps + tap;
    const int64_t first_pixel = static_cast<int64_t>(cell.image) * readers.image_pixels;
#pragma unroll
    for (int above = 0; above < 2; ++above) {
        // List of the left neighbor, or of the upper left one if `above`. The next list is that of the cell, or of its
        // upper neighbor. Lists are numbered from cell (-1, -1) on.
        const int64_t list = slice * (readers.lists + 1) + (cell.y + 1 - above) * (problem.width + 1) + cell.x;
        const int begin = readers.starts[list], middle = readers.starts[list + 1], end = readers.starts[list + 2];
        for (int i = begin; i < end; ++i) {
            const int pixel = readers.pixels[slice * readers.image_pixels + i];
            const int corner = above * 2 + (i < middle ? 1 : 0);
            const real_t weight = weights[(slice * readers.image_pixels + pixel) * 4 + corner];
            Global<const scalar_t> source =
                grad_output + ((first_pixel + pixel) * problem.out_channels + group * problem.group_outputs + output);
            add_weighted<kWidth>(source, weight, output, problem.group_outputs, sums);
        }
    }
    Vec<scalar_t, kItem> result;
#pragma unroll
    for (int i = 0; i < kItem; ++i) {
        store(result[i], sums[i]);
    }
    return result;
}

template <typename operand_t, int kColumns>
using InputProduct = TileProduct<operand_t, kColumns, false, false>;

template <typename operand_t, int kColumns, int kWidth>
__global__ void __launch_bounds__(kProductThreads, 2) deform_conv2d_input_gradient_kernel(
    const __grid_constant__ DeformProblem<element_t<operand_t>> problem, const __grid_constant__ ReaderLists readers,
    Global<const accum_t<element_t<operand_t>>> weights,  // (slice, pixel, corner)
    Global<const element_t<operand_t>> grad_output,       // (pixels, O)
    Global<const element_t<operand_t>> packed,            // (C * taps, packed_outputs)
    Global<element_t<operand_t>> grad_input,              // (cells, C)
    const int cells) {                                    // of all images
    using scalar_t = element_t<operand_t>;
    using real_t = accum_t<scalar_t>;
    using Product = InputProduct<operand_t, kColumns>;
    constexpr int kItem = Product::kItem, kDepth = Product::kDepth;
    SPATIALFLOW_DYNAMIC_SHARED(scalar_t, left);
    const Shared<scalar_t> right = left + 2 * Product::kLeftSize;
    const int first_cell = static_cast<int>(blockIdx.x) * kProductRows;
    const int begin = static_cast<int>(blockIdx.y) * kColumns;  // first channel in the run
    const int first_channel = static_cast<int>(blockIdx.z) * problem.run;
    const int group = first_channel / problem.group_channels;
    const int offset_group = first_channel / problem.offset_group_channels;
    const int thread_row = static_cast<int>(threadIdx.x) / 4, thread_item = static_cast<int>(threadIdx.x) % 4 * kItem;
    const int thread_cell = first_cell + thread_row, length = problem.taps * problem.packed_outputs;
    const Cell cell = {
        thread_cell / problem.width / problem.height, thread_cell / problem.width % problem.height,
        thread_cell % problem.width};

    Product product;
    run_steps<kDepth>(
        length,
        [&](int k, int buffer) {
            load_items<kColumns, kDepth / kItem>(
                right + buffer * Product::kRightSize, Product::kRightRow,
                [&](int row, int element, Shared<scalar_t> target) {
                    const int tap = (k + element) / problem.packed_outputs;
                    const int output = k + element - tap * problem.packed_outputs;
                    const bool present = begin + row < problem.run && tap < problem.taps;
                    const int at =
                        (first_channel * problem.taps + tap * problem.run + begin + row) * problem.packed_outputs +
                        output;
                    cp_async_16(target, packed + at, present);
                });
            Vec<scalar_t, kItem> item{};
            if (thread_cell < cells && k + thread_item < length) {
                const int tap = (k + thread_item) / problem.packed_outputs;
                item = spread_item<kWidth>(
                    problem, readers, weights, grad_output, cell, offset_group, group, tap,
                    k + thread_item - tap * problem.packed_outputs);
            }
            store_vector(
                left + (buffer * Product::kLeftSize + thread_row * Product::kLeftRow + thread_item),
                prepared(item, operand_t{}));
        },
        [&](int buffer) {
            product.accumulate(left + buffer * Product::kLeftSize, right + buffer * Product::kRightSize);
        },
        [](int) {});
    product.for_each([&](int row, int column, const Vec<real_t, Product::kVisitColumns>& sums) {
#pragma unroll
        for (int i = 0; i < Product::kVisitColumns; ++i) {
            if (first_cell + row < cells && begin + column + i < problem.run) {
                scalar_t result;
                store(result, sums[i]);
                grad_input
                    [static_cast<int64_t>(first_cell + row) * problem.channels + first_channel + begin + column + i] =
                        result;
            }
        }
    });
}

// ---- host --------------------------------------------------------------------------------------------------------

template <typename operand_t>
void gather_input_gradient(
    const char* op, const DeformProblem<element_t<operand_t>>& problem, const DeformConvShape& shape, bool vectorized,
    const Tensor& grad_output,  // (N, O, H_out, W_out), channels-last
    const Tensor& packed,
    const Tensor& grad_input,  // (N, C, H, W), channels-last
    Stream stream) {
    using scalar_t = element_t<operand_t>;
    using real_t = accum_t<scalar_t>;
    const int64_t slices = shape.batch * shape.offset_groups * shape.taps(), samples = slices * shape.pixels();
    const int64_t lists = (shape.height + 1) * (shape.width + 1);
    check(slices <= 0x7fffffff && lists < 0x7fffffff, op, ": too many taps or cells for CUDA");
    const Tensor list = empty_like_sized(grad_output, {samples}, ScalarType::Int);
    const Tensor rank = empty_like_sized(list, {samples}), pixels = empty_like_sized(list, {samples});
    Tensor starts = empty_like_sized(list, {slices * (lists + 1)});
    torch::stable::zero_(starts);
    const Tensor weights = empty_like_sized(grad_output, {samples * 4}, accum_dtype(grad_output.scalar_type()));
    const ReaderLists readers = {mutable_data<int>(list),          mutable_data<int>(rank),
                                 mutable_data<int>(starts),        mutable_data<int>(pixels),
                                 static_cast<int>(slices),         static_cast<int>(lists),
                                 static_cast<int>(shape.pixels()), static_cast<int>(shape.offset_groups)};
    const dim3 by_sample(grid_size(op, ceil_div(samples, kListThreads))), block(kListThreads);
    launch<deform_count_readers_kernel<scalar_t>>(
        by_sample, block, 0, stream, problem, readers, mutable_data<real_t>(weights));
    launch<deform_sum_counts_kernel>(dim3(static_cast<unsigned>(slices)), block, 0, stream, readers);
    launch<deform_list_readers_kernel>(by_sample, block, 0, stream, readers);
    launch<deform_sort_readers_kernel>(
        dim3(grid_size(op, ceil_div(slices * lists, kListThreads))), block, 0, stream, readers);
    constexpr int kMaxColumns = kIsSimt<operand_t> ? 64 : 256;  // 128 columns by multiply-adds would spill registers
    with_tile<scalar_t, kMaxColumns>(vectorized, problem.run, [&](auto columns, auto width) {
        constexpr int kColumns = decltype(columns)::value;
        using Product = InputProduct<operand_t, kColumns>;
        const int64_t cells = shape.batch * shape.height * shape.width;
        launch<deform_conv2d_input_gradient_kernel<operand_t, kColumns, decltype(width)::value>>(
            deform_grid(
                op, ceil_div(cells, kProductRows), ceil_div(problem.run, kColumns), shape.channels / problem.run),
            dim3(kProductThreads), 2 * Product::kTilesSize * sizeof(scalar_t), stream, problem, readers,
            data<real_t>(weights), data<scalar_t>(grad_output), data<scalar_t>(packed),
            mutable_data<scalar_t>(grad_input), static_cast<int>(cells));
    });
}

}  // namespace
}  // namespace spatialflow
