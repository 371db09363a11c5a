// SPDX-License-Identifier: Apache-2.0
//
// With `offset_tangent` this op and its gradients compute their derivative along that direction of the offset: the
// tangent of a sample takes the place of the sample.
#include "ops/tensor.h"

STABLE_TORCH_LIBRARY_FRAGMENT(spatialflow, library) {
    library.def(
        "deform_conv2d(Tensor input, Tensor offset, Tensor weight, Tensor? bias, Tensor? mask, "
        "Tensor? offset_tangent, int stride_h, int stride_w, int padding_h, int padding_w, int dilation_h, "
        "int dilation_w) -> Tensor");
}
