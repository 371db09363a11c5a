// SPDX-License-Identifier: Apache-2.0
//
// Best class of every pixel, in one launch on CUDA. The logits have a quarter of the height and width of the network's
// input:
//
//   output[y, x] = argmax_c bilinear(logits[c], y, x); ties: the first class; NaN is never the maximum
//
// common/stuff_labels.h defines the position of pixel (y, x) in the logits.
//
// logits (C, h, w) of any strides, output (H, W). A block computes up to 128 adjacent pixels of a row, one per thread.
// It interpolates the two adjacent rows of logits into shared memory (cells, classes), as many classes at a time as
// fit. Loads run along classes or cells, whichever have the smaller stride, two classes per load if aligned. Rows in
// shared memory have an odd length against bank conflicts. Each thread then interpolates between its two cells for each
// class. This file is compiled without fused multiply-adds, so that labels equal those of the CPU.
#include <cmath>

#include "common/stuff_labels.h"
#include "cuda/launch.h"
#include "ops/stuff_labels.h"

namespace spatialflow {
namespace {

constexpr int kThreads = 128;
constexpr int kMaxCells = 160;  // maximum number of columns of logits per block
constexpr int64_t kSharedBytes = 48 * 1024;

struct LabelProblem {
    LabelAxis rows, columns;
    int64_t class_stride, row_stride, column_stride;
    int classes;
    bool has_classes_inside;  // classes have a smaller stride than columns
    int tile_classes = 0;     // classes in shared memory at a time
    int pixels = kThreads;    // maximum number per block
    int segments = 0;         // blocks per row
};

// ---- device ------------------------------------------------------------------------------------------------------

template <typename scalar_t, typename label_t, int kWidth>
__global__ void __launch_bounds__(kThreads) stuff_labels_kernel(
    Global<const scalar_t> logits,  // (C, h, w), strided
    Global<label_t> output,         // (H, W)
    const LabelProblem problem) {
    using real_t = accum_t<scalar_t>;
    SPATIALFLOW_DYNAMIC_SHARED(real_t, tile);  // (cells, stride)
    const LabelAxis& columns = problem.columns;
    const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarpSize;
    const int64_t y = blockIdx.x / problem.segments;
    const int64_t begin = static_cast<int64_t>(blockIdx.x % problem.segments) * problem.pixels;
    const int64_t end = begin + problem.pixels < columns.pixels ? begin + problem.pixels : columns.pixels;
    const int64_t first_cell = columns.tap(begin).first;
    const int cells = static_cast<int>(columns.tap(end - 1).second - first_cell) + 1;
    const int stride = problem.tile_classes | 1;

    const LabelTap row = problem.rows.tap(y);
    const auto row_weight = static_cast<real_t>(row.weight);
    const bool classes_inside = problem.has_classes_inside;
    const int64_t outer_stride = classes_inside ? problem.column_stride : problem.class_stride;
    const int64_t inner_stride = classes_inside ? problem.class_stride : problem.column_stride;
    const int outer_step = classes_inside ? stride : 1, inner_step = classes_inside ? 1 : stride;  // in the tile

    const bool is_pixel = begin + thread < end;
    const LabelTap tap = columns.tap(is_pixel ? begin + thread : begin);
    const int left = static_cast<int>(tap.first - first_cell) * stride;
    const int right = static_cast<int>(tap.second - first_cell) * stride;
    const auto weight = static_cast<real_t>(tap.weight);
    real_t best = -static_cast<real_t>(INFINITY);
    int label = 0;

    for (int first_class = 0; first_class < problem.classes; first_class += problem.tile_classes) {
        const int remaining = problem.classes - first_class;
        const int classes = remaining < problem.tile_classes ? remaining : problem.tile_classes;
        if (first_class > 0) {
            __syncthreads();  // all threads have read the previous classes
        }
        const int64_t corner = first_cell * problem.column_stride + first_class * problem.class_stride;
        const Global<const scalar_t> upper = logits + (row.first * problem.row_stride + corner);
        const Global<const scalar_t> lower = logits + (row.second * problem.row_stride + corner);
        const int outer = classes_inside ? cells : classes, inner = classes_inside ? classes : cells;
#pragma unroll 1
        for (int j = lane * kWidth; j < inner; j += kWarpSize * kWidth) {
#pragma unroll 4
            for (int i = thread / kWarpSize; i < outer; i += kThreads / kWarpSize) {
                const int64_t at = i * outer_stride + j * inner_stride;
                const auto above = load_vector<kWidth>(upper + at), below = load_vector<kWidth>(lower + at);
#pragma unroll
                for (int k = 0; k < kWidth; ++k) {
                    const real_t value = load(above[k]);
                    tile[i * outer_step + j * inner_step + k] = value + row_weight * (load(below[k]) - value);
                }
            }
        }
        __syncthreads();
        if (is_pixel) {
#pragma unroll 4
            for (int c = 0; c < classes; ++c) {
                const real_t low = tile[left + c], high = tile[right + c];
                const real_t value = low + weight * (high - low);
                if (value > best) {
                    best = value;
                    label = first_class + c;
                }
            }
        }
    }
    if (is_pixel) {
        output[y * columns.pixels + begin + thread] = static_cast<label_t>(label);
    }
}

// ---- host --------------------------------------------------------------------------------------------------------

// Maximum number of adjacent cells that a block reads if it computes `pixels` adjacent pixels.
int64_t widest_block(const LabelAxis& columns, int pixels) {
    int64_t widest = 0;
    for (int64_t begin = 0; begin < columns.pixels; begin += pixels) {
        const int64_t last = begin + pixels < columns.pixels ? begin + pixels - 1 : columns.pixels - 1;
        const int64_t cells = columns.tap(last).second - columns.tap(begin).first + 1;
        widest = cells > widest ? cells : widest;
    }
    return widest;
}

template <typename scalar_t, typename label_t>
void label_pixels(const Tensor& logits, const Tensor& output, LabelProblem problem, Stream stream) {
    using real_t = accum_t<scalar_t>;
    while (widest_block(problem.columns, problem.pixels) > kMaxCells) {
        problem.pixels /= 2;  // the loop ends, because a single pixel reads at most two cells
    }
    const int64_t cells = widest_block(problem.columns, problem.pixels);
    const int64_t fitting = (kSharedBytes / static_cast<int64_t>(sizeof(real_t)) / cells - 1) / 2 * 2;
    problem.tile_classes = static_cast<int>(problem.classes < fitting ? problem.classes : fitting);
    const int64_t segments = ceil_div(problem.columns.pixels, problem.pixels);
    const unsigned blocks = grid_size("stuff_labels", problem.rows.pixels * segments);
    problem.segments = static_cast<int>(segments);
    const auto shared_bytes = static_cast<size_t>(cells * (problem.tile_classes | 1)) * sizeof(real_t);
    const auto values = data<scalar_t>(logits);
    const auto labels = mutable_data<label_t>(output);
    const bool is_paired = problem.has_classes_inside && problem.class_stride == 1 && problem.classes % 2 == 0 &&
                           problem.row_stride % 2 == 0 && problem.column_stride % 2 == 0 &&
                           is_aligned(logits.const_data_ptr(), 2 * sizeof(scalar_t));
    if (is_paired) {
        launch<stuff_labels_kernel<scalar_t, label_t, 2>>(
            dim3(blocks), dim3(kThreads), shared_bytes, stream, values, labels, problem);
    } else {
        launch<stuff_labels_kernel<scalar_t, label_t, 1>>(
            dim3(blocks), dim3(kThreads), shared_bytes, stream, values, labels, problem);
    }
}

Tensor stuff_labels_cuda(
    const Tensor& logits, int64_t valid_height, int64_t valid_width, int64_t height, int64_t width) {
    check_stuff_labels(logits, valid_height, valid_width, height, width);
    const DeviceScope device(logits);
    Tensor output = empty_labels(logits, height, width);
    if (output.numel() == 0) {
        return output;
    }
    const LabelProblem problem{
        LabelAxis(logits.size(1), valid_height, height),
        LabelAxis(logits.size(2), valid_width, width),
        stride_of(logits, 0),
        stride_of(logits, 1),
        stride_of(logits, 2),
        static_cast<int>(logits.size(0)),
        stride_of(logits, 0) < stride_of(logits, 2)};
    dispatch_floating("stuff_labels", logits.scalar_type(), [&](auto zero) {
        using scalar_t = decltype(zero);
        if (output.scalar_type() == ScalarType::Byte) {
            label_pixels<scalar_t, uint8_t>(logits, output, problem, device.stream());
        } else {
            label_pixels<scalar_t, int64_t>(logits, output, problem, device.stream());
        }
    });
    return output;
}

}  // namespace
}  // namespace spatialflow

SPATIALFLOW_DEVICE_IMPL(library) { library.impl("stuff_labels", TORCH_BOX(&spatialflow::stuff_labels_cuda)); }
