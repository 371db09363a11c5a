// SPDX-License-Identifier: Apache-2.0
#include "ops/panoptic_quality_counts.h"

STABLE_TORCH_LIBRARY_FRAGMENT(spatialflow, library) {
    library.def(
        "panoptic_quality_counts(Tensor gt_map, Tensor pred_map, SymInt gt_segments, SymInt pred_segments) -> Tensor");
}

STABLE_TORCH_LIBRARY_FRAGMENT(spatialflow_checks, library) {
    library.def("panoptic_quality_counts(Tensor gt_map, Tensor pred_map, int gt_segments, int pred_segments) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(spatialflow_checks, CompositeExplicitAutograd, library) {
    library.impl("panoptic_quality_counts", TORCH_BOX(&spatialflow::check_panoptic_quality_counts));
}
