# SPDX-License-Identifier: Apache-2.0
"""Training targets of a batch, from the network's outputs and the ground truth."""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from spatialflow.config import Config
from spatialflow.models.anchors import STRIDES, valid_flags
from spatialflow.models.postprocess import detect, pyramid_anchors, pyramid_base_anchors
from spatialflow.models.spatialflow import NetworkOutput
from spatialflow.models.targets import AnchorTargets, ThingTargets, anchor_targets, thing_targets
from spatialflow.ops import select_candidates
from spatialflow.structures import GroundTruth


class Targets(NamedTuple):
    """Targets of the three tasks for a batch of N images."""

    anchors: AnchorTargets
    things: ThingTargets | None  # None without a thing head
    semantic: Tensor  # (N, H, W) uint8, UNLABELED for pixels without a label


class TargetAssigner:
    """Assignment of ground truth to anchors and proposals, without gradients.

    Args:
        config: provides the anchors, the thresholds and the selection of proposals.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.proposal_config = replace(config.test, nms_threshold=config.training.proposal_nms_threshold)
        self._base: Tensor | None = None

    def __call__(self, output: NetworkOutput, truth: GroundTruth) -> Targets:
        """Compute the targets of a batch.

        Args:
            output: of the network.
            truth: at the scale of the network's input.
        """
        things = None if output.thing_features is None else self.thing_targets(output, truth)
        return Targets(self.anchor_targets(output, truth), things, truth.semantic)

    @torch.no_grad()
    def anchor_targets(self, output: NetworkOutput, truth: GroundTruth) -> AnchorTargets:
        """Compute the targets of all anchors of the output's levels."""
        model, training = self.config.model, self.config.training
        device = output.class_logits[0].device
        sizes = [(logits.shape[-2], logits.shape[-1]) for logits in output.class_logits]
        anchors = torch.cat(pyramid_anchors(self._base_anchors(device), sizes))  # (A, 4)
        padded = truth.padded_sizes.to(device)
        flags = [
            valid_flags(size, stride, padded, model.num_anchors) for size, stride in zip(sizes, STRIDES, strict=True)
        ]
        inside = torch.cat(flags, dim=1)  # (N, A)
        return anchor_targets(
            anchors, inside, truth.boxes, truth.labels, model.num_things, training.positive_iou, training.negative_iou
        )

    @torch.no_grad()
    def thing_targets(self, output: NetworkOutput, truth: GroundTruth) -> ThingTargets:
        """Compute RoIs and masks: all ground-truth boxes plus current detections that match one."""
        candidates = select_candidates(
            output.class_logits,
            output.box_deltas,
            self._base_anchors(output.class_logits[0].device),
            STRIDES,
            truth.valid_sizes,
            torch.ones_like(truth.valid_sizes, dtype=torch.float32),
            self.config.test.candidates_per_level,
        )
        detections = detect(candidates, self.proposal_config)
        counts = detections.count.tolist()
        proposals = [boxes[:count] for boxes, count in zip(detections.boxes, counts, strict=True)]
        return thing_targets(proposals, truth, 2 * self.config.model.roi_size, self.config.training.positive_iou)

    def _base_anchors(self, device: torch.device) -> Tensor:
        """Return the base anchors of the L levels, (L, num_anchors, 4); compute them only if the device changed."""
        if self._base is None or self._base.device != device:
            self._base = pyramid_base_anchors(self.config.model, device)
        return self._base
