// SPDX-License-Identifier: Apache-2.0
#include "ops/stuff_labels.h"

STABLE_TORCH_LIBRARY_FRAGMENT(spatialflow, library) {
    library.def(
        "stuff_labels(Tensor logits, SymInt valid_height, SymInt valid_width, SymInt height, SymInt width) -> Tensor");
}

STABLE_TORCH_LIBRARY_FRAGMENT(spatialflow_checks, library) {
    library.def("stuff_labels(Tensor logits, int valid_height, int valid_width, int height, int width) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(spatialflow_checks, CompositeExplicitAutograd, library) {
    library.impl("stuff_labels", TORCH_BOX(&spatialflow::check_stuff_labels));
}
