// SPDX-License-Identifier: Apache-2.0
//
// Dispatch from a run-time dtype to a C++ type, for all back ends.
#pragma once

#include "ops/tensor.h"

namespace spatialflow {

// Call body(scalar_t{}) with the C++ type of the floating-point `dtype`; half_t and bfloat_t are the 16-bit types of
// the back end.
template <typename half_t, typename bfloat_t, typename Body>
inline void dispatch_floating_types(const char* op, ScalarType dtype, Body&& body) {
    switch (dtype) {
        case ScalarType::Float:
            return body(float{});
        case ScalarType::Double:
            return body(double{});
        case ScalarType::Half:
            return body(half_t{});
        case ScalarType::BFloat16:
            return body(bfloat_t{});
        default:
            check(false, op, ": no kernel for ", dtype_name(dtype));
    }
}

// Call body(real_t{}) with the C++ type of an accumulation dtype, float32 or float64.
template <typename Body>
inline void dispatch_accum(ScalarType dtype, Body&& body) {
    if (dtype == ScalarType::Double) {
        body(double{});
    } else {
        body(float{});
    }
}

}  // namespace spatialflow
