# SPDX-License-Identifier: Apache-2.0
"""RetinaNet's anchors, and box deltas relative to them."""

from collections.abc import Sequence

import torch
from torch import Tensor

STRIDES = (8, 16, 32, 64, 128)
"""Strides of P3..P7 in pixels."""


def base_anchors(
    stride: int, octave_scale: float = 4.0, scales_per_octave: int = 3, ratios: Sequence[float] = (0.5, 1.0, 2.0)
) -> Tensor:
    """Compute the anchors of the cell at the origin.

    Args:
        stride: stride of the level in pixels.
        octave_scale: smallest anchor size in strides.
        scales_per_octave: number of sizes, each 2 ** (1 / scales_per_octave) times the one before.
        ratios: height / width.

    Returns:
        (len(ratios) * scales_per_octave, 4) float32, (x1, y1, x2, y2) in pixels around 0; ratio-major, then scale.
    """
    octaves = [2.0 ** (i / scales_per_octave) for i in range(scales_per_octave)]
    scales = (torch.tensor(octaves, dtype=torch.float64, device="cpu") * octave_scale).float()
    h_ratios = torch.sqrt(torch.tensor(ratios, dtype=torch.float32, device="cpu"))
    widths = (stride * (1 / h_ratios)[:, None] * scales[None, :]).reshape(-1)
    heights = (stride * h_ratios[:, None] * scales[None, :]).reshape(-1)
    return torch.stack([-0.5 * widths, -0.5 * heights, 0.5 * widths, 0.5 * heights], dim=-1)


def valid_flags(size: tuple[int, int], stride: int, padded_sizes: Tensor, num_anchors: int) -> Tensor:
    """Mark the anchors whose cell begins inside the padded size of the image; training ignores the others.

    Args:
        size: (H, W) of the level in the batch.
        stride: stride of the level.
        padded_sizes: (N, 2) int64, height and width in pixels that each image alone is padded to.
        num_anchors: anchors per cell.

    Returns:
        (N, H * W * num_anchors) bool, on the device of `padded_sizes`.
    """
    rows, columns = (
        torch.arange(cells, device=padded_sizes.device) * stride < padded_sizes[:, axis, None]
        for axis, cells in enumerate(size)
    )
    return (rows[:, :, None] & columns[:, None, :])[..., None].expand(-1, -1, -1, num_anchors).flatten(1)


def encode_boxes(anchors: Tensor, boxes: Tensor) -> Tensor:
    """Encode boxes as deltas, without normalization (means 0, deviations 1); `ops.select_candidates` decodes them.

    Args:
        anchors: (..., 4), (x1, y1, x2, y2).
        boxes: (..., 4).

    Returns:
        (..., 4): (dx, dy) in anchor sizes, (dw, dh) as logarithms.
    """
    anchors, boxes = anchors.float(), boxes.float()
    center = (anchors[..., :2] + anchors[..., 2:]) * 0.5
    size = anchors[..., 2:] - anchors[..., :2]
    target_center = (boxes[..., :2] + boxes[..., 2:]) * 0.5
    target_size = boxes[..., 2:] - boxes[..., :2]
    return torch.cat([(target_center - center) / size, torch.log(target_size / size)], dim=-1)
