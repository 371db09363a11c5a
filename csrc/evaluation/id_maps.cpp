// SPDX-License-Identifier: Apache-2.0
#include "id_maps.h"

#include "clones.h"

namespace spatialflow::evaluation {

SPATIALFLOW_CLONES void decode_ids(
    const uint8_t* __restrict__ pixels, size_t count, bool swapped, int32_t* __restrict__ ids) {
    const int red = swapped ? 2 : 0;
    const int blue = 2 - red;
    for (size_t i = 0; i < count; ++i) {
        ids[i] = pixels[3 * i + red] | pixels[3 * i + 1] << 8 | pixels[3 * i + blue] << 16;
    }
}

SPATIALFLOW_CLONES size_t encode_ids(
    const int32_t* __restrict__ ids, size_t count, bool swapped, uint8_t* __restrict__ pixels) {
    uint32_t all = 0;
    for (size_t i = 0; i < count; ++i) all |= static_cast<uint32_t>(ids[i]);
    if (all > static_cast<uint32_t>(kLargestId)) {
        for (size_t i = 0; i < count; ++i) {
            if (static_cast<uint32_t>(ids[i]) > static_cast<uint32_t>(kLargestId)) return i;
        }
    }
    const int red = swapped ? 2 : 0;
    const int blue = 2 - red;
    for (size_t i = 0; i < count; ++i) {
        pixels[3 * i + red] = static_cast<uint8_t>(ids[i]);
        pixels[3 * i + 1] = static_cast<uint8_t>(ids[i] >> 8);
        pixels[3 * i + blue] = static_cast<uint8_t>(ids[i] >> 16);
    }
    return count;
}

}  // namespace spatialflow::evaluation
