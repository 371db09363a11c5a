// SPDX-License-Identifier: Apache-2.0
//
// What the schemas of flow_conv2d, fused_subnets and deform_conv2d share: `algorithm`, how a convolution multiplies float32,
// and the tag of packed weights.
#pragma once

#include "ops/tensor.h"

namespace spatialflow {

constexpr int64_t kConvAuto = 0, kConvWinograd = 1, kConvDirect = 2, kConvTf32 = 3, kConvTf32x3 = 4;

inline void check_algorithm(const char* op, int64_t algorithm) {
    check(
        algorithm >= kConvAuto && algorithm <= kConvTf32x3, op,
        ": algorithm must be 0 (auto), 1 (winograd), 2 (direct), 3 (tf32) or 4 (tf32x3), got ", algorithm);
}

// Elements behind packed weights that no kernel reads. Their number is the tag of the layout, which differs between
// instruction sets, CPU and CUDA, and float32 and float64 while the sizes agree. `columns` is how many float32 outputs
// lie side by side; CUDA counts as 1. A length survives files, copies and captured graphs, and no device is waited for
// to read it. A layout that changes takes a tag that was never used; weights without one are of earlier versions.
inline int64_t packed_tag(int64_t columns, bool is_double) { return 2 * columns + (is_double ? 1 : 0); }

}  // namespace spatialflow
