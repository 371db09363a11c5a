// SPDX-License-Identifier: Apache-2.0
#include "ops/preprocess_images.h"

STABLE_TORCH_LIBRARY_FRAGMENT(spatialflow, library) {
    library.def(
        "preprocess_images(Tensor[] images, SymInt[] heights, SymInt[] widths, float[] mean, float[] std, "
        "SymInt divisor, ScalarType dtype) -> Tensor");
}

STABLE_TORCH_LIBRARY_FRAGMENT(spatialflow_checks, library) {
    library.def(
        "preprocess_images(Tensor[] images, int[] heights, int[] widths, float[] mean, float[] std, int divisor, "
        "ScalarType dtype) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(spatialflow_checks, CompositeExplicitAutograd, library) {
    library.impl("preprocess_images", TORCH_BOX(&spatialflow::check_preprocess_images));
}
