// SPDX-License-Identifier: Apache-2.0
//
// Decodes the filtered lines of an 8-bit RGB or RGBA PNG to panoptic ids; alpha is dropped.
//
// Residuals of id maps are nearly all zero. For zero residuals the Sub and Paeth filters reduce to copying the pixel
// above or repeating the pixel to the left: such pixels are decoded eight at a time.
#pragma once

#include <cstddef>
#include <cstdint>

namespace spatialflow {

constexpr int kPngFilters = 5;

// Returns height, or the index of the first line whose filter is unknown; `ids` is unspecified from that line on.
// channels: 3 or 4. lines: (height, 1 + width * channels), each line after its filter. ids: (height, width).
size_t unfilter_png(const uint8_t* lines, size_t height, size_t width, int channels, int32_t* ids);

}  // namespace spatialflow
