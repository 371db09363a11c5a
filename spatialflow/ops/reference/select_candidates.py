# SPDX-License-Identifier: Apache-2.0
"""Reference implementation of `spatialflow.ops.select_candidates` in plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from spatialflow.ops.select_candidates import Candidates

MAX_LOG_RATIO = abs(math.log(16 / 1000))
"""Limit of dw and dh, the logarithms of width and height ratios."""


def select_candidates(
    class_logits: Sequence[Tensor],
    box_deltas: Sequence[Tensor],
    base_anchors: Tensor,
    strides: Sequence[int],
    valid_sizes: Tensor,
    scale_factors: Tensor,
    per_level: int,
) -> Candidates:
    """Compute `spatialflow.ops.select_candidates` level by level."""
    real = torch.float64 if class_logits[0].dtype == torch.float64 else torch.float32
    boxes, scores = [], []
    for logits, deltas, base, stride in zip(class_logits, box_deltas, base_anchors.to(real), strides, strict=True):
        batch, channels, height, width = logits.shape
        anchors = grid_anchors((height, width), stride, base)  # (M, 4)
        logits = logits.permute(0, 2, 3, 1).reshape(batch, len(anchors), channels // len(base)).to(real)
        deltas = deltas.permute(0, 2, 3, 1).reshape(batch, len(anchors), 4).to(real)
        if 0 < per_level < len(anchors):
            lowest = -torch.inf
            best = F.pad(logits.masked_fill(logits.isnan(), lowest), (0, 1), value=lowest).amax(dim=-1)  # (B, M)
            selected = best.sort(dim=1, descending=True, stable=True).indices[:, :per_level]  # (B, per_level)
            logits = logits.gather(1, selected[..., None].expand(-1, -1, logits.shape[2]))
            deltas = deltas.gather(1, selected[..., None].expand(-1, -1, 4))
            anchors = anchors[selected]
        boxes.append(decode_boxes(anchors, deltas))
        scores.append(logits.sigmoid())
    limits = valid_sizes.flip(-1).repeat(1, 2)[:, None].to(real)  # (B, 1, 4): W, H, W, H
    clipped = torch.cat(boxes, dim=1).clamp(min=0).minimum(limits)
    return Candidates(clipped / scale_factors.repeat(1, 2)[:, None].to(real), torch.cat(scores, dim=1))


def grid_anchors(size: tuple[int, int], stride: int, base: Tensor) -> Tensor:
    """Return the anchors of a whole level; cell (y, x) has `base` moved by (x * stride, y * stride).

    Args:
        size: (H, W) of the level.
        stride: stride of the level in pixels.
        base: (A, 4) anchors of cell (0, 0), in pixels.

    Returns:
        (H * W * A, 4), cells row-major, then anchors; dtype and device of `base`.
    """
    h, w = size
    x = torch.arange(w, device=base.device, dtype=base.dtype) * stride
    y = torch.arange(h, device=base.device, dtype=base.dtype) * stride
    shift = torch.stack([x.repeat(h), y.repeat_interleave(w)] * 2, dim=-1)  # (H*W, 4)
    return (shift[:, None, :] + base[None]).reshape(-1, 4)


def decode_boxes(anchors: Tensor, deltas: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    """Decode predicted deltas to boxes.

    Args:
        anchors: (..., 4), (x1, y1, x2, y2).
        deltas: (..., 4), (dx, dy, dw, dh); dw and dh are clamped to +-|log(16 / 1000)|, dx and dy are free.
        size: (H, W) of the valid image: coordinates are clipped to [0, W] and [0, H]; None: no clipping.

    Returns:
        (..., 4) of the type of `deltas`.
    """
    dw = deltas[..., 2].clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    dh = deltas[..., 3].clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    cx = (anchors[..., 0] + anchors[..., 2]) * 0.5
    cy = (anchors[..., 1] + anchors[..., 3]) * 0.5
    w = anchors[..., 2] - anchors[..., 0]
    h = anchors[..., 3] - anchors[..., 1]
    gw, gh = w * dw.exp(), h * dh.exp()
    gx = torch.addcmul(cx, w, deltas[..., 0])
    gy = torch.addcmul(cy, h, deltas[..., 1])
    x1, y1, x2, y2 = gx - gw * 0.5, gy - gh * 0.5, gx + gw * 0.5, gy + gh * 0.5
    if size is not None:
        x1, x2 = x1.clamp(0, size[1]), x2.clamp(0, size[1])
        y1, y2 = y1.clamp(0, size[0]), y2.clamp(0, size[0])
    return torch.stack([x1, y1, x2, y2], dim=-1)
