# SPDX-License-Identifier: Apache-2.0
"""Data structures that data sets, models and the training engine share."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # scoring imports this module, and must not import torch
    from torch import Tensor

UNLABELED = 255
"""Value of pixels without a label in semantic maps."""


class GroundTruth(NamedTuple):
    """Ground truth of a batch of N images at the network's scale."""

    boxes: list[Tensor]  # N x (K_i, 4) float32, (x1, y1, x2, y2) in pixels
    labels: list[Tensor]  # N x (K_i,) int64 thing labels
    masks: list[Tensor]  # N x (K_i, H, W) bool or uint8
    semantic: Tensor  # (N, H, W) uint8, UNLABELED for pixels without a label, padding included
    valid_sizes: Tensor  # (N, 2) int64, height and width without padding
    padded_sizes: Tensor  # (N, 2) int64, height and width that each image alone is padded to
