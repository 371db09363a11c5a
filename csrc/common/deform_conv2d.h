// SPDX-License-Identifier: Apache-2.0
//
// Where a tap of a deformable convolution reads (Dai et al., Deformable Convolutional Networks, eq. 2-4), written once
// for CPU and CUDA. Tap (i, j) of output cell (oy, ox) samples the input bilinearly at
//
//   y = oy * stride - padding + i * dilation + offset_y,   x likewise.
//
// A sample is a sum over the four cells around it, `value[corner] * input[corner]`; corners are numbered
// 0 1
// 2 3. Corners outside the map count as zero.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/host_device.h"

namespace spatialflow {

template <typename real_t>
struct DeformTap {
    int64_t y;  // corner 0; its row or column is -1 half a cell outside the map
    int64_t x;
    real_t fraction_y;
    real_t fraction_x;
};

// False, and the tap reads nothing, outside [-1, height) x [-1, width): written so that NaN and infinity are outside.
template <typename real_t>
SPATIALFLOW_HOST_DEVICE bool deform_tap(real_t y, real_t x, int64_t height, int64_t width, DeformTap<real_t>& tap) {
    if (!(y >= real_t(-1) && y < real_t(height) && x >= real_t(-1) && x < real_t(width))) {
        return false;
    }
    const real_t low_y = std::floor(y), low_x = std::floor(x);
    tap.y = static_cast<int64_t>(low_y);
    tap.x = static_cast<int64_t>(low_x);
    tap.fraction_y = y - low_y;
    tap.fraction_x = x - low_x;
    return true;
}

// Cell of a corner, row-major, or -1 outside the map.
template <typename real_t>
SPATIALFLOW_HOST_DEVICE int64_t deform_corner(const DeformTap<real_t>& tap, int corner, int64_t height, int64_t width) {
    const int64_t y = tap.y + (corner >> 1), x = tap.x + (corner & 1);
    return y >= 0 && y < height && x >= 0 && x < width ? y * width + x : -1;
}

template <typename real_t>
SPATIALFLOW_HOST_DEVICE void deform_values(const DeformTap<real_t>& tap, real_t value[4]) {
    const real_t low_y = real_t(1) - tap.fraction_y, low_x = real_t(1) - tap.fraction_x;
    value[0] = low_y * low_x;
    value[1] = low_y * tap.fraction_x;
    value[2] = tap.fraction_y * low_x;
    value[3] = tap.fraction_y * tap.fraction_x;
}

// Derivatives of the values by y and x. At whole coordinates, where the sample has a kink, those from above.
template <typename real_t>
SPATIALFLOW_HOST_DEVICE void deform_slopes(const DeformTap<real_t>& tap, real_t slope_y[4], real_t slope_x[4]) {
    const real_t low_y = real_t(1) - tap.fraction_y, low_x = real_t(1) - tap.fraction_x;
    slope_y[0] = -low_x;
    slope_y[1] = -tap.fraction_x;
    slope_y[2] = low_x;
    slope_y[3] = tap.fraction_x;
    slope_x[0] = -low_y;
    slope_x[1] = low_y;
    slope_x[2] = -tap.fraction_y;
    slope_x[3] = tap.fraction_y;
}

// The same two for the derivative of the sample along an offset tangent (ty, tx), which takes the sample's place when
// tangents are propagated. A bilinear function has one second derivative that is not zero: the mixed one.
template <typename real_t>
SPATIALFLOW_HOST_DEVICE void deform_tangent_values(
    const DeformTap<real_t>& tap, real_t tangent_y, real_t tangent_x, real_t value[4]) {
    real_t slope_y[4], slope_x[4];
    deform_slopes(tap, slope_y, slope_x);
    for (int corner = 0; corner < 4; ++corner) {
        value[corner] = tangent_y * slope_y[corner] + tangent_x * slope_x[corner];
    }
}

template <typename real_t>
SPATIALFLOW_HOST_DEVICE void deform_tangent_slopes(
    real_t tangent_y, real_t tangent_x, real_t slope_y[4], real_t slope_x[4]) {
    for (int corner = 0; corner < 4; ++corner) {
        const real_t mixed = corner == 0 || corner == 3 ? real_t(1) : real_t(-1);
        slope_y[corner] = tangent_x * mixed;
        slope_x[corner] = tangent_y * mixed;
    }
}

}  // namespace spatialflow
