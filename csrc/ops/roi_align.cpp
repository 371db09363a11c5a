// SPDX-License-Identifier: Apache-2.0
#include "ops/roi_align.h"

STABLE_TORCH_LIBRARY_FRAGMENT(spatialflow, library) {
    library.def(
        "roi_align(Tensor input, Tensor boxes, SymInt pooled_height, SymInt pooled_width, float spatial_scale, "
        "int sampling_ratio, bool aligned) -> Tensor");
    library.def(
        "_roi_align_backward(Tensor grad_output, Tensor boxes, SymInt pooled_height, SymInt pooled_width, "
        "float spatial_scale, int sampling_ratio, bool aligned, SymInt batch, SymInt channels, SymInt height, "
        "SymInt width, bool channels_last, bool deterministic) -> Tensor");
}

STABLE_TORCH_LIBRARY_FRAGMENT(spatialflow_checks, library) {
    library.def(
        "roi_align(Tensor input, Tensor boxes, int pooled_height, int pooled_width, float spatial_scale, "
        "int sampling_ratio) -> ()");
    library.def(
        "_roi_align_backward(Tensor grad_output, Tensor boxes, int pooled_height, int pooled_width, "
        "float spatial_scale, int sampling_ratio, int channels) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(spatialflow_checks, CompositeExplicitAutograd, library) {
    library.impl("roi_align", TORCH_BOX(&spatialflow::check_roi_align));
    library.impl("_roi_align_backward", TORCH_BOX(&spatialflow::check_roi_align_backward));
}
