// SPDX-License-Identifier: Apache-2.0
#include "ops/paste_masks.h"

STABLE_TORCH_LIBRARY_FRAGMENT(spatialflow, library) {
    library.def(
        "paste_masks(Tensor mask_logits, Tensor boxes, SymInt height, SymInt width, float threshold) -> Tensor");
}

STABLE_TORCH_LIBRARY_FRAGMENT(spatialflow_checks, library) {
    library.def("paste_masks(Tensor mask_logits, Tensor boxes, int height, int width, float threshold) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(spatialflow_checks, CompositeExplicitAutograd, library) {
    library.impl("paste_masks", TORCH_BOX(&spatialflow::check_paste_masks));
}
