// SPDX-License-Identifier: Apache-2.0
#include "ops/group_norm_relu.h"

STABLE_TORCH_LIBRARY_FRAGMENT(spatialflow, library) {
    library.def(
        "_group_norm_relu_backward(Tensor grad_output, Tensor input, Tensor statistics, Tensor? weight, Tensor? bias, "
        "int num_groups, bool upsample) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)");
}

STABLE_TORCH_LIBRARY_FRAGMENT(spatialflow_checks, library) {
    library.def(
        "_group_norm_relu_backward(Tensor grad_output, Tensor input, Tensor statistics, Tensor? weight, Tensor? bias, "
        "int num_groups, bool upsample) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(spatialflow_checks, CompositeExplicitAutograd, library) {
    library.impl("_group_norm_relu_backward", TORCH_BOX(&spatialflow::check_group_norm_relu_backward));
}
