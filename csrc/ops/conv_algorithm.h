// SPDX-License-Identifier: Apache-2.0
//
// Definitions shared by flow_conv2d, fused_subnets and deform_conv2d: the values of `algorithm`, and the tag of packed
// weights.
#pragma once

#include "ops/tensor.h"

namespace spatialflow {

constexpr int64_t kConvAuto = 0, kConvWinograd = 1, kConvDirect = 2, kConvTf32 = 3, kConvTf32x3 = 4;

inline void check_algorithm(const char* op, int64_t algorithm) {
    check(
        algorithm >= kConvAuto && algorithm <= kConvTf32x3, op,
        ": algorithm must be 0 (auto), 1 (winograd), 2 (direct), 3 (tf32) or 4 (tf32x3), got ", algorithm);
}

// Tag of the layout of packed weights: the number of unused elements after them. The layout differs between instruction
// sets, CPU and CUDA, and float32 and float64, while the sizes may be equal. `columns` is kGemmColumns<float> on the
// CPU, and 1 on CUDA. Files, copies and captured graphs preserve a length, and reading it needs no synchronization with
// the device. A changed layout must get an unused tag; weights without a tag are from earlier versions.
inline int64_t packed_tag(int64_t columns, bool is_double) { return 2 * columns + (is_double ? 1 : 0); }

}  // namespace spatialflow
