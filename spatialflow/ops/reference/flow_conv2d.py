# SPDX-License-Identifier: Apache-2.0
"""3x3 convolution of feature plus flow in plain PyTorch: the specification of `spatialflow.ops.flow_conv2d`."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def flow_conv2d(
    x: Tensor | list[Tensor],
    flow: Tensor | list[Tensor] | None,
    weight: Tensor,
    bias: Tensor | None = None,
    relu: bool = True,
    algorithm: str = "auto",
) -> Tensor | list[Tensor]:
    """Same arguments and result as `spatialflow.ops.flow_conv2d`; the algorithm makes no difference here."""
    if not isinstance(x, Tensor):
        flows = [None] * len(x) if flow is None else flow
        return [flow_conv2d(level, of_level, weight, bias, relu) for level, of_level in zip(x, flows)]
    result = F.conv2d(x if flow is None else x + flow, weight, bias, padding=1)
    return result.relu() if relu else result
