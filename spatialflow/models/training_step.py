# SPDX-License-Identifier: Apache-2.0
"""Forward pass of a training step: network, targets and losses."""

from collections.abc import Callable
from typing import cast

from torch import Tensor, nn

from spatialflow.config import Config
from spatialflow.models.assigner import TargetAssigner
from spatialflow.models.criterion import Criterion, Losses, StuffLoss, stuff_loss_sum
from spatialflow.models.spatialflow import NetworkOutput, SpatialFlow
from spatialflow.models.targets import ThingTargets
from spatialflow.structures import GroundTruth


class TrainingStep(nn.Module):
    """Network, target assignment and criterion as one module, so that DistributedDataParallel sees one forward call.

    (N, 3, H, W) and the ground truth -> `Losses`.

    Args:
        network: in training mode.
        config: the configuration, for targets and losses.
        average: as for `Criterion`.
        stuff_loss: as for `Criterion`.
    """

    def __init__(
        self,
        network: SpatialFlow,
        config: Config,
        average: Callable[[Tensor], Tensor] | None = None,
        stuff_loss: StuffLoss = stuff_loss_sum,
    ) -> None:
        super().__init__()
        self.network = network
        self.assigner = TargetAssigner(config)
        self.criterion = Criterion(config, average, stuff_loss)

    def forward(self, images: Tensor, truth: GroundTruth) -> Losses:
        """Compute the losses of a batch.

        Args:
            images: (N, 3, H, W) floating point, normalized.
            truth: the ground truth, at the same scale.
        """
        output = self.network(images)
        targets = self.assigner(output, truth)
        mask_logits = None if targets.things is None else self._mask_logits(output, targets.things)
        return self.criterion(output, targets, mask_logits)

    def _mask_logits(self, output: NetworkOutput, things: ThingTargets) -> Tensor:
        """Compute the mask logits of the RoIs, (K, M, M).

        Without any RoI, compute (1, M, M) logits of a small RoI: DDP waits for the gradient of every parameter, so
        every parameter must be in the graph.
        """
        rois, labels = things.rois, things.labels
        if len(rois) == 0:
            rois, labels = rois.new_tensor([[0, 0, 0, 1, 1]]), labels.new_zeros(1)
        return self.network.thing_logits(cast("list[Tensor]", output.thing_features), rois, labels)
