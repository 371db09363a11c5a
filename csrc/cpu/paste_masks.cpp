// SPDX-License-Identifier: Apache-2.0
//
// Pasting of small masks into an image on the CPU:
//
//   output[k, y, x] = bilinear(sigmoid(mask_logits[k]), y, x) >= threshold, zeros around the mask
//
// Only pixels that read a cell of the mask are computed: those in the box or within half a cell of it. The two rows of
// cells adjacent to a row of pixels are interpolated once for the whole row. All pixels between the same two cells form
// a run. If both cells are on the same side of the threshold, the run is filled or skipped as a whole. So only runs
// that the outline crosses need arithmetic per pixel.
//
// Tasks are (mask, rows of the image).
#include "common/paste_masks.h"

#include <algorithm>
#include <cmath>

#include "cpu/dispatch.h"
#include "cpu/sigmoid.h"
#include "ops/paste_masks.h"

namespace spatialflow {
namespace {

constexpr int64_t kBandRows = 64;  // rows per task

// Runs of the pixels of a row: pixels [begin[i], begin[i + 1]) of run i lie between cells i - 1 and i.
template <typename real_t>
struct Runs {
    std::vector<int64_t> begin;   // (cells + 2)
    std::vector<real_t> weights;  // of the cell with the larger index, from pixel begin[0] on

    void fill(const PasteAxis& axis, const PixelRange& range) {
        begin.assign(static_cast<size_t>(axis.cells + 2), range.end);
        weights.resize(static_cast<size_t>(range.end - range.begin));
        int64_t run = 0;
        begin[0] = range.begin;
        for (int64_t pixel = range.begin; pixel < range.end; ++pixel) {
            const double position = axis.position(pixel);
            const double cell = std::floor(position);
            for (; run < static_cast<int64_t>(cell) + 1; ++run) {
                begin[static_cast<size_t>(run + 1)] = pixel;
            }
            weights[static_cast<size_t>(pixel - range.begin)] = static_cast<real_t>(position - cell);
        }
    }
};

template <typename real_t>
void paste_row(
    const real_t* cells,  // (MW + 2), zeros at both ends
    const Runs<real_t>& runs, real_t threshold,
    uint8_t* row) {  // (W)
    const auto count = static_cast<int64_t>(runs.begin.size()) - 1;
    for (int64_t i = 0; i < count;) {
        const bool low = cells[i] >= threshold, high = cells[i + 1] >= threshold;
        const int64_t begin = runs.begin[static_cast<size_t>(i)];
        if (low != high) {
            const int64_t end = runs.begin[static_cast<size_t>(i + 1)];
            const real_t* weight = runs.weights.data() + (begin - runs.begin[0]);
            for (int64_t x = begin; x < end; ++x) {
                row[x] = paste_is_inside(cells[i], cells[i + 1], weight[x - begin], threshold);
            }
            ++i;
            continue;
        }
        int64_t last = i + 1;
        while (last < count && (cells[last + 1] >= threshold) == low) {
            ++last;
        }
        const int64_t end = runs.begin[static_cast<size_t>(last)];
        if (low && end > begin) {
            std::memset(row + begin, 1, static_cast<size_t>(end - begin));
        }
        i = last;
    }
}

template <typename scalar_t, typename real_t>
void paste(
    const scalar_t* mask_logits,  // (K, MH, MW)
    const double* boxes,          // (K, 4)
    uint8_t* output,              // (K, H, W)
    int64_t count, int64_t mask_height, int64_t mask_width, int64_t height, int64_t width, real_t threshold) {
    const int64_t stride = mask_width + 2;
    // Probabilities with a frame of zeros.
    std::vector<real_t> probabilities(static_cast<size_t>(count * (mask_height + 2) * stride));
    parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
        for (int64_t k = begin; k < end; ++k) {
            for (int64_t y = 0; y < mask_height; ++y) {
                const scalar_t* source = mask_logits + (k * mask_height + y) * mask_width;
                real_t* target = probabilities.data() + (k * (mask_height + 2) + y + 1) * stride + 1;
                write_sigmoid(source, target, mask_width);
            }
        }
    });
    const int64_t bands = (height + kBandRows - 1) / kBandRows;
    parallel_for(0, count * bands, 1, [&](int64_t begin, int64_t end) {
        Runs<real_t> runs;
        std::vector<real_t> cells(static_cast<size_t>(stride));
        int64_t current_mask = -1;
        PixelRange rows{0, 0}, columns{0, 0};
        PasteAxis y_axis{};
        for (int64_t task = begin; task < end; ++task) {
            const int64_t k = task / bands;
            if (k != current_mask) {
                const double* box = boxes + 4 * k;
                y_axis = paste_axis(box[1], box[3], mask_height);
                const PasteAxis x_axis = paste_axis(box[0], box[2], mask_width);
                rows = paste_range(y_axis, height);
                columns = paste_range(x_axis, width);
                if (rows.begin < rows.end && columns.begin < columns.end) {
                    runs.fill(x_axis, columns);
                }
                current_mask = k;
            }
            const int64_t first = task % bands * kBandRows, last = std::min(first + kBandRows, height);
            uint8_t* mask = output + k * height * width;
            std::memset(mask + first * width, 0, static_cast<size_t>((last - first) * width));
            if (columns.begin >= columns.end) {
                continue;
            }
            for (int64_t y = std::max(first, rows.begin); y < std::min(last, rows.end); ++y) {
                const double position = y_axis.position(y);
                const double cell = std::floor(position);
                const auto weight = static_cast<real_t>(position - cell);
                const real_t* upper =
                    probabilities.data() + (k * (mask_height + 2) + static_cast<int64_t>(cell) + 1) * stride;
                const real_t* lower = upper + stride;
                for (int64_t x = 0; x < stride; ++x) {
                    cells[static_cast<size_t>(x)] = upper[x] + weight * (lower[x] - upper[x]);
                }
                paste_row(cells.data(), runs, threshold, mask + y * width);
            }
        }
    });
}

Tensor paste_masks_cpu(
    const Tensor& mask_logits, const Tensor& boxes, int64_t height, int64_t width, double threshold) {
    check_paste_masks(mask_logits, boxes, height, width, threshold);
    Tensor output = empty_like_sized(mask_logits, {mask_logits.size(0), height, width}, ScalarType::Bool);
    if (output.numel() == 0) {
        return output;
    }
    const Tensor logits = to_contiguous(mask_logits), corners = contiguous_as(boxes, ScalarType::Double);
    dispatch_floating("paste_masks", mask_logits.scalar_type(), [&](auto zero) {
        using scalar_t = decltype(zero);
        using real_t = accum_t<scalar_t>;
        paste<scalar_t, real_t>(
            data<scalar_t>(logits), data<double>(corners), static_cast<uint8_t*>(output.mutable_data_ptr()),
            logits.size(0), logits.size(1), logits.size(2), height, width, static_cast<real_t>(threshold));
    });
    return output;
}

}  // namespace
}  // namespace spatialflow

STABLE_TORCH_LIBRARY_IMPL(spatialflow, CPU, library) {
    library.impl("paste_masks", TORCH_BOX(&spatialflow::paste_masks_cpu));
}
