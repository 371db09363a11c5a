# SPDX-License-Identifier: Apache-2.0
"""From the network's raw outputs to detections, masks and stuff logits; pure functions of tensors."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from spatialflow.config import InferenceConfig, ModelConfig
from spatialflow.models.anchors import STRIDES, base_anchors
from spatialflow.models.spatialflow import SpatialFlow
from spatialflow.ops import Candidates, multiclass_nms
from spatialflow.ops.reference.select_candidates import grid_anchors


class Detections(NamedTuple):
    """Boxes kept by NMS, in score order; rows from `count` on are zero with label -1."""

    boxes: Tensor  # (B, D, 4) float32
    scores: Tensor  # (B, D) float32
    labels: Tensor  # (B, D) int64
    count: Tensor  # (B,) int64


def pyramid_base_anchors(model: ModelConfig, device: torch.device) -> Tensor:
    """(L, A, 4) float32: the anchors of the cell at the origin of each pyramid level."""
    shape = (model.anchor_octave_scale, model.anchor_scales_per_octave, model.anchor_ratios)
    return torch.stack([base_anchors(stride, *shape) for stride in STRIDES]).to(device, non_blocking=True)


def pyramid_anchors(base: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """(H * W * A, 4) float32 anchors of each pyramid level, whose numbers of cells, (H, W), are `sizes`.

    `base` is that of `pyramid_base_anchors`.
    """
    return [grid_anchors(size, stride, own) for size, stride, own in zip(sizes, STRIDES, base)]


def detect(candidates: Candidates, test: InferenceConfig) -> Detections:
    """Class-wise NMS over all levels; at most `test.max_detections` per image in score order."""
    kept = multiclass_nms(
        candidates.boxes, candidates.scores, test.score_threshold, test.nms_threshold, test.max_detections
    )
    return Detections(kept.boxes, kept.scores, kept.labels, kept.count)


def make_rois(boxes: Sequence[Tensor], scale_factors: Tensor) -> Tensor:
    """Boxes of each image at original scale, (K_i, 4), -> RoIs at network scale, (sum K_i, 5), image index first."""
    rois = [
        torch.cat([b.new_full((len(b), 1), i), b * scale_factors[i].repeat(2).to(b)], dim=1)
        for i, b in enumerate(boxes)
    ]
    return torch.cat(rois)


CPU_CHUNK, GPU_CHUNK = 128, 1024
"""RoIs that the mask head computes at once. On a GPU each chunk costs 12 launches, and 1024 RoIs of 256 channels in 16
bits take 0.6 GB."""


def mask_logits(
    network: SpatialFlow,
    thing_features: list[Tensor],
    rois: Tensor,
    labels: Tensor,
    active: Tensor | None = None,
) -> Tensor:
    """(K, 28, 28) float32 logits of each RoI's own class, computed in chunks of RoIs to bound the memory.

    Logits of RoIs that are not `active`, (K,) bool, are unspecified; None: all are wanted.
    """
    chunk = CPU_CHUNK if rois.device.type == "cpu" else GPU_CHUNK
    parts = [
        network.thing_logits(
            thing_features,
            rois[i : i + chunk],
            labels[i : i + chunk],
            None if active is None else active[i : i + chunk],
        )
        for i in range(0, len(rois), chunk)
    ]
    side = 2 * network.config.model.roi_size
    return torch.cat(parts).float() if parts else rois.new_zeros((0, side, side))


def resized_stuff_logits(
    quarter_logits: Tensor, valid_size: tuple[int, int], original_size: tuple[int, int], mirrored: bool = False
) -> Tensor:
    """Stuff logits at original size, so that those of several views can be averaged: 4x upsampling, crop to the valid
    image, bilinear resize, all with aligned corners.

    Every step is linear and acts on rows and columns apart, so that a matrix for each does all three: nothing of the
    size of the network's input is ever made.

    Args:
        quarter_logits: (C, H/4, W/4) of one image.
        valid_size: (H, W) at network scale, without padding.
        original_size: (H, W) of the result.
        mirrored: the image went through the network mirrored; the result is turned back.

    Returns:
        (C, *original_size) float32.
    """
    rows, columns = (
        _resize_weights(cells, valid, original, quarter_logits.device)
        for cells, valid, original in zip(quarter_logits.shape[1:], valid_size, original_size)
    )
    columns = columns.flip(0) if mirrored else columns
    return rows @ (quarter_logits.float() @ columns.t())


def _resize_weights(cells: int, valid: int, original: int, device: torch.device) -> Tensor:
    """(original, cells): what each cell of an axis contributes to each position after upsampling, crop and resize."""
    upsampled = F.interpolate(torch.eye(cells, device=device)[None], size=4 * cells, mode="linear", align_corners=True)
    return F.interpolate(upsampled[..., :valid], size=original, mode="linear", align_corners=True)[0].t()


def mirror_boxes(boxes: Tensor, widths: Tensor) -> Tensor:
    """Boxes (B, N, 4) in images of `widths` (B,), where they are after mirroring the images."""
    x1, y1, x2, y2 = boxes.unbind(dim=-1)
    width = widths[:, None].to(boxes)
    return torch.stack([width - x2, y1, width - x1, y2], dim=-1)


def mean_mask_logits(logits: Sequence[Tensor]) -> Tensor:
    """Logits of the mean of the probabilities; written so that probabilities near 0 and 1 keep their precision.

    log(mean p / (1 - mean p)), with log sums of log p and of log(1 - p).
    """
    stacked = torch.stack(list(logits))
    return F.logsigmoid(stacked).logsumexp(dim=0) - F.logsigmoid(-stacked).logsumexp(dim=0)
