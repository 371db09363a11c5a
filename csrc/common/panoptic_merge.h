// SPDX-License-Identifier: Apache-2.0
//
// Decisions of the panoptic merge, shared by CPU and CUDA: which instances are candidates, which are dropped, and which
// pixels a box covers. All ratios are computed in double from exact counts, so back ends agree at every threshold.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace spatialflow {

// Columns of the segment table, one int64 row per segment; row r describes id r + 1.
enum MergeColumn : int {
    kMergeLabel,     // of the instance, or the stuff label; -1 in unused rows
    kMergeIsThing,   // 1 or 0
    kMergeInstance,  // index of the instance in the input, -1 for stuff
    kMergeArea,      // pixels
    kMergeX,         // bounding box of the pixels
    kMergeY,
    kMergeWidth,
    kMergeHeight,
    kMergeColumns
};

// False for a NaN score.
SPATIALFLOW_HOST_DEVICE bool merge_is_candidate(double score, double score_threshold) {
    return score >= score_threshold;
}

SPATIALFLOW_HOST_DEVICE bool merge_instance_is_kept(int64_t overlap, int64_t area, double overlap_threshold) {
    return area > 0 && !(double(overlap) / double(area) > overlap_threshold);
}

SPATIALFLOW_HOST_DEVICE bool merge_box_is_filled(int64_t still_void, int64_t area, double box_threshold) {
    return still_void > 0 && double(still_void) / double(area) >= box_threshold;
}

// Pixels [x1, x2) x [y1, y2) of the image under a box; empty (all zero) if a coordinate is not finite.
struct PixelBox {
    int64_t x1, y1, x2, y2;
    SPATIALFLOW_HOST_DEVICE int64_t area() const { return x1 < x2 && y1 < y2 ? (x2 - x1) * (y2 - y1) : 0; }
};

// Truncates towards zero and clamps to [0, size]; clamping first keeps the conversion defined for any value.
SPATIALFLOW_HOST_DEVICE int64_t merge_pixel_edge(double value, int64_t size) {
    return value <= 0.0 ? 0 : value >= double(size) ? size : static_cast<int64_t>(value);
}

SPATIALFLOW_HOST_DEVICE PixelBox merge_pixel_box(const double* box, int64_t height, int64_t width) {
    for (int i = 0; i < 4; ++i) {
        if (!(box[i] - box[i] == 0.0)) {
            return {0, 0, 0, 0};
        }
    }
    return {
        merge_pixel_edge(box[0], width), merge_pixel_edge(box[1], height), merge_pixel_edge(box[2], width),
        merge_pixel_edge(box[3], height)};
}

}  // namespace spatialflow
