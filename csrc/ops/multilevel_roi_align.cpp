// SPDX-License-Identifier: Apache-2.0
#include "ops/multilevel_roi_align.h"

STABLE_TORCH_LIBRARY_FRAGMENT(spatialflow, library) {
    library.def(
        "multilevel_roi_align(Tensor[] features, Tensor boxes, SymInt pooled_height, SymInt pooled_width, "
        "float[] strides, int sampling_ratio, bool aligned, float finest_scale) -> Tensor");
    library.def(
        "_multilevel_roi_align_backward(Tensor grad_output, Tensor boxes, SymInt pooled_height, SymInt pooled_width, "
        "float[] strides, int sampling_ratio, bool aligned, float finest_scale, SymInt batch, SymInt channels, "
        "SymInt[] heights, SymInt[] widths, bool channels_last, bool deterministic) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_FRAGMENT(spatialflow_checks, library) {
    library.def(
        "multilevel_roi_align(Tensor[] features, Tensor boxes, int pooled_height, int pooled_width, "
        "float[] strides, int sampling_ratio, float finest_scale) -> ()");
    library.def(
        "_multilevel_roi_align_backward(Tensor grad_output, Tensor boxes, int pooled_height, int pooled_width, "
        "float[] strides, int sampling_ratio, float finest_scale, int channels, int[] heights, int[] widths) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(spatialflow_checks, CompositeExplicitAutograd, library) {
    library.impl("multilevel_roi_align", TORCH_BOX(&spatialflow::check_multilevel_roi_align));
    library.impl("_multilevel_roi_align_backward", TORCH_BOX(&spatialflow::check_multilevel_roi_align_backward));
}
