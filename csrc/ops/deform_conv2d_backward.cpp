// SPDX-License-Identifier: Apache-2.0
//
// Schemas and argument checks of the gradients of deform_conv2d. A gradient that is not requested is an empty tensor of
// shape (0).
#include "ops/deform_conv2d.h"

STABLE_TORCH_LIBRARY_FRAGMENT(spatialflow, library) {
    library.def(
        "_deform_conv2d_backward_data(Tensor grad_output, Tensor input, Tensor offset, Tensor weight, Tensor? mask, "
        "Tensor? offset_tangent, int stride_h, int stride_w, int padding_h, int padding_w, int dilation_h, "
        "int dilation_w, int algorithm, bool need_input, bool need_sampling, bool deterministic) -> "
        "(Tensor grad_input, Tensor grad_offset, Tensor grad_mask)");
    library.def(
        "_deform_conv2d_backward_weight(Tensor grad_output, Tensor input, Tensor offset, Tensor? mask, "
        "Tensor? offset_tangent, int stride_h, int stride_w, int padding_h, int padding_w, int dilation_h, "
        "int dilation_w, int algorithm, SymInt group_channels, SymInt kernel_h, SymInt kernel_w) -> Tensor");
}

namespace spatialflow {
namespace {

void check_deform_data_call(
    const Tensor& grad_output, const Tensor& input, const Tensor& offset, const Tensor& weight,
    const std::optional<Tensor>& mask, const std::optional<Tensor>& offset_tangent, int64_t stride_h, int64_t stride_w,
    int64_t padding_h, int64_t padding_w, int64_t dilation_h, int64_t dilation_w, int64_t algorithm) {
    const DeformConvShape shape = check_deform_conv2d(
        input, offset, weight, std::nullopt, mask, offset_tangent,
        {{stride_h, stride_w}, {padding_h, padding_w}, {dilation_h, dilation_w}, algorithm});
    check_deform_grad_output("deform_conv2d_backward", grad_output, input, shape);
}

void check_deform_weight_call(
    const Tensor& grad_output, const Tensor& input, const Tensor& offset, const std::optional<Tensor>& mask,
    const std::optional<Tensor>& offset_tangent, int64_t stride_h, int64_t stride_w, int64_t padding_h,
    int64_t padding_w, int64_t dilation_h, int64_t dilation_w, int64_t algorithm, int64_t group_channels,
    int64_t kernel_h, int64_t kernel_w) {
    check_deform_grad_weight(
        "deform_conv2d_backward", grad_output, input, offset, mask, offset_tangent,
        {{stride_h, stride_w}, {padding_h, padding_w}, {dilation_h, dilation_w}, algorithm}, group_channels, kernel_h,
        kernel_w);
}

}  // namespace
}  // namespace spatialflow

STABLE_TORCH_LIBRARY_FRAGMENT(spatialflow_checks, library) {
    library.def(
        "_deform_conv2d_backward_data(Tensor grad_output, Tensor input, Tensor offset, Tensor weight, "
        "Tensor? mask, Tensor? offset_tangent, int stride_h, int stride_w, int padding_h, int padding_w, "
        "int dilation_h, int dilation_w, int algorithm) -> ()");
    library.def(
        "_deform_conv2d_backward_weight(Tensor grad_output, Tensor input, Tensor offset, Tensor? mask, "
        "Tensor? offset_tangent, int stride_h, int stride_w, int padding_h, int padding_w, int dilation_h, "
        "int dilation_w, int algorithm, int group_channels, int kernel_h, int kernel_w) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(spatialflow_checks, CompositeExplicitAutograd, library) {
    library.impl("_deform_conv2d_backward_data", TORCH_BOX(&spatialflow::check_deform_data_call));
    library.impl("_deform_conv2d_backward_weight", TORCH_BOX(&spatialflow::check_deform_weight_call));
}
