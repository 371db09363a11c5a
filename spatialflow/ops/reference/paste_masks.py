# SPDX-License-Identifier: Apache-2.0
"""Mask pasting in plain PyTorch: the specification of `spatialflow.ops.paste_masks`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def paste_masks(mask_logits: Tensor, boxes: Tensor, size: tuple[int, int], threshold: float = 0.5) -> Tensor:
    """Same arguments and result as `spatialflow.ops.paste_masks`, by `grid_sample` over the whole image."""
    height, width = size
    count = mask_logits.shape[0]
    if count == 0 or height == 0 or width == 0 or mask_logits.numel() == 0:
        return torch.zeros((count, height, width), dtype=torch.bool)
    real = torch.float64 if mask_logits.dtype == torch.float64 else torch.float32
    x1, y1, x2, y2 = boxes.double()[:, :, None].unbind(1)  # (K, 1) each
    y = (torch.arange(height) + 0.5 - y1) / (y2 - y1) * 2 - 1
    x = (torch.arange(width) + 0.5 - x1) / (x2 - x1) * 2 - 1
    shape = (count, height, width)
    grid = torch.stack([x[:, None, :].expand(shape), y[:, :, None].expand(shape)], dim=-1).to(real)
    # grid_sample keeps a coordinate that is not finite out of bounds only by luck; such boxes are masked below.
    grid = grid.nan_to_num(nan=-9.0, posinf=9.0, neginf=-9.0).clamp(-9, 9)
    values = F.grid_sample(mask_logits.to(real).sigmoid()[:, None], grid, align_corners=False)[:, 0]
    proper = torch.isfinite(boxes).all(dim=1) & (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    return (values >= threshold) & proper[:, None, None]
