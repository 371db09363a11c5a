# SPDX-License-Identifier: Apache-2.0
"""Stand-ins in plain PyTorch for the operators that the model calls."""

from typing import NamedTuple, Optional

import torch
from torch import Tensor
from torch.nn import functional as F


def _pair(v):
    return (v, v) if isinstance(v, int) else tuple(v)


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Optional[Tensor] = None,
    stride=1,
    padding=0,
    dilation=1,
    mask: Optional[Tensor] = None,
) -> Tensor:
    (sh, sw), (ph, pw), (dh, dw) = _pair(stride), _pair(padding), _pair(dilation)
    n, c, h, w = input.shape
    out_c, cg, kh, kw = weight.shape
    ho, wo = offset.shape[-2:]
    columns = []
    ys = torch.arange(ho, dtype=offset.dtype) * sh - ph
    xs = torch.arange(wo, dtype=offset.dtype) * sw - pw
    for k in range(kh * kw):
        y = ys[:, None] + (k // kw) * dh + offset[:, 2 * k]
        x = xs[None, :] + (k % kw) * dw + offset[:, 2 * k + 1]
        grid = torch.stack([(2 * x + 1) / w - 1, (2 * y + 1) / h - 1], -1)
        value = F.grid_sample(input, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        columns.append(value if mask is None else value * mask[:, k : k + 1])
    col = torch.stack(columns, 2)  # (N, C, K, Ho, Wo)
    groups = c // cg
    col = col.reshape(n, groups, cg * kh * kw, ho * wo)
    out = torch.einsum("gok,ngkp->ngop", weight.reshape(groups, out_c // groups, -1), col).reshape(n, out_c, ho, wo)
    return out if bias is None else out + bias[:, None, None]


class PackedConv(NamedTuple):
    weight: Tensor
    bias: Tensor


def pack_conv3x3(weight: Tensor, bias: Tensor, algorithm: str = "auto") -> PackedConv:
    return PackedConv(weight.contiguous(memory_format=torch.channels_last), bias)


def flow_conv2d(x, flow, weight, bias=None, relu: bool = True, algorithm: str = "auto"):
    if isinstance(x, (list, tuple)):
        return [
            flow_conv2d(level, None if flow is None else flow[i], weight, bias, relu, algorithm)
            for i, level in enumerate(x)
        ]
    if isinstance(weight, PackedConv):
        weight, bias = weight
    y = F.conv2d(x if flow is None else x + flow, weight, bias, padding=1)
    return y.relu_() if relu else y
