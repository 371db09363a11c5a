# SPDX-License-Identifier: Apache-2.0
"""The four parallel sub-networks and the spatial information flows between them (paper, equations 1 to 4)."""

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from spatialflow.models.deform import OFFSET_CHANNELS, FlowOffsetDeformConv2d, SelfOffsetDeformConv2d
from spatialflow.ops import SubnetParameters
from spatialflow.ops.fused_subnets import Conv
from spatialflow.ops.subnet_schedule import run_subnets

SEGMENTATION_LEVELS = 3
"""Number of pyramid levels for stuff and thing segmentation: P3 to P5. P6 and P7 are for detection only."""

SUBNETS = ("cls", "reg", "stuff", "thing")
"""Names of the sub-networks: classification, box regression, stuff segmentation, thing segmentation."""


class SubnetFeatures(NamedTuple):
    """Inputs of the heads: final features of the four sub-networks; for an absent sub-network the FPN's features."""

    cls: list[Tensor]  # 5 x (N, C, H, W)
    reg: list[Tensor]  # 5 x (N, C, H, W)
    stuff: list[Tensor]  # 3 x (N, C, H, W)
    thing: list[Tensor]  # 3 x (N, C, H, W)


class Subnets(nn.Module):
    """Classification, regression, stuff and thing sub-networks with their flows.

    5 levels (N, in_channels, H, W) -> `SubnetFeatures` of maps (N, channels, H, W). Maps of a sub-network without
    stages have in_channels.

    A flow is a 3x3 convolution without activation. A stage is relu(conv(feature + flow(source))); `run_subnets` gives
    the order. In a deformable stage with a flow, flow(feature + source) predicts the offsets and mask instead. The
    deformable convolution then reads the feature without that flow (equation 4). A deformable stage without a flow
    predicts offsets and mask from its input.

    The output of a sub-network without stages is the level plus its flows, P + flow(source), as in the paper's naive
    model with flows.

    Args:
        in_channels: channels of the FPN levels.
        channels: channels inside the sub-networks.
        detection_stages: stages of cls and reg.
        stuff_stages: stages of stuff, at most detection_stages.
        thing_stages: stages of thing.
        flow_source: "reg" or "cls"; None: no flows except the semantic flow.
        flow_to_detection: flow from the source into the other detection sub-network.
        flow_to_stuff: flow from the source into stuff.
        flow_to_thing: flow from the source into thing.
        flow_stuff_to_thing: the semantic flow, from the final stuff feature into thing; it needs no source.
        segmentation: the segmentation tasks, any of "stuff" and "thing".
        deformable: indices of the deformable stages, by name of the sub-network.
        init_std: standard deviation of the initial weights; narrow networks trained from scratch need more than 0.01.
    """

    def __init__(
        self,
        in_channels: int = 256,
        channels: int = 256,
        *,
        detection_stages: int = 4,
        stuff_stages: int = 4,
        thing_stages: int = 1,
        flow_source: str | None = "reg",
        flow_to_detection: bool = True,
        flow_to_stuff: bool = True,
        flow_to_thing: bool = True,
        flow_stuff_to_thing: bool = True,
        segmentation: Sequence[str] = ("stuff", "thing"),
        deformable: dict[str, Sequence[int]] | None = None,
        init_std: float = 0.01,
    ) -> None:
        super().__init__()
        self.deformable = {name: frozenset(indices) for name, indices in (deformable or {}).items()}
        self.source = flow_source or "reg"
        follower = "cls" if self.source == "reg" else "reg"
        num_stages = {"cls": detection_stages, "reg": detection_stages, "stuff": stuff_stages, "thing": thing_stages}
        receives_flow = {
            self.source: False,
            follower: flow_to_detection,
            "stuff": flow_to_stuff and "stuff" in segmentation,
            "thing": flow_to_thing and "thing" in segmentation,
        }
        for name, count in num_stages.items():
            has_flows = receives_flow[name] and flow_source is not None
            self._add_subnet(name, count, in_channels, channels, has_flows)
        has_semantic_flow = flow_stuff_to_thing and set(segmentation) == {"stuff", "thing"}
        stuff_channels = channels if stuff_stages > 0 else in_channels
        self.semantic_flow = nn.ModuleList(
            nn.Conv2d(stuff_channels, in_channels if s == 0 else channels, 3, padding=1)
            for s in range(max(thing_stages, 1) if has_semantic_flow else 0)
        )
        self._initialize(init_std)

    def _add_subnet(self, name: str, num_stages: int, in_channels: int, channels: int, has_flows: bool) -> None:
        """Add the stages of a sub-network, and the flows into it unless it is the source."""
        deformable = self.deformable.get(name, frozenset())
        deform_conv = FlowOffsetDeformConv2d if has_flows else SelfOffsetDeformConv2d
        stages, flows = nn.ModuleList(), nn.ModuleList()
        for s in range(num_stages):
            width = in_channels if s == 0 else channels
            stages.append((deform_conv if s in deformable else nn.Conv2d)(width, channels, 3, padding=1))
            if has_flows:
                flows.append(nn.Conv2d(channels, OFFSET_CHANNELS if s in deformable else width, 3, padding=1))
        if has_flows and num_stages == 0:
            flows.append(nn.Conv2d(channels, in_channels, 3, padding=1))
        self.add_module(name, stages)
        if name != self.source:
            self.add_module(f"flow_{name}", flows)

    def _initialize(self, init_std: float) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=init_std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, SelfOffsetDeformConv2d):
                module.zero_offsets()

    def stages(self) -> dict[str, nn.ModuleList]:
        """Stages of each sub-network, by name."""
        return {name: cast("nn.ModuleList", self.get_submodule(name)) for name in SUBNETS}

    def flows(self) -> dict[str, nn.ModuleList]:
        """Flow convolutions into each sub-network except the source, by name; "semantic": those from stuff to thing.

        The list of a sub-network without flows is empty.
        """
        flows: dict[str, Any] = {name: self.get_submodule(f"flow_{name}") for name in SUBNETS if name != self.source}
        return flows | {"semantic": self.semantic_flow}

    def fused_parameters(self, convert: Callable[[nn.Conv2d], Conv] | None = None) -> SubnetParameters:
        """Collect the parameters of the operator `fused_subnets`, for a network without deformable stages.

        Args:
            convert: makes the operator's argument from a convolution; None: (weight, bias), which have gradients.
        """
        convert = convert or (lambda conv: (conv.weight, conv.bias))
        flows = self.flows()
        semantic_flow = flows.pop("semantic")
        lists: dict[str, Any] = self.stages() | {
            "flow_cls": flows["cls" if self.source == "reg" else "reg"],
            "flow_stuff": flows["stuff"],
            "flow_thing": flows["thing"],
            "semantic_flow": semantic_flow,
        }
        return SubnetParameters(
            **{name: tuple(map(convert, convs)) for name, convs in lists.items()},
            flow_source=self.source if any(map(len, flows.values())) else None,
            segmentation_levels=SEGMENTATION_LEVELS,
        )

    def forward(self, pyramid: Sequence[Tensor]) -> SubnetFeatures:
        """Compute the features of the four tasks from [P3, ..., P7], each (N, in_channels, H, W)."""
        stages, flows, levels = self.stages(), self.flows(), []
        for index, level in enumerate(pyramid):
            names = SUBNETS if index < SEGMENTATION_LEVELS else SUBNETS[:2]
            inputs = dict.fromkeys(names, level)
            levels.append(run_subnets(inputs, stages, flows, self.source, _run_stage, _run_flow, operator.add))
        return SubnetFeatures(*([level[name] for level in levels if name in level] for name in SUBNETS))


def _run_stage(conv: nn.Module, flow: nn.Module | None, x: Tensor, source: Tensor, semantic: Tensor | None) -> Tensor:
    """Compute relu(conv(x + semantic + flow(source))), or equation 4 for a deformable stage with a flow."""
    summed = x if semantic is None else x + semantic
    if flow is None:
        return conv(summed).relu()
    if isinstance(conv, FlowOffsetDeformConv2d):
        return conv(summed, flow(x + source)).relu()
    return conv(summed + flow(source)).relu()


def _run_flow(conv: nn.Module, x: Tensor, like: Tensor) -> Tensor:
    return conv(x)
