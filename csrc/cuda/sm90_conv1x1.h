// SPDX-License-Identifier: Apache-2.0
//
// 1x1 convolutions by wgmma, where compute capability 9.0a has it; the kernel is in sm90_conv1x1.cu.
#pragma once

#include "cuda/launch.h"

namespace spatialflow {

// False where the kernel is not made for it: channels and outputs are multiples of eight, and they, pixels and tiles
// fewer than 2^31; on other devices always. Else fills `out`, which is not empty. Weight and bias are contiguous,
// residual and result channels-last; `x` has any strides, and is copied where TMA cannot read it.
template <typename scalar_t>
bool conv1x1_sm90(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
    const Tensor& out, bool relu, Stream stream);

}  // namespace spatialflow
