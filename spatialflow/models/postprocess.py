# SPDX-License-Identifier: Apache-2.0
"""Postprocessing of the network's raw outputs to detections, masks and stuff logits; pure functions of tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from spatialflow.config import InferenceConfig, ModelConfig
from spatialflow.models.anchors import STRIDES, base_anchors
from spatialflow.models.spatialflow import SpatialFlow
from spatialflow.ops import Candidates, Detections, multiclass_nms
from spatialflow.ops.reference.select_candidates import grid_anchors


def pyramid_base_anchors(model: ModelConfig, device: torch.device) -> Tensor:
    """Compute the anchors of the cell at the origin of each pyramid level, (L, A, 4) float32."""
    shape = (model.anchor_octave_scale, model.anchor_scales_per_octave, model.anchor_ratios)
    return torch.stack([base_anchors(stride, *shape) for stride in STRIDES]).to(device, non_blocking=True)


def pyramid_anchors(base: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Compute the anchors of each pyramid level, (H * W * A, 4) float32.

    Args:
        base: from `pyramid_base_anchors`.
        sizes: (H, W) of each level.
    """
    return [
        grid_anchors(size, stride, level_base) for size, stride, level_base in zip(sizes, STRIDES, base, strict=True)
    ]


def detect(candidates: Candidates, test: InferenceConfig) -> Detections:
    """Apply NMS per class over all levels; keep at most `test.max_detections` per image, in score order."""
    return multiclass_nms(
        candidates.boxes, candidates.scores, test.score_threshold, test.nms_threshold, test.max_detections
    )


def make_rois(boxes: Sequence[Tensor] | Tensor, scale_factors: Tensor) -> Tensor:
    """Scale boxes of each image, (K_i, 4), to RoIs of the network's input, (sum K_i, 5), image index first."""
    rois = [
        torch.cat([b.new_full((len(b), 1), i), b * scale_factors[i].repeat(2).to(b)], dim=1)
        for i, b in enumerate(boxes)
    ]
    return torch.cat(rois)


CPU_CHUNK, GPU_CHUNK = 128, 1024
"""RoIs per chunk of the mask head. On a GPU each chunk costs 12 launches, and 1024 RoIs of 256 channels in 16 bits take
0.6 GB."""


def mask_logits(
    network: SpatialFlow,
    thing_features: list[Tensor],
    rois: Tensor,
    labels: Tensor,
    active: Tensor | None = None,
) -> Tensor:
    """Compute the mask logits of each RoI's class, in chunks of RoIs to bound the memory.

    Args:
        network: with a thing head.
        thing_features: P3..P5 of the network's output.
        rois: (K, 5) at network scale, image index first.
        labels: (K,) int64.
        active: (K,) bool, RoIs whose logits are needed; None: all. The logits of the others are unspecified.

    Returns:
        (K, 2S, 2S) float32, where S is `roi_size` of the configuration.
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
    logits: Tensor, valid_size: tuple[int, int], original_size: tuple[int, int], mirrored: bool = False
) -> Tensor:
    """Resize stuff logits to the original size, at which the logits of several views can be added.

    The steps are 4x upsampling, a crop to the valid image, and a resize to the original size. Both interpolations are
    bilinear with aligned corners. Every step is linear and separable, so one matrix for rows and one for columns do all
    three. No map of the size of the network's input is made.

    Args:
        logits: (C, h, w) of one image, at a quarter of network scale.
        valid_size: (H, W) at network scale, without padding.
        original_size: (H, W) of the result.
        mirrored: whether the network saw the image mirrored; the result is mirrored back.

    Returns:
        (C, *original_size) float32.
    """
    rows, columns = (
        _resize_weights(cells, valid, original, logits.device)
        for cells, valid, original in zip(logits.shape[1:], valid_size, original_size, strict=True)
    )
    columns = columns.flip(0) if mirrored else columns
    return rows @ (logits.float() @ columns.t())


def _resize_weights(cells: int, valid: int, original: int, device: torch.device) -> Tensor:
    """Compute the weight of each cell of an axis at each resized position, (original, cells)."""
    upsampled = F.interpolate(torch.eye(cells, device=device)[None], size=4 * cells, mode="linear", align_corners=True)
    return F.interpolate(upsampled[..., :valid], size=original, mode="linear", align_corners=True)[0].t()


def mirror_boxes(boxes: Tensor, widths: Tensor) -> Tensor:
    """Mirror boxes (B, N, 4) in images of `widths` (B,) horizontally."""
    x1, y1, x2, y2 = boxes.unbind(dim=-1)
    width = widths[:, None].to(boxes)
    return torch.stack([width - x2, y1, width - x1, y2], dim=-1)


def mean_mask_logits(logits: Sequence[Tensor]) -> Tensor:
    """Compute the logits of the mean probabilities; probabilities near 0 and 1 keep their precision.

    log(mean p / (1 - mean p)) is computed as logsumexp(log p) - logsumexp(log(1 - p)).
    """
    stacked = torch.stack(list(logits))
    return F.logsigmoid(stacked).logsumexp(dim=0) - F.logsigmoid(-stacked).logsumexp(dim=0)
