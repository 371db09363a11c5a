# SPDX-License-Identifier: Apache-2.0
"""Sub-networks for tests of fused_subnets and its kernels: convolutions, levels and the paper's configurations."""

import torch

from spatialflow import ops
from spatialflow.ops import reference

LISTS = ops.SubnetParameters._fields[:8]
SIZES = [(13, 18), (7, 9), (5, 6), (2, 4), (1, 1)]


def conv(channels: int, out_channels: int, bias: bool = True, clear: bool = False) -> list:
    """Make [weight, bias]; with `clear`, a large bias keeps every output away from zero."""
    weight = torch.randn(out_channels, channels, 3, 3, dtype=torch.float64) * (2 / max(channels, 1)) ** 0.5 / 3
    if clear:
        return [weight * 0.2, torch.tensor([5.0, -5.0, 5.0] * out_channels, dtype=torch.float64)[:out_channels]]
    return [weight, torch.randn(out_channels, dtype=torch.float64) * 0.1 if bias else None]


def wiring(
    stages=(2, 2, 2, 1),
    channels=6,
    inner=None,
    flows=(True, True, True, True),
    source="reg",
    flow_stages=None,
    clear=False,
) -> list:
    """Make the eight lists of convolutions: `inner` channels inside the sub-networks, `channels` in the levels."""
    inner = inner or channels
    names = ("cls", "reg", "stuff", "thing")
    lists = {
        name: [conv(channels if s == 0 else inner, inner, clear=clear) for s in range(count)]
        for name, count in zip(names, stages)
    }
    source_channels = inner if stages[names.index(source)] else channels
    stuff_channels = inner if stages[2] else channels
    follower = stages[0] if source == "reg" else stages[1]
    for name, wanted, count, width in (
        ("flow_cls", flows[0], follower, source_channels),
        ("flow_stuff", flows[1], stages[2], source_channels),
        ("flow_thing", flows[2], stages[3], source_channels),
        ("semantic_flow", flows[3], stages[3], stuff_channels),
    ):
        lists[name] = [
            conv(width, channels if s == 0 else inner, bias=s != 1) if flow_stages is None or s in flow_stages else None
            for s in range(max(count, 1) if wanted else 0)
        ]
    return [lists[name] for name in LISTS]


def pyramid(channels: int, sizes=SIZES, batch: int = 1) -> list:
    return [torch.randn(batch, channels, *size, dtype=torch.float64) for size in sizes]


def parameters_of(convs: list, flow_source="reg", segmentation_levels=3) -> ops.SubnetParameters:
    lists = [tuple(None if pair is None else tuple(pair) for pair in convolutions) for convolutions in convs]
    return ops.SubnetParameters(*lists, flow_source=flow_source, segmentation_levels=segmentation_levels)


def run_fused_subnets(levels, convs, algorithm="auto", **wired):
    return list(ops.fused_subnets(levels, parameters_of(convs, **wired), algorithm))


def by_reference(levels, convs, algorithm="auto", **wired):
    return list(reference.fused_subnets(levels, parameters_of(convs, **wired)))


WIRINGS = {
    "paper": {"stages": (4, 4, 4, 1)},
    "source cls": {"stages": (3, 3, 3, 1), "source": "cls"},
    "no flows": {"stages": (2, 2, 2, 2), "flows": (False,) * 4},
    "flow to cls alone": {"stages": (2, 2, 2, 1), "flows": (True, False, False, False)},
    "detection alone": {"stages": (2, 2, 0, 0), "flows": (True, False, False, False)},
    "fewer stuff stages": {"stages": (3, 3, 1, 1)},
    "three thing stages": {"stages": (1, 1, 1, 3)},
    "no stages, flows": {"stages": (2, 2, 0, 0)},
    "other width": {"stages": (2, 2, 2, 2), "inner": 40},
    "some flows": {"stages": (3, 3, 3, 3), "flow_stages": (0, 2)},
    "nothing": {"stages": (0, 0, 0, 0), "flows": (False,) * 4},
}
"""Keyword arguments of `wiring` for the network of the paper, for ablations and for unusual combinations."""
