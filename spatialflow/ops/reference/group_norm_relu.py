# SPDX-License-Identifier: Apache-2.0
"""Reference implementation of `spatialflow.ops.group_norm_relu` in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def group_norm_relu(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    upsample: bool = False,
) -> Tensor:
    """Compute `spatialflow.ops.group_norm_relu`."""
    batch, channels, height, width = input.shape
    wide = input if input.dtype == torch.float64 else input.float()
    groups = wide.reshape(batch, num_groups, channels // num_groups * height * width)  # (N, G, values)
    centered = groups - groups.mean(dim=2, keepdim=True)
    variance = centered.square().mean(dim=2, keepdim=True)  # (N, G, 1)
    result = (centered / (variance + eps).sqrt()).reshape(input.shape)
    if weight is not None:
        result = result * weight[:, None, None]
    if bias is not None:
        result = result + bias[:, None, None]
    result = result.relu()
    if upsample and result.numel() > 0:
        result = F.interpolate(result, scale_factor=2, mode="bilinear", align_corners=True)
    elif upsample:  # interpolate takes no empty tensors
        result = result.reshape(batch, channels, 2 * height, 2 * width)
    return result.to(input.dtype)
