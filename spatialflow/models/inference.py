# SPDX-License-Identifier: Apache-2.0
"""From the network's raw outputs to detections, masks and stuff logits; pure functions of tensors."""

from typing import NamedTuple, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from spatialflow.models.anchors import STRIDES, base_anchors, decode_boxes, grid_anchors
from spatialflow.models.config import ModelConfig, TestConfig
from spatialflow.models.spatialflow import SpatialFlow
from spatialflow.ops import multiclass_nms


class Candidates(NamedTuple):
    """Decoded boxes that compete in NMS; N is the same for all images of a batch."""

    boxes: Tensor  # (B, N, 4) float32
    scores: Tensor  # (B, N, num_things) float32, sigmoid


class Detections(NamedTuple):
    """Boxes kept by NMS, in score order; rows from `count` on are zero with label -1."""

    boxes: Tensor  # (B, D, 4) float32
    scores: Tensor  # (B, D) float32
    labels: Tensor  # (B, D) int64
    count: Tensor  # (B,) int64


def pyramid_anchors(model: ModelConfig, sizes: Sequence[tuple[int, int]], device: torch.device) -> list[Tensor]:
    """(H * W * A, 4) float32 anchors of each pyramid level, whose numbers of cells, (H, W), are `sizes`."""
    shape = (model.anchor_octave_scale, model.anchor_scales_per_octave, model.anchor_ratios)
    return [
        grid_anchors(size, stride, base_anchors(stride, *shape).to(device, non_blocking=True))
        for size, stride in zip(sizes, STRIDES)
    ]


def select_candidates(
    class_logits: Sequence[Tensor],
    box_deltas: Sequence[Tensor],
    anchors: Sequence[Tensor],
    valid_sizes: Tensor,
    scale_factors: Tensor,
    per_level: int,
) -> Candidates:
    """The best anchors of every level, decoded, clipped to the valid image and brought to the original scale.

    Args:
        class_logits: per level (B, A * num_things, H, W).
        box_deltas: per level (B, A * 4, H, W).
        anchors: per level (H * W * A, 4), see `pyramid_anchors`.
        valid_sizes: (B, 2), height and width of each image at network scale, without padding.
        scale_factors: (B, 2), x and y factor original -> network scale; ones keep boxes at network scale.
        per_level: anchors kept per level, by their best class score; 0 = all. Ties are resolved arbitrarily.

    Returns:
        Candidates, levels concatenated in order.
    """
    boxes, scores = [], []
    for logits, deltas, own in zip(class_logits, box_deltas, anchors):
        batch = len(logits)
        logits = logits.permute(0, 2, 3, 1).reshape(batch, len(own), -1)  # (B, H*W*A, classes)
        deltas = deltas.permute(0, 2, 3, 1).reshape(batch, len(own), 4)
        if 0 < per_level < logits.shape[1]:
            best = logits.amax(dim=-1).topk(per_level).indices  # (B, per_level); the sigmoid does not change the order
            logits = logits.gather(1, best[..., None].expand(-1, -1, logits.shape[2]))
            deltas = deltas.gather(1, best[..., None].expand(-1, -1, 4))
            own = own[best]
        boxes.append(decode_boxes(own, deltas.float()))
        scores.append(logits.float().sigmoid())
    limits = valid_sizes.flip(-1).repeat(1, 2)[:, None].to(boxes[0])  # (B, 1, 4): W, H, W, H
    clipped = torch.cat(boxes, dim=1).clamp(min=0).minimum(limits)
    return Candidates(clipped / scale_factors.repeat(1, 2)[:, None].to(clipped), torch.cat(scores, dim=1))


def detect(candidates: Candidates, test: TestConfig) -> Detections:
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


def mask_logits(
    network: SpatialFlow, thing_features: list[Tensor], rois: Tensor, labels: Tensor, chunk: int = 128
) -> Tensor:
    """(K, 28, 28) float32 logits of each RoI's own class, computed `chunk` RoIs at a time to bound the memory."""
    parts = [
        network.thing_logits(thing_features, rois[i : i + chunk], labels[i : i + chunk])
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
