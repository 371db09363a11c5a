// SPDX-License-Identifier: Apache-2.0
#include "ops/multiclass_nms.h"

STABLE_TORCH_LIBRARY_FRAGMENT(spatialflow, library) {
    library.def(
        "multiclass_nms(Tensor boxes, Tensor scores, float score_threshold, float iou_threshold, "
        "SymInt max_detections) -> (Tensor boxes, Tensor scores, Tensor labels, Tensor count, Tensor indices)");
}

STABLE_TORCH_LIBRARY_FRAGMENT(spatialflow_checks, library) {
    library.def(
        "multiclass_nms(Tensor boxes, Tensor scores, float score_threshold, float iou_threshold, "
        "int max_detections) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(spatialflow_checks, CompositeExplicitAutograd, library) {
    library.impl("multiclass_nms", TORCH_BOX(&spatialflow::check_multiclass_nms));
}
