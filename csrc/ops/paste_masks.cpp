// SPDX-License-Identifier: Apache-2.0
#include "ops/tensor.h"

STABLE_TORCH_LIBRARY_FRAGMENT(spatialflow, library) {
    library.def(
        "paste_masks(Tensor mask_logits, Tensor boxes, SymInt height, SymInt width, float threshold) -> Tensor");
}
