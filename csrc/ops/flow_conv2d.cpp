// SPDX-License-Identifier: Apache-2.0
#include "ops/tensor.h"

// An empty `flow` is none. `algorithm`: 0 auto, 1 winograd, 2 direct.
STABLE_TORCH_LIBRARY_FRAGMENT(spatialflow, library) {
    library.def(
        "flow_conv2d(Tensor[] x, Tensor[] flow, Tensor weight, Tensor? bias, bool relu, int algorithm) -> Tensor[]");
    library.def("_pack_conv3x3(Tensor weight, int algorithm) -> Tensor");
    library.def(
        "_flow_conv2d_packed(Tensor[] x, Tensor[] flow, Tensor packed, Tensor? bias, SymInt out_channels, bool relu, "
        "int algorithm) -> Tensor[]");
}
