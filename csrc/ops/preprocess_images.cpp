// SPDX-License-Identifier: Apache-2.0
#include "ops/tensor.h"

STABLE_TORCH_LIBRARY_FRAGMENT(spatialflow, library) {
    library.def(
        "preprocess_images(Tensor[] images, SymInt[] heights, SymInt[] widths, float[] mean, float[] std, "
        "SymInt divisor, ScalarType dtype) -> Tensor");
}
