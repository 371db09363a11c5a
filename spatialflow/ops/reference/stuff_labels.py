# SPDX-License-Identifier: Apache-2.0
"""Reference implementation of `spatialflow.ops.stuff_labels` in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def stuff_labels(logits: Tensor, valid_size: tuple[int, int], original_size: tuple[int, int]) -> Tensor:
    """Compute `spatialflow.ops.stuff_labels`, from the logits of every pixel."""
    enlarged = enlarged_logits(logits, valid_size, original_size)
    labels = torch.where(enlarged.isnan(), -math.inf, enlarged).argmax(dim=0)
    return labels.to(torch.uint8 if logits.shape[0] <= 256 else torch.int64)


def enlarged_logits(logits: Tensor, valid_size: tuple[int, int], original_size: tuple[int, int]) -> Tensor:
    """Return (C, *original_size) logits in the dtype of the arithmetic; the labels are their argmax."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    upper, lower, weight = taps(logits.shape[1], valid_size[0], original_size[0], logits)
    rows = logits[:, upper] + weight[:, None] * (logits[:, lower] - logits[:, upper])  # (C, H, w)
    left, right, weight = taps(logits.shape[2], valid_size[1], original_size[1], logits)
    return rows[..., left] + weight * (rows[..., right] - rows[..., left])


def taps(cells: int, valid: int, pixels: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the two cells around each pixel of an axis and the weight of the second, in the dtype of `like`."""
    step = 1.0 / (pixels / valid) if pixels else 0.0
    nearest = (torch.arange(pixels, dtype=torch.float64, device=like.device) * step).floor().clamp(max=valid - 1)
    exact = nearest.float() * ((cells - 1) / (4 * cells - 1))
    first = exact.floor().clamp(max=cells - 1)
    return first.long(), (first + 1).clamp(max=cells - 1).long(), (exact - first).to(like.dtype)
