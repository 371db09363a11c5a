# SPDX-License-Identifier: Apache-2.0
"""3x3 convolution of a feature plus a flow, with bias and ReLU, over a whole pyramid in one call."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple, TypeVar, overload

import torch
from torch import Tensor

from spatialflow.ops.arrays import are_tensors, as_list, with_arrays
from spatialflow.ops.conv_algorithm import (
    algorithm_code,
    check_packed_bias,
    check_packed_layout,
    pack_conv3x3_weight,
)
from spatialflow.ops.differentiable import autocast, needs_gradient, without_gradient
from spatialflow.ops.fake import register_fake
from spatialflow.ops.flow_conv2d_backward import differentiable_flow_conv2d
from spatialflow.ops.layout import empty_levels

_flow_conv2d_packed = without_gradient("_flow_conv2d_packed")
_flow_conv2d_group = without_gradient("_flow_conv2d_group")


class PackedConv(NamedTuple):
    """A 3x3 convolution with its weights in the order that the kernels read, made by `pack_conv3x3`.

    The order depends on the instruction set, the device and the version of the package. A pickle or a deep copy
    therefore has `weight` but not `packed`, and packs `weight` again on loading. Every operator refuses a `packed` that
    it would read in another order. `weight` also serves calls that need gradients.
    """

    packed: Tensor  # a vector; its length identifies the order
    weight: Tensor  # (C_out, C_in, 3, 3)
    bias: Tensor | None  # (C_out,)
    algorithm: str
    packed_bias: Tensor | None  # (C_out,) in the dtype of sums, as the kernels read it

    def __reduce__(self) -> tuple[Any, ...]:
        return pack_conv3x3, (self.weight, self.bias, self.algorithm)

    def packed_again(self, weight: Tensor, bias: Tensor | None) -> PackedConv:
        """Pack another weight and bias with the same algorithm."""
        return pack_conv3x3(weight, bias, self.algorithm)


Entry = TypeVar("Entry", bound=Tensor | list[Tensor])
"""A feature map, or a list of maps of several levels."""


@overload
def flow_conv2d(
    x: Tensor,
    flow: Tensor | None,
    weight: Tensor | PackedConv,
    bias: Tensor | None = None,
    relu: bool = True,
    algorithm: str = "auto",
    active: Tensor | None = None,
) -> Tensor: ...


@overload
def flow_conv2d(
    x: list[Tensor],
    flow: list[Tensor] | None,
    weight: Tensor | PackedConv,
    bias: Tensor | None = None,
    relu: bool = True,
    algorithm: str = "auto",
    active: Tensor | None = None,
) -> list[Tensor]: ...


@overload
def flow_conv2d(
    x: list[Entry],
    flow: None,
    weight: list[PackedConv],
    bias: None = None,
    relu: bool = True,
    algorithm: str = "auto",
    active: None = None,
) -> list[Entry]: ...


def flow_conv2d(  # type: ignore[misc]  # a list[list[Tensor]] is not a list[Tensor | list[Tensor]], as lists are mutable
    x: Tensor | list[Tensor] | list[Tensor | list[Tensor]],
    flow: Tensor | list[Tensor] | None,
    weight: Tensor | PackedConv | list[PackedConv],
    bias: Tensor | None = None,
    relu: bool = True,
    algorithm: str = "auto",
    active: Tensor | None = None,
) -> Tensor | list[Tensor] | list[Tensor | list[Tensor]]:
    """Compute relu(conv3x3(x + flow) + bias), stride 1 and padding 1, for one map or all levels of a pyramid at once.

    Args:
        x: features (N, C_in, H, W), or a list of them, one per level (sizes and batches may differ); float32, float64,
            float16 or bfloat16, any strides. With a list of weights, `x` is a list of such entries, one for each
            weight.
        flow: added to `x`, in the same structure and shapes, or None.
        weight: (C_out, C_in, 3, 3), or a `PackedConv`, whose bias and algorithm are then used. A list of `PackedConv`
            is a list of independent convolutions; `flow` must then be None. On CUDA those of the same algorithm share
            one launch if possible.
        bias: (C_out,) or None.
        relu: whether to apply ReLU to the result; NaN stays NaN.
        algorithm: arithmetic of float32 (and of 16-bit types on the CPU); float64 is always direct. Errors below are
            relative to the largest output.
            "auto": on the CPU "winograd" from 32 input and 32 output channels on, else "direct". A weight that is not
            packed is also "direct" if all maps together have fewer than 256 pixels. On CUDA "tf32" if torch allows it
            for its own convolutions (`torch.backends.cudnn.conv.fp32_precision`, or
            `torch.backends.cudnn.allow_tf32`; the default), else "tf32x3". A compiled function keeps the setting at the
            time of tracing.
            "winograd": F(4x4, 3x3), a quarter of the multiplications, error about 3e-6; CUDA computes it as "tf32x3".
            "direct": multiply-adds in float32, exact up to the order of sums: error about 1e-6.
            "tf32": tensor cores; inputs and weights are rounded to TF32 (11-bit significand): error about 3e-4.
            "tf32x3": tensor cores, three products of TF32: error about 1e-6.
            The CPU computes the last two as "auto", so that one model serves both devices.
        active: (N,) bool, which images of the batch are computed, or None for all. It requires `weight` to be one
            `PackedConv`, and all levels to have N images. Results of the other images are zeros, whatever their
            features are. Unless gradients are needed, writing the zeros is their only cost. On CUDA the host does not
            wait for the flags.

    Returns:
        (N, C_out, H, W) in the structure of `x` and its dtype; each level channels-last if that level of `x` is.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit, naming the argument; packed weights in the order of
            another instruction set, device, dtype or version.
        ValueError: an unknown `algorithm`; `x` and `flow` of different structure; a bias beside a `PackedConv`;
            `active` without a `PackedConv`. With a list of weights: a weight that is not packed, a `flow`, a `bias`,
            `active`, or another number of entries in `x`.

    Note:
        Sums are in float32 (float64 for float64). On the CPU x + flow is not rounded to 16 bits; on CUDA it is, as
        tensor cores read it. With "direct" and on CUDA, a NaN in one pixel reaches its 3x3 neighborhood. With
        "winograd" on the CPU it may reach all outputs of the 4x4 tiles whose 6x6 input tiles have the pixel. An
        infinity may become NaN there. "tf32" turns values from 3.4e38 on into infinity, "tf32x3" turns an infinity into
        NaN. On CUDA a non-finite value at the border of a map may make the weight gradient of its channel NaN in all
        taps. Empty maps and no levels give empty results.

        Gradients flow to x, flow, weight and bias, in reverse and forward mode and to any order; they are
        deterministic.

        Complexity: 9 * C_in * C_out multiply-adds per pixel, a quarter of the multiplications with "winograd". An
        unpacked weight is packed in every call.

        Difference from `torch.nn.functional.conv2d` (torchvision, mmcv and detectron2 have no such operator): the sum
        with the flow, bias and ReLU are part of the kernel, and all levels of a pyramid are one call.

    Examples:
        >>> pyramid = [torch.rand(1, 32, 40, 60), torch.rand(1, 32, 20, 30)]
        >>> flow = [torch.rand(1, 32, 40, 60), torch.rand(1, 32, 20, 30)]
        >>> [tuple(level.shape) for level in flow_conv2d(pyramid, flow, torch.rand(64, 32, 3, 3), torch.rand(64))]
        [(1, 64, 40, 60), (1, 64, 20, 30)]

    Source: SpatialFlow (Chen et al.), equation 3; Lavin & Gray (2015) for the Winograd form.
    """
    if isinstance(weight, (list, tuple)) and not isinstance(weight, PackedConv):
        algorithm_code("flow_conv2d", algorithm)
        levels = [level for entry in as_list(x) for level in as_list(entry)]
        weights: Any = []
        biases: Any = []
        for conv in weight:
            is_packed = isinstance(conv, PackedConv)
            weights += conv[:2] if is_packed else [conv]
            biases += (conv.bias, conv.packed_bias) if is_packed else ()
        if not are_tensors(*levels, *weights, optional=(*biases, active)):
            return with_arrays(flow_conv2d, locals())
        if active is not None:
            raise ValueError("flow_conv2d: active must be None when weight is a list")
        return _convolve_group(x, flow, list(weight), bias, relu)
    levels, flows = as_list(x), [] if flow is None else as_list(flow)
    if isinstance(weight, PackedConv):
        weights, biases = weight[:2], (weight.bias, weight.packed_bias)
    else:
        weights, biases = [weight], (bias,)
    if not are_tensors(*levels, *flows, *weights, optional=(*biases, active)):
        return with_arrays(flow_conv2d, locals())
    if active is not None and not isinstance(weight, PackedConv):
        raise ValueError("flow_conv2d: active must be None unless weight is a PackedConv")
    algorithm_code("flow_conv2d", algorithm)
    single = isinstance(x, Tensor)
    if flow is not None and isinstance(flow, Tensor) != single:
        raise ValueError("flow_conv2d: flow must have the structure of x: both one tensor, or both a list of levels")
    levels, flows = [autocast(level) for level in levels], [autocast(level) for level in flows]
    if isinstance(weight, PackedConv):
        if bias is not None:
            raise ValueError("flow_conv2d: bias must be None when weight is a PackedConv, which has its own")
        conv, bias, algorithm, weight = weight, weight.bias, weight.algorithm, weight.weight
        code = algorithm_code("flow_conv2d", algorithm, levels[0] if levels else None)
        if not needs_gradient([*levels, *flows, weight, bias]):
            call = (levels, flows, conv.packed, conv.packed_bias, weight.shape[0], bool(relu), code)
            outputs = _flow_conv2d_packed(*call) if active is None else _flow_conv2d_packed(*call, active)
            return outputs[0] if single else list(outputs)
        if active is not None:
            _check_active("flow_conv2d", active, levels)
            levels, flows = _only_active(levels, active), _only_active(flows, active)
    bias = None if bias is None else autocast(bias)
    code = algorithm_code("flow_conv2d", algorithm, levels[0] if levels else None)
    outputs = differentiable_flow_conv2d(levels, flows, autocast(weight), bias, bool(relu), code) if levels else []
    outputs = outputs if active is None else _only_active(outputs, active)
    return outputs[0] if single else list(outputs)


def pack_conv3x3(weight: Tensor, bias: Tensor | None = None, algorithm: str = "auto") -> PackedConv:
    """Rearrange (and, for Winograd, transform) the weights of a 3x3 convolution once, for many calls of `flow_conv2d`.

    Args:
        weight: (C_out, C_in, 3, 3); float32, float64, float16 or bfloat16, any strides.
        bias: (C_out,) or None.
        algorithm: as in `flow_conv2d`.

    Returns:
        A `PackedConv` for inputs of the dtype of `weight`. Packed weights of 16-bit types are float32 and also serve
        float32 inputs. Do not change `weight` in place afterwards: calls with gradients read it, all others its packed
        copy.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit, naming the argument.
        ValueError: an unknown `algorithm`.
    """
    if not are_tensors(weight, optional=(bias,)):
        return with_arrays(pack_conv3x3, locals())
    code = algorithm_code("pack_conv3x3", algorithm)
    packed = pack_conv3x3_weight(weight, code)
    check_packed_bias("pack_conv3x3", bias, weight)
    packed_bias = None if bias is None else bias.detach().to(packed.dtype).contiguous()
    return PackedConv(packed, weight, bias, algorithm, packed_bias)


def _convolve_group(x: Any, flow: Any, weights: list[PackedConv], bias: Any, relu: bool) -> list[Any]:
    """Call `flow_conv2d` for a list of weights."""
    if flow is not None or bias is not None:
        raise ValueError("flow_conv2d: flow and bias must be None when weight is a list")
    if not isinstance(x, (list, tuple)) or len(x) != len(weights):
        got = f"{len(x)} entries" if isinstance(x, (list, tuple)) else type(x).__name__
        raise ValueError(f"flow_conv2d: x must be a list with an entry for each of {len(weights)} weights, got {got}")
    for index, conv in enumerate(weights):
        if not isinstance(conv, PackedConv):
            raise ValueError(f"flow_conv2d: weight[{index}] must be a PackedConv, got {type(conv).__name__}")
    entries = [as_list(entry) for entry in x]
    maps = [autocast(level) for entry in entries for level in entry]
    parameters = [t for conv in weights for t in (conv.weight, conv.bias)]
    is_traced = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]  # it cannot trace lists of sizes
    if not entries or not all(entries) or is_traced or needs_gradient([*maps, *parameters]):
        return [flow_conv2d(entry, None, conv, None, relu) for entry, conv in zip(x, weights, strict=True)]
    biases = [conv.packed.new_empty(0) if conv.packed_bias is None else conv.packed_bias for conv in weights]
    outputs = iter(
        _flow_conv2d_group(
            maps,
            [len(entry) for entry in entries],
            [conv.packed for conv in weights],
            biases,
            [conv.weight.shape[0] for conv in weights],
            bool(relu),
            [algorithm_code("flow_conv2d", conv.algorithm, maps[0]) for conv in weights],
        )
    )
    results = [[next(outputs) for _ in entry] for entry in entries]
    return [result[0] if isinstance(entry, Tensor) else result for entry, result in zip(x, results, strict=True)]


def _check_levels(op: str, name: str, levels: list[Tensor], channels: Any) -> None:
    for index, level in enumerate(levels):
        where, shape = f"{op}: {name}[{index}]", tuple(level.shape)
        torch._check(level.dim() == 4, partial(str, f"{where} must be (N, C, H, W), got {shape}"))
        torch._check(
            level.shape[1] == channels, partial(str, f"{where} must have {channels} channels, got shape {shape}")
        )


def _check_active(op: str, active: Tensor, levels: list[Tensor]) -> None:
    """Raise the operator's errors about `active`, for calls with gradients, which do not pass it to the operator."""
    if active.dtype != torch.bool:
        raise RuntimeError(f"{op}: active must be bool, got {str(active.dtype).removeprefix('torch.')}")
    if active.dim() != 1:
        raise RuntimeError(f"{op}: active must be (N,), got shape ({', '.join(map(str, active.shape))})")
    for index, level in enumerate(levels):
        if active.shape[0] != level.shape[0]:
            raise RuntimeError(
                f"{op}: active must have a flag for each image of x[{index}], {level.shape[0]}, got {len(active)}"
            )


def _only_active(levels: list[Tensor], active: Tensor) -> list[Tensor]:
    """Replace images that are not active by zeros; no gradient flows to those."""
    return [torch.where(active[:, None, None, None], level, 0) for level in levels]


@register_fake("flow_conv2d")
def _(
    x: list[Tensor], flow: list[Tensor], weight: Tensor, bias: Tensor | None, relu: bool, algorithm: int
) -> list[Tensor]:
    torch._check(weight.dim() == 4, lambda: f"flow_conv2d: weight must be (O, C, 3, 3), got {tuple(weight.shape)}")
    _check_levels("flow_conv2d", "x", x, weight.shape[1])
    _check_levels("flow_conv2d", "flow", flow, weight.shape[1])
    return empty_levels(x, weight.shape[0])


@register_fake("_flow_conv2d_packed", op="flow_conv2d")
def _(
    x: list[Tensor],
    flow: list[Tensor],
    packed: Tensor,
    bias: Tensor | None,
    out_channels: int,
    relu: bool,
    algorithm: int,
    active: Tensor | None = None,
) -> list[Tensor]:
    if x:
        check_packed_layout("flow_conv2d", packed)
    return empty_levels(x, out_channels)


@register_fake("_flow_conv2d_group", op="flow_conv2d")
def _(
    x: list[Tensor],
    counts: list[int],
    packed: list[Tensor],
    biases: list[Tensor],
    out_channels: list[int],
    relu: bool,
    algorithms: list[int],
) -> list[Tensor]:
    for weight in packed:
        check_packed_layout("flow_conv2d", weight)
    remaining, results = list(x), []
    for count, channels in zip(counts, out_channels, strict=True):
        results += empty_levels(remaining[:count], channels)
        del remaining[:count]
    return results
