# SPDX-License-Identifier: Apache-2.0
"""The training criterion: raw outputs and ground truth in, four losses out. The network knows nothing of it."""

from dataclasses import replace
from typing import Callable, NamedTuple, Optional

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from spatialflow.models.anchors import STRIDES, valid_flags
from spatialflow.models.config import Config
from spatialflow.models.inference import detect, pyramid_anchors, select_candidates
from spatialflow.models.spatialflow import NetworkOutput, SpatialFlow
from spatialflow.models.targets import AnchorTargets, ThingTargets, Truth, anchor_targets, thing_targets
from spatialflow.ops import sigmoid_focal_loss

IGNORED_PIXEL = 255
"""Value of pixels without a label in semantic maps."""


class Losses(NamedTuple):
    """The terms of the training objective (paper, equation 6), weights applied; absent tasks are None."""

    cls: Tensor  # () focal loss of the classes
    box: Tensor  # () L1 loss of the boxes
    thing: Optional[Tensor]  # () cross entropy of the masks
    stuff: Optional[Tensor]  # () cross entropy of the semantic map, times stuff_loss_weight

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
    """Sum of the cross entropy of all labelled pixels.

    Args:
        logits: (N, C, H, W).
        semantic: (N, H, W) integer, 255 where a pixel does not count.

    Returns:
        () float32.
    """
    return F.cross_entropy(logits.float(), semantic.long(), ignore_index=IGNORED_PIXEL, reduction="sum")


class Criterion:
    """The losses of a batch.

    Every term is a sum over the batch divided by a count over the batch: anchors by the sum over images of their
    positives (at least 1 each), masks by the number of RoIs, pixels by the number of labelled ones. With several
    processes the counts are those of all processes, so that the averaged gradients are those of one process with the
    whole batch.

    Args:
        config: for the anchors, thresholds and weights.
        average: replaces a vector of counts by its mean over processes; None with one process.
    """

    def __init__(self, config: Config, average: Optional[Callable[[Tensor], Tensor]] = None):
        self.config = config
        self.average = average or (lambda counts: counts)
        self.proposal_config = replace(config.test, nms_threshold=config.training.proposal_nms_threshold)

    def __call__(self, network: SpatialFlow, images: Tensor, truth: Truth) -> Losses:
        """Runs the network on a batch and compares.

        Args:
            network: in training mode.
            images: (N, 3, H, W) floating point, normalised.
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
                (truth.semantic != IGNORED_PIXEL).sum(),
            ]
        ).float()
        count = self.average(count).clamp(min=1e-6)  # (3,) anchors, RoIs, pixels
        cls, box = self._detection_sums(output, targets)
        thing = stuff = None
        if things is not None:
            thing = self._thing_sum(network, output, things) / count[1]
        if stuff_logits is not None:
            stuff = self._stuff_sum(network, stuff_logits, truth) / count[2] * training.stuff_loss_weight
        return Losses(cls / count[0], box / count[0], thing, stuff)

    @torch.no_grad()
    def anchor_targets(self, output: NetworkOutput, truth: Truth) -> AnchorTargets:
        """Targets of all anchors of the output's levels."""
        model, training = self.config.model, self.config.training
        device = output.class_logits[0].device
        sizes = [tuple(logits.shape[-2:]) for logits in output.class_logits]
        anchors = torch.cat(pyramid_anchors(model, sizes, device))  # (A, 4)
        inside = torch.stack(
            [
                torch.cat(
                    [valid_flags(size, stride, padded, model.num_anchors) for size, stride in zip(sizes, STRIDES)]
                )
                for padded in truth.padded_sizes.tolist()
            ]
        ).to(device)  # (N, A)
        return anchor_targets(
            anchors, inside, truth.boxes, truth.labels, model.num_things, training.positive_iou, training.negative_iou
        )

    @torch.no_grad()
    def thing_targets(self, output: NetworkOutput, truth: Truth) -> ThingTargets:
        """RoIs and masks: all ground truth, and the head's present detections at network scale that fit one."""
        model = self.config.model
        sizes = [logits.shape[-2:] for logits in output.class_logits]
        candidates = select_candidates(
            output.class_logits,
            output.box_deltas,
            pyramid_anchors(model, sizes, output.class_logits[0].device),
            truth.valid_sizes,
            torch.ones_like(truth.valid_sizes, dtype=torch.float32),
            self.config.test.candidates_per_level,
        )
        found = detect(candidates, self.proposal_config)
        proposals = [boxes[:count] for boxes, count in zip(found.boxes, found.count.tolist())]
        return thing_targets(proposals, truth, 2 * model.roi_size, self.config.training.positive_iou)

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

    def _stuff_sum(self, network: SpatialFlow, quarter_logits: Tensor, truth: Truth) -> Tensor:
        """Semantic loss, one image at a time; the enlarged logits are made again in the backward pass instead of
        kept.
        """

        def image_sum(logits: Tensor, semantic: Tensor) -> Tensor:
            return stuff_loss_sum(network.stuff_head.enlarge(logits), semantic)

        return torch.stack(
            [
                checkpoint(image_sum, quarter_logits[i : i + 1], truth.semantic[i : i + 1], use_reentrant=False)
                for i in range(len(quarter_logits))
            ]
        ).sum()
