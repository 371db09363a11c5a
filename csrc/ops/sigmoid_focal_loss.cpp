// SPDX-License-Identifier: Apache-2.0
#include "ops/sigmoid_focal_loss.h"

STABLE_TORCH_LIBRARY_FRAGMENT(spatialflow, library) {
    library.def("sigmoid_focal_loss(Tensor logits, Tensor labels, float gamma, float alpha) -> Tensor");
    library.def("_sigmoid_focal_loss_sum(Tensor logits, Tensor labels, float gamma, float alpha) -> Tensor");
    library.def(
        "_sigmoid_focal_loss_derivative(Tensor factor, Tensor logits, Tensor labels, float gamma, float alpha, "
        "int order) -> Tensor");
}

STABLE_TORCH_LIBRARY_FRAGMENT(spatialflow_checks, library) {
    library.def("sigmoid_focal_loss(Tensor logits, Tensor labels, float gamma, float alpha) -> ()");
    library.def("_sigmoid_focal_loss_sum(Tensor logits, Tensor labels, float gamma, float alpha) -> ()");
    library.def(
        "_sigmoid_focal_loss_derivative(Tensor factor, Tensor logits, Tensor labels, float gamma, float alpha, "
        "int order) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(spatialflow_checks, CompositeExplicitAutograd, library) {
    library.impl("sigmoid_focal_loss", TORCH_BOX(&spatialflow::check_sigmoid_focal_loss));
    library.impl("_sigmoid_focal_loss_sum", TORCH_BOX(&spatialflow::check_sigmoid_focal_loss));
    library.impl("_sigmoid_focal_loss_derivative", TORCH_BOX(&spatialflow::check_sigmoid_focal_loss_derivative));
}
