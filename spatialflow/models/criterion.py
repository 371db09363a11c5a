# SPDX-License-Identifier: Apache-2.0
"""The training criterion: losses of the network's outputs against the targets. It runs no part of the network."""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from spatialflow.config import Config
from spatialflow.models.assigner import Targets
from spatialflow.models.spatialflow import NetworkOutput
from spatialflow.models.targets import AnchorTargets, ThingTargets
from spatialflow.ops import sigmoid_focal_loss
from spatialflow.structures import UNLABELED

ROWS_AT_ONCE = 16
"""Rows per band of the stuff loss on the CPU; the logits of a band stay in cache."""


class Losses(NamedTuple):
    """The terms of the training objective (paper, equation 6), weights applied; absent tasks are None."""

    cls: Tensor  # () focal loss of the classes
    box: Tensor  # () L1 loss of the boxes
    thing: Tensor | None  # () cross entropy of the masks
    stuff: Tensor | None  # () cross entropy of the semantic map, times stuff_loss_weight

    def total(self) -> Tensor:
        """Sum the terms."""
        return torch.stack([term for term in self if term is not None]).sum()


def focal_loss_sum(logits: Tensor, labels: Tensor, gamma: float = 2.0, alpha: float = 0.25) -> Tensor:
    """Compute the sum of the focal loss over all classes of all anchors that are not ignored.

    Args:
        logits: (M, C).
        labels: (M,) int64: class, C for background, -1 for ignored.
        gamma: exponent.
        alpha: weight of positives.

    Returns:
        () float32. Value and gradients are numerically stable for logits of any size.

    Source: Lin et al., Focal Loss for Dense Object Detection (2017), equation 5.
    """
    return sigmoid_focal_loss(logits, labels, gamma, alpha, reduction="sum")


def l1_loss_sum(deltas: Tensor, target: Tensor) -> Tensor:
    """Sum the absolute differences of `deltas` and `target`, (P, 4) each; the sum is not divided by 4."""
    return (deltas.float() - target).abs().sum()


def mask_loss_sum(logits: Tensor, target: Tensor) -> Tensor:
    """Sum the mean binary cross entropy of each RoI's mask; `logits` and `target` are (K, M, M)."""
    return F.binary_cross_entropy_with_logits(logits.float(), target, reduction="none").mean(dim=(1, 2)).sum()


def stuff_loss_sum(logits: Tensor, semantic: Tensor) -> Tensor:
    """Sum the cross entropy of all labeled pixels, with the logits upsampled to the size of the labels.

    Args:
        logits: (N, C, h, w), upsampled to (H, W) bilinearly with aligned corners.
        semantic: (N, H, W) integer, UNLABELED (255) where a pixel does not count.

    Returns:
        () float32. Differentiable once, with respect to `logits`.
    """
    return torch.stack(
        [
            _UpsampledCrossEntropy.apply(*image)  # type: ignore[no-untyped-call]  # of torch
            for image in zip(logits.float(), semantic, strict=True)
        ]
    ).sum()


class _UpsampledCrossEntropy(torch.autograd.Function):
    """Loss and gradient of one image in one pass.

    The CPU processes the image in bands of rows, so that no upsampled logits of the whole image are stored. A GPU
    processes the image as one band.

    Upsampling is one matrix product per axis; the gradient uses the products with the transposed matrices.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, semantic: Tensor) -> Tensor:
        (height, width), (classes, h, w) = semantic.shape, logits.shape
        along_x, along_y = (_upsampling_weights(small, large, logits) for small, large in ((w, width), (h, height)))
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
            log_probabilities = band.log_softmax(dim=1)
            total -= (log_probabilities.gather(1, labels)[:, 0] * counted).sum()
            minus_one = log_probabilities.new_full(labels.shape, -1.0)
            d_band = log_probabilities.exp_().scatter_add_(1, labels, minus_one)  # softmax minus one-hot labels
            d_band *= counted[:, None]
            gradient[first:last] += (weights.t() @ d_band.view(weights.shape[0], -1)).view(-1, width, classes)
        ctx.save_for_backward((along_x.t() @ gradient).permute(2, 0, 1))
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0] * grad_total, None


def _upsampling_weights(small: int, large: int, like: Tensor) -> Tensor:
    """Compute the (large, small) weights of bilinear upsampling with aligned corners."""
    source = torch.arange(large, dtype=torch.float64, device=like.device) * ((small - 1) / max(large - 1, 1))
    nodes = torch.arange(small, dtype=torch.float64, device=like.device)
    return (1 - (source[:, None] - nodes).abs()).clamp_(min=0).to(like.dtype)


StuffLoss = Callable[[Tensor, Tensor], Tensor]
"""Stuff logits at stride 4 and the semantic map -> the loss summed over labeled pixels, as `stuff_loss_sum`."""


class Criterion:
    """The losses of a batch.

    Every term is a sum over the batch divided by a count over the batch. For anchors the count is the number of
    positives, at least 1 per image. For masks it is the number of RoIs, for the stuff loss the number of labeled
    pixels. With several processes the counts are the means over processes, so that the averaged gradients are those of
    one process with the whole batch.

    Args:
        config: provides the number of classes, the parameters of the focal loss and the weight of the stuff loss.
        average: replaces a vector of counts by its mean over processes; None with one process.
        stuff_loss: the loss of the semantic map.
    """

    def __init__(
        self,
        config: Config,
        average: Callable[[Tensor], Tensor] | None = None,
        stuff_loss: StuffLoss = stuff_loss_sum,
    ) -> None:
        self.config = config
        self.average = average or (lambda counts: counts)
        self.stuff_loss = stuff_loss

    def __call__(self, output: NetworkOutput, targets: Targets, mask_logits: Tensor | None) -> Losses:
        """Compute the losses of a batch.

        Args:
            output: of the network, for N images.
            targets: of a `TargetAssigner`.
            mask_logits: (K, M, M) of the RoIs in `targets.things`. Without RoIs: the (1, M, M) logits of an arbitrary
                RoI, which keep the thing head in the graph. None without a thing head.

        Returns:
            Losses. A batch without ground-truth boxes has a thing loss of zero with zero gradients.
        """
        anchors, things = targets.anchors, targets.things
        counts = torch.stack(
            [
                anchors.counts.clamp(min=1).sum(),
                anchors.counts.new_tensor(0 if things is None else len(things.rois)),
                (targets.semantic != UNLABELED).sum(),
            ]
        ).float()
        num_positives, num_rois, num_pixels = self.average(counts).clamp(min=1e-6)
        cls, box = self._detection_sums(output, anchors)
        thing = stuff = None
        if things is not None:
            thing = _thing_sum(cast("Tensor", mask_logits), things) / num_rois
        if output.stuff_logits is not None:
            stuff = self.stuff_loss(output.stuff_logits, targets.semantic) / num_pixels
            stuff = stuff * self.config.training.stuff_loss_weight
        return Losses(cls / num_positives, box / num_positives, thing, stuff)

    def _detection_sums(self, output: NetworkOutput, targets: AnchorTargets) -> tuple[Tensor, Tensor]:
        """Compute the focal and L1 sums over all levels."""
        training, num_things = self.config.training, self.config.model.num_things
        batch = len(targets.labels)
        # (N, A_l, C) per level
        logits = [level.permute(0, 2, 3, 1).reshape(batch, -1, num_things) for level in output.class_logits]
        labels = targets.labels.split([level.shape[1] for level in logits], dim=1)
        cls = torch.stack(
            [
                focal_loss_sum(level.flatten(0, 1), target.flatten(), training.focal_gamma, training.focal_alpha)
                for level, target in zip(logits, labels, strict=True)
            ]
        ).sum()
        # (N, A, 4)
        deltas = torch.cat([level.permute(0, 2, 3, 1).reshape(batch, -1, 4) for level in output.box_deltas], dim=1)
        return cls, l1_loss_sum(deltas[targets.positive[:, 0], targets.positive[:, 1]], targets.deltas)


def _thing_sum(mask_logits: Tensor, things: ThingTargets) -> Tensor:
    """Compute the mask loss summed over RoIs; without RoIs, zero with zero gradients."""
    return mask_loss_sum(mask_logits, things.masks) if len(things.rois) > 0 else mask_logits.float().sum() * 0
