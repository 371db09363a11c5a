// SPDX-License-Identifier: Apache-2.0
//
// COCO panoptic PNG pixels (red + 256 * green + 65536 * blue) to ids and back.
#pragma once

#include <cstddef>
#include <cstdint>

namespace spatialflow {

constexpr int32_t kLargestId = (1 << 24) - 1;

// swapped = channels are blue, green, red, as OpenCV keeps them.
void decode_ids(const uint8_t* pixels /* (count, 3) */, size_t count, bool swapped, int32_t* ids /* (count) */);

// Returns the index of the first id outside [0, kLargestId] (nothing is promised about `pixels` then), else count.
size_t encode_ids(const int32_t* ids /* (count) */, size_t count, bool swapped, uint8_t* pixels /* (count, 3) */);

}  // namespace spatialflow
