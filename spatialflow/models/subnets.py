# SPDX-License-Identifier: Apache-2.0
"""The four parallel sub-networks and the spatial information flows between them (paper, equations 1 to 4)."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from spatialflow.models.deform import OFFSET_CHANNELS, DeformConv2d, split_offsets
from spatialflow.ops import deform_conv2d

SEGMENTATION_LEVELS = 3
"""Stuff and thing segmentation see P3..P5; P6 and P7 serve detection alone."""


class SubnetFeatures(NamedTuple):
    """Inputs of the heads: final features of the four sub-networks, for an absent one those of the FPN."""

    cls: list[Tensor]  # 5 x (N, C, H, W)
    reg: list[Tensor]  # 5 x (N, C, H, W)
    stuff: list[Tensor]  # 3 x (N, C, H, W)
    thing: list[Tensor]  # 3 x (N, C, H, W)


class Subnets(nn.Module):
    """Classification, regression, stuff and thing sub-networks with their flows.

    At every stage the source sub-network ("reg" in the paper) advances first; its new feature flows, through a 3x3
    adaptation convolution without activation, into the sum that the same stage of the other sub-networks convolves. The
    thing sub-network runs after all stages and also takes the semantic flow of the final stuff feature. In a deformable
    stage the flow gives the sampling offsets instead: they are predicted from feature + source, and the deformable
    convolution sees the feature alone (equation 4).

    A segmentation sub-network without stages receives its flows directly: feature = P + flow(source); this is how the
    flows act on the paper's naive model.

    Args:
        in_channels: channels of the FPN levels.
        channels: channels inside the sub-networks.
        detection_stages: stages of cls and reg.
        stuff_stages: stages of stuff, at most detection_stages.
        thing_stages: stages of thing.
        flow_source: "reg", "cls" or None for none of the flows into detection, stuff and thing.
        flow_to_detection, flow_to_stuff, flow_to_thing: where the source flows to.
        flow_stuff_to_thing: the semantic flow; it needs no source.
        segmentation: the tasks beside detection, of "stuff" and "thing".
        deformable: stage indices by sub-network name.
        init_std: standard deviation of the initial weights; narrow networks trained from scratch need more than 0.01.
    """

    def __init__(
        self,
        in_channels: int = 256,
        channels: int = 256,
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
    ):
        super().__init__()
        self.deformable = {name: frozenset(indices) for name, indices in (deformable or {}).items()}
        self.source = flow_source or "reg"
        self.follower = "cls" if self.source == "reg" else "reg"
        stages = {"cls": detection_stages, "reg": detection_stages, "stuff": stuff_stages, "thing": thing_stages}
        receives = {
            self.source: False,
            self.follower: flow_to_detection,
            "stuff": flow_to_stuff and "stuff" in segmentation,
            "thing": flow_to_thing and "thing" in segmentation,
        }
        for name, count in stages.items():
            warped = self.deformable.get(name, ())
            flows = receives[name] and flow_source is not None
            convs, flow_convs = [], []
            for s in range(count):
                width = in_channels if s == 0 else channels
                own_offsets = s in warped and not flows
                convs.append((DeformConv2d if own_offsets else nn.Conv2d)(width, channels, 3, padding=1))
                if flows:
                    flow_convs.append(nn.Conv2d(channels, OFFSET_CHANNELS if s in warped else width, 3, padding=1))
            if flows and count == 0:
                flow_convs.append(nn.Conv2d(channels, in_channels, 3, padding=1))
            self.add_module(name, nn.ModuleList(convs))
            if name != self.source:
                self.add_module(f"flow_{name}", nn.ModuleList(flow_convs))
        semantic = flow_stuff_to_thing and set(segmentation) == {"stuff", "thing"}
        stuff_width = channels if stuff_stages > 0 else in_channels
        self.semantic_flow = nn.ModuleList(
            nn.Conv2d(stuff_width, in_channels if s == 0 else channels, 3, padding=1)
            for s in range(max(thing_stages, 1) if semantic else 0)
        )
        self._initialise(init_std)

    def _initialise(self, init_std: float):
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=init_std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, DeformConv2d):
                module.zero_offsets()

    def flows(self, name: str) -> nn.ModuleList:
        """Flow convolutions into the sub-network `name`, empty where none."""
        return self.get_submodule(f"flow_{name}") if name != self.source else nn.ModuleList()

    def _level(self, p: Tensor, segmentation: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """One pyramid level, (N, in_channels, H, W), through all sub-networks."""
        stages = {name: self.get_submodule(name) for name in ("cls", "reg", "stuff", "thing")}
        f = {"cls": p, "reg": p, "stuff": p}
        for s, conv in enumerate(stages[self.source]):
            f[self.source] = conv(f[self.source]).relu()  # (N, channels, H, W)
            for name in (self.follower, "stuff") if segmentation else (self.follower,):
                if s < len(stages[name]):
                    f[name] = self._stage(name, s, f[name], f[self.source])
        if not segmentation:
            return f["cls"], f["reg"], None, None
        source, stuff, thing = f[self.source], f["stuff"], p
        if len(stages["stuff"]) == 0 and len(self.flows("stuff")) > 0:
            stuff = stuff + self.flows("stuff")[0](source)
        for s in range(len(stages["thing"])):
            semantic = _at(self.semantic_flow, s)
            thing = self._stage("thing", s, thing, source, None if semantic is None else semantic(stuff))
        if len(stages["thing"]) == 0:
            flow, semantic = _at(self.flows("thing"), 0), _at(self.semantic_flow, 0)
            thing = thing if semantic is None else thing + semantic(stuff)
            thing = thing if flow is None else thing + flow(source)
        return f["cls"], f["reg"], stuff, thing

    def _stage(self, name: str, s: int, f: Tensor, source: Tensor, semantic: Tensor | None = None) -> Tensor:
        """relu(conv(f + semantic + flow(source))); in a deformable stage flow(f + source) gives the offsets."""
        conv, flow = self.get_submodule(name)[s], _at(self.flows(name), s)
        x = f if semantic is None else f + semantic
        if flow is None:
            return conv(x).relu()
        if s in self.deformable.get(name, ()):
            offset, mask = split_offsets(flow(f + source))  # (N, 18, H, W), (N, 9, H, W)
            return deform_conv2d(x, offset, conv.weight, conv.bias, stride=1, padding=1, mask=mask).relu()
        return conv(x + flow(source)).relu()

    def forward(self, pyramid: Sequence[Tensor]) -> SubnetFeatures:
        """[P3, ..., P7], each (N, in_channels, H, W), -> the features of the four tasks."""
        levels = [self._level(p, i < SEGMENTATION_LEVELS) for i, p in enumerate(pyramid)]
        cls, reg, stuff, thing = (list(task) for task in zip(*levels))
        return SubnetFeatures(cls, reg, stuff[:SEGMENTATION_LEVELS], thing[:SEGMENTATION_LEVELS])


def _at(modules: nn.ModuleList, index: int) -> nn.Module | None:
    return modules[index] if index < len(modules) else None
