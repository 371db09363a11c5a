# SPDX-License-Identifier: Apache-2.0
"""Reference implementation of `spatialflow.ops.preprocess_images` in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor


def preprocess_images(
    images: Tensor | Sequence[Tensor],
    sizes: tuple[int, int] | Sequence[tuple[int, int]],
    mean: Sequence[float],
    std: Sequence[float],
    divisor: int = 32,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Compute `spatialflow.ops.preprocess_images`, image by image."""
    size_list = cast("Sequence[tuple[int, int]]", [sizes] if isinstance(images, Tensor) else sizes)
    images = [images] if isinstance(images, Tensor) else images
    height, width = (-(-max(sides) // divisor) * divisor for sides in zip(*size_list, strict=True))
    batch = torch.zeros((len(images), 3, height, width), dtype=dtype, device=images[0].device)
    batch = batch.contiguous(memory_format=torch.channels_last)
    means = torch.tensor(mean, dtype=torch.float32, device=batch.device)
    factors = 1.0 / torch.tensor(std, dtype=torch.float64, device=batch.device)
    for target, image, (h, w) in zip(batch, images, size_list, strict=True):
        rgb = resize(image, h, w).flip(2)
        normalized = ((rgb.float() - means).double() * factors).float()
        target[:, :h, :w] = normalized.permute(2, 0, 1).to(dtype)
    return batch


def resize(image: Tensor, height: int, width: int) -> Tensor:
    """Resize (H, W, 3) uint8 to (height, width, 3) int64 in 0 .. 255, in OpenCV's fixed-point arithmetic."""
    pixels = image.long()  # (H, W, 3)
    if image.shape[0] == 2 * height and image.shape[1] == 2 * width:
        return (pixels[::2, ::2] + pixels[::2, 1::2] + pixels[1::2, ::2] + pixels[1::2, 1::2] + 2) >> 2
    left, right, left_weight, right_weight = taps(image.shape[1], width, image.device)
    rows = pixels[:, left] * left_weight[:, None] + pixels[:, right] * right_weight[:, None] >> 4  # (H, width, 3)
    upper, lower, upper_weight, lower_weight = (
        tap[:, None, None] for tap in taps(image.shape[0], height, image.device)
    )
    above, below = rows[upper.flatten()] * upper_weight >> 16, rows[lower.flatten()] * lower_weight >> 16
    return (above + below + 2) >> 2


def taps(source: int, target: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the two source cells around each target element, clamped to the source, and their weights times 2048."""
    step = 1.0 / (target / source)
    position = ((torch.arange(target, dtype=torch.float64, device=device) + 0.5) * step - 0.5).float()
    cell = position.floor()
    fraction = position - cell
    weights = ((1.0 - fraction) * 2048).round().long(), (fraction * 2048).round().long()
    first = cell.long()
    return first.clamp(0, source - 1), (first + 1).clamp(0, source - 1), *weights
