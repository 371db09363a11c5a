// SPDX-License-Identifier: Apache-2.0
//
// Paste small masks into images on CUDA:
//
//   output[k, y, x] = bilinear(sigmoid(mask_logits[k]), y, x) >= threshold, zeros around the mask
//
// The first kernel computes probabilities with a border of zeros, and the ranges of rows and columns that each box
// covers. In the second kernel a thread computes 16 consecutive pixels, across the ends of rows, so that stores are 16
// bytes. A thread without a pixel in a box runs about 120 integer instructions, which take less time than its store of
// zeros. This file is compiled without fused multiply-adds. Probabilities may differ from those of the CPU in the last
// bits: the CPU code may have fused multiply-adds, and its exp is rounded differently.
#include "common/paste_masks.h"

#include "cuda/launch.h"
#include "ops/paste_masks.h"

namespace spatialflow {
namespace {

constexpr int kThreads = 256;
constexpr int kPixels = 16;  // of a thread

struct PasteProblem {
    int64_t count, mask_height, mask_width;
    int height, width;
    int64_t pixels;  // of all masks
};

// ---- device ------------------------------------------------------------------------------------------------------

template <typename scalar_t>
__global__ void __launch_bounds__(kThreads) paste_prepare_kernel(
    Global<const scalar_t> mask_logits,       // (K, MH, MW)
    Global<const double> boxes,               // (K, 4)
    Global<accum_t<scalar_t>> probabilities,  // (K, MH + 2, MW + 2)
    Global<int> ranges,                       // (K, 4): columns [begin, end), rows [begin, end)
    const PasteProblem problem) {
    using real_t = accum_t<scalar_t>;
    const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
    const int64_t rows = problem.mask_height + 2, columns = problem.mask_width + 2;
    if (index >= problem.count * rows * columns) {
        return;
    }
    const int64_t k = index / (rows * columns);
    const int64_t y = index / columns % rows - 1, x = index % columns - 1;
    real_t value = real_t(0);
    if (y >= 0 && y < problem.mask_height && x >= 0 && x < problem.mask_width) {
        const scalar_t logit = mask_logits[(k * problem.mask_height + y) * problem.mask_width + x];
        value = real_t(1) / (real_t(1) + std::exp(-static_cast<real_t>(load(logit))));
    }
    probabilities[index] = value;
    if (index < problem.count) {  // thread k computes the ranges of mask k; there are at least four threads per mask
        const Global<const double> box = boxes + index * 4;
        const PixelRange columns = paste_range(paste_axis(box[0], box[2], problem.mask_width), problem.width);
        const PixelRange rows = paste_range(paste_axis(box[1], box[3], problem.mask_height), problem.height);
        store_vector(
            ranges + index * 4, Vec<int, 4>{
                                    static_cast<int>(columns.begin), static_cast<int>(columns.end),
                                    static_cast<int>(rows.begin), static_cast<int>(rows.end)});
    }
}

template <typename real_t>
__global__ void __launch_bounds__(kThreads) paste_masks_kernel(
    Global<const real_t> probabilities,  // (K, MH + 2, MW + 2)
    Global<const double> boxes,          // (K, 4)
    Global<const int> ranges,            // (K, 4): columns [begin, end), rows [begin, end)
    Global<uint8_t> output,              // (K, H, W)
    const PasteProblem problem, const real_t threshold) {
    const int64_t first =
        static_cast<int64_t>(blockIdx.x) * (kThreads * kPixels) + static_cast<int>(threadIdx.x) * kPixels;
    if (first >= problem.pixels) {
        return;
    }
    const int count = problem.pixels - first < kPixels ? static_cast<int>(problem.pixels - first) : kPixels;
    const int64_t stride = problem.mask_width + 2;
    int64_t row = first / problem.width;  // row index over all masks
    int x = static_cast<int>(first - row * problem.width);
    Vec<uint64_t, 2> pixels{};  // one byte per pixel
#pragma unroll 1
    for (int begin = 0, end = 0; begin < count; begin = end, x = 0, ++row) {  // pixels [begin, end) are in one row
        end = problem.width - x < count - begin ? begin + (problem.width - x) : count;
        const int64_t k = row / problem.height;
        const int y = static_cast<int>(row - k * problem.height);
        const auto [columns_begin, columns_end, rows_begin, rows_end] = load_vector<4>(ranges + k * 4).values;
        const int begin_x = x > columns_begin ? x : columns_begin;
        const int end_x = x + (end - begin) < columns_end ? x + (end - begin) : columns_end;
        if (!(rows_begin <= y && y < rows_end && begin_x < end_x)) {
            continue;
        }
        const PasteAxis x_axis = paste_axis(boxes[k * 4], boxes[k * 4 + 2], problem.mask_width);
        const PasteAxis y_axis = paste_axis(boxes[k * 4 + 1], boxes[k * 4 + 3], problem.mask_height);
        const double position_y = y_axis.position(y), cell_y = floor(position_y);
        const auto weight_y = static_cast<real_t>(position_y - cell_y);
        const Global<const real_t> upper =
            probabilities + (k * (problem.mask_height + 2) + static_cast<int64_t>(cell_y) + 1) * stride;
#pragma unroll 1
        for (int pixel_x = begin_x; pixel_x < end_x; ++pixel_x) {
            const int i = begin + (pixel_x - x);
            const double position_x = x_axis.position(pixel_x), cell_x = floor(position_x);
            const int64_t at = static_cast<int64_t>(cell_x) + 1;
            const real_t up_left = upper[at], up_right = upper[at + 1];
            const real_t low_left = upper[stride + at], low_right = upper[stride + at + 1];
            const real_t left = up_left + weight_y * (low_left - up_left);
            const real_t right = up_right + weight_y * (low_right - up_right);
            const bool inside = paste_is_inside(left, right, static_cast<real_t>(position_x - cell_x), threshold);
            (i < 8 ? pixels[0] : pixels[1]) |= static_cast<uint64_t>(inside) << (i % 8 * 8);
        }
    }
    if (count == kPixels) {
        store_vector(pointer_cast<uint64_t>(output + first), pixels);
    } else {
        for (int i = 0; i < count; ++i) {
            output[first + i] = static_cast<uint8_t>((i < 8 ? pixels[0] : pixels[1]) >> (i % 8 * 8));
        }
    }
}

// ---- host --------------------------------------------------------------------------------------------------------

Tensor paste_masks_cuda(
    const Tensor& mask_logits, const Tensor& boxes, int64_t height, int64_t width, double threshold) {
    const char* op = "paste_masks";
    check_paste_masks(mask_logits, boxes, height, width, threshold);
    const DeviceScope device(mask_logits);
    Tensor output = empty_like_sized(mask_logits, {mask_logits.size(0), height, width}, ScalarType::Bool);
    if (output.numel() == 0) {
        return output;
    }
    const Tensor logits = to_contiguous(mask_logits), corners = contiguous_as(boxes, ScalarType::Double);
    check(
        height <= 0x7fffffff && width <= 0x7fffffff, op, ": size must be below 2^31 on CUDA, got (", height, ", ",
        width, ")");
    const PasteProblem problem{logits.size(0),           logits.size(1),          logits.size(2),
                               static_cast<int>(height), static_cast<int>(width), output.numel()};
    const bool is_double = logits.scalar_type() == ScalarType::Double;
    const Tensor probabilities = empty_like_sized(
        logits, {problem.count, problem.mask_height + 2, problem.mask_width + 2},
        is_double ? ScalarType::Double : ScalarType::Float);
    const Tensor ranges = empty_like_sized(logits, {problem.count, 4}, ScalarType::Int);
    dispatch_floating(op, logits.scalar_type(), [&](auto zero) {
        using scalar_t = decltype(zero);
        using real_t = accum_t<scalar_t>;
        launch<paste_prepare_kernel<scalar_t>>(
            dim3(grid_size(op, ceil_div(probabilities.numel(), kThreads))), dim3(kThreads), 0, device.stream(),
            data<scalar_t>(logits), data<double>(corners), mutable_data<real_t>(probabilities),
            mutable_data<int>(ranges), problem);
        launch<paste_masks_kernel<real_t>>(
            dim3(grid_size(op, ceil_div(output.numel(), kThreads * kPixels))), dim3(kThreads), 0, device.stream(),
            data<real_t>(probabilities), data<double>(corners), data<int>(ranges), mutable_data<uint8_t>(output),
            problem, static_cast<real_t>(threshold));
    });
    return output;
}

}  // namespace
}  // namespace spatialflow

SPATIALFLOW_DEVICE_IMPL(library) { library.impl("paste_masks", TORCH_BOX(&spatialflow::paste_masks_cuda)); }
