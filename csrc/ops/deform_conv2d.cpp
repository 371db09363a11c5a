// SPDX-License-Identifier: Apache-2.0
//
// With `offset_tangent` this op and its gradients compute their derivative along that direction of the offset: the
// tangent of a sample takes the place of the sample.
#include "ops/deform_conv2d.h"

STABLE_TORCH_LIBRARY_FRAGMENT(spatialflow, library) {
    library.def(
        "deform_conv2d(Tensor input, Tensor offset, Tensor weight, Tensor? bias, Tensor? mask, "
        "Tensor? offset_tangent, int stride_h, int stride_w, int padding_h, int padding_w, int dilation_h, "
        "int dilation_w, int algorithm) -> Tensor");
}

namespace spatialflow {
namespace {

void check_deform_call(
    const Tensor& input, const Tensor& offset, const Tensor& weight, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& mask, const std::optional<Tensor>& offset_tangent, int64_t stride_h, int64_t stride_w,
    int64_t padding_h, int64_t padding_w, int64_t dilation_h, int64_t dilation_w, int64_t algorithm) {
    check_deform_conv2d(input, offset, weight, bias, mask, offset_tangent,
                        {{stride_h, stride_w}, {padding_h, padding_w}, {dilation_h, dilation_w}, algorithm});
}

}  // namespace
}  // namespace spatialflow

STABLE_TORCH_LIBRARY_FRAGMENT(spatialflow_checks, library) {
    library.def(
        "deform_conv2d(Tensor input, Tensor offset, Tensor weight, Tensor? bias, Tensor? mask, "
        "Tensor? offset_tangent, int stride_h, int stride_w, int padding_h, int padding_w, int dilation_h, "
        "int dilation_w, int algorithm) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(spatialflow_checks, CompositeExplicitAutograd, library) {
    library.impl("deform_conv2d", TORCH_BOX(&spatialflow::check_deform_call));
}
