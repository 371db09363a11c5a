// SPDX-License-Identifier: Apache-2.0
#include "ops/tensor.h"

STABLE_TORCH_LIBRARY_FRAGMENT(spatialflow, library) {
    library.def(
        "_flow_conv2d_weight_gradient(Tensor[] x, Tensor[] flow, Tensor[] grad_output, int algorithm) -> Tensor");
}
