# SPDX-License-Identifier: Apache-2.0
"""What the worker knows of each operator: how to call it, and what its judges are.

The reference is computed in float64 from the same rounded inputs. Where a result hangs on a comparison (a sample on the
border of the map, a sum at the kink of ReLU) the operator in float32 may decide otherwise than the reference; `nearby`
gives arguments a rounding away, and results that the reference itself changes there are excluded and counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from op_matrix import map_tensors
from spatialflow import ops
from spatialflow.ops import reference

EPSILON = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.float16: 2.0**-23, torch.bfloat16: 2.0**-23}


@dataclass(frozen=True)
class Operator:
    """An operator and its judges; all functions take the arguments by name.

    Attributes:
        call: the operator.
        reference: its plain-PyTorch twin.
        differentiable: arguments with a gradient.
        exact: results are integers that must be equal, and the reference gets the tensors as they are.
        nearby: arguments a rounding away from the given ones, in float64.
        nearby_for: the questions where that makes a difference: "result", "gradient".
        linear: arguments that enter linearly; their absolute values tell the size of the terms of the sums.
        poisons: the reference spreads NaN and infinities of the inputs further than the operator does; results that it
            makes not finite are not compared.
        affordable: whether the reference can be computed in little time.
    """

    call: Callable[..., Any]
    reference: Callable[..., Any]
    differentiable: tuple[str, ...] = ()
    exact: bool = False
    nearby: Callable[[dict, float], Iterator[dict]] = lambda arguments, epsilon: iter(())
    nearby_for: tuple[str, ...] = ()
    linear: tuple[str, ...] = ()
    poisons: Callable[[dict], bool] = lambda arguments: False
    affordable: Callable[[dict], bool] = lambda arguments: True

    def absolute(self, arguments: dict) -> dict:
        """The arguments with absolute values of those that enter linearly."""
        return {name: map_tensors(Tensor.abs, v) if name in self.linear else v for name, v in arguments.items()}


def _shifted(boxes: Tensor, by: float, first: int, signs: tuple[int, int]) -> Tensor:
    """Boxes with both corners moved by a few roundings of their largest coordinate."""
    finite = torch.where(boxes.isfinite(), boxes, 0)[:, first:].abs()
    step = (finite.amax(dim=1, keepdim=True) + 64) * by
    moved = boxes.clone()
    moved[:, first : first + 2] += signs[0] * step
    moved[:, first + 2 :] += signs[1] * step
    return moved


def _nearby_boxes(arguments: dict, epsilon: float) -> Iterator[dict]:
    for signs in ((1, 1), (-1, -1), (1, -1), (-1, 1)):
        yield arguments | {"boxes": _shifted(arguments["boxes"], 16 * epsilon, arguments["boxes"].shape[1] - 4, signs)}


def _moderate(arguments: dict, scale: float) -> bool:
    """Whether the grids of adaptive sampling, whose points the reference lists, are small."""
    boxes = arguments["boxes"]
    extent = torch.where(boxes.isfinite(), boxes, 0)[:, -4:].double().abs()
    return arguments["sampling_ratio"] > 0 or boxes.numel() == 0 or float(extent.max()) * scale < 1e4


def _nearby_offsets(arguments: dict, epsilon: float) -> Iterator[dict]:
    offset = arguments["offset"]
    step = (offset.abs() + 64) * 16 * epsilon
    for sign in (1, -1):
        yield arguments | {"offset": offset + sign * step}


def _nearby_bias(arguments: dict, epsilon: float) -> Iterator[dict]:
    weight, bias = arguments["weight"], arguments.get("bias")
    if not arguments["relu"] or weight.numel() == 0:
        return
    bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
    x = arguments["x"]
    largest = max((float(torch.where(t.isfinite(), t, 0).abs().max()) for t in leaves(x) if t.numel()), default=1.0)
    flow = leaves(arguments["flow"])
    largest += max((float(torch.where(t.isfinite(), t, 0).abs().max()) for t in flow if t.numel()), default=0.0)
    row = torch.where(weight.isfinite(), weight, 0).abs().sum(dim=(1, 2, 3))
    step = (row * largest + bias.abs().nan_to_num()) * 64 * epsilon
    for sign in (1, -1):
        yield arguments | {"bias": bias + sign * step}


def leaves(value: Any) -> list[Tensor]:
    """The tensors in a nest of lists, tuples and dictionaries, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    return [leaf for item in value for leaf in leaves(item)] if isinstance(value, (list, tuple, type({}.values()))) else []


def _has_specials(arguments: dict) -> bool:
    return any(not bool(t.detach().isfinite().all()) for t in leaves(arguments) if t.is_floating_point())


def _flow_conv2d_packed(*, x: Any, flow: Any, weight: Tensor, bias: Tensor | None, relu: bool, algorithm: str) -> Any:
    return ops.flow_conv2d(x, flow, ops.pack_conv3x3(weight, bias, algorithm), None, relu)


def _is_winograd(arguments: dict) -> bool:
    """Winograd spreads what is not finite over tiles, and adds before it multiplies."""
    weight = arguments["weight"]
    return arguments["algorithm"] != "direct" and weight.dtype != torch.float64 and _has_specials(arguments)


OPERATORS: dict[str, Operator] = {
    "roi_align": Operator(
        ops.roi_align,
        reference.roi_align,
        differentiable=("input",),
        nearby=_nearby_boxes,
        nearby_for=("result", "gradient"),
        linear=("input",),
        poisons=_has_specials,
        affordable=lambda a: _moderate(a, a["spatial_scale"]),
    ),
    "deform_conv2d": Operator(
        ops.deform_conv2d,
        reference.deform_conv2d,
        differentiable=("input", "offset", "weight", "bias", "mask"),
        nearby=_nearby_offsets,
        nearby_for=("gradient",),
        linear=("input", "weight", "bias", "mask"),
        poisons=_has_specials,
    ),
    "flow_conv2d": Operator(
        ops.flow_conv2d,
        reference.flow_conv2d,
        differentiable=("x", "flow", "weight", "bias"),
        nearby=_nearby_bias,
        nearby_for=("gradient",),
        linear=("x", "flow", "weight", "bias"),
        poisons=_is_winograd,
    ),
    "pack_conv3x3": Operator(
        _flow_conv2d_packed,
        reference.flow_conv2d,
        differentiable=("x", "flow", "weight", "bias"),
        nearby=_nearby_bias,
        nearby_for=("gradient",),
        linear=("x", "flow", "weight", "bias"),
        poisons=_is_winograd,
    ),
}
