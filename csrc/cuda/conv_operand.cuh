// SPDX-License-Identifier: Apache-2.0
//
// Operand types of the convolution kernels for a schema's `algorithm`, and ReLU.
#pragma once

#include "cuda/tensor_core.cuh"
#include "ops/conv_algorithm.h"

namespace spatialflow {

// Return the algorithm of the CUDA kernels. For float32 it is fused multiply-adds for "direct", one TF32 product for
// "tf32", and three TF32 products for all others. Other dtypes have one algorithm each; the result is then always
// kConvTf32x3, and is not used.
inline int64_t cuda_algorithm(int64_t algorithm, ScalarType dtype) {
    return dtype == ScalarType::Float && (algorithm == kConvDirect || algorithm == kConvTf32) ? algorithm : kConvTf32x3;
}

// Call body(operand_t{}) with the operand type for a result of cuda_algorithm.
template <typename scalar_t, typename Body>
inline void dispatch_operand(int64_t algorithm, Body&& body) {
    if constexpr (std::is_same_v<scalar_t, float>) {
        if (algorithm == kConvTf32) {
            return body(Tf32{});
        }
        if (algorithm == kConvTf32x3) {
            return body(Tf32x3{});
        }
    }
    body(scalar_t{});
}

template <typename real_t>
__device__ __forceinline__ real_t rectified(real_t value, bool relu) {
    return relu && value < real_t(0) ? real_t(0) : value;  // NaN stays
}

}  // namespace spatialflow
