// SPDX-License-Identifier: Apache-2.0
//
// Instantiations of the 3x3 convolutions of flow_conv2d and fused_subnets.
#include "cpu/conv3x3_direct.h"
#include "cpu/conv3x3_tensors.h"
#include "cpu/conv3x3_winograd.h"

namespace spatialflow {

template void conv3x3_winograd(const std::vector<ConvGroup<float>>&);
template void conv3x3_winograd(const std::vector<ConvGroup<float16>>&);
template void conv3x3_winograd(const std::vector<ConvGroup<bfloat16>>&);
template void conv3x3_direct(const std::vector<ConvGroup<float>>&);
template void conv3x3_direct(const std::vector<ConvGroup<double>>&);
template void conv3x3_direct(const std::vector<ConvGroup<float16>>&);
template void conv3x3_direct(const std::vector<ConvGroup<bfloat16>>&);

}  // namespace spatialflow
