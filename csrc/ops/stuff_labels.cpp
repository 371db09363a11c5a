// SPDX-License-Identifier: Apache-2.0
#include "ops/tensor.h"

STABLE_TORCH_LIBRARY_FRAGMENT(spatialflow, library) {
    library.def(
        "stuff_labels(Tensor logits, SymInt valid_height, SymInt valid_width, SymInt height, SymInt width) -> Tensor");
}
