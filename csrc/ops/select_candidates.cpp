// SPDX-License-Identifier: Apache-2.0
#include "ops/select_candidates.h"

STABLE_TORCH_LIBRARY_FRAGMENT(spatialflow, library) {
    library.def(
        "select_candidates(Tensor[] class_logits, Tensor[] box_deltas, Tensor base_anchors, int[] strides, "
        "Tensor valid_sizes, Tensor scale_factors, SymInt per_level) -> (Tensor boxes, Tensor scores)");
}

STABLE_TORCH_LIBRARY_FRAGMENT(spatialflow_checks, library) {
    library.def(
        "select_candidates(Tensor[] class_logits, Tensor[] box_deltas, Tensor base_anchors, int[] strides, "
        "Tensor valid_sizes, Tensor scale_factors, int per_level) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(spatialflow_checks, CompositeExplicitAutograd, library) {
    library.impl("select_candidates", TORCH_BOX(&spatialflow::check_select_candidates));
}
