// SPDX-License-Identifier: Apache-2.0
#include "ops/flow_conv2d.h"

// An empty `flow` means no flow. `algorithm` is 0 auto, 1 winograd, 2 direct, 3 tf32 or 4 tf32x3. `active` is (N,) bool
// or None.
STABLE_TORCH_LIBRARY_FRAGMENT(spatialflow, library) {
    library.def(
        "flow_conv2d(Tensor[] x, Tensor[] flow, Tensor weight, Tensor? bias, bool relu, int algorithm) -> Tensor[]");
    library.def("_pack_conv3x3(Tensor weight, int algorithm) -> Tensor");
    library.def(
        "_flow_conv2d_packed(Tensor[] x, Tensor[] flow, Tensor packed, Tensor? bias, SymInt out_channels, bool relu, "
        "int algorithm, Tensor? active=None) -> Tensor[]");
    library.def(
        "_flow_conv2d_group(Tensor[] x, int[] counts, Tensor[] packed, Tensor[] biases, SymInt[] out_channels, "
        "bool relu, int[] algorithms) -> Tensor[]");
}

namespace spatialflow {
namespace {

void check_pack_call(const Tensor& weight, int64_t algorithm) {
    check_conv_weight("pack_conv3x3", weight);
    check_algorithm("pack_conv3x3", algorithm);
}

void check_packed_call(
    const std::vector<Tensor>& x, const std::vector<Tensor>& flow, const Tensor& packed,
    const std::optional<Tensor>& bias, int64_t out_channels, int64_t algorithm, const std::optional<Tensor>& active) {
    check_algorithm("flow_conv2d", algorithm);
    if (!x.empty()) {
        check_flow_conv2d_packed(x, flow, packed, bias, out_channels, algorithm, active);
    }
}

void check_group_call(
    const std::vector<Tensor>& x, const std::vector<int64_t>& counts, const std::vector<Tensor>& packed,
    const std::vector<Tensor>& biases, const std::vector<int64_t>& out_channels,
    const std::vector<int64_t>& algorithms) {
    for_each_in_group(x, counts, packed, biases, out_channels, algorithms, [](auto&&...) {});
}

}  // namespace
}  // namespace spatialflow

STABLE_TORCH_LIBRARY_FRAGMENT(spatialflow_checks, library) {
    library.def("flow_conv2d(Tensor[] x, Tensor[] flow, Tensor weight, Tensor? bias, int algorithm) -> ()");
    library.def("_pack_conv3x3(Tensor weight, int algorithm) -> ()");
    library.def(
        "_flow_conv2d_packed(Tensor[] x, Tensor[] flow, Tensor packed, Tensor? bias, int out_channels, "
        "int algorithm, Tensor? active) -> ()");
    library.def(
        "_flow_conv2d_group(Tensor[] x, int[] counts, Tensor[] packed, Tensor[] biases, int[] out_channels, "
        "int[] algorithms) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(spatialflow_checks, CompositeExplicitAutograd, library) {
    library.impl("flow_conv2d", TORCH_BOX(&spatialflow::check_flow_conv2d));
    library.impl("_pack_conv3x3", TORCH_BOX(&spatialflow::check_pack_call));
    library.impl("_flow_conv2d_packed", TORCH_BOX(&spatialflow::check_packed_call));
    library.impl("_flow_conv2d_group", TORCH_BOX(&spatialflow::check_group_call));
}
