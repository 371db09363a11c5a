// SPDX-License-Identifier: Apache-2.0
//
// 3x3 convolutions by wgmma on devices of compute capability 9.0a; the kernel is in sm90_conv3x3_kernel.cuh.
#pragma once

#include "cuda/conv3x3.h"

namespace spatialflow {

// Run the convolutions that the kernel supports, and return the others. The kernel requires a positive multiple of 64
// input channels, at most kMaxEntries levels that are not empty, and maps that TMA can read. The number of sub-tiles
// times that of blocks of 64 outputs must be at most 2^26. On devices of other compute capabilities than 9.0a, return
// all convolutions.
template <typename scalar_t>
std::vector<Convolution> convolve3x3_sm90(
    const std::vector<Convolution>& convolutions, Stream stream, const std::optional<Tensor>& active);

}  // namespace spatialflow
