// SPDX-License-Identifier: Apache-2.0
//
// Bilinear resize of 8-bit images in the fixed-point arithmetic of OpenCV (INTER_LINEAR), and normalization with the
// roundings of SpatialFlow's released code. Both are bit-identical to OpenCV.
//
//   position = (i + 0.5) * source / target - 0.5, rounded to float32; outside the image, the edge is repeated
//   weights  = round(2048 * (1 - fraction)), round(2048 * fraction)
//   row      = (left * weight + right * weight) >> 4
//   pixel    = ((upper * weight >> 16) + (lower * weight >> 16) + 2) >> 2
//
// An image whose sides are both halved exactly is averaged over 2 x 2 pixels instead. All weights are then 1, and only
// the last shift remains. Files that include this header are compiled without fused multiply-adds.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/host_device.h"

namespace spatialflow {

// One axis of a resize.
struct ResizeAxis {
    int64_t source, target;
    double step;  // source / target, as OpenCV rounds it
};

struct ImageResize {
    ResizeAxis y, x;
    bool halves;  // both axes are halved exactly
};

inline ImageResize image_resize(int64_t height, int64_t width, int64_t new_height, int64_t new_width) {
    const auto axis = [](int64_t source, int64_t target) {
        return ResizeAxis{source, target, 1.0 / (static_cast<double>(target) / static_cast<double>(source))};
    };
    return {axis(height, new_height), axis(width, new_width), height == 2 * new_height && width == 2 * new_width};
}

// The two source rows or columns between which row or column `i` of the result lies, and their weights.
struct ResizeTap {
    int64_t first, second;
    int first_weight, second_weight;
};

SPATIALFLOW_HOST_DEVICE ResizeTap resize_tap(int64_t i, const ResizeAxis& axis, bool halves) {
    if (halves) {
        return {2 * i, 2 * i + 1, 1, 1};
    }
    const float position = static_cast<float>((static_cast<double>(i) + 0.5) * axis.step - 0.5);
    const float floored = floorf(position);
    const float fraction = position - floored;
    const int64_t last = axis.source - 1, at = static_cast<int64_t>(floored);
    const auto clamped = [last](int64_t index) { return index < 0 ? 0 : index > last ? last : index; };
    return {
        clamped(at), clamped(at + 1), static_cast<int>(rintf((1.0f - fraction) * 2048.0f)),
        static_cast<int>(rintf(fraction * 2048.0f))};
}

// Interpolation between two columns, then between two rows, for integers or vectors of integers.
template <typename value_t, typename weight_t>
SPATIALFLOW_HOST_DEVICE value_t
resize_columns(value_t left, value_t right, weight_t left_weight, weight_t right_weight, bool halves) {
    return (left * left_weight + right * right_weight) >> (halves ? 0 : 4);
}
template <typename value_t>
SPATIALFLOW_HOST_DEVICE value_t
resize_rows(value_t upper, value_t lower, int upper_weight, int lower_weight, bool halves) {
    const int shift = halves ? 0 : 16;
    return ((upper * upper_weight >> shift) + (lower * lower_weight >> shift) + 2) >> 2;
}

// Parameters of (value - mean) / std for one channel.
struct Normalization {
    float mean;
    double factor;  // 1 / std
};

SPATIALFLOW_HOST_DEVICE float normalize(int value, const Normalization& channel) {
    return static_cast<float>(static_cast<double>(static_cast<float>(value) - channel.mean) * channel.factor);
}

}  // namespace spatialflow
