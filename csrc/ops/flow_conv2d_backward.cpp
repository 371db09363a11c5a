// SPDX-License-Identifier: Apache-2.0
#include "ops/flow_conv2d.h"

STABLE_TORCH_LIBRARY_FRAGMENT(spatialflow, library) {
    library.def(
        "_flow_conv2d_weight_gradient(Tensor[] x, Tensor[] flow, Tensor[] grad_output, int algorithm) -> Tensor");
}

STABLE_TORCH_LIBRARY_FRAGMENT(spatialflow_checks, library) {
    library.def("_flow_conv2d_weight_gradient(Tensor[] x, Tensor[] flow, Tensor[] grad_output, int algorithm) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(spatialflow_checks, CompositeExplicitAutograd, library) {
    library.impl("_flow_conv2d_weight_gradient", TORCH_BOX(&spatialflow::check_conv_weight_gradient));
}
