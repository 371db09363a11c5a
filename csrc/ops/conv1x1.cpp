// SPDX-License-Identifier: Apache-2.0
#include "ops/conv1x1.h"

STABLE_TORCH_LIBRARY_FRAGMENT(spatialflow, library) {
    library.def("_conv1x1(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, bool relu) -> Tensor");
}

STABLE_TORCH_LIBRARY_FRAGMENT(spatialflow_checks, library) {
    library.def("_conv1x1(Tensor x, Tensor weight, Tensor? bias, Tensor? residual) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(spatialflow_checks, CompositeExplicitAutograd, library) {
    library.impl("_conv1x1", TORCH_BOX(&spatialflow::check_conv1x1));
}
