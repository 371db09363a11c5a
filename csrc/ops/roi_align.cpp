// SPDX-License-Identifier: Apache-2.0
#include "ops/tensor.h"

STABLE_TORCH_LIBRARY_FRAGMENT(spatialflow, library) {
    library.def(
        "roi_align(Tensor input, Tensor boxes, SymInt pooled_height, SymInt pooled_width, float spatial_scale, "
        "int sampling_ratio, bool aligned) -> Tensor");
    library.def(
        "_roi_align_backward(Tensor grad_output, Tensor boxes, SymInt pooled_height, SymInt pooled_width, "
        "float spatial_scale, int sampling_ratio, bool aligned, SymInt batch, SymInt channels, SymInt height, "
        "SymInt width, bool channels_last, bool deterministic) -> Tensor");
}
