// SPDX-License-Identifier: Apache-2.0
//
// Where the pixels of a label map fall among logits at a quarter of the network's input, written once for CPU and CUDA.
// Files that include this are compiled without fused multiply-adds, so that every back end sees the same weights.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/host_device.h"

namespace spatialflow {

// A pixel lies `weight` of the way from cell `first` to `second`, the next one; the last cell is its own next one.
struct LabelTap {
    int64_t first, second;
    float weight;
};

// One axis: `pixels` of the result pick, as OpenCV's INTER_NEAREST does, among the first `valid` of the 4 * cells
// positions to which the logits are enlarged with aligned corners.
struct LabelAxis {
    int64_t cells, valid, pixels;
    double nearest_step;  // positions per pixel
    float cell_step;      // cells per position; float, and so are positions in cells, as in torch's interpolation

    LabelAxis(int64_t cells, int64_t valid, int64_t pixels)
        : cells(cells),
          valid(valid),
          pixels(pixels),
          nearest_step(1.0 / (double(pixels) / double(valid))),
          cell_step(static_cast<float>(double(cells - 1) / double(4 * cells - 1))) {}

    SPATIALFLOW_HOST_DEVICE LabelTap tap(int64_t pixel) const {
        const auto nearest = static_cast<int64_t>(double(pixel) * nearest_step);
        const float exact = static_cast<float>(nearest < valid ? nearest : valid - 1) * cell_step;
        const auto cell = static_cast<int64_t>(exact);
        const int64_t first = cell < cells ? cell : cells - 1;
        return {first, first + (first + 1 < cells), exact - static_cast<float>(first)};
    }
};

}  // namespace spatialflow
