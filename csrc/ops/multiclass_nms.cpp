// SPDX-License-Identifier: Apache-2.0
#include "ops/tensor.h"

STABLE_TORCH_LIBRARY_FRAGMENT(spatialflow, library) {
    library.def(
        "multiclass_nms(Tensor boxes, Tensor scores, float score_threshold, float iou_threshold, "
        "SymInt max_detections) -> (Tensor boxes, Tensor scores, Tensor labels, Tensor count, Tensor indices)");
}
