# SPDX-License-Identifier: Apache-2.0
"""Conversion of tensors to arrays, and bilinear sampling."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import numpy as np
import torch
from torch import Tensor


def without_warnings(function: Callable) -> Callable:
    """Wrap `function` so that NumPy does not warn of overflow, NaN and division by zero, which are expected here."""

    @wraps(function)
    def run(*args: Any, **options: Any) -> Any:
        with np.errstate(all="ignore"):
            return function(*args, **options)

    return run


def to_array(tensor: Tensor) -> np.ndarray:
    """Convert a tensor to an array: floating-point values to float64, integers to int64, bool to bool."""
    tensor = tensor.detach().cpu()
    if tensor.is_floating_point():
        return tensor.double().numpy().copy()
    return tensor.numpy().copy() if tensor.dtype == torch.bool else tensor.long().numpy().copy()


def comparison_dtype(*tensors: Tensor) -> type:
    """Return the type in which an operator compares: float64 if any of its tensors is float64, else float32."""
    return np.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else np.float32


def to_pair(value: int | Sequence[int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def bilinear(image: np.ndarray, y: float, x: float) -> np.ndarray:
    """Sample `image` (C, H, W) bilinearly at a point, with zeros around the map; 0 * NaN is NaN."""
    height, width = image.shape[1:]
    sample = np.zeros(image.shape[0])
    if not (-1 <= y <= height and -1 <= x <= width):
        return sample
    top, left = math.floor(y), math.floor(x)
    for row, row_weight in ((top, 1 - (y - top)), (top + 1, y - top)):
        for column, column_weight in ((left, 1 - (x - left)), (left + 1, x - left)):
            if 0 <= row < height and 0 <= column < width:
                sample += row_weight * column_weight * image[:, row, column]
    return sample
