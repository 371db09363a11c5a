# SPDX-License-Identifier: Apache-2.0
"""Preprocessing of images."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fuzz.brute_force.common import to_array, without_warnings


def _resize_coefficients(source: int, target: int) -> list[tuple[int, int, int, int]]:
    """For each output position, return two cells and their weights in 1/2048, as OpenCV's INTER_LINEAR for 8 bits."""
    scale = 1 / (target / source)
    result = []
    for place in range(target):
        at = np.float32((place + 0.5) * scale - 0.5)
        cell = math.floor(at)
        fraction = at - np.float32(cell)
        low, high = min(max(cell, 0), source - 1), min(max(cell + 1, 0), source - 1)
        weights = [int(np.rint(part * np.float32(2048))) for part in (np.float32(1) - fraction, fraction)]
        result.append((low, high, *weights))
    return result


def _resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize (H, W, 3) bytes as OpenCV's `resize` with INTER_LINEAR."""
    height, width = size
    result = np.zeros((height, width, 3), dtype=np.int64)
    if image.shape[:2] == (2 * height, 2 * width):
        for y in range(height):
            for x in range(width):
                result[y, x] = (image[2 * y : 2 * y + 2, 2 * x : 2 * x + 2].sum(axis=(0, 1)) + 2) >> 2
        return result
    rows, columns = _resize_coefficients(image.shape[0], height), _resize_coefficients(image.shape[1], width)
    for y, (top, bottom, top_weight, bottom_weight) in enumerate(rows):
        for x, (left, right, left_weight, right_weight) in enumerate(columns):
            upper = image[top, left] * left_weight + image[top, right] * right_weight
            lower = image[bottom, left] * left_weight + image[bottom, right] * right_weight
            total = ((top_weight * (upper >> 4)) >> 16) + ((bottom_weight * (lower >> 4)) >> 16)
            result[y, x] = (total + 2) >> 2
    return result


@without_warnings
def preprocess_images(
    images: Tensor | Sequence[Tensor],
    sizes: tuple[int, int] | Sequence[tuple[int, int]],
    mean: Sequence[float],
    std: Sequence[float],
    divisor: int = 32,
    dtype: torch.dtype = torch.float32,
) -> np.ndarray:
    """Compute the documented float32 result, bit for bit, whatever `dtype` is."""
    if isinstance(images, Tensor):
        images, sizes = [images], [sizes]
    height, width = (-(-max(sides) // divisor) * divisor for sides in zip(*sizes))
    result = np.zeros((len(images), 3, height, width))
    for n, (image, size) in enumerate(zip(images, sizes)):
        resized = _resize(to_array(image), size)
        for channel in range(3):
            centered = resized[:, :, 2 - channel].astype(np.float32) - np.float32(mean[channel])
            result[n, channel, : size[0], : size[1]] = (centered * (1 / np.float64(std[channel]))).astype(np.float32)
    return result
