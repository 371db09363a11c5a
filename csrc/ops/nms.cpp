// SPDX-License-Identifier: Apache-2.0
#include "ops/nms.h"

STABLE_TORCH_LIBRARY_FRAGMENT(spatialflow, library) {
    library.def("nms(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor");
    library.def("batched_nms(Tensor boxes, Tensor scores, Tensor idxs, float iou_threshold) -> Tensor");
}

namespace spatialflow {
namespace {

void check_nms_call(const Tensor& boxes, const Tensor& scores, double iou_threshold) {
    check_nms("nms", boxes, scores, iou_threshold);
}

}  // namespace
}  // namespace spatialflow

STABLE_TORCH_LIBRARY_FRAGMENT(spatialflow_checks, library) {
    library.def("nms(Tensor boxes, Tensor scores, float iou_threshold) -> ()");
    library.def("batched_nms(Tensor boxes, Tensor scores, Tensor idxs, float iou_threshold) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(spatialflow_checks, CompositeExplicitAutograd, library) {
    library.impl("nms", TORCH_BOX(&spatialflow::check_nms_call));
    library.impl("batched_nms", TORCH_BOX(&spatialflow::check_batched_nms));
}
