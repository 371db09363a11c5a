# SPDX-License-Identifier: Apache-2.0
"""Reference implementation of `spatialflow.ops.flow_conv2d` in plain PyTorch."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F


def flow_conv2d(
    x: Tensor | list[Tensor],
    flow: Tensor | list[Tensor] | None,
    weight: Tensor,
    bias: Tensor | None = None,
    relu: bool = True,
    algorithm: str = "auto",
    active: Tensor | None = None,
) -> Tensor | list[Tensor]:
    """Compute `spatialflow.ops.flow_conv2d` level by level; `algorithm` is accepted and ignored.

    `active` does not require a `PackedConv`.
    """
    if not isinstance(x, Tensor):
        flows = [None] * len(x) if flow is None else flow
        return [
            cast("Tensor", flow_conv2d(level, level_flow, weight, bias, relu, algorithm, active))
            for level, level_flow in zip(x, flows, strict=True)
        ]
    total = x if flow is None else x + cast("Tensor", flow)
    if active is not None:
        active = active[:, None, None, None]
        total = torch.where(active, total, 0)
    result = conv3x3(total, weight, bias)
    result = result.relu() if relu else result
    return result if active is None else torch.where(active, result, 0)


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolve (N, C_in, H, W) to (N, C_out, H, W); any size may be zero."""
    size = (x.shape[0], weight.shape[0], *x.shape[2:])
    if 0 in (*size, x.shape[1]):
        nothing = x.flatten()[:0].sum() + weight.flatten()[:0].sum()  # zero, with zero gradients
        result = nothing + x.new_zeros(size)
        return result if bias is None else result + bias.to(x.dtype)[:, None, None]
    return F.conv2d(x, weight, None if bias is None else bias.to(x.dtype), padding=1)
