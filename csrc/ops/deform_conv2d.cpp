// SPDX-License-Identifier: Apache-2.0
//
// Schemas and argument checks of deform_conv2d. With `offset_tangent`, the operator and its gradients replace each
// sample by its derivative along `offset_tangent`, a direction in the space of offsets.
#include "ops/deform_conv2d.h"

STABLE_TORCH_LIBRARY_FRAGMENT(spatialflow, library) {
    library.def(
        "deform_conv2d(Tensor input, Tensor offset, Tensor weight, Tensor? bias, Tensor? mask, "
        "Tensor? offset_tangent, int stride_h, int stride_w, int padding_h, int padding_w, int dilation_h, "
        "int dilation_w, int algorithm) -> Tensor");
    library.def("_pack_deform_conv2d(Tensor weight, int groups, int offset_groups, int algorithm) -> Tensor");
    library.def(
        "_deform_conv2d_packed(Tensor input, Tensor offset, Tensor packed, Tensor? bias, Tensor? mask, int stride_h, "
        "int stride_w, int padding_h, int padding_w, int dilation_h, int dilation_w, int algorithm, "
        "SymInt out_channels, int groups, int offset_groups, int kernel_h, int kernel_w, bool mask_sigmoid, "
        "bool relu) -> Tensor");
}

namespace spatialflow {
namespace {

void check_deform_call(
    const Tensor& input, const Tensor& offset, const Tensor& weight, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& mask, const std::optional<Tensor>& offset_tangent, int64_t stride_h, int64_t stride_w,
    int64_t padding_h, int64_t padding_w, int64_t dilation_h, int64_t dilation_w, int64_t algorithm) {
    check_deform_conv2d(
        input, offset, weight, bias, mask, offset_tangent,
        {{stride_h, stride_w}, {padding_h, padding_w}, {dilation_h, dilation_w}, algorithm});
}

void check_pack_call(const Tensor& weight, int64_t groups, int64_t offset_groups, int64_t algorithm) {
    check_pack_deform_conv2d(weight, groups, offset_groups, algorithm);
}

void check_packed_call(
    const Tensor& input, const Tensor& offset, const std::optional<Tensor>& bias, const std::optional<Tensor>& mask,
    int64_t stride_h, int64_t stride_w, int64_t padding_h, int64_t padding_w, int64_t dilation_h, int64_t dilation_w,
    int64_t algorithm, int64_t out_channels, int64_t groups, int64_t offset_groups, int64_t kernel_h,
    int64_t kernel_w) {
    check_deform_conv2d_packed(
        input, offset, bias, mask, {{stride_h, stride_w}, {padding_h, padding_w}, {dilation_h, dilation_w}, algorithm},
        {out_channels, groups, offset_groups, kernel_h, kernel_w});
}

}  // namespace
}  // namespace spatialflow

STABLE_TORCH_LIBRARY_FRAGMENT(spatialflow_checks, library) {
    library.def(
        "deform_conv2d(Tensor input, Tensor offset, Tensor weight, Tensor? bias, Tensor? mask, "
        "Tensor? offset_tangent, int stride_h, int stride_w, int padding_h, int padding_w, int dilation_h, "
        "int dilation_w, int algorithm) -> ()");
    library.def("_pack_deform_conv2d(Tensor weight, int groups, int offset_groups, int algorithm) -> ()");
    library.def(
        "_deform_conv2d_packed(Tensor input, Tensor offset, Tensor? bias, Tensor? mask, int stride_h, int stride_w, "
        "int padding_h, int padding_w, int dilation_h, int dilation_w, int algorithm, int out_channels, int groups, "
        "int offset_groups, int kernel_h, int kernel_w) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(spatialflow_checks, CompositeExplicitAutograd, library) {
    library.impl("deform_conv2d", TORCH_BOX(&spatialflow::check_deform_call));
    library.impl("_pack_deform_conv2d", TORCH_BOX(&spatialflow::check_pack_call));
    library.impl("_deform_conv2d_packed", TORCH_BOX(&spatialflow::check_packed_call));
}
