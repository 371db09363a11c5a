// SPDX-License-Identifier: Apache-2.0
//
// Where the pixels of an image fall on a small mask stretched over a box, written once for CPU and CUDA.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace spatialflow {

// One axis of a box: pixel p has its centre at (p + 0.5), and the cells of the mask have theirs at half integers of
// (p + 0.5 - low) / (high - low) * cells. In double, so that large images keep sub-pixel precision.
struct PasteAxis {
    double low;
    double scale;  // cells per pixel; 0 for an axis without extent or with an end that is not finite
    int64_t cells;

    // Mask coordinate of pixel `pixel`: cell i is at i. Cells -1 and `cells` are the zeros around the mask.
    SPATIALFLOW_HOST_DEVICE double position(int64_t pixel) const { return (double(pixel) + 0.5 - low) * scale - 0.5; }
};

SPATIALFLOW_HOST_DEVICE PasteAxis paste_axis(double low, double high, int64_t cells) {
    const double extent = high - low;
    return {low, extent > 0.0 && extent - extent == 0.0 ? double(cells) / extent : 0.0, cells};
}

// Pixels [begin, end) of an axis of `size` pixels that touch a cell; the others see only zeros.
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
    // Bounds widened by two pixels against rounding, then trimmed by the exact test.
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

// Whether the value `weight` of the way from `low` to `high` reaches the threshold. Decided without arithmetic where
// both ends agree, so that rounding cannot take a pixel out of a region that is inside altogether. NaN is outside.
template <typename real_t>
SPATIALFLOW_HOST_DEVICE bool paste_is_inside(real_t low, real_t high, real_t weight, real_t threshold) {
    const bool low_inside = low >= threshold, high_inside = high >= threshold;
    return low_inside == high_inside ? low_inside : low + weight * (high - low) >= threshold;
}

}  // namespace spatialflow
