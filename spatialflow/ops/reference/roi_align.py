# SPDX-License-Identifier: Apache-2.0
"""Reference implementation of `spatialflow.ops.roi_align` in plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def roi_align(
    input: Tensor,
    boxes: Tensor,
    output_size: int | tuple[int, int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
) -> Tensor:
    """Compute `spatialflow.ops.roi_align` for boxes as (K, 5) rows, one RoI at a time."""
    ph, pw = output_size if isinstance(output_size, (tuple, list)) else (output_size, output_size)
    batch, channels, height, width = input.shape
    real = torch.float64 if input.dtype == torch.float64 else torch.float32
    feature = input.to(real)
    pooled = zeros((boxes.shape[0], channels, ph, pw), [feature])
    for k, row in enumerate(boxes.to(real)):
        if bool(torch.isfinite(row).all()) and 0 <= float(row[0]) < batch:
            rows = _axis_weights(row[2], row[4], ph, height, spatial_scale, sampling_ratio, aligned)  # (PH, H)
            columns = _axis_weights(row[1], row[3], pw, width, spatial_scale, sampling_ratio, aligned)  # (PW, W)
            if rows is not None and columns is not None:
                along_x = _weighted(feature[int(row[0])], columns)  # (C, H, PW)
                values = _weighted(along_x.transpose(1, 2), rows).transpose(1, 2)  # (C, PH, PW)
                pooled = pooled.index_put((torch.tensor([k], device=boxes.device),), values[None])
    return pooled.to(input.dtype)


def _weighted(planes: Tensor, weights: Tensor) -> Tensor:
    """Sum (C, H, W) with weights (PW, W) over W to (C, H, PW); cells of weight 0 are left out, as 0 * NaN is NaN."""
    return torch.stack(
        [planes[..., bin_weights != 0] @ bin_weights[bin_weights != 0] for bin_weights in weights], dim=2
    )


def zeros(size: tuple[int, ...], features: Sequence[Tensor]) -> Tensor:
    """Return zeros that have zero gradients with respect to all `features`, also if these are NaN."""
    return features[0].new_zeros(size) + sum(feature.flatten()[:0].sum() for feature in features)


def _axis_weights(
    low: Tensor, high: Tensor, bins: int, size: int, spatial_scale: float, sampling_ratio: int, aligned: bool
) -> Tensor | None:
    """Return (bins, size): the weight of every cell in the mean over the samples of each bin.

    Return None if the lower edge or the extent of the RoI, in cells of the feature, is not finite.
    """
    low, high = (edge * spatial_scale - (0.5 if aligned else 0.0) for edge in (low, high))
    extent = high - low if aligned else (high - low).clamp(min=1)
    if not bool(torch.isfinite(low) & torch.isfinite(extent)):
        return None
    weights = low.new_zeros((bins, size))
    grid = float(sampling_ratio) if sampling_ratio > 0 else float((extent / bins).ceil())
    if grid <= 0 or size == 0:
        return weights
    step = extent / bins / grid
    for bin in range(bins):
        first = low + bin * (extent / bins)
        begin, end = 0.0, grid
        if step > 0 and grid > 4:  # only samples that may be on the map
            begin = max(math.floor((-1 - float(first)) / float(step)) - 2, 0)
            end = min(math.ceil((size - float(first)) / float(step)) + 2, grid)
        if not begin < min(end, 1e15):
            continue
        index = torch.arange(int(begin), int(min(end, 1e15)), device=low.device)  # (S,) samples
        position = first + (index.to(low.dtype) + 0.5) * step  # (S,) positions in cells
        inside = (position >= -1) & (position <= size)
        position = position[inside].clamp(0, size - 1)
        cell = position.floor().long().clamp(max=max(size - 2, 0))
        fraction = position - cell
        weights[bin].index_put_((cell,), (1 - fraction) / grid, accumulate=True)
        weights[bin].index_put_(((cell + 1).clamp(max=size - 1),), fraction / grid, accumulate=True)
    return weights
