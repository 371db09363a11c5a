# SPDX-License-Identifier: Apache-2.0
"""Sub-networks for inference."""

from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn

from spatialflow.models.optimized.layers import PackedFlowOffsetDeformConv2d, PackedModule, optimize_conv, pack
from spatialflow.models.subnets import SEGMENTATION_LEVELS, SubnetFeatures, Subnets
from spatialflow.ops import SubnetParameters, fused_subnets
from spatialflow.ops.subnet_schedule import run_subnets


def optimize_subnets(subnets: Subnets) -> "FusedSubnets | PackedSubnets":
    """Make the module of this file that replaces the sub-networks."""
    return (PackedSubnets if any(subnets.deformable.values()) else FusedSubnets)(subnets)


class FusedSubnets(PackedModule):
    """`Subnets` without deformable stages, all levels in one call of `fused_subnets`.

    5 levels (N, in_channels, H, W) -> `SubnetFeatures` of maps (N, channels, H, W).

    Args:
        subnets: the plain sub-networks.
    """

    packed: SubnetParameters

    def __init__(self, subnets: Subnets) -> None:
        super().__init__(subnets.fused_parameters(pack))

    def forward(self, pyramid: Sequence[Tensor]) -> SubnetFeatures:
        """Compute the features of the four tasks."""
        return SubnetFeatures(*fused_subnets(list(pyramid), self.packed))


class PackedSubnets(nn.Module):
    """`Subnets` with deformable stages, stage by stage over all levels, the convolutions packed.

    5 levels (N, in_channels, H, W) -> `SubnetFeatures` of maps (N, channels, H, W).

    Args:
        subnets: the plain sub-networks.
    """

    def __init__(self, subnets: Subnets) -> None:
        super().__init__()
        self.source = subnets.source
        self.stages, self.flows = (
            nn.ModuleDict(
                {
                    name: nn.ModuleList(optimize_conv(cast("nn.Conv2d", conv), relu) for conv in convs)
                    for name, convs in lists.items()
                }
            )
            for lists, relu in ((subnets.stages(), True), (subnets.flows(), False))
        )

    def forward(self, pyramid: Sequence[Tensor]) -> SubnetFeatures:
        """Compute the features of the four tasks."""
        levels, segmentation = list(pyramid), list(pyramid[:SEGMENTATION_LEVELS])
        inputs = {"cls": levels, "reg": levels, "stuff": segmentation, "thing": segmentation}
        return SubnetFeatures(**run_subnets(inputs, self.stages, self.flows, self.source, _run_stage, _run_flow, _add))


def _run_stage(
    conv: nn.Module, flow: nn.Module | None, x: list[Tensor], source: list[Tensor], semantic: list[Tensor] | None
) -> list[Tensor]:
    """Compute relu(conv(x + semantic + flow(source))), or the paper's equation 4 for a deformable stage with a flow."""
    if flow is None:
        return conv(x if semantic is None else _add(x, semantic))
    source = source[: len(x)]
    if isinstance(conv, PackedFlowOffsetDeformConv2d):
        return conv(x if semantic is None else _add(x, semantic), flow(x, source))
    spatial = flow(source)
    return conv(x, spatial if semantic is None else _add(spatial, semantic))


def _run_flow(conv: nn.Module, x: list[Tensor], like: list[Tensor]) -> list[Tensor]:
    return conv(x[: len(like)])


def _add(a: list[Tensor], b: list[Tensor]) -> list[Tensor]:
    return [x + y for x, y in zip(a, b, strict=True)]
