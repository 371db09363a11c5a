// SPDX-License-Identifier: Apache-2.0
//
// How many pixels carry each pair of ids in two images of the same size: the only pass over pixels that
// panoptic quality needs.
//
// Segments are large, so a pair rarely changes from one pixel to the next. Chunks that stay in the first-level cache
// are turned into ids, a vectorised pass marks the pixels at which a pair changes, and only those touch the hash
// table. A 640x480 pair costs little more than reading it once. Noise is not what this is for: it is given up, since
// sorting all pixels is faster then.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

namespace spatialflow {

struct IdImage {
    enum class Kind { kRgb, kIds };  // three bytes a pixel (id = red + 256 green + 65536 blue), or one int32
    Kind kind;
    const void* data;  // (pixels, 3) uint8 or (pixels) int32
};

struct PairCount {
    int32_t first;
    int32_t second;
    int64_t count;
};

// Counts of all pairs that occur, sorted by (first, second). Both images hold `pixels` pixels. Nothing where pairs stay
// the same for less than about eight pixels in a row.
std::optional<std::vector<PairCount>> count_pairs(const IdImage& first, const IdImage& second, size_t pixels);

}  // namespace spatialflow
