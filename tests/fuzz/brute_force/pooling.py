# SPDX-License-Identifier: Apache-2.0
"""RoIAlign on one feature map and on a pyramid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from fuzz.brute_force.common import comparison_dtype, to_array, to_pair, without_warnings


def _boxes_array(boxes: Tensor | Sequence[Tensor]) -> np.ndarray:
    """Return (K, 5) float64 rows of batch index and corners, also for a list of boxes per image."""
    if isinstance(boxes, Tensor):
        return to_array(boxes)
    rows = [[index, *box] for index, of_image in enumerate(boxes) for box in to_array(of_image)]
    return np.array(rows, dtype=np.float64).reshape(-1, 5)


def _bin_weights(start: Any, extent: Any, bins: int, ratio: int, size: int, real: type) -> list[dict[int, float]]:
    """For every bin of one axis, return the weight of each of `size` cells in the mean of the bin's samples.

    Bilinear weights are products over the axes, and the samples of a bin form a grid, so the axes are independent.
    """
    length = real(extent) / real(bins)
    if not (np.isfinite(start) and np.isfinite(extent)):
        return [{} for _ in range(bins)]
    count = ratio if ratio > 0 else math.ceil(length)
    result = []
    for index in range(bins):
        weights: dict[int, float] = {}
        first, last = 0, count
        if count > 100_000:  # only samples near the map matter
            step, origin = float(length) / count, float(start) + index * float(length)
            first = max(0, math.floor((-2 - origin) / step))
            last = min(count, math.ceil((size + 2 - origin) / step))
        for sample in range(first, last):
            at = start + real(index) * length + (real(sample) + real(0.5)) * length / real(count)
            if size == 0 or not -1 <= at <= size:
                continue
            at = min(max(float(at), 0.0), size - 1.0)
            low = int(at)
            for cell, weight in ((low, 1 - (at - low)), (low + 1, at - low)):
                if weight != 0:
                    weights[cell] = weights.get(cell, 0.0) + weight / count
        result.append(weights)
    return result


def _pool(
    pooled: np.ndarray, features: np.ndarray, box: np.ndarray, scale: float, ratio: int, aligned: bool, real: type
) -> None:
    """Add the pooled RoI `box` of `features` (N, C, H, W) to `pooled` (C, PH, PW), which is zero."""
    batch, _, height, width = features.shape
    if not np.isfinite(box.astype(real)).all() or not 0 <= real(box[0]) < batch:
        return
    image = features[int(real(box[0]))]
    half = real(0.5 if aligned else 0)
    x1, y1, x2, y2 = (real(corner) * real(scale) - half for corner in box[1:])
    roi_width, roi_height = x2 - x1, y2 - y1
    if not aligned:
        roi_width, roi_height = max(roi_width, real(1)), max(roi_height, real(1))
    rows = _bin_weights(y1, roi_height, pooled.shape[1], ratio, height, real)
    columns = _bin_weights(x1, roi_width, pooled.shape[2], ratio, width, real)
    for i, of_row in enumerate(rows):
        for j, of_column in enumerate(columns):
            for y, y_weight in of_row.items():
                for x, x_weight in of_column.items():
                    pooled[:, i, j] += y_weight * x_weight * image[:, y, x]


@without_warnings
def roi_align(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: int | tuple[int, int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
) -> np.ndarray:
    real, features, rows = comparison_dtype(input), to_array(input), _boxes_array(boxes)
    pooled = np.zeros((len(rows), features.shape[1], *to_pair(output_size)))
    for index, box in enumerate(rows):
        _pool(pooled[index], features, box, spatial_scale, sampling_ratio, aligned, real)
    return pooled


@without_warnings
def multilevel_roi_align(
    features: Sequence[Tensor],
    boxes: Tensor | Sequence[Tensor],
    output_size: int | tuple[int, int],
    strides: Sequence[float],
    sampling_ratio: int = 0,
    aligned: bool = True,
    finest_scale: float = 56,
) -> np.ndarray:
    real, levels, rows = comparison_dtype(*features), [to_array(level) for level in features], _boxes_array(boxes)
    pooled = np.zeros((len(rows), levels[0].shape[1], *to_pair(output_size)))
    for index, box in enumerate(rows):
        x1, y1, x2, y2 = (real(corner) for corner in box[1:])
        level = np.floor(np.log2(np.sqrt((x2 - x1) * (y2 - y1)) / real(finest_scale) + real(1e-6)))
        if np.isnan(level):  # one axis is reversed, so the area is negative: the finest level
            level = 0
        level = int(min(max(level, 0), len(levels) - 1))
        _pool(pooled[index], levels[level], box, 1 / strides[level], sampling_ratio, aligned, real)
    return pooled
