# SPDX-License-Identifier: Apache-2.0
"""Reference implementation of `spatialflow.ops.panoptic_quality_counts` in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def panoptic_quality_counts(gt_map: Tensor, pred_map: Tensor, gt_segments: int, pred_segments: int) -> Tensor:
    """Compute `spatialflow.ops.panoptic_quality_counts`, by one bincount."""
    gt, pred = gt_map.long().flatten(), pred_map.long().flatten()  # (H * W)
    inside = (gt >= 0) & (gt <= gt_segments) & (pred >= 0) & (pred <= pred_segments)
    pairs = (gt * (pred_segments + 1) + pred)[inside]  # flat indices of the table
    counts = torch.bincount(pairs, minlength=(gt_segments + 1) * (pred_segments + 1))
    return counts.view(gt_segments + 1, pred_segments + 1)
