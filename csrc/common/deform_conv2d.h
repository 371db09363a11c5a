// SPDX-License-Identifier: Apache-2.0
//
// Sampling positions and bilinear weights of deformable convolution (Dai et al., Deformable Convolutional Networks, eq.
// 2-4), shared by CPU and CUDA. Tap (i, j) of output cell (oy, ox) samples the input bilinearly at
//
//   y = oy * stride - padding + i * dilation + offset_y,   x from ox in the same way.
//
// A sample is the sum of `value[corner] * input[corner]` over the four cells around it. Corners 0 and 1 are the upper
// cells, 2 and 3 the lower cells. The input is zero outside the map.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/host_device.h"

namespace spatialflow {

template <typename real_t>
struct DeformTap {
    int64_t y;  // cell of corner 0; -1 for a position in [-1, 0)
    int64_t x;
    real_t fraction_y;
    real_t fraction_x;
};

// Compute the cells and fractions of a position. Return false outside [-1, height) x [-1, width), and for NaN and
// infinity: the tap then reads nothing.
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

// Row-major index of a corner's cell, or -1 outside the map.
template <typename real_t>
SPATIALFLOW_HOST_DEVICE int64_t deform_corner(const DeformTap<real_t>& tap, int corner, int64_t height, int64_t width) {
    const int64_t y = tap.y + (corner >> 1), x = tap.x + (corner & 1);
    return y >= 0 && y < height && x >= 0 && x < width ? y * width + x : -1;
}

// Bilinear weights of the four corners.
template <typename real_t>
SPATIALFLOW_HOST_DEVICE void deform_values(const DeformTap<real_t>& tap, real_t value[4]) {
    const real_t low_y = real_t(1) - tap.fraction_y, low_x = real_t(1) - tap.fraction_x;
    value[0] = low_y * low_x;
    value[1] = low_y * tap.fraction_x;
    value[2] = tap.fraction_y * low_x;
    value[3] = tap.fraction_y * tap.fraction_x;
}

// Derivatives of the four weights with respect to y and x. At integer coordinates, where the sample is not
// differentiable, they are the right-hand derivatives.
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

// Weights of the four corners in the derivative of a sample along (tangent_y, tangent_x), a tangent of the offset. A
// kernel that is given offset tangents computes with this derivative instead of the sample.
template <typename real_t>
SPATIALFLOW_HOST_DEVICE void deform_tangent_values(
    const DeformTap<real_t>& tap, real_t tangent_y, real_t tangent_x, real_t value[4]) {
    real_t slope_y[4], slope_x[4];
    deform_slopes(tap, slope_y, slope_x);
    for (int corner = 0; corner < 4; ++corner) {
        value[corner] = tangent_y * slope_y[corner] + tangent_x * slope_x[corner];
    }
}

// Derivatives of the weights of deform_tangent_values with respect to y and x. The only nonzero second derivative of a
// bilinear function is the mixed one.
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
