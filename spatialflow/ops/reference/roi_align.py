# SPDX-License-Identifier: Apache-2.0
"""RoIAlign in plain PyTorch: the specification of `spatialflow.ops.roi_align`."""

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
    """Same arguments and result as `spatialflow.ops.roi_align`, with boxes as (K, 5) rows; one RoI at a time."""
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
                own = _weighted(_weighted(feature[int(row[0])], columns).transpose(1, 2), rows).transpose(1, 2)
                pooled = pooled.index_put((torch.tensor([k], device=boxes.device),), own[None])
    return pooled.to(input.dtype)


def _weighted(planes: Tensor, weights: Tensor) -> Tensor:
    """(C, H, W) and (PW, W) to (C, H, PW): sums over W, of cells with a weight alone, as 0 * NaN would be NaN."""
    return torch.stack([planes[..., of_bin != 0] @ of_bin[of_bin != 0] for of_bin in weights], dim=2)


def zeros(size: tuple[int, ...], features: Sequence[Tensor]) -> Tensor:
    """Zeros like `features`, and with zero gradients by them, whatever these hold."""
    return features[0].new_zeros(size) + sum(feature.flatten()[:0].sum() for feature in features)


def _axis_weights(
    low: Tensor, high: Tensor, bins: int, size: int, spatial_scale: float, sampling_ratio: int, aligned: bool
) -> Tensor | None:
    """(bins, size): weight of every cell in the mean over the samples of each bin. None for a RoI that is not finite in
    cells of the feature.
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
        if step > 0 and grid > 4:  # only samples that can lie on the map, however many there are
            begin = max(math.floor((-1 - float(first)) / float(step)) - 2, 0)
            end = min(math.ceil((size - float(first)) / float(step)) + 2, grid)
        if not begin < min(end, 1e15):
            continue
        index = torch.arange(int(begin), int(min(end, 1e15)), device=low.device)
        at = first + (index.to(low.dtype) + 0.5) * step
        inside = (at >= -1) & (at <= size)
        at = at[inside].clamp(0, size - 1)
        cell = at.floor().long().clamp(max=max(size - 2, 0))
        fraction = at - cell
        weights[bin].index_put_((cell,), (1 - fraction) / grid, accumulate=True)
        weights[bin].index_put_(((cell + 1).clamp(max=size - 1),), fraction / grid, accumulate=True)
    return weights
