// SPDX-License-Identifier: Apache-2.0
//
// Deformable convolution by wgmma, where compute capability 9.0a has it; the kernel is in sm90_deform_conv2d.cu.
#pragma once

#include "cuda/deform_conv2d.cuh"

namespace spatialflow {

// Compute the output on devices of compute capability 9.0a, or partial sums of it in float32, (parts, pixels, O)
// without the bias, which the caller adds. False on other devices, and if the kernel does not support the problem. It
// needs one weight group, channels of an offset group that are a multiple of 64, and more than 64 outputs, a multiple
// of 8.
template <typename scalar_t>
bool deform_conv2d_sm90(
    const char* op, const DeformProblem<scalar_t>& problem, const Tensor& packed, const std::optional<Tensor>& bias,
    const Tensor& output, std::optional<Tensor>& parts, Stream stream);

}  // namespace spatialflow
