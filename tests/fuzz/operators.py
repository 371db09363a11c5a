# SPDX-License-Identifier: Apache-2.0
"""Table of the operators: how the worker calls each of them, and its judges.

The reference is computed in float64 from the same rounded inputs. Some results depend on a comparison, such as a sample
on the border of the map or a sum at the kink of ReLU. There the operator in float32 may decide differently from the
reference. `nearby` gives arguments perturbed by a rounding; elements of the reference that change with them are
excluded (see `fuzz.judge`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fuzz import brute_force
from spatialflow import ops
from spatialflow.ops import reference

EPSILON = {torch.float64: 2.0**-52, torch.float32: 2.0**-23}


@dataclass(frozen=True)
class Operator:
    """An operator with its judges; all functions take the arguments by name.

    Attributes:
        call: the operator.
        reference: its plain-PyTorch reference.
        brute: its brute force in NumPy.
        differentiable: arguments with a gradient.
        exact: results must equal those of the reference, which gets the tensors unconverted.
        nearby: yields the arguments perturbed by a rounding, in float64.
        nearby_for: what depends on such perturbations: "result", "gradient".
        linear: arguments in which the operator is linear; their absolute values give the size of the terms of the sums.
        sizes: function that replaces the reference in the computation of these sizes; None: the reference itself.
        has_sampling_points: whether the operator has a gradient with respect to sampling points.
        poisons: the reference multiplies non-finite values by zero, which spreads them further than the operator does.
            Then results that are not finite in the reference are not compared.
        composed: the call consists of torch operators if gradients are required. For expanded tensors their fake
            kernels predict other strides than the real ones.
        unstable: (arguments, tensors) -> bool: whether results are unspecified. `tensors` are those of the arguments,
            then incoming gradients and tangents. Such a call must not crash or write out of bounds; its results are not
            compared.
        excused: (arguments, result) -> bools: elements of an integer result that are right although the brute force
            gives another number.
        layered: layers round their results to the dtype of the features, so errors are larger than those of sums.
        unpredicted_errors: pattern of errors that the operator raises and its fake kernel does not.
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
    has_sampling_points: bool = False
    poisons: bool = False
    composed: bool = False
    unstable: Callable[[dict, list[Tensor]], bool] = lambda arguments, tensors: False
    excused: Callable[[dict, Tensor], Tensor] | None = None
    layered: bool = False
    unpredicted_errors: str = "$^"

    def absolute(self, arguments: dict) -> dict:
        """Return the arguments with absolute values of the linear ones.

        Winograd mixes the nine taps of a kernel, so each counts as the largest of them.
        """

        def size(t: Tensor) -> Tensor:
            is_kernel = t.dim() == 4 and t.shape[2:] == (3, 3) and t.numel() > 0
            mixed = is_kernel and "offset" not in arguments and arguments.get("algorithm", "direct") != "direct"
            return t.abs().amax(dim=(2, 3), keepdim=True).expand_as(t) if mixed else t.abs()

        return {name: map_tensors(size, v) if name in self.linear else v for name, v in arguments.items()}


def _shifted(boxes: Tensor, by: float, first: int, signs: tuple[int, int]) -> Tensor:
    """Move both corners of each box by `by` * (its largest coordinate + 64), in the directions of `signs`."""
    moved = boxes.to(torch.float64, copy=True)  # such small steps would be lost in 16 bits
    finite = torch.where(moved.isfinite(), moved, 0)[:, first:].abs()
    step = (finite.amax(dim=1, keepdim=True) + 64) * by
    moved[:, first : first + 2] += signs[0] * step
    moved[:, first + 2 :] += signs[1] * step
    return moved


def _nearby_boxes(arguments: dict, epsilon: float) -> Iterator[dict]:
    for signs in ((1, 1), (-1, -1), (1, -1), (-1, 1)):
        yield arguments | {"boxes": _shifted(arguments["boxes"], 16 * epsilon, arguments["boxes"].shape[1] - 4, signs)}


def _nearby_offsets(arguments: dict, epsilon: float) -> Iterator[dict]:
    offset = arguments["offset"]
    step = (offset.abs() + 64) * 16 * epsilon
    for sign in (1, -1):
        yield arguments | {"offset": offset + sign * step}


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """Apply a function to every tensor within nested lists and dictionaries."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {name: map_tensors(function, item) for name, item in value.items()}
    return [map_tensors(function, item) for item in value] if isinstance(value, list) else value


def leaves(value: Any) -> list[Tensor]:
    """Return the tensors within nested lists, tuples and dictionaries, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [leaf for item in value for leaf in leaves(item)] if isinstance(value, (list, tuple)) else []


def _is_unstable_convolution(arguments: dict, tensors: list[Tensor]) -> bool:
    """Tell whether arguments make results of a convolution unspecified.

    Winograd sums its inputs: an infinite or very large number changes all results of the 4 x 4 output tiles that read
    it. For all algorithms it is unspecified whether a non-finite weight is multiplied by padding.
    """
    weights = leaves({name: value for name, value in arguments.items() if name in ("weight", "bias", "parameters")})
    # "auto" selects Winograd by the number of channels.
    many = any(t.dim() == 4 and min(t.shape[:2]) >= 32 for t in weights)
    algorithm = arguments["algorithm"]
    winograd = algorithm == "winograd" or (algorithm != "direct" and many)
    if winograd and tensors[0].dtype != torch.float64:
        return any(not bool((t.detach().double().abs() < 1e3).all()) for t in tensors)
    if _splits_infinity(arguments, tensors):
        return True
    # On CUDA a non-finite value at the border reaches the gradients of weights whose taps read padding there.
    asks_gradient = len(tensors) > len(leaves(arguments))
    if asks_gradient and _is_cuda() and not all(bool(t.detach().isfinite().all()) for t in tensors):
        return True
    # Results of earlier layers, or gradients, may overflow between layers where float64 does not.
    return not all(bool(t.detach().isfinite().all()) for t in weights) or _overflows(arguments, tensors)


def _splits_infinity(arguments: dict, tensors: list[Tensor]) -> bool:
    """Tell whether float32 on CUDA splits an infinity: 3xTF32 also multiplies the remainder, which is NaN."""
    on_tensor_cores = _is_cuda() and arguments["algorithm"] != "direct" and tensors[0].dtype == torch.float32
    return on_tensor_cores and any(bool(t.detach().isinf().any()) for t in tensors)


def _is_unstable_deform_conv2d(arguments: dict, tensors: list[Tensor]) -> bool:
    return _splits_infinity(arguments, tensors) or _overflows(arguments, tensors)


def _is_unstable_norm(arguments: dict, tensors: list[Tensor]) -> bool:
    """Tell whether results of a norm are unspecified: squares of deviations may overflow, or factors are infinite.

    Infinite parameters give infinity or NaN in their channel, infinite gradients in their group.
    """
    gradients = tensors[len(leaves(arguments)) :]
    factors = leaves([arguments["weight"], arguments["bias"], gradients])
    return any(bool(t.detach().isinf().any()) for t in factors) or _overflows(arguments, tensors)


def _sizes_of_norm(
    *, input: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, upsample: bool
) -> Tensor:
    """Compute the sizes of the norm's terms: no cancellation, constant mean and deviation, and no ReLU."""
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
    """Tell whether a product of gradients, weights and features may overflow the dtype that stores it."""
    # Stored in float16: results of layers and, on CUDA, samples of a deformable convolution and x + flow. Other sums
    # are in float32.
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
    if input.dim() == offset.dim() == weight.dim() == 4:  # otherwise the operators raise the error
        groups = input.shape[1] // max(weight.shape[1], 1) or 1
        offset_groups = offset.shape[1] // max(2 * weight.shape[2:].numel(), 1) or 1
    conv = ops.pack_deform_conv2d(weight, options.pop("bias"), groups, offset_groups, options.pop("algorithm"))
    return ops.deform_conv2d(input, offset, conv, **options)


def _subnet_parameters(parameters: dict) -> ops.SubnetParameters:
    lists = {
        name: tuple(conv and tuple(conv) for conv in value)
        for name, value in parameters.items()
        if isinstance(value, list)
    }
    return ops.SubnetParameters(**parameters | lists)


def _fused_subnets(*, levels: list, parameters: dict, algorithm: str) -> Any:
    return ops.fused_subnets(levels, _subnet_parameters(parameters), algorithm)


def _fused_subnets_packed(*, levels: list, parameters: dict, algorithm: str) -> Any:
    return ops.fused_subnets(levels, ops.pack_subnets(_subnet_parameters(parameters), algorithm))


def _fused_subnets_reference(*, levels: list, parameters: dict, algorithm: str) -> Any:
    return reference.fused_subnets(levels, _subnet_parameters(parameters), algorithm)


def _fused_subnets_brute(*, levels: list, parameters: dict, algorithm: str) -> Any:
    return brute_force.fused_subnets(levels, _subnet_parameters(parameters), algorithm)


def _nearby(*names: str) -> Callable[[dict, float], Iterator[dict]]:
    """Perturb the named arguments at random by roundings, so that sums at the kink of a ReLU change sign.

    Larger steps are included because the Winograd algorithm rounds more often.
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
    """Return the pixels where the logit of the operator's label equals the largest logit up to rounding.

    Pixels and calls where float32 may overflow are included.
    """
    logits = torch.from_numpy(brute_force.upsampled_logits(**arguments))  # (H, W, C)
    logits = torch.where(logits.isnan(), -torch.inf, logits)
    known = result.long() < logits.shape[2]
    chosen = logits.gather(2, torch.where(known, result.long(), 0)[..., None])[..., 0]
    finite = torch.where(logits.isfinite(), logits, 0)
    scale = finite.abs().amax(dim=2)
    largest = torch.finfo(torch.float32).max / 4  # float32 may overflow beyond this
    near = (chosen >= logits.amax(dim=2) - 1e-5 * scale) | (scale > largest)
    # A huge logit changes the result if rounding makes its interpolation weight nonzero.
    return known & (near | bool(_overflows(arguments, [arguments["logits"]])))


def _nearby_threshold(arguments: dict, epsilon: float) -> Iterator[dict]:
    """Perturb boxes, for pixels at the edge of a cell whose logit is NaN, and the threshold."""
    yield from _nearby_boxes(arguments, epsilon)
    for factor in (1 + 64 * epsilon, 1 - 64 * epsilon):
        yield arguments | {"threshold": arguments["threshold"] * factor}


_FLOW_CONV2D = Operator(
    ops.flow_conv2d,
    reference.flow_conv2d,
    brute_force.flow_conv2d,
    differentiable=("x", "flow", "weight", "bias"),
    nearby=_nearby("weight", "x", "flow"),
    nearby_for=("gradient",),
    linear=("x", "flow", "weight", "bias"),
    unstable=_is_unstable_convolution,
)
_DEFORM_CONV2D = Operator(
    ops.deform_conv2d,
    reference.deform_conv2d,
    brute_force.deform_conv2d,
    differentiable=("input", "offset", "weight", "bias", "mask"),
    nearby=_nearby_offsets,
    has_sampling_points=True,
    unstable=_is_unstable_deform_conv2d,
    nearby_for=("gradient",),
    linear=("input", "weight", "bias", "mask"),
    poisons=True,
)
_FUSED_SUBNETS = Operator(
    _fused_subnets,
    _fused_subnets_reference,
    _fused_subnets_brute,
    composed=True,
    differentiable=("levels", "parameters"),
    nearby=_nearby("parameters", "levels"),
    nearby_for=("gradient",),
    linear=("levels", "parameters"),
    unstable=_is_unstable_convolution,
    layered=True,
    unpredicted_errors="was packed for other channels|channels of the feature it is added to",
)


def _roi_align(name: str, features: str) -> Operator:
    """Return a RoIAlign operator with its judges; `features` is the name of its differentiable argument."""
    return Operator(
        getattr(ops, name),
        getattr(reference, name),
        getattr(brute_force, name),
        differentiable=(features,),
        nearby=_nearby_boxes,
        nearby_for=("result", "gradient"),
        linear=(features,),
        poisons=True,
    )


OPERATORS: dict[str, Operator] = {
    "roi_align": _roi_align("roi_align", "input"),
    "flow_conv2d": _FLOW_CONV2D,
    "pack_conv3x3": replace(_FLOW_CONV2D, call=_flow_conv2d_packed),
    "group_norm_relu": Operator(
        ops.group_norm_relu,
        reference.group_norm_relu,
        brute_force.group_norm_relu,
        differentiable=("input", "weight", "bias"),
        nearby=_nearby("input", "bias"),
        nearby_for=("gradient",),
        linear=("weight", "bias"),
        sizes=_sizes_of_norm,
        unstable=_is_unstable_norm,
    ),
    "multilevel_roi_align": _roi_align("multilevel_roi_align", "features"),
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
    "deform_conv2d": _DEFORM_CONV2D,
    "pack_deform_conv2d": replace(_DEFORM_CONV2D, call=_deform_conv2d_packed),
    "fused_subnets": _FUSED_SUBNETS,
    "pack_subnets": replace(_FUSED_SUBNETS, call=_fused_subnets_packed),
}
