// SPDX-License-Identifier: Apache-2.0
//
// Gradients that are not wanted come back as empty tensors of shape (0).
#include "ops/tensor.h"

STABLE_TORCH_LIBRARY_FRAGMENT(spatialflow, library) {
    library.def(
        "_deform_conv2d_backward_data(Tensor grad_output, Tensor input, Tensor offset, Tensor weight, Tensor? mask, "
        "Tensor? offset_tangent, int stride_h, int stride_w, int padding_h, int padding_w, int dilation_h, "
        "int dilation_w, bool need_input, bool need_sampling, bool deterministic) -> (Tensor grad_input, "
        "Tensor grad_offset, Tensor grad_mask)");
    library.def(
        "_deform_conv2d_backward_weight(Tensor grad_output, Tensor input, Tensor offset, Tensor? mask, "
        "Tensor? offset_tangent, int stride_h, int stride_w, int padding_h, int padding_w, int dilation_h, "
        "int dilation_w, SymInt group_channels, SymInt kernel_h, SymInt kernel_w) -> Tensor");
}
