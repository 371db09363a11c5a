// SPDX-License-Identifier: Apache-2.0
//
// Suppression rule of every NMS operator, shared by CPU and CUDA:
//
//   area(b)  = max(x2 - x1, 0) * max(y2 - y1, 0)
//   inter    = max(min(x2) - max(x1), 0) * max(min(y2) - max(y1), 0)
//   suppress = inter > threshold * ((area(a) + area(b)) - inter)
//
// The IEEE operations are exactly these, each rounded separately (no fused multiply-add), in float, or in double if
// boxes or scores are double. So all back ends decide equally, also for a pair whose IoU equals the threshold.
// max(NaN, 0) is 0.
// With a threshold >= 0, a box whose area is 0 or infinite neither suppresses nor is suppressed: the comparison is
// false. Boxes with a NaN corner are excluded beforehand (`box_is_valid`).
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace spatialflow {

template <typename real_t>
struct Box {
    real_t x1, y1, x2, y2;
};

// Product without contraction to a fused multiply-add. Host files that include this header are compiled with
// -ffp-contract=off.
template <typename real_t>
SPATIALFLOW_HOST_DEVICE real_t rounded_product(real_t a, real_t b) {
#if defined(__CUDA_ARCH__)
    if constexpr (sizeof(real_t) == 4) {
        return __fmul_rn(a, b);
    } else {
        return __dmul_rn(a, b);
    }
#else
    return a * b;
#endif
}

template <typename real_t>
SPATIALFLOW_HOST_DEVICE real_t positive_part(real_t value) {
    return value > real_t(0) ? value : real_t(0);
}

template <typename real_t>
SPATIALFLOW_HOST_DEVICE bool box_is_valid(const Box<real_t>& box) {
    return box.x1 == box.x1 && box.y1 == box.y1 && box.x2 == box.x2 && box.y2 == box.y2;
}

template <typename real_t>
SPATIALFLOW_HOST_DEVICE real_t box_area(const Box<real_t>& box) {
    return rounded_product(positive_part(box.x2 - box.x1), positive_part(box.y2 - box.y1));
}

// Whether a box of this area can suppress or be suppressed (see above): 0 < area < infinity.
template <typename real_t>
SPATIALFLOW_HOST_DEVICE bool area_competes(real_t area) {
    return area > real_t(0) && area - area == real_t(0);
}

template <typename real_t>
SPATIALFLOW_HOST_DEVICE bool suppresses(
    const Box<real_t>& a, real_t area_a, const Box<real_t>& b, real_t area_b, real_t threshold) {
    const real_t left = a.x1 > b.x1 ? a.x1 : b.x1;
    const real_t top = a.y1 > b.y1 ? a.y1 : b.y1;
    const real_t right = a.x2 < b.x2 ? a.x2 : b.x2;
    const real_t bottom = a.y2 < b.y2 ? a.y2 : b.y2;
    const real_t inter = rounded_product(positive_part(right - left), positive_part(bottom - top));
    return inter > rounded_product(threshold, (area_a + area_b) - inter);
}

// Unsigned key that ascends as scores descend; equal for -0 and +0. Scores must not be NaN.
SPATIALFLOW_HOST_DEVICE uint32_t descending_key(float score) {
    score += 0.0f;  // -0 + 0 = +0
    uint32_t bits;
    __builtin_memcpy(&bits, &score, sizeof(bits));
    return bits & 0x80000000u ? bits : ~bits & 0x7fffffffu;
}
SPATIALFLOW_HOST_DEVICE uint64_t descending_key(double score) {
    score += 0.0;
    uint64_t bits;
    __builtin_memcpy(&bits, &score, sizeof(bits));
    return bits >> 63 ? bits : ~bits & 0x7fffffffffffffffu;
}

}  // namespace spatialflow
