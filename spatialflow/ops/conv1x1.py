# SPDX-License-Identifier: Apache-2.0
"""1x1 convolution with bias, residual and ReLU in one kernel, without gradients; private to the package.

`spatialflow/models/optimized/conv.py` uses it. `conv1x1(x, weight, bias, residual, relu)` computes
relu(conv2d(x, weight) + bias + residual). Sums are in float32 (float64 for float64) and rounded once:

    x: (N, C, H, W); float32, float64, float16 or bfloat16, any strides.
    weight: (O, C, 1, 1); this and the others have the dtype of `x`.
    bias: (O,) or None.
    residual: (N, O, H, W) or None.
    relu: whether to apply ReLU.

The result is (N, O, H, W), channels-last. A shape, dtype or device that does not fit is a RuntimeError.
"""

import torch
from torch import Tensor

from spatialflow.ops.differentiable import without_gradient
from spatialflow.ops.fake import register_fake


@register_fake("_conv1x1")
def _(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, relu: bool) -> Tensor:
    torch._check(x.dim() == 4, lambda: f"conv1x1: x must be (N, C, H, W), got {tuple(x.shape)}")
    size = (x.shape[0], weight.shape[0], *x.shape[2:])
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


conv1x1 = without_gradient("_conv1x1")
