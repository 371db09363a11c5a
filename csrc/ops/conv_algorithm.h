// SPDX-License-Identifier: Apache-2.0
//
// How a convolution multiplies float32: what the schemas of flow_conv2d, flow_tower and deform_conv2d call `algorithm`.
#pragma once

#include "ops/tensor.h"

namespace spatialflow {

constexpr int64_t kConvAuto = 0, kConvWinograd = 1, kConvDirect = 2, kConvTf32 = 3, kConvTf32x3 = 4;

inline void check_algorithm(const char* op, int64_t algorithm) {
    check(algorithm >= kConvAuto && algorithm <= kConvTf32x3, op,
          ": algorithm must be 0 (auto), 1 (winograd), 2 (direct), 3 (tf32) or 4 (tf32x3), got ", algorithm);
}

}  // namespace spatialflow
