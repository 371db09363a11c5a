// SPDX-License-Identifier: Apache-2.0
// PNG files as the COCO panoptic format uses them: 8-bit RGB or RGBA (alpha is dropped), not interlaced.
//
// Residuals of id maps are nearly all zero, and where they are, the Sub and Paeth filters reduce to copying the pixel
// above or repeating the pixel to the left: those stretches are done eight pixels at a time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>

namespace spatialflow::evaluation {

class PngError : public std::runtime_error {
    using std::runtime_error::runtime_error;
};

struct PngSize {
    size_t height;
    size_t width;
};

// Throws PngError unless `data` begins like a PNG of the kind above.
PngSize read_png_header(const uint8_t* data, size_t size);

// Decodes the file whose header was read before. Throws PngError where it is truncated or damaged.
void decode_png(const uint8_t* data, size_t size, uint8_t* pixels /* (height, width, 3) */);

}  // namespace spatialflow::evaluation
