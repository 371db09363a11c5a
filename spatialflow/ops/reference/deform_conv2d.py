# SPDX-License-Identifier: Apache-2.0
"""Reference implementation of `spatialflow.ops.deform_conv2d` in plain PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = (1, 1),
    padding: int | tuple[int, int] = (0, 0),
    dilation: int | tuple[int, int] = (1, 1),
    mask: Tensor | None = None,
    algorithm: str = "auto",
    mask_sigmoid: bool = False,
    relu: bool = False,
) -> Tensor:
    """Compute `spatialflow.ops.deform_conv2d` with one gather per corner of the bilinear samples.

    `algorithm` is accepted and ignored.
    """
    (stride_y, stride_x), (padding_y, padding_x), (dilation_y, dilation_x) = (
        (v, v) if isinstance(v, int) else v for v in (stride, padding, dilation)
    )
    n, channels, height, width = input.shape
    out_channels, group_channels, kernel_h, kernel_w = weight.shape
    taps = kernel_h * kernel_w
    offset_groups = offset.shape[1] // (2 * taps)
    out_h, out_w = offset.shape[2:]
    groups = channels // group_channels if group_channels else 1
    real = torch.float64 if input.dtype == torch.float64 else torch.float32

    offset = offset.to(real).reshape(n, offset_groups, taps, 2, out_h, out_w)
    tap = torch.arange(taps, device=input.device)
    oy = torch.arange(out_h, device=input.device) * stride_y - padding_y
    ox = torch.arange(out_w, device=input.device) * stride_x - padding_x
    y = (oy[:, None] + (tap // kernel_w * dilation_y)[:, None, None]).to(real) + offset[:, :, :, 0]
    x = (ox + (tap % kernel_w * dilation_x)[:, None, None]).to(real) + offset[:, :, :, 1]  # (N, G, taps, H_out, W_out)

    sampled = (y >= -1) & (y < height) & (x >= -1) & (x < width)  # False for NaN
    if mask is not None:
        mask = mask.to(real).reshape(n, offset_groups, taps, out_h, out_w)
        mask = mask.sigmoid() if mask_sigmoid else mask
        sampled = sampled & torch.isfinite(mask)
        mask = mask.masked_fill(~sampled, 0)
    y, x = y.masked_fill(~sampled, -1), x.masked_fill(~sampled, -1)  # finite, so that a skipped sample is 0, not NaN
    low_y, low_x = y.detach().floor(), x.detach().floor()

    planes = input.to(real).reshape(n, offset_groups, channels // offset_groups, height * width)
    planes = F.pad(planes, (0, 1))  # one more cell, for positions outside the map
    columns: Any = 0  # a Tensor after the first corner
    for corner_y, weight_y in ((low_y, 1 - (y - low_y)), (low_y + 1, y - low_y)):
        for corner_x, weight_x in ((low_x, 1 - (x - low_x)), (low_x + 1, x - low_x)):
            inside = sampled & (corner_y >= 0) & (corner_y < height) & (corner_x >= 0) & (corner_x < width)
            cell = (corner_y * width + corner_x).masked_fill(~inside, height * width).long()
            cell = cell.reshape(n, offset_groups, 1, taps * out_h * out_w).expand(-1, -1, planes.shape[2], -1)
            value = planes.gather(3, cell).view(n, offset_groups, planes.shape[2], taps, out_h, out_w)
            columns = columns + value * (weight_y * weight_x).unsqueeze(2)
    if mask is not None:
        columns = columns * mask.unsqueeze(2)

    columns = columns.reshape(n, groups, group_channels * taps, out_h * out_w)
    kernel = weight.to(real).reshape(groups, out_channels // groups, group_channels * taps)
    output = torch.einsum("gok,ngkp->ngop", kernel, columns).reshape(n, out_channels, out_h, out_w)
    if bias is not None:
        output = output + bias.to(real)[:, None, None]
    return (output.relu() if relu else output).to(input.dtype)
