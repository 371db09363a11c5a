# SPDX-License-Identifier: Apache-2.0
"""Reference implementation of `spatialflow.ops.multiclass_nms` in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from spatialflow.ops.multiclass_nms import Detections
from spatialflow.ops.reference.nms import batched_nms, compute_type


def multiclass_nms(
    boxes: Tensor, scores: Tensor, score_threshold: float, iou_threshold: float, max_detections: int
) -> Detections:
    """Compute `spatialflow.ops.multiclass_nms` by `batched_nms` of all (box, class) pairs."""
    if boxes.dim() == 2:
        return _one_image(boxes, scores, score_threshold, iou_threshold, max_detections)
    images = [
        _one_image(b, s, score_threshold, iou_threshold, max_detections) for b, s in zip(boxes, scores, strict=True)
    ]
    if not images:
        images = [_one_image(boxes.new_zeros((0, 4)), scores.new_zeros((0, 0)), 0.0, 0.0, max_detections)]
        return Detections(*(torch.stack(parts)[:0] for parts in zip(*images, strict=True)))
    return Detections(*(torch.stack(parts) for parts in zip(*images, strict=True)))


def _one_image(
    boxes: Tensor, scores: Tensor, score_threshold: float, iou_threshold: float, max_detections: int
) -> Detections:
    wide = scores.to(compute_type(boxes, scores))
    index, label = (wide > wide.new_tensor(score_threshold)).nonzero(as_tuple=True)  # (K) each
    keep = batched_nms(boxes.to(wide.dtype)[index], wide[index, label], label, iou_threshold)[:max_detections]
    index, label, count = index[keep], label[keep], len(keep)

    def padded(values: Tensor, filler: float) -> Tensor:
        missing = values.new_full((max_detections - count, *values.shape[1:]), filler)
        return torch.cat([values, missing])

    return Detections(
        padded(boxes[index], 0),
        padded(scores[index, label], 0),
        padded(label, -1),
        torch.tensor(count, device=boxes.device),
        padded(index, -1),
    )
