// SPDX-License-Identifier: Apache-2.0
//
// RoIAlign over a feature pyramid on CUDA. The kernels of roi_align.cu and roi_align_backward.cu choose the level per
// RoI (roi_level in common/roi_align.h). So a launch computes all levels, and the host never reads the boxes.
#include "ops/multilevel_roi_align.h"

#include "cuda/launch.h"

SPATIALFLOW_DEVICE_IMPL(library) {
    library.impl("multilevel_roi_align", TORCH_BOX(&spatialflow::multilevel_roi_align));
    library.impl("_multilevel_roi_align_backward", TORCH_BOX(&spatialflow::multilevel_roi_align_backward));
}
