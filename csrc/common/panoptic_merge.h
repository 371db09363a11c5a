// SPDX-License-Identifier: Apache-2.0
//
// Rules of the panoptic merge, shared by CPU and CUDA: selection of candidates, removal of instances, and pixels of a
// box. All ratios are computed in double from exact counts, so all back ends give equal results at every threshold.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace spatialflow {

// Columns of the segment table, one int64 row per segment; row r describes id r + 1.
enum MergeColumn : int {
    kMergeLabel,     // label of the instance, or stuff label; -1 in unused rows
    kMergeIsThing,   // 1 or 0
    kMergeInstance,  // index of the instance in the input, -1 for stuff
    kMergeArea,      // pixels
    kMergeX,         // bounding box of the pixels
    kMergeY,
    kMergeWidth,
    kMergeHeight,
    kMergeColumns
};

// Whether an instance is a candidate; false for a NaN score.
SPATIALFLOW_HOST_DEVICE bool merge_is_candidate(double score, double score_threshold) {
    return score >= score_threshold;
}

SPATIALFLOW_HOST_DEVICE bool merge_instance_is_kept(int64_t overlap, int64_t area, double overlap_threshold) {
    return area > 0 && !(double(overlap) / double(area) > overlap_threshold);
}

SPATIALFLOW_HOST_DEVICE bool merge_box_is_filled(int64_t still_void, int64_t area, double box_overlap_threshold) {
    return still_void > 0 && double(still_void) / double(area) >= box_overlap_threshold;
}

// Pixels [x1, x2) x [y1, y2) of the image under a box; empty (all zero) if a coordinate is not finite.
struct PixelBox {
    int64_t x1, y1, x2, y2;
    SPATIALFLOW_HOST_DEVICE int64_t area() const { return x1 < x2 && y1 < y2 ? (x2 - x1) * (y2 - y1) : 0; }
};

// Truncate toward zero and clamp to [0, size]. Clamping first makes the conversion defined for all finite values.
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
