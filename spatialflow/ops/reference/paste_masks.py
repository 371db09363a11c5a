# SPDX-License-Identifier: Apache-2.0
"""Reference implementation of `spatialflow.ops.paste_masks` in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def paste_masks(mask_logits: Tensor, boxes: Tensor, size: tuple[int, int], threshold: float = 0.5) -> Tensor:
    """Compute `spatialflow.ops.paste_masks`, by `grid_sample` over the whole image."""
    height, width = size
    count = mask_logits.shape[0]
    result = torch.zeros((count, height, width), dtype=torch.bool, device=boxes.device)
    if result.numel() == 0 or mask_logits.numel() == 0:
        return result
    real = torch.float64 if mask_logits.dtype == torch.float64 else torch.float32
    boxes = boxes.double()  # (K, 4)
    extents = boxes[:, 2:] - boxes[:, :2]  # (K, 2)
    proper = (torch.isfinite(boxes[:, :2]) & torch.isfinite(extents) & (extents > 0)).all(dim=1)
    rows, columns = (torch.arange(side, dtype=torch.float64, device=boxes.device) + 0.5 for side in size)
    # One mask at a time: the float64 sampling grid takes 16 bytes per pixel of the image, and the result takes one.
    for k in proper.nonzero()[:, 0].tolist():
        x1, y1, x2, y2 = boxes[k]
        y = (rows - y1) / (y2 - y1) * 2 - 1  # (H)
        x = (columns - x1) / (x2 - x1) * 2 - 1  # (W)
        grid = torch.stack([x.expand(height, width), y[:, None].expand(height, width)], dim=-1).to(real)
        # grid_sample does not guarantee that a coordinate that is not finite is out of bounds.
        grid = grid.nan_to_num(nan=-9.0, posinf=9.0, neginf=-9.0).clamp(-9, 9)
        values = F.grid_sample(mask_logits[k].to(real).sigmoid()[None, None], grid[None], align_corners=False)
        result[k] = values[0, 0] >= threshold
    return result
