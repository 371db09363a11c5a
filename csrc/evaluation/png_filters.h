// SPDX-License-Identifier: Apache-2.0
//
// The last step of reading a panoptic PNG: the filtered lines of an 8-bit RGB or RGBA image to ids (alpha is dropped).
//
// Libraries un-filter byte after byte, for photographs. Residuals of id maps are nearly all zero, and where they are,
// the Sub and Paeth filters reduce to copying the pixel above or repeating the pixel to the left: those stretches are
// done eight pixels at a time.
#pragma once

#include <cstddef>
#include <cstdint>

namespace spatialflow {

constexpr int kPngFilters = 5;

// Returns height, or the index of the first line whose filter is unknown (nothing is promised about `ids` from there
// on). channels: 3 or 4. lines: (height, 1 + width * channels), the filter in front of each line. ids: (height, width).
size_t unfilter_png(const uint8_t* lines, size_t height, size_t width, int channels, int32_t* ids);

}  // namespace spatialflow
