# SPDX-License-Identifier: Apache-2.0
"""Reference implementation of `spatialflow.ops.multilevel_roi_align` in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spatialflow.ops.reference.roi_align import roi_align, zeros


def multilevel_roi_align(
    features: Sequence[Tensor],
    boxes: Tensor,
    output_size: int | tuple[int, int],
    strides: Sequence[float],
    sampling_ratio: int = 0,
    aligned: bool = True,
    finest_scale: float = 56,
) -> Tensor:
    """Compute `spatialflow.ops.multilevel_roi_align` level by level, for boxes (K, 5)."""
    ph, pw = output_size if isinstance(output_size, (tuple, list)) else (output_size, output_size)
    real = torch.float64 if features[0].dtype == torch.float64 else torch.float32
    levels = roi_levels(boxes.to(real), len(features), finest_scale)  # (K,)
    pooled = zeros((boxes.shape[0], features[0].shape[1], ph, pw), features)
    for level, (feature, stride) in enumerate(zip(features, strides, strict=True)):
        rows = (levels == level).nonzero().squeeze(1)
        if feature.numel() > 0 and rows.numel() > 0:
            values = roi_align(feature, boxes[rows], (ph, pw), 1.0 / stride, sampling_ratio, aligned)
            pooled = pooled.index_put((rows,), values)
    return pooled


def roi_levels(boxes: Tensor, levels: int, finest_scale: float) -> Tensor:
    """Return the level of each RoI, (K,) int64: clamp(floor(log2(sqrt(area) / finest_scale + 1e-6)), 0, levels - 1).

    It is computed by comparisons, without rounding a logarithm. A RoI without area has level 0.
    """
    area = (boxes[:, 3] - boxes[:, 1]) * (boxes[:, 4] - boxes[:, 2])  # (K,)
    ratio = area.sqrt() / finest_scale + 1e-6
    bounds = 2.0 ** torch.arange(1, levels, dtype=boxes.dtype, device=boxes.device)  # (levels - 1,)
    return (ratio[:, None] >= bounds).sum(1)
