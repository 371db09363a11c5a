// SPDX-License-Identifier: Apache-2.0
//
// Decoding of an anchor and its deltas to a box of the original image, shared by CPU and CUDA.
//
//   anchor = base + (x * stride, y * stride) of cell (y, x), with center c and size s
//   center = c + s * (dx, dy)     size = s * exp(clamp((dw, dh), -log(1000 / 16), log(1000 / 16)))
//   box    = clip(center -+ size / 2, 0, size of the image without padding) / scale
//
// NaN propagates through every step; NMS never keeps such a box.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "common/host_device.h"
#include "common/nms.h"

namespace spatialflow {

constexpr double kMaxLogRatio = 4.135166556742356;  // log(1000 / 16)

// Compute the interval of a box on one axis from the base anchor [low, high] moved by `shift`. `limit` is the size of
// the image without padding.
template <typename real_t>
SPATIALFLOW_HOST_DEVICE void decode_axis(
    float low, float high, int64_t shift, real_t offset, real_t log_ratio, real_t limit, real_t scale, real_t& begin,
    real_t& end) {
    const real_t bound = static_cast<real_t>(kMaxLogRatio);
    const real_t first = static_cast<real_t>(shift) + static_cast<real_t>(low);
    const real_t last = static_cast<real_t>(shift) + static_cast<real_t>(high);
    const real_t size = last - first;
    const real_t clamped = log_ratio < -bound ? -bound : log_ratio > bound ? bound : log_ratio;
    const real_t center = (first + last) * real_t(0.5) + size * offset;
    const real_t half = size * std::exp(clamped) * real_t(0.5);
    const auto clipped = [&](real_t at) {
        const real_t positive = at < real_t(0) ? real_t(0) : at;
        return positive > limit ? limit : positive;
    };
    begin = clipped(center - half) / scale;
    end = clipped(center + half) / scale;
}

template <typename real_t>
struct CandidateImage {
    real_t height, width;  // of the image without padding
    real_t scale_x, scale_y;
};

// Decode one candidate. `x` and `y` are the cell's origin in pixels; `dx` to `dh` are the deltas.
template <typename real_t>
SPATIALFLOW_HOST_DEVICE Box<real_t> decode_candidate(
    const Box<float>& base, int64_t x, int64_t y, real_t dx, real_t dy, real_t dw, real_t dh,
    const CandidateImage<real_t>& image) {
    Box<real_t> box;
    decode_axis(base.x1, base.x2, x, dx, dw, image.width, image.scale_x, box.x1, box.x2);
    decode_axis(base.y1, base.y2, y, dy, dh, image.height, image.scale_y, box.y1, box.y2);
    return box;
}

}  // namespace spatialflow
