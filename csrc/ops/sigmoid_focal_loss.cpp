// SPDX-License-Identifier: Apache-2.0
#include "ops/tensor.h"

STABLE_TORCH_LIBRARY_FRAGMENT(spatialflow, library) {
    library.def("sigmoid_focal_loss(Tensor logits, Tensor labels, float gamma, float alpha) -> Tensor");
    library.def("_sigmoid_focal_loss_sum(Tensor logits, Tensor labels, float gamma, float alpha) -> Tensor");
    library.def(
        "_sigmoid_focal_loss_derivative(Tensor factor, Tensor logits, Tensor labels, float gamma, float alpha, "
        "int order) -> Tensor");
}
