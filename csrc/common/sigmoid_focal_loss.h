// SPDX-License-Identifier: Apache-2.0
//
// Sigmoid focal loss (Lin et al., Focal Loss for Dense Object Detection, equation 5) and its derivatives, shared by CPU
// and CUDA.
//
// Let x be a logit. z = -x for the class of the label, and z = x for every other class. s = sigmoid(z) is the
// probability of the wrong decision. Without its factor alpha or 1 - alpha, the loss of one element is
//
//   f(z) = s^gamma * softplus(z)          softplus(z) = -log(1 - s) = max(z, 0) + log(1 + exp(-|z|))
//
// Every term is computed from exp(-|z|) in [0, 1]. So nothing overflows, and 1 - s has no cancellation for large z.
#pragma once

#include <cmath>
#include <type_traits>

#include "common/host_device.h"

namespace spatialflow {

// 1 / value for 1 <= value <= 2; NaN gives NaN. For float on CUDA it is one instruction with an error of at most one
// unit in the last place.
template <typename real_t, typename value_t>
SPATIALFLOW_HOST_DEVICE value_t focal_reciprocal(value_t value) {
#if defined(__CUDA_ARCH__)
    if constexpr (sizeof(value_t) == sizeof(float)) {
        asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(value));
        return value;
    }
#endif
    return real_t(1) / value;
}

// Derivative of f at z, of order 0 to 2. NaN gives NaN.
//
// value_t is a scalar or a vector; Math::exp(x) is called for x <= 0 and Math::log1p(x) for 0 <= x <= 1.
template <int order, typename Math, typename value_t, typename real_t>
SPATIALFLOW_HOST_DEVICE value_t focal_term(value_t z, real_t gamma) {
    const value_t zero = value_t{}, one = zero + real_t(1);
    value_t exponent;  // -|z|
    if constexpr (std::is_floating_point_v<value_t>) {
        exponent = -std::fabs(z);
    } else {
        exponent = z > zero ? -z : z;
    }
    const value_t small = Math::exp(exponent);
    const value_t log_term = Math::log1p(small);
    const value_t softplus_z = (z > zero ? z : zero) + log_term;
    const value_t larger = focal_reciprocal<real_t>(one + small);
    const value_t smaller = small * larger;
    const value_t s = z > zero ? larger : smaller;
    const value_t one_minus_s = z > zero ? smaller : larger;
    value_t power;  // s^gamma
    if (gamma == real_t(2)) {
        power = s * s;
    } else if (gamma == real_t(0)) {
        power = one;
    } else {
        power = Math::exp(-gamma * ((z > zero ? zero : -z) + log_term));  // log s = -softplus(-z)
    }
    value_t result;
    if constexpr (order == 0) {
        result = power * softplus_z;
    } else {
        // f' = s^gamma g with g = gamma (1 - s) softplus + s. The bound makes the product 0 for infinite z, not 0 *
        // infinity.
        const value_t limit = zero + real_t(1e4);
        const value_t bounded = softplus_z < limit ? softplus_z : limit;
        const value_t slope = gamma * one_minus_s * bounded + s;
        result = power * slope;
        if constexpr (order == 2) {
            result = power * one_minus_s * (gamma * slope - gamma * s * bounded + (gamma + real_t(1)) * s);
        }
    }
    if constexpr (std::is_floating_point_v<value_t>) {
        return result;  // NaN for NaN; only the vector version of exp does not propagate NaN
    } else {
        return z == z ? result : z;
    }
}

}  // namespace spatialflow
