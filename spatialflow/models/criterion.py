# SPDX-License-Identifier: Apache-2.0
"""The training criterion: raw outputs and ground truth in, four losses out. The network knows nothing of it."""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from spatialflow.config import Config
from spatialflow.models.anchors import STRIDES, valid_flags
from spatialflow.models.postprocess import detect, pyramid_anchors, pyramid_base_anchors
from spatialflow.models.spatialflow import NetworkOutput, SpatialFlow
from spatialflow.models.targets import AnchorTargets, ThingTargets, anchor_targets, thing_targets
from spatialflow.ops import select_candidates, sigmoid_focal_loss
from spatialflow.structures import UNLABELED, GroundTruth

ROWS_AT_ONCE = 16
"""Rows of the stuff loss that are worked on together on the CPU; their logits stay in cache."""


class Losses(NamedTuple):
    """The terms of the training objective (paper, equation 6), weights applied; absent tasks are None."""

    cls: Tensor  # () focal loss of the classes
    box: Tensor  # () L1 loss of the boxes
    thing: Tensor | None  # () cross entropy of the masks
    stuff: Tensor | None  # () cross entropy of the semantic map, times stuff_loss_weight

    def total(self) -> Tensor:
        """Their sum."""
        return torch.stack([term for term in self if term is not None]).sum()


def focal_loss_sum(logits: Tensor, labels: Tensor, gamma: float = 2.0, alpha: float = 0.25) -> Tensor:
    """Sum of the focal loss over all classes of all anchors that are not ignored.

    Args:
        logits: (M, C).
        labels: (M,) int64: class, C for background, -1 for ignored.
        gamma, alpha: exponent and weight of positives.

    Returns:
        () float32. Smooth in the logits however large they are.

    Source: Lin et al., Focal Loss for Dense Object Detection (2017), equation 5.
    """
    return sigmoid_focal_loss(logits, labels, gamma, alpha, reduction="sum")


def l1_loss_sum(deltas: Tensor, target: Tensor) -> Tensor:
    """Sum of absolute differences, (P, 4) each; not divided by 4."""
    return (deltas.float() - target).abs().sum()


def mask_loss_sum(logits: Tensor, target: Tensor) -> Tensor:
    """Sum over RoIs of the mean binary cross entropy of their masks, (K, M, M) each."""
    return F.binary_cross_entropy_with_logits(logits.float(), target, reduction="none").mean(dim=(1, 2)).sum()


def stuff_loss_sum(logits: Tensor, semantic: Tensor) -> Tensor:
    """Sum of the cross entropy of all labeled pixels, with the logits enlarged to the size of the labels.

    Args:
        logits: (N, C, H / f, W / f), enlarged bilinearly with aligned corners.
        semantic: (N, H, W) integer, 255 where a pixel does not count.

    Returns:
        () float32. Differentiable once, by `logits`.
    """
    return torch.stack([_EnlargedCrossEntropy.apply(*image) for image in zip(logits.float(), semantic)]).sum()


class _EnlargedCrossEntropy(torch.autograd.Function):
    """Loss and gradient of one image in one pass, band by band, so that no map of image size but the labels exists.

    Enlarging is a matrix product along either axis, and so is its adjoint.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, semantic: Tensor) -> Tensor:
        (height, width), (classes, h, w) = semantic.shape, logits.shape
        along_x, along_y = (_enlargement(small, large, logits) for small, large in ((w, width), (h, height)))
        wide = along_x @ logits.permute(1, 2, 0)  # (h, W, C)
        gradient, total = torch.zeros_like(wide), logits.new_zeros(())
        rows = ROWS_AT_ONCE if logits.device.type == "cpu" else height
        for start in range(0, height, rows):
            labels = semantic[start : start + rows].flatten().long()  # (R * W,)
            first, last = (max(start * (h - 1) // max(height - 1, 1) - 1, 0), (start + rows) * h // height + 2)
            weights = along_y[start : start + rows, first:last]  # (R, rows of `wide` that the band touches)
            band = (weights @ wide[first:last].flatten(1)).view(-1, classes)  # (R * W, C)
            counted = labels != UNLABELED
            labels = torch.where(counted, labels, 0)[:, None]
            log_shares = band.log_softmax(dim=1)
            total -= (log_shares.gather(1, labels)[:, 0] * counted).sum()
            shares = log_shares.exp_().scatter_add_(1, labels, log_shares.new_full(labels.shape, -1.0))
            shares *= counted[:, None]
            gradient[first:last] += (weights.t() @ shares.view(weights.shape[0], -1)).view(-1, width, classes)
        ctx.save_for_backward((along_x.t() @ gradient).permute(2, 0, 1))
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_total: Tensor) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0] * grad_total, None


def _enlargement(small: int, large: int, like: Tensor) -> Tensor:
    """(large, small) weights of bilinear enlargement with aligned corners."""
    source = torch.arange(large, dtype=torch.float64, device=like.device) * ((small - 1) / max(large - 1, 1))
    nodes = torch.arange(small, dtype=torch.float64, device=like.device)
    return (1 - (source[:, None] - nodes).abs()).clamp_(min=0).to(like.dtype)


class Criterion:
    """The losses of a batch.

    Every term is a sum over the batch divided by a count over the batch: anchors by the sum over images of their
    positives (at least 1 each), masks by the number of RoIs, pixels by the number of labeled ones. With several
    processes the counts are those of all processes, so that the averaged gradients are those of one process with the
    whole batch.

    Args:
        config: for the anchors, thresholds and weights.
        average: replaces a vector of counts by its mean over processes; None with one process.
    """

    def __init__(self, config: Config, average: Callable[[Tensor], Tensor] | None = None):
        self.config = config
        self.average = average or (lambda counts: counts)
        self.proposal_config = replace(config.test, nms_threshold=config.training.proposal_nms_threshold)
        self._base: Tensor | None = None

    def __call__(self, network: SpatialFlow, images: Tensor, truth: GroundTruth) -> Losses:
        """Runs the network on a batch and compares.

        Args:
            network: in training mode.
            images: (N, 3, H, W) floating point, normalized.
            truth: at the same scale.

        Returns:
            Losses. A batch without a single ground truth has a thing loss of zero with zero gradients.
        """
        training = self.config.training
        output, stuff_logits = network.dense(images)
        targets = self.anchor_targets(output, truth)
        things = None if network.thing_head is None else self.thing_targets(output, truth)
        count = torch.stack(
            [
                targets.counts.clamp(min=1).sum(),
                targets.counts.new_tensor(0 if things is None else len(things.rois)),
                (truth.semantic != UNLABELED).sum(),
            ]
        ).float()
        count = self.average(count).clamp(min=1e-6)  # (3,) anchors, RoIs, pixels
        cls, box = self._detection_sums(output, targets)
        thing = stuff = None
        if things is not None:
            thing = self._thing_sum(network, output, things) / count[1]
        if stuff_logits is not None:
            stuff = self._stuff_sum(stuff_logits, truth) / count[2] * training.stuff_loss_weight
        return Losses(cls / count[0], box / count[0], thing, stuff)

    @torch.no_grad()
    def anchor_targets(self, output: NetworkOutput, truth: GroundTruth) -> AnchorTargets:
        """Targets of all anchors of the output's levels."""
        model, training = self.config.model, self.config.training
        device = output.class_logits[0].device
        sizes = [tuple(logits.shape[-2:]) for logits in output.class_logits]
        anchors = torch.cat(pyramid_anchors(self._base_anchors(device), sizes))  # (A, 4)
        padded = truth.padded_sizes.to(device)
        flags = [valid_flags(size, stride, padded, model.num_anchors) for size, stride in zip(sizes, STRIDES)]
        inside = torch.cat(flags, dim=1)  # (N, A)
        return anchor_targets(
            anchors, inside, truth.boxes, truth.labels, model.num_things, training.positive_iou, training.negative_iou
        )

    @torch.no_grad()
    def thing_targets(self, output: NetworkOutput, truth: GroundTruth) -> ThingTargets:
        """RoIs and masks: all ground truth, and the head's present detections at network scale that fit one."""
        model = self.config.model
        candidates = select_candidates(
            output.class_logits,
            output.box_deltas,
            self._base_anchors(output.class_logits[0].device),
            STRIDES,
            truth.valid_sizes,
            torch.ones_like(truth.valid_sizes, dtype=torch.float32),
            self.config.test.candidates_per_level,
        )
        found = detect(candidates, self.proposal_config)
        proposals = [boxes[:count] for boxes, count in zip(found.boxes, found.count.tolist())]
        return thing_targets(proposals, truth, 2 * model.roi_size, self.config.training.positive_iou)

    def _base_anchors(self, device: torch.device) -> Tensor:
        """(L, A, 4), uploaded once."""
        if self._base is None or self._base.device != device:
            self._base = pyramid_base_anchors(self.config.model, device)
        return self._base

    def _detection_sums(self, output: NetworkOutput, targets: AnchorTargets) -> tuple[Tensor, Tensor]:
        """Focal and L1 sums over all levels."""
        training, num_things = self.config.training, self.config.model.num_things
        batch = len(targets.labels)
        logits = [
            level.permute(0, 2, 3, 1).reshape(batch, -1, num_things) for level in output.class_logits
        ]  # (N, A_l, C)
        labels = targets.labels.split([level.shape[1] for level in logits], dim=1)
        cls = torch.stack(
            [
                focal_loss_sum(level.flatten(0, 1), target.flatten(), training.focal_gamma, training.focal_alpha)
                for level, target in zip(logits, labels)
            ]
        ).sum()
        deltas = torch.cat(
            [level.permute(0, 2, 3, 1).reshape(batch, -1, 4) for level in output.box_deltas], dim=1
        )  # (N, A, 4)
        return cls, l1_loss_sum(deltas[targets.positive[:, 0], targets.positive[:, 1]], targets.deltas)

    def _thing_sum(self, network: SpatialFlow, output: NetworkOutput, things: ThingTargets) -> Tensor:
        """Mask loss summed over RoIs; without any, a weightless RoI keeps every parameter in the graph (DDP waits
        for each).
        """
        if len(things.rois) > 0:
            return mask_loss_sum(network.thing_logits(output.thing_features, things.rois, things.labels), things.masks)
        rois = things.rois.new_tensor([[0, 0, 0, 1, 1]])
        return network.thing_logits(output.thing_features, rois, things.labels.new_zeros(1)).float().sum() * 0

    def _stuff_sum(self, logits: Tensor, truth: GroundTruth) -> Tensor:
        """Semantic loss of the logits at stride 4."""
        return stuff_loss_sum(logits, truth.semantic)
