// SPDX-License-Identifier: Apache-2.0
#include "ops/panoptic_merge.h"

// The first results for K masks are the id map (H, W) int32 and the segment table (K + stuff_labels, 8) int64. The
// others are the scores of the segments (K + stuff_labels) float32, and the number of segments, an int64 scalar tensor.
// The columns of the table are in common/panoptic_merge.h. All sizes are known beforehand, so the host does not have to
// wait for the device.
STABLE_TORCH_LIBRARY_FRAGMENT(spatialflow, library) {
    library.def(
        "panoptic_merge(Tensor masks, Tensor scores, Tensor labels, Tensor? boxes, Tensor stuff, SymInt stuff_labels, "
        "int[] ignored_stuff, float score_threshold, float overlap_threshold, int stuff_area_threshold, "
        "float box_overlap_threshold) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_FRAGMENT(spatialflow_checks, library) {
    library.def(
        "panoptic_merge(Tensor masks, Tensor scores, Tensor labels, Tensor? boxes, Tensor stuff, "
        "int stuff_labels, float score_threshold, float overlap_threshold, float box_overlap_threshold) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(spatialflow_checks, CompositeExplicitAutograd, library) {
    library.impl("panoptic_merge", TORCH_BOX(&spatialflow::check_panoptic_merge));
}
