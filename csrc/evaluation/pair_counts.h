// SPDX-License-Identifier: Apache-2.0
//
// Number of pixels of each pair of ids in two images of equal size. This is the only pass over pixels for panoptic
// quality.
//
// Segments are large, so a pair rarely changes from one pixel to the next. Chunks that fit into the L1 cache are
// decoded to ids, and a vectorized pass marks the pixels at which the pair changes. Only these pixels access the hash
// table, so the cost is little more than one read of both images. For noise the function returns nullopt, because
// sorting all pixels is then faster.
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

// Return the counts of all pairs that occur, sorted by (first, second). Both images have `pixels` pixels. Return
// nullopt for noise: if there are more runs of equal pairs than 4096 plus an eighth of the pixels read so far.
std::optional<std::vector<PairCount>> count_pairs(const IdImage& first, const IdImage& second, size_t pixels);

}  // namespace spatialflow
