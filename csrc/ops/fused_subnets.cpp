// SPDX-License-Identifier: Apache-2.0
#include "ops/fused_subnets.h"

// `packed` and `biases` hold the convolutions of eight lists in order: cls, reg, stuff, thing, flow_cls, flow_stuff,
// flow_thing, semantic_flow. `counts` holds the lengths of the lists. A packed tensor without elements represents an
// absent convolution. `algorithms` holds one algorithm per convolution, as for flow_conv2d. The result is the maps of
// cls and reg (all levels), then of stuff and thing (segmentation levels). Sub-networks with neither convolutions nor
// flows are omitted.
STABLE_TORCH_LIBRARY_FRAGMENT(spatialflow, library) {
    library.def(
        "fused_subnets(Tensor[] levels, Tensor[] packed, Tensor[] biases, int[] algorithms, int[] counts, "
        "bool source_is_cls, int segmentation_levels) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_FRAGMENT(spatialflow_checks, library) {
    library.def(
        "fused_subnets(Tensor[] levels, Tensor[] packed, Tensor[] biases, int[] algorithms, int[] counts, "
        "int segmentation_levels) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(spatialflow_checks, CompositeExplicitAutograd, library) {
    library.impl("fused_subnets", TORCH_BOX(&spatialflow::check_fused_subnets));
}
