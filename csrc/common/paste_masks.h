// SPDX-License-Identifier: Apache-2.0
//
// Mapping from image pixels to the cells of a small mask stretched over a box, shared by CPU and CUDA.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace spatialflow {

// One axis of a box. The center of pixel p is at p + 0.5, or (p + 0.5 - low) / (high - low) * cells in units of cells.
// The center of cell i is at i + 0.5. Computation is in double for sub-pixel precision in large images.
struct PasteAxis {
    double low;
    double scale;  // cells per pixel; 0 for an extent that is not positive and finite
    int64_t cells;

    // Mask coordinate of pixel `pixel`; cell i has coordinate i. Cells -1 and `cells` are the zeros around the mask.
    SPATIALFLOW_HOST_DEVICE double position(int64_t pixel) const { return (double(pixel) + 0.5 - low) * scale - 0.5; }
};

SPATIALFLOW_HOST_DEVICE PasteAxis paste_axis(double low, double high, int64_t cells) {
    const double extent = high - low;
    return {low, extent > 0.0 && extent - extent == 0.0 ? double(cells) / extent : 0.0, cells};
}

// Pixels [begin, end) of an axis of `size` pixels that read a cell of the mask; other pixels read only zeros.
struct PixelRange {
    int64_t begin, end;
};

SPATIALFLOW_HOST_DEVICE int64_t paste_pixel_at(double coordinate, int64_t size) {
    return !(coordinate > 0.0) ? 0 : coordinate >= double(size) ? size : static_cast<int64_t>(coordinate);
}

SPATIALFLOW_HOST_DEVICE PixelRange paste_range(const PasteAxis& axis, int64_t size) {
    if (!(axis.scale > 0.0)) {
        return {0, 0};
    }
    // Widen the bounds by two or three pixels because of rounding, then trim them by the exact test.
    PixelRange range{
        paste_pixel_at(axis.low - 0.5 / axis.scale - 2.0, size),
        paste_pixel_at(axis.low + (double(axis.cells) + 0.5) / axis.scale + 3.0, size)};
    while (range.begin < range.end && !(axis.position(range.begin) > -1.0)) {
        ++range.begin;
    }
    while (range.begin < range.end && !(axis.position(range.end - 1) < double(axis.cells))) {
        --range.end;
    }
    return range;
}

// Whether low + weight * (high - low) reaches the threshold; false for NaN. If both ends are on the same side of the
// threshold, the sum is not computed. So rounding cannot remove a pixel from the inside of a region.
template <typename real_t>
SPATIALFLOW_HOST_DEVICE bool paste_is_inside(real_t low, real_t high, real_t weight, real_t threshold) {
    const bool low_inside = low >= threshold, high_inside = high >= threshold;
    return low_inside == high_inside ? low_inside : low + weight * (high - low) >= threshold;
}

}  // namespace spatialflow
