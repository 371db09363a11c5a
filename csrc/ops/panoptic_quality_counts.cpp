// SPDX-License-Identifier: Apache-2.0
#include "ops/tensor.h"

STABLE_TORCH_LIBRARY_FRAGMENT(spatialflow, library) {
    library.def(
        "panoptic_quality_counts(Tensor gt_map, Tensor pred_map, SymInt gt_segments, SymInt pred_segments) -> Tensor");
}
