# SPDX-License-Identifier: Apache-2.0
"""Reference implementation of `spatialflow.ops.nms` and `batched_nms` in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def compute_type(boxes: Tensor, scores: Tensor) -> torch.dtype:
    """Return the dtype of the arithmetic."""
    return torch.float64 if torch.float64 in (boxes.dtype, scores.dtype) else torch.float32


def area(boxes: Tensor) -> Tensor:
    """Return the (N) areas of (N, 4) boxes; 0 for reversed boxes and NaN extents."""
    size = (boxes[:, 2:] - boxes[:, :2]).nan_to_num(0, float("inf"), float("-inf")).clamp(min=0)  # (N, 2)
    return size[:, 0] * size[:, 1]


def suppressed(boxes: Tensor, by: Tensor, iou_threshold: float) -> Tensor:
    """Return (N) bool: which of the (N, 4) boxes the box `by` (4) suppresses."""
    threshold = torch.tensor(iou_threshold, dtype=boxes.dtype, device=boxes.device)
    size = torch.minimum(boxes[:, 2:], by[2:]) - torch.maximum(boxes[:, :2], by[:2])  # (N, 2)
    size = size.nan_to_num(0, float("inf"), float("-inf")).clamp(min=0)
    inter = size[:, 0] * size[:, 1]  # (N)
    return inter > threshold * ((area(boxes) + area(by[None])) - inter)


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Compute `spatialflow.ops.nms` as `batched_nms` of one class."""
    return batched_nms(boxes, scores, torch.zeros_like(scores, dtype=torch.int64), iou_threshold)


def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """Compute `spatialflow.ops.batched_nms`, one kept box at a time."""
    boxes, scores = (tensor.to(compute_type(boxes, scores)) for tensor in (boxes, scores))
    rows = torch.argsort(scores, descending=True, stable=True)  # (N)
    rows = rows[~(scores.isnan() | boxes.isnan().any(dim=1))[rows]]
    keep = []
    while len(rows):
        best, rows = rows[0], rows[1:]
        keep.append(best)
        drop = suppressed(boxes[rows], boxes[best], iou_threshold) & (idxs[rows] == idxs[best])
        rows = rows[~drop]
    return torch.stack(keep) if keep else rows
