# SPDX-License-Identifier: Apache-2.0
"""RetinaNet's anchors and the coding of boxes relative to them."""

import math
from typing import Optional, Sequence

import torch
from torch import Tensor

STRIDES = (8, 16, 32, 64, 128)
"""Strides of P3..P7 in pixels."""

MAX_LOG_RATIO = abs(math.log(16 / 1000))
"""Limit of the decoded log width and height ratios."""


def base_anchors(
    stride: int, octave_scale: float = 4.0, scales_per_octave: int = 3, ratios: Sequence[float] = (0.5, 1.0, 2.0)
) -> Tensor:
    """The anchors of the cell at the origin.

    Args:
        stride: stride of the level in pixels.
        octave_scale: smallest anchor size in strides.
        scales_per_octave: sizes, each 2 ** (1 / scales_per_octave) times the one before.
        ratios: height / width.

    Returns:
        (len(ratios) * scales_per_octave, 4) float32, (x1, y1, x2, y2) in pixels around 0; ratio-major, then scale.
    """
    scales = (
        torch.tensor([2.0 ** (i / scales_per_octave) for i in range(scales_per_octave)], dtype=torch.float64)
        * octave_scale
    )
    scales = scales.float()
    h_ratios = torch.sqrt(torch.tensor(ratios, dtype=torch.float32))
    widths = (stride * (1 / h_ratios)[:, None] * scales[None, :]).reshape(-1)
    heights = (stride * h_ratios[:, None] * scales[None, :]).reshape(-1)
    return torch.stack([-0.5 * widths, -0.5 * heights, 0.5 * widths, 0.5 * heights], dim=-1)


def grid_anchors(size: tuple[int, int], stride: int, base: Tensor) -> Tensor:
    """Anchors of a whole level: cell (y, x) is centered at (x * stride, y * stride), no half-cell offset, no rounding.

    Args:
        size: (H, W) of the level.
        stride: stride of the level in pixels.
        base: (A, 4) from `base_anchors`.

    Returns:
        (H * W * A, 4), cells row-major, then anchors; type and device of `base`.
    """
    h, w = size
    x = torch.arange(w, device=base.device, dtype=base.dtype) * stride
    y = torch.arange(h, device=base.device, dtype=base.dtype) * stride
    shift = torch.stack([x.repeat(h), y.repeat_interleave(w)] * 2, dim=-1)  # (H*W, 4)
    return (shift[:, None, :] + base[None]).reshape(-1, 4)


def valid_flags(size: tuple[int, int], stride: int, padded_size: tuple[int, int], num_anchors: int) -> Tensor:
    """Marks the anchors whose cell lies inside the image's own padded size (training ignores the others).

    Args:
        size: (H, W) of the level in the batch.
        stride: stride of the level.
        padded_size: (H, W) of this image, padded, in pixels.
        num_anchors: anchors per cell.

    Returns:
        (H * W * num_anchors,) bool.
    """
    rows = torch.arange(size[0]) < min(math.ceil(padded_size[0] / stride), size[0])
    columns = torch.arange(size[1]) < min(math.ceil(padded_size[1] / stride), size[1])
    return (rows[:, None] & columns[None, :]).reshape(-1, 1).expand(-1, num_anchors).reshape(-1)


def encode_boxes(anchors: Tensor, boxes: Tensor) -> Tensor:
    """Deltas that `decode_boxes` turns back into `boxes`: means 0, standard deviations 1.

    Args:
        anchors: (..., 4), (x1, y1, x2, y2).
        boxes: (..., 4).

    Returns:
        (..., 4): (dx, dy) in anchor sizes, (dw, dh) as logarithms.
    """
    anchors, boxes = anchors.float(), boxes.float()
    centre = (anchors[..., :2] + anchors[..., 2:]) * 0.5
    size = anchors[..., 2:] - anchors[..., :2]
    target_centre = (boxes[..., :2] + boxes[..., 2:]) * 0.5
    target_size = boxes[..., 2:] - boxes[..., :2]
    return torch.cat([(target_centre - centre) / size, torch.log(target_size / size)], dim=-1)


def decode_boxes(anchors: Tensor, deltas: Tensor, size: Optional[tuple[int, int]] = None) -> Tensor:
    """Boxes from anchors and predicted deltas.

    Args:
        anchors: (..., 4), (x1, y1, x2, y2).
        deltas: (..., 4), (dx, dy, dw, dh); dw and dh are clamped to +-|log(16 / 1000)|, dx and dy are free.
        size: (H, W) of the valid image: coordinates are clipped to [0, W] and [0, H]; None: no clipping.

    Returns:
        (..., 4) of the type of `deltas`.
    """
    dw = deltas[..., 2].clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    dh = deltas[..., 3].clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    cx = (anchors[..., 0] + anchors[..., 2]) * 0.5
    cy = (anchors[..., 1] + anchors[..., 3]) * 0.5
    w = anchors[..., 2] - anchors[..., 0]
    h = anchors[..., 3] - anchors[..., 1]
    gw, gh = w * dw.exp(), h * dh.exp()
    gx = torch.addcmul(cx, w, deltas[..., 0])
    gy = torch.addcmul(cy, h, deltas[..., 1])
    x1, y1, x2, y2 = gx - gw * 0.5, gy - gh * 0.5, gx + gw * 0.5, gy + gh * 0.5
    if size is not None:
        x1, x2 = x1.clamp(0, size[1]), x2.clamp(0, size[1])
        y1, y2 = y1.clamp(0, size[0]), y2.clamp(0, size[0])
    return torch.stack([x1, y1, x2, y2], dim=-1)
