# SPDX-License-Identifier: Apache-2.0
"""What the worker knows of each operator: how to call it, and what its judges are.

The reference is computed in float64 from the same rounded inputs. Where a result hangs on a comparison (a sample on the
border of the map, a sum at the kink of ReLU) the operator in float32 may decide otherwise than the reference; `nearby`
gives arguments a rounding away, and results that the reference itself changes there are excluded and counted.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fuzz import brute_force
from spatialflow import ops
from spatialflow.ops import reference

EPSILON = {torch.float64: 2.0**-52, torch.float32: 2.0**-23}


@dataclass(frozen=True)
class Operator:
    """An operator and its judges; all functions take the arguments by name.

    Attributes:
        call: the operator.
        reference: its plain-PyTorch reference.
        brute: its brute force in NumPy.
        differentiable: arguments with a gradient.
        exact: results are integers that must be equal, and the reference gets the tensors as they are.
        nearby: arguments a rounding away from the given ones, in float64.
        nearby_for: the questions where that makes a difference: "result", "gradient".
        linear: arguments that enter linearly; their absolute values tell the size of the terms of the sums.
        sizes: like the reference, but its results and derivatives for such absolute values are the sizes of the terms,
            where those of the reference are not: an argument enters both linearly and otherwise. None: the reference.
        places: whether there is a gradient by the places of samples.
        poisons: the reference spreads what is not finite further than the operator does, as it multiplies it by zero;
            results that it makes not finite are not compared.
        composed: of operators of torch where a gradient may be asked for; their fake kernels give expanded tensors
            other strides than they do themselves.
        unstable: whether results can be told to be neither right nor wrong: (arguments, all tensors with incoming
            gradients) -> bool. The call must do no harm then, and that is all.
        excused: for integer results and the brute force, where both answers are right: (arguments, result) -> bools.
        affordable: whether the reference can be computed in little time.
        layered: layers keep their results in the dtype of the features, which rounds more than sums do.
        unforeseen: pattern of the refusals that the fake kernel leaves to the operator.
    """

    call: Callable[..., Any]
    reference: Callable[..., Any]
    brute: Callable[..., Any]
    differentiable: tuple[str, ...] = ()
    exact: bool = False
    nearby: Callable[[dict, float], Iterator[dict]] = lambda arguments, epsilon: iter(())
    nearby_for: tuple[str, ...] = ()
    linear: tuple[str, ...] = ()
    sizes: Callable[..., Any] | None = None
    places: bool = False
    poisons: bool = False
    composed: bool = False
    unstable: Callable[[dict, list[Tensor]], bool] = lambda arguments, tensors: False
    excused: Callable[[dict, Tensor], Tensor] | None = None
    affordable: Callable[[dict], bool] = lambda arguments: True
    layered: bool = False
    unforeseen: str = "$^"

    def absolute(self, arguments: dict) -> dict:
        """The arguments with absolute values of those that enter linearly.

        Winograd mixes the nine taps of a kernel, so each counts as the largest of them.
        """

        def size(t: Tensor) -> Tensor:
            is_kernel = t.dim() == 4 and t.shape[2:] == (3, 3) and t.numel() > 0
            mixed = is_kernel and "offset" not in arguments and arguments.get("algorithm", "direct") != "direct"
            return t.abs().amax(dim=(2, 3), keepdim=True).expand_as(t) if mixed else t.abs()

        return {name: map_tensors(size, v) if name in self.linear else v for name, v in arguments.items()}


def _shifted(boxes: Tensor, by: float, first: int, signs: tuple[int, int]) -> Tensor:
    """Boxes with both corners moved by a few roundings of their largest coordinate."""
    moved = boxes.to(torch.float64, copy=True)  # 16 bits do not hold places nearby
    finite = torch.where(moved.isfinite(), moved, 0)[:, first:].abs()
    step = (finite.amax(dim=1, keepdim=True) + 64) * by
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


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """A nest of lists and dictionaries with its tensors replaced."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {name: map_tensors(function, item) for name, item in value.items()}
    return [map_tensors(function, item) for item in value] if isinstance(value, list) else value


def leaves(value: Any) -> list[Tensor]:
    """The tensors in a nest of lists, tuples and dictionaries, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [leaf for item in value for leaf in leaves(item)] if isinstance(value, (list, tuple)) else []


def _upsets_convolution(arguments: dict, tensors: list[Tensor]) -> bool:
    """Tell whether arguments make results of a convolution unspecified, because Winograd sums its inputs.

    An infinite or very large number spoils the tile of 4 x 4 pixels around it. It is unspecified whether a weight that
    is not finite is multiplied by padding.
    """
    weights = leaves({name: value for name, value in arguments.items() if name in ("weight", "bias", "parameters")})
    many = any(t.dim() == 4 and min(t.shape[:2]) >= 32 for t in weights)  # channels: "auto" takes Winograd
    algorithm = arguments["algorithm"]
    winograd = algorithm == "winograd" or (algorithm != "direct" and many)
    if winograd and tensors[0].dtype != torch.float64:
        return any(not bool((t.detach().double().abs() < 1e3).all()) for t in tensors)
    if _has_rests_of_infinity(arguments, tensors):
        return True
    # On CUDA a value at the border that is not finite reaches the gradients of weights that see padding there.
    asks_gradient = len(tensors) > len(leaves(arguments))
    if asks_gradient and _is_cuda() and not all(bool(t.detach().isfinite().all()) for t in tensors):
        return True
    # Layers multiply: what those before made, or a gradient, may overflow in between, where float64 does not.
    return not all(bool(t.detach().isfinite().all()) for t in weights) or _overflows(arguments, tensors)


def _has_rests_of_infinity(arguments: dict, tensors: list[Tensor]) -> bool:
    """On CUDA the rest of an infinity in float32, which tensor cores multiply as well, is NaN."""
    on_tensor_cores = _is_cuda() and arguments["algorithm"] != "direct" and tensors[0].dtype == torch.float32
    return on_tensor_cores and any(bool(t.detach().isinf().any()) for t in tensors)


def _upsets_deform_conv2d(arguments: dict, tensors: list[Tensor]) -> bool:
    return _has_rests_of_infinity(arguments, tensors) or _overflows(arguments, tensors)


def _upsets_norm(arguments: dict, tensors: list[Tensor]) -> bool:
    """Tell whether arguments make results of a norm unspecified, because squares of deviations overflow.

    It is unspecified whether infinite parameters give infinity or NaN in their channel, and infinite gradients in their
    group.
    """
    gradients = tensors[len(leaves(arguments)) :]
    open_ones = leaves([arguments["weight"], arguments["bias"], gradients])
    return any(bool(t.detach().isinf().any()) for t in open_ones) or _overflows(arguments, tensors)


def _sizes_of_norm(
    *, input: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, upsample: bool
) -> Tensor:
    """The norm without what the mean, and derivatives of mean and deviation, take away again, and without ReLU."""
    groups = input.reshape(len(input), num_groups, input[0].numel() // num_groups if len(input) else 0)
    deviation = (groups.var(dim=2, keepdim=True, correction=0) + eps).sqrt().detach()
    values = (groups.abs() + groups.mean(dim=2, keepdim=True).abs()).detach()
    result = ((values + (groups - groups.detach())) / deviation).reshape(input.shape)
    result = result if weight is None else result * weight[:, None, None]
    result = result if bias is None else result + bias[:, None, None]
    if not upsample:
        return result
    if result.numel() == 0:
        return result.reshape(*input.shape[:2], 2 * input.shape[2], 2 * input.shape[3])
    return torch.nn.functional.interpolate(result, scale_factor=2, mode="bilinear", align_corners=True)


def _is_cuda() -> bool:
    return os.environ.get("SPATIALFLOW_BACKEND", "cpu").startswith("simt")


def _overflows(arguments: dict, tensors: list[Tensor]) -> bool:
    """Whether a product of some numbers (gradients, weights, features) can be too large for what holds it."""
    # Layers keep their results in float16; CUDA the samples of a deformable convolution, and x + flow. Others sum in
    # float32.
    float16 = 1e2 if "parameters" in arguments or ("offset" in arguments and _is_cuda()) else 1e12
    if arguments.get("flow") is not None and _is_cuda():
        float16 = 3e4
    limit = {torch.float64: 1e100, torch.float16: float16}.get(tensors[0].dtype, 1e12)
    return any(bool((t.isfinite() & (t.abs() > limit)).any()) for t in (t.detach().double() for t in tensors))


def _flow_conv2d_packed(
    *, x: Any, flow: Any, weight: Tensor, bias: Tensor | None, relu: bool, algorithm: str, active: Tensor | None
) -> Any:
    return ops.flow_conv2d(x, flow, ops.pack_conv3x3(weight, bias, algorithm), None, relu, active=active)


def _deform_conv2d_packed(*, input: Tensor, offset: Tensor, weight: Tensor, **options: Any) -> Tensor:
    groups = offset_groups = 1
    if input.dim() == offset.dim() == weight.dim() == 4:  # else what is wrong is for the operators to say
        groups = input.shape[1] // max(weight.shape[1], 1) or 1
        offset_groups = offset.shape[1] // max(2 * weight.shape[2:].numel(), 1) or 1
    conv = ops.pack_deform_conv2d(weight, options.pop("bias"), groups, offset_groups, options.pop("algorithm"))
    return ops.deform_conv2d(input, offset, conv, **options)


def _tower(parameters: dict) -> ops.SubnetParameters:
    lists = {
        name: tuple(conv and tuple(conv) for conv in value)
        for name, value in parameters.items()
        if isinstance(value, list)
    }
    return ops.SubnetParameters(**parameters | lists)


def _fused_subnets(*, levels: list, parameters: dict, algorithm: str) -> Any:
    return ops.fused_subnets(levels, _tower(parameters), algorithm)


def _fused_subnets_packed(*, levels: list, parameters: dict, algorithm: str) -> Any:
    return ops.fused_subnets(levels, ops.pack_subnets(_tower(parameters), algorithm))


def _fused_subnets_reference(*, levels: list, parameters: dict, algorithm: str) -> Any:
    return reference.fused_subnets(levels, _tower(parameters), algorithm)


def _fused_subnets_brute(*, levels: list, parameters: dict, algorithm: str) -> Any:
    return brute_force.fused_subnets(levels, _tower(parameters), algorithm)


def _nearby(*names: str) -> Callable[[dict, float], Iterator[dict]]:
    """Move weights and features at random, by one rounding up or down, so that sums at the kink of a ReLU change sides.

    Sums of the Winograd algorithm round more often.
    """

    def nearby(arguments: dict, epsilon: float) -> Iterator[dict]:
        generator = torch.Generator(device="cpu").manual_seed(0)
        for roundings in ((4, 32, 256) if epsilon < 1e-5 else (0.5, 1, 2)) * 8:

            def moved(t: Tensor, step: float = roundings * epsilon) -> Tensor:
                noise = torch.randn(t.shape, generator=generator, dtype=t.dtype, device="cpu").to(t)
                return t + step * (t.abs() + 1) * noise

            yield arguments | {name: map_tensors(moved, arguments[name]) for name in names}

    return nearby


def _named_dtype(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*, dtype: dict, **arguments: Any) -> Any:
        return function(**arguments, dtype=getattr(torch, dtype["dtype"]))

    return call


def _tied(arguments: dict, result: Tensor) -> Tensor:
    """Pixels whose class is, within a rounding, as good as the best."""
    enlarged = torch.from_numpy(brute_force.enlarged_logits(**arguments))  # (H, W, C)
    enlarged = torch.where(enlarged.isnan(), -torch.inf, enlarged)
    known = result.long() < enlarged.shape[2]
    own = enlarged.gather(2, torch.where(known, result.long(), 0)[..., None])[..., 0]
    finite = torch.where(enlarged.isfinite(), enlarged, 0)
    scale = finite.abs().amax(dim=2)
    largest = torch.finfo(torch.float32).max / 4  # beyond, float32 overflows
    near = (own >= enlarged.amax(dim=2) - 1e-5 * scale) | (scale > largest)
    # A huge logit counts or not by whether its weight is 0 or a rounding.
    return known & (near | bool(_overflows(arguments, [arguments["logits"]])))


def _nearby_threshold(arguments: dict, epsilon: float) -> Iterator[dict]:
    """Pixels whose probability is the threshold, and pixels at the edge of a cell whose logit is NaN."""
    yield from _nearby_boxes(arguments, epsilon)
    for factor in (1 + 64 * epsilon, 1 - 64 * epsilon):
        yield arguments | {"threshold": arguments["threshold"] * factor}


OPERATORS: dict[str, Operator] = {
    "roi_align": Operator(
        ops.roi_align,
        reference.roi_align,
        brute_force.roi_align,
        differentiable=("input",),
        nearby=_nearby_boxes,
        nearby_for=("result", "gradient"),
        linear=("input",),
        poisons=True,
        affordable=lambda a: _moderate(a, a["spatial_scale"]),
    ),
    "flow_conv2d": Operator(
        ops.flow_conv2d,
        reference.flow_conv2d,
        brute_force.flow_conv2d,
        differentiable=("x", "flow", "weight", "bias"),
        nearby=_nearby("weight", "x", "flow"),
        nearby_for=("gradient",),
        linear=("x", "flow", "weight", "bias"),
        unstable=_upsets_convolution,
    ),
    "pack_conv3x3": Operator(
        _flow_conv2d_packed,
        reference.flow_conv2d,
        brute_force.flow_conv2d,
        differentiable=("x", "flow", "weight", "bias"),
        nearby=_nearby("weight", "x", "flow"),
        nearby_for=("gradient",),
        linear=("x", "flow", "weight", "bias"),
        unstable=_upsets_convolution,
    ),
    "group_norm_relu": Operator(
        ops.group_norm_relu,
        reference.group_norm_relu,
        brute_force.group_norm_relu,
        differentiable=("input", "weight", "bias"),
        nearby=_nearby("input", "bias"),
        nearby_for=("gradient",),
        linear=("weight", "bias"),
        sizes=_sizes_of_norm,
        unstable=_upsets_norm,
    ),
    "multilevel_roi_align": Operator(
        ops.multilevel_roi_align,
        reference.multilevel_roi_align,
        brute_force.multilevel_roi_align,
        differentiable=("features",),
        nearby=_nearby_boxes,
        nearby_for=("result", "gradient"),
        linear=("features",),
        poisons=True,
        affordable=lambda a: _moderate(a, 1 / min(a["strides"])),
    ),
    "nms": Operator(ops.nms, reference.nms, brute_force.nms, exact=True),
    "batched_nms": Operator(ops.batched_nms, reference.batched_nms, brute_force.batched_nms, exact=True),
    "multiclass_nms": Operator(ops.multiclass_nms, reference.multiclass_nms, brute_force.multiclass_nms, exact=True),
    "panoptic_merge": Operator(ops.panoptic_merge, reference.panoptic_merge, brute_force.panoptic_merge, exact=True),
    "panoptic_quality_counts": Operator(
        ops.panoptic_quality_counts,
        reference.panoptic_quality_counts,
        brute_force.panoptic_quality_counts,
        exact=True,
    ),
    "paste_masks": Operator(
        ops.paste_masks,
        reference.paste_masks,
        brute_force.paste_masks,
        exact=True,
        nearby=_nearby_threshold,
        nearby_for=("result",),
    ),
    "preprocess_images": Operator(
        _named_dtype(ops.preprocess_images),
        _named_dtype(reference.preprocess_images),
        _named_dtype(brute_force.preprocess_images),
        exact=True,
    ),
    "select_candidates": Operator(ops.select_candidates, reference.select_candidates, brute_force.select_candidates),
    "sigmoid_focal_loss": Operator(
        ops.sigmoid_focal_loss,
        reference.sigmoid_focal_loss,
        brute_force.sigmoid_focal_loss,
        differentiable=("logits",),
        poisons=True,
        unstable=lambda arguments, tensors: arguments["reduction"] != "none" and _overflows(arguments, tensors),
    ),
    "stuff_labels": Operator(
        ops.stuff_labels, reference.stuff_labels, brute_force.stuff_labels, exact=True, excused=_tied
    ),
}
for _name, _call in (("deform_conv2d", ops.deform_conv2d), ("pack_deform_conv2d", _deform_conv2d_packed)):
    OPERATORS[_name] = Operator(
        _call,
        reference.deform_conv2d,
        brute_force.deform_conv2d,
        differentiable=("input", "offset", "weight", "bias", "mask"),
        nearby=_nearby_offsets,
        places=True,
        unstable=_upsets_deform_conv2d,
        nearby_for=("gradient",),
        linear=("input", "weight", "bias", "mask"),
        poisons=True,
    )

for _name, _call in (("fused_subnets", _fused_subnets), ("pack_subnets", _fused_subnets_packed)):
    OPERATORS[_name] = Operator(
        _call,
        _fused_subnets_reference,
        _fused_subnets_brute,
        composed=True,
        differentiable=("levels", "parameters"),
        nearby=_nearby("parameters", "levels"),
        nearby_for=("gradient",),
        linear=("levels", "parameters"),
        unstable=_upsets_convolution,
        layered=True,
        unforeseen="was packed for other channels|channels of the feature it is added to",
    )
