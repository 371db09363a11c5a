// SPDX-License-Identifier: Apache-2.0
#include "ops/group_norm_relu.h"

// `statistics` is (N, num_groups, 2) in float64: the mean and 1 / sqrt(variance + eps) of every group.
STABLE_TORCH_LIBRARY_FRAGMENT(spatialflow, library) {
    library.def(
        "group_norm_relu(Tensor input, Tensor? weight, Tensor? bias, int num_groups, float eps, bool upsample) -> "
        "(Tensor output, Tensor statistics)");
    library.def(
        "_group_norm_relu_backward(Tensor grad_output, Tensor input, Tensor statistics, Tensor? weight, Tensor? bias, "
        "int num_groups, bool upsample) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)");
}

STABLE_TORCH_LIBRARY_FRAGMENT(spatialflow_checks, library) {
    library.def(
        "group_norm_relu(Tensor input, Tensor? weight, Tensor? bias, int num_groups, float eps) -> ()");
    library.def(
        "_group_norm_relu_backward(Tensor grad_output, Tensor input, Tensor statistics, Tensor? weight, Tensor? bias, "
        "int num_groups, bool upsample) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(spatialflow_checks, CompositeExplicitAutograd, library) {
    library.impl("group_norm_relu", TORCH_BOX(&spatialflow::check_group_norm_relu));
    library.impl("_group_norm_relu_backward", TORCH_BOX(&spatialflow::check_group_norm_relu_backward));
}
