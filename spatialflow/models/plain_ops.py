# SPDX-License-Identifier: Apache-2.0
"""Stand-ins in plain PyTorch for the operators that the model calls."""

from typing import NamedTuple, Optional

import torch
from torch import Tensor
from torch.nn import functional as F


def _pair(v):
    return (v, v) if isinstance(v, int) else tuple(v)


def deform_conv2d(input: Tensor, offset: Tensor, weight: Tensor, bias: Optional[Tensor] = None, stride=1, padding=0, dilation=1,
                  mask: Optional[Tensor] = None) -> Tensor:
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
        columns.append(value if mask is None else value * mask[:, k:k + 1])
    col = torch.stack(columns, 2)  # (N, C, K, Ho, Wo)
    groups = c // cg
    col = col.reshape(n, groups, cg * kh * kw, ho * wo)
    out = torch.einsum("gok,ngkp->ngop", weight.reshape(groups, out_c // groups, -1), col).reshape(n, out_c, ho, wo)
    return out if bias is None else out + bias[:, None, None]


class Detections(NamedTuple):
    boxes: Tensor
    scores: Tensor
    labels: Tensor
    count: Tensor


def multiclass_nms(boxes: Tensor, scores: Tensor, score_threshold: float, iou_threshold: float, max_detections: int) -> Detections:
    b, n, c = scores.shape
    out = Detections(boxes.new_zeros(b, max_detections, 4), scores.new_zeros(b, max_detections),
                     torch.full((b, max_detections), -1), torch.zeros(b, dtype=torch.long))
    for i in range(b):
        index, label = (scores[i] > score_threshold).nonzero(as_tuple=True)
        s = scores[i, index, label]
        order = torch.sort(s, descending=True, stable=True).indices
        index, label, s = index[order], label[order], s[order]
        bx = boxes[i, index]
        area = (bx[:, 2] - bx[:, 0]) * (bx[:, 3] - bx[:, 1])
        alive = torch.ones(len(s), dtype=torch.bool)
        kept = 0
        for j in range(len(s)):
            if not alive[j]:
                continue
            out.boxes[i, kept], out.scores[i, kept], out.labels[i, kept] = bx[j], s[j], label[j]
            kept += 1
            if kept == max_detections:
                break
            wh = (torch.minimum(bx[:, 2:], bx[j, 2:]) - torch.maximum(bx[:, :2], bx[j, :2])).clamp(min=0)
            inter = wh[:, 0] * wh[:, 1]
            alive &= ~((label == label[j]) & (inter > iou_threshold * (area + area[j] - inter)))
        out.count[i] = kept
    return out


class PackedConv(NamedTuple):
    weight: Tensor
    bias: Tensor


def pack_conv3x3(weight: Tensor, bias: Tensor, algorithm: str = "auto") -> PackedConv:
    return PackedConv(weight.contiguous(memory_format=torch.channels_last), bias)


def flow_conv2d(x, flow, weight, bias=None, relu: bool = True, algorithm: str = "auto"):
    if isinstance(x, (list, tuple)):
        return [flow_conv2d(level, None if flow is None else flow[i], weight, bias, relu, algorithm) for i, level in enumerate(x)]
    if isinstance(weight, PackedConv):
        weight, bias = weight
    y = F.conv2d(x if flow is None else x + flow, weight, bias, padding=1)
    return y.relu_() if relu else y
