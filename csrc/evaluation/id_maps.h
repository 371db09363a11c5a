// SPDX-License-Identifier: Apache-2.0
//
// Conversion between COCO panoptic PNG pixels (red + 256 * green + 65536 * blue) and ids.
#pragma once

#include <cstddef>
#include <cstdint>

namespace spatialflow {

constexpr int32_t kLargestId = (1 << 24) - 1;

// Decode pixels to ids. If `bgr`, the channels are in the order blue, green, red, as in OpenCV.
void decode_ids(const uint8_t* pixels /* (count, 3) */, size_t count, bool bgr, int32_t* ids /* (count) */);

// Encode ids as pixels. Return `count`, or the index of the first id outside [0, kLargestId]; `pixels` is then
// unspecified.
size_t encode_ids(const int32_t* ids /* (count) */, size_t count, bool bgr, uint8_t* pixels /* (count, 3) */);

}  // namespace spatialflow
