// SPDX-License-Identifier: Apache-2.0
//
// Mapping from the pixels of a label map to logits at a quarter of the network's input size, shared by CPU and CUDA.
// Files that include this header are compiled without fused multiply-adds, so that all back ends compute equal weights.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/host_device.h"

namespace spatialflow {

// The rows or columns of the logits ("cells") between which a pixel lies. `first` has the weight 1 - `weight`; `second`
// has the weight `weight`, and is first + 1, or first at the last cell.
struct LabelTap {
    int64_t first, second;
    float weight;
};

// One axis. The logits are upsampled to 4 * cells positions with aligned corners. Each of the `pixels` of the result
// takes one of the first `valid` positions, as in OpenCV's INTER_NEAREST.
struct LabelAxis {
    int64_t cells, valid, pixels;
    double nearest_step;  // positions per pixel
    float cell_step;      // cells per position; float as in torch's interpolation

    LabelAxis(int64_t cells, int64_t valid, int64_t pixels)
        : cells(cells),
          valid(valid),
          pixels(pixels),
          nearest_step(1.0 / (double(pixels) / double(valid))),
          cell_step(static_cast<float>(double(cells - 1) / double(4 * cells - 1))) {}

    SPATIALFLOW_HOST_DEVICE LabelTap tap(int64_t pixel) const {
        const auto nearest = static_cast<int64_t>(double(pixel) * nearest_step);
        const float position = static_cast<float>(nearest < valid ? nearest : valid - 1) * cell_step;
        const auto cell = static_cast<int64_t>(position);
        const int64_t first = cell < cells ? cell : cells - 1;
        return {first, first + (first + 1 < cells), position - static_cast<float>(first)};
    }
};

}  // namespace spatialflow
