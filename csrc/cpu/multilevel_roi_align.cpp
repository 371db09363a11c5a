// SPDX-License-Identifier: Apache-2.0
//
// RoIAlign over a feature pyramid on the CPU. The kernels of roi_align.cpp choose the level per RoI.
#include "ops/multilevel_roi_align.h"

STABLE_TORCH_LIBRARY_IMPL(spatialflow, CPU, library) {
    library.impl("multilevel_roi_align", TORCH_BOX(&spatialflow::multilevel_roi_align));
    library.impl("_multilevel_roi_align_backward", TORCH_BOX(&spatialflow::multilevel_roi_align_backward));
}
