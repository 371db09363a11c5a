# SPDX-License-Identifier: Apache-2.0
"""Panoptic quality counts in plain PyTorch: the specification of `spatialflow.ops.panoptic_quality_counts`."""

from __future__ import annotations

import torch
from torch import Tensor


def panoptic_quality_counts(gt_map: Tensor, pred_map: Tensor, gt_segments: int, pred_segments: int) -> Tensor:
    """Same arguments and result as `spatialflow.ops.panoptic_quality_counts`, by one bincount."""
    gt, pred = gt_map.long().flatten(), pred_map.long().flatten()
    inside = (gt >= 0) & (gt <= gt_segments) & (pred >= 0) & (pred <= pred_segments)
    pairs = (gt * (pred_segments + 1) + pred)[inside]
    counts = torch.bincount(pairs, minlength=(gt_segments + 1) * (pred_segments + 1))
    return counts.view(gt_segments + 1, pred_segments + 1)
