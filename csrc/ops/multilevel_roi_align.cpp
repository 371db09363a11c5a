// SPDX-License-Identifier: Apache-2.0
#include "ops/tensor.h"

STABLE_TORCH_LIBRARY_FRAGMENT(spatialflow, library) {
    library.def(
        "multilevel_roi_align(Tensor[] features, Tensor boxes, SymInt pooled_height, SymInt pooled_width, "
        "float[] strides, int sampling_ratio, bool aligned, float finest_scale) -> Tensor");
    library.def(
        "_multilevel_roi_align_backward(Tensor grad_output, Tensor boxes, SymInt pooled_height, SymInt pooled_width, "
        "float[] strides, int sampling_ratio, bool aligned, float finest_scale, SymInt batch, SymInt channels, "
        "SymInt[] heights, SymInt[] widths, bool channels_last, bool deterministic) -> Tensor[]");
}
