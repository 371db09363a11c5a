// SPDX-License-Identifier: Apache-2.0
//
// Deformable convolution by wgmma, where compute capability 9.0a has it; the kernel is in sm90_deform_conv2d.cu.
#pragma once

#include "cuda/deform_conv2d.h"

namespace spatialflow {

// False where the kernel is not made for the problem: one weight group, channels of an offset group a multiple of 64,
// more than 64 outputs, a multiple of 8; on other devices always. Else writes the output, or parts of it in float32,
// (parts, pixels, O) without the bias, that are still to be added.
template <typename scalar_t>
bool deform_conv2d_sm90(
    const char* op, const DeformProblem<scalar_t>& problem, const Tensor& packed, const std::optional<Tensor>& bias,
    const Tensor& output, std::optional<Tensor>& parts, Stream stream);

}  // namespace spatialflow
