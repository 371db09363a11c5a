// SPDX-License-Identifier: Apache-2.0
//
// Decoder of the filtered lines of an 8-bit RGB or RGBA PNG to panoptic ids; alpha is dropped.
//
// Almost all residuals of id maps are zero. With zero residuals, Sub copies the pixel to the left, and Paeth usually
// copies the pixel above or the pixel to the left. Such pixels are decoded eight at a time.
#pragma once

#include <cstddef>
#include <cstdint>

namespace spatialflow {

constexpr int kPngFilters = 5;

// Decode the image. Return height, or the index of the first line whose filter is unknown; `ids` is unspecified from
// that line on. channels: 3 or 4. lines: (height, 1 + width * channels); the first byte of a line is its filter type.
// ids: (height, width).
size_t unfilter_png(const uint8_t* lines, size_t height, size_t width, int channels, int32_t* ids);

}  // namespace spatialflow
