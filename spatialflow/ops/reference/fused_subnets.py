# SPDX-License-Identifier: Apache-2.0
"""Reference implementation of `spatialflow.ops.fused_subnets` in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from spatialflow.ops.reference.flow_conv2d import conv3x3


def fused_subnets(levels: Sequence[Tensor], parameters: Any, algorithm: str = "auto") -> tuple[list[Tensor], ...]:
    """Compute `spatialflow.ops.fused_subnets` level by level, for convolutions as (weight, bias)."""
    outputs: tuple[list[Tensor], ...] = ([], [], [], [])
    for index, level in enumerate(levels):
        segmentation = index < parameters.segmentation_levels
        for maps, result in zip(outputs, _one_level(level, parameters, segmentation), strict=True):
            maps.append(result)
    cls, reg, stuff, thing = outputs
    return cls, reg, stuff[: parameters.segmentation_levels], thing[: parameters.segmentation_levels]


def _one_level(p: Tensor, parameters: Any, segmentation: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    source = parameters.flow_source or "reg"
    follower = "cls" if source == "reg" else "reg"
    flows = {follower: parameters.flow_cls, "stuff": parameters.flow_stuff, "thing": parameters.flow_thing}
    receivers = (follower, "stuff") if segmentation else (follower,)
    f = {"cls": p, "reg": p, "stuff": p}
    for s in range(max(len(parameters.cls), len(parameters.reg), len(parameters.stuff))):
        f[source] = _stage(f[source], getattr(parameters, source), s)
        for name in receivers:
            if s < len(getattr(parameters, name)):
                f[name] = _stage(_plus(f[name], flows[name], s, f[source]), getattr(parameters, name), s)
    for name in receivers:
        if len(getattr(parameters, name)) == 0:
            f[name] = _plus(f[name], flows[name], 0, f[source])
    thing = p
    for s in range(max(len(parameters.thing), 1) if segmentation else 0):
        thing = _plus(thing, parameters.semantic_flow, s, f["stuff"])
        thing = _plus(thing, flows["thing"], s, f[source])
        thing = _stage(thing, parameters.thing, s)
    return f["cls"], f["reg"], f["stuff"], thing


def _stage(x: Tensor, convs: Sequence[Any], s: int) -> Tensor:
    return conv3x3(x, *convs[s]).relu() if s < len(convs) else x


def _plus(x: Tensor, convs: Sequence[Any], s: int, source: Tensor) -> Tensor:
    return x + conv3x3(source, *convs[s]) if s < len(convs) and convs[s] is not None else x
