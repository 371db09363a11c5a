# SPDX-License-Identifier: Apache-2.0
"""Group normalization with ReLU, and sigmoid focal loss."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from fuzz.brute_force.common import to_array, without_warnings


def _doubled(values: np.ndarray) -> np.ndarray:
    """Interpolate (S, ...) linearly to (2 S, ...) along the first axis; the ends keep their values (align_corners)."""
    size = len(values)
    result = []
    for index in range(2 * size):
        place = index * (size - 1) / (2 * size - 1)
        low = min(int(place), size - 1)
        high = min(low + 1, size - 1)
        result.append(values[low] * (1 - (place - low)) + values[high] * (place - low))
    return np.array(result).reshape(2 * size, *values.shape[1:])


@without_warnings
def group_norm_relu(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    upsample: bool = False,
) -> np.ndarray:
    values = to_array(input)
    batch, channels, height, width = values.shape
    by_group = channels // num_groups
    result = np.zeros(values.shape)
    if values.size == 0:
        return np.zeros((batch, channels, 2 * height, 2 * width)) if upsample else result
    for n in range(batch):
        for c in range(channels):
            first = c // by_group * by_group
            group = values[n, first : first + by_group]
            mean = group.sum() / group.size
            variance = ((group - mean) ** 2).sum() / group.size
            result[n, c] = (values[n, c] - mean) / np.sqrt(variance + eps)
            if weight is not None:
                result[n, c] *= to_array(weight)[c]
            if bias is not None:
                result[n, c] += to_array(bias)[c]
    result = np.where(result < 0, 0, result)
    if upsample:
        result = np.moveaxis(_doubled(np.moveaxis(result, 2, 0)), 0, 2)
        result = np.moveaxis(_doubled(np.moveaxis(result, 3, 0)), 0, 3)
    return result


@without_warnings
def sigmoid_focal_loss(
    logits: Tensor, labels: Tensor, gamma: float = 2.0, alpha: float = 0.25, reduction: str = "none"
) -> np.ndarray | np.float64:
    values = to_array(logits)
    classes = values.shape[-1]
    targets = to_array(labels).reshape(-1)
    rows = values.reshape(len(targets), classes)
    loss = np.zeros_like(rows)
    for row, target in enumerate(targets):
        if not 0 <= target <= classes:
            continue
        for label in range(classes):
            right = rows[row, label] if label == target else -rows[row, label]  # logit of the right decision
            weight = 1.0 if alpha < 0 else alpha if label == target else 1 - alpha
            rest = np.log1p(np.exp(-abs(right)))
            modulation = np.exp(-gamma * (rest + max(right, 0.0))) if gamma > 0 else 1.0  # sigmoid(-right) ** gamma
            loss[row, label] = weight * modulation * (rest + max(-right, 0.0))
    if reduction == "sum":
        return loss.sum()
    return np.float64(loss.sum() / loss.size) if reduction == "mean" else loss.reshape(values.shape)
