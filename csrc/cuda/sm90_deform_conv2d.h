// SPDX-License-Identifier: Apache-2.0
//
// Deformable convolution by wgmma on devices of compute capability 9.0a; the kernel is in sm90_deform_conv2d.cu.
#pragma once

#include "cuda/deform_conv2d.cuh"

namespace spatialflow {

// Compute the output on devices of compute capability 9.0a. If the function sets `parts`, it writes partial sums there
// instead, (parts, pixels * O) in float32. The caller then adds the parts and the bias, and applies ReLU. Return false
// on other devices, and if the kernel does not support the problem. The kernel requires one weight group and more than
// 64 outputs, a multiple of 8. The channels of an offset group must be a multiple of 64. The weight may have at most
// kTableTaps taps.
template <typename scalar_t>
bool deform_conv2d_sm90(
    const char* op, const DeformProblem<scalar_t>& problem, const Tensor& packed, const std::optional<Tensor>& bias,
    const Tensor& output, std::optional<Tensor>& parts, Stream stream);

}  // namespace spatialflow
