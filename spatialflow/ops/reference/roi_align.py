# SPDX-License-Identifier: Apache-2.0
"""RoIAlign in plain PyTorch: the specification of `spatialflow.ops.roi_align`."""

from __future__ import annotations

import math

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
    pooled = [_one_roi(feature, row, ph, pw, spatial_scale, sampling_ratio, aligned) for row in boxes.to(real)]
    if not pooled:
        return input.new_zeros((0, channels, ph, pw))
    return torch.stack(pooled).to(input.dtype)


def _one_roi(
    feature: Tensor, row: Tensor, ph: int, pw: int, spatial_scale: float, sampling_ratio: int, aligned: bool
) -> Tensor:
    batch, channels, height, width = feature.shape
    if not bool(torch.isfinite(row).all()) or not 0 <= float(row[0]) < batch:
        return feature.new_zeros((channels, ph, pw)) + 0 * feature.sum()  # keeps a zero gradient
    x1, y1, x2, y2 = (row[1:] * spatial_scale - (0.5 if aligned else 0.0)).unbind()
    rows = _axis_weights(y1, y2, ph, height, sampling_ratio, aligned)  # (PH, H)
    columns = _axis_weights(x1, x2, pw, width, sampling_ratio, aligned)  # (PW, W)
    return torch.einsum("ph,chw,qw->cpq", rows, feature[int(row[0])], columns)


def _axis_weights(low: Tensor, high: Tensor, bins: int, size: int, sampling_ratio: int, aligned: bool) -> Tensor:
    """(bins, size): weight of every cell in the mean over the samples of each bin."""
    extent = high - low if aligned else (high - low).clamp(min=1)
    grid = sampling_ratio if sampling_ratio > 0 else max(math.ceil(extent / bins), 0)
    weights = low.new_zeros((bins, size))
    if grid == 0:
        return weights
    index = torch.arange(bins * grid, device=low.device)
    bin, sample = index // grid, index % grid
    real = low.dtype  # integer tensors times 0-d ones would fall back to float32
    at = low + bin.to(real) * (extent / bins) + (sample.to(real) + 0.5) * (extent / bins / grid)  # (bins * grid,)
    inside = (at >= -1) & (at <= size)
    at = at.clamp(0, size - 1)
    cell = at.floor().long().clamp(max=max(size - 2, 0))
    fraction = at - cell
    share = inside.to(at.dtype) / grid
    weights.index_put_((bin, cell), share * (1 - fraction), accumulate=True)
    weights.index_put_((bin, (cell + 1).clamp(max=size - 1)), share * fraction, accumulate=True)
    return weights
