# SPDX-License-Identifier: Apache-2.0
"""Target assignment: matching of ground truth to anchors and proposals, and their targets."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from spatialflow.models.anchors import encode_boxes
from spatialflow.ops import roi_align
from spatialflow.structures import GroundTruth

BACKGROUND = -1
"""Assigned index of an anchor or proposal whose IoU with every ground truth is too low."""

IGNORED = -2
"""Assigned index of an anchor that is neither positive nor background; the losses leave it out."""


class AnchorTargets(NamedTuple):
    """Targets of all anchors of a batch, levels concatenated in order, cells row-major, then anchors."""

    labels: Tensor  # (N, A) int64: thing label; num_things for background; -1 for ignored
    positive: Tensor  # (P, 2) int64: image and anchor of every positive, in order
    deltas: Tensor  # (P, 4) float32 encoded boxes of the positives
    counts: Tensor  # (N,) int64 positives of every image


class ThingTargets(NamedTuple):
    """Positive proposals of a batch with their masks."""

    rois: Tensor  # (K, 5) float32: image, x1, y1, x2, y2
    labels: Tensor  # (K,) int64 thing label of the ground truth
    assigned: Tensor  # (K,) int64 index of the ground truth within its image
    masks: Tensor  # (K, M, M) float32, 0 or 1


def box_iou(a: Tensor, b: Tensor) -> Tensor:
    """Compute the IoU of every pair: (K, 4) and (A, 4) -> (K, A) float32; 0 where a box has no area."""
    lt = torch.maximum(a[:, None, :2], b[None, :, :2])
    wh = (torch.minimum(a[:, None, 2:], b[None, :, 2:]) - lt).clamp_(min=0)
    overlap = wh[..., 0] * wh[..., 1]
    area_a = (a[:, 2] - a[:, 0]) * (a[:, 3] - a[:, 1])
    area_b = (b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1])
    return overlap / (area_a[:, None] + area_b[None] - overlap).clamp_(min=1e-6)


def assign(boxes: Tensor, truth: Tensor, positive_iou: float, negative_iou: float, claim_iou: float) -> Tensor:
    """Assign to each box the ground truth of highest IoU, if that is high enough.

    Args:
        boxes: (A, 4) anchors or proposals.
        truth: (K, 4) ground-truth boxes.
        positive_iou: a box whose best IoU is at least this gets that ground truth.
        negative_iou: a box whose best IoU is below this is background; boxes in between are ignored.
        claim_iou: a ground truth whose best IoU is at least this also claims every box tied at that IoU. The last
            ground truth that claims a box gets it. With claim_iou 0 a zero-area ground truth (IoU 0 everywhere)
            claims every box; data sets must not contain such boxes.

    Returns:
        (A,) int64: index into `truth`, -1 for background, -2 for ignored. Among equal IoUs the first ground truth wins.

    Source: mmdetection 2.3, MaxIoUAssigner.
    """
    if len(truth) == 0 or len(boxes) == 0:
        return torch.full((len(boxes),), BACKGROUND, dtype=torch.int64, device=boxes.device)
    iou = box_iou(truth.float(), boxes.float())  # (K, A)
    best, index = _first_maximum(iou)
    assigned = torch.where(best >= positive_iou, index, IGNORED)
    assigned = torch.where(best < negative_iou, BACKGROUND, assigned)
    order = torch.arange(len(truth), device=iou.device)[:, None]
    best_of_truth = iou.amax(dim=1, keepdim=True)  # (K, 1)
    claims = (iou == best_of_truth) & (best_of_truth >= claim_iou)  # (K, A)
    claimed = torch.where(claims, order, -1).amax(dim=0)  # (A,) last claim
    return torch.where(claimed >= 0, claimed, assigned)


def _first_maximum(values: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the column maxima of (K, A) and the first row of each maximum, whatever the device."""
    best = values.amax(dim=0)
    rows = torch.arange(len(values), device=values.device)[:, None]
    return best, torch.where(values == best, rows, len(values)).amin(dim=0)


def anchor_targets(
    anchors: Tensor,
    inside: Tensor,
    boxes: Sequence[Tensor],
    labels: Sequence[Tensor],
    num_things: int,
    positive_iou: float = 0.5,
    negative_iou: float = 0.4,
) -> AnchorTargets:
    """Compute the class and box targets of every anchor.

    Args:
        anchors: (A, 4) of all levels.
        inside: (N, A) bool, from `valid_flags`: the anchor's cell begins inside the image's own padded size. Anchors
            that are not inside are ignored.
        boxes: N x (K_i, 4) ground truth.
        labels: N x (K_i,) int64.
        num_things: the label that stands for background.
        positive_iou: see `assign`.
        negative_iou: see `assign`.

    Returns:
        AnchorTargets.
    """
    batch_labels, positive, deltas = [], [], []
    for i, (truth, classes) in enumerate(zip(boxes, labels, strict=True)):
        used = torch.where(inside[i, :, None], anchors, 0)  # anchors outside become empty boxes, of IoU 0
        assigned = assign(used, truth, positive_iou, negative_iou, claim_iou=0.0)
        assigned = torch.where(inside[i], assigned, IGNORED)
        target = torch.where(assigned == BACKGROUND, num_things, -1)
        hit = (assigned >= 0).nonzero().squeeze(1)  # (P_i,)
        target[hit] = classes[assigned[hit]]
        batch_labels.append(target)
        positive.append(torch.stack([torch.full_like(hit, i), hit], dim=1))
        deltas.append(encode_boxes(anchors[hit], truth[assigned[hit]]))
    counts = torch.tensor([len(p) for p in positive], device=anchors.device)
    return AnchorTargets(torch.stack(batch_labels), torch.cat(positive), torch.cat(deltas), counts)


def thing_targets(
    proposals: Sequence[Tensor], truth: GroundTruth, mask_size: int, positive_iou: float = 0.5
) -> ThingTargets:
    """Compute positive proposals and their mask targets.

    Args:
        proposals: N x (P_i, 4) detections at network scale, without gradient. The ground-truth boxes are put before
            them.
        truth: the batch's ground truth.
        mask_size: side of the masks.
        positive_iou: a detection whose best IoU is at least this gets that ground truth, whatever its class. A ground
            truth also claims the detection of highest IoU with it, if that IoU is at least this.

    Returns:
        ThingTargets, image by image, ground truth first; K may be 0.
    """
    rois, labels, assigned, masks = [], [], [], []
    for i, (detected, boxes, classes) in enumerate(zip(proposals, truth.boxes, truth.labels, strict=True)):
        matched = assign(detected, boxes, positive_iou, positive_iou, claim_iou=positive_iou)
        hit = matched >= 0
        index = torch.cat([torch.arange(len(boxes), device=boxes.device), matched[hit]])
        positives = torch.cat([boxes.float(), detected[hit].float()])  # (P, 4)
        rois.append(torch.cat([positives.new_full((len(positives), 1), i), positives], dim=1))
        labels.append(classes[index])
        assigned.append(index)
        masks.append(mask_targets(truth.masks[i], positives, index, mask_size))
    return ThingTargets(torch.cat(rois), torch.cat(labels), torch.cat(assigned), torch.cat(masks))


def mask_targets(masks: Tensor, boxes: Tensor, assigned: Tensor, size: int, at_once: int = 16) -> Tensor:
    """Crop and resize the ground-truth mask of each box.

    Args:
        masks: (K, H, W) bool or uint8.
        boxes: (P, 4) float32 in pixels of the masks, to which they are clipped.
        assigned: (P,) int64 mask of each box.
        size: side of the result.
        at_once: number of masks that are converted to float32 at a time; bounds the memory.

    Returns:
        (P, size, size) float32 of 0 and 1: RoIAlign (aligned, adaptive sampling) of the mask, `>= 0.5`.
    """
    targets = boxes.new_zeros((len(boxes), size, size), dtype=torch.float32)
    boxes = boxes.clamp(min=0).minimum(boxes.new_tensor([masks.shape[2], masks.shape[1]] * 2))
    for start in range(0, len(masks), at_once):
        chunk = ((assigned >= start) & (assigned < start + at_once)).nonzero().squeeze(1)
        rois = torch.cat([(assigned[chunk] - start)[:, None].to(torch.float32), boxes[chunk].float()], dim=1)
        bitmaps = masks[start : start + at_once, None].to(torch.float32)  # (B, 1, H, W)
        targets[chunk] = (roi_align(bitmaps, rois, size, 1.0, 0, aligned=True)[:, 0] >= 0.5).to(torch.float32)
    return targets
