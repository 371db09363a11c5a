// SPDX-License-Identifier: Apache-2.0
#include "ops/fused_subnets.h"

// `packed` and `biases` hold the convolutions of eight lists one after the other: cls, reg, stuff, thing, flow_cls,
// flow_stuff, flow_thing, semantic_flow; `counts` their lengths; a vector without elements stands for an absent flow.
// `algorithms` holds one for each, as for flow_conv2d.
// Returns the maps of cls, reg (all levels), stuff, thing (segmentation levels), without those of sub-networks that do
// nothing.
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
