// SPDX-License-Identifier: Apache-2.0
#include "ops/group_norm_relu.h"

// `statistics` is (N, num_groups, 2) in float64: the mean and 1 / sqrt(variance + eps) of every group.
STABLE_TORCH_LIBRARY_FRAGMENT(spatialflow, library) {
    library.def(
        "group_norm_relu(Tensor input, Tensor? weight, Tensor? bias, int num_groups, float eps, bool upsample) -> "
        "(Tensor output, Tensor statistics)");
}

STABLE_TORCH_LIBRARY_FRAGMENT(spatialflow_checks, library) {
    library.def("group_norm_relu(Tensor input, Tensor? weight, Tensor? bias, int num_groups, float eps) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(spatialflow_checks, CompositeExplicitAutograd, library) {
    library.impl("group_norm_relu", TORCH_BOX(&spatialflow::check_group_norm_relu));
}
