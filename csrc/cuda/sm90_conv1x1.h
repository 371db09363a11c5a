// SPDX-License-Identifier: Apache-2.0
//
// 1x1 convolutions by wgmma on devices of compute capability 9.0a; the kernel is in sm90_conv1x1.cu.
#pragma once

#include "cuda/launch.h"

namespace spatialflow {

// Compute `out`, which is not empty, on devices of compute capability 9.0a. Return false on other devices, and if the
// kernel does not support the sizes. Channels and outputs must be positive multiples of eight. Channels, outputs and
// out.numel() / 8 must be at most 2^31 - 1024. Weight and bias are contiguous, residual and result channels-last. `x`
// has any strides, and is copied if TMA cannot read it.
template <typename scalar_t>
bool conv1x1_sm90(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
    const Tensor& out, bool relu, Stream stream);

}  // namespace spatialflow
