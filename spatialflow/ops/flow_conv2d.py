# SPDX-License-Identifier: Apache-2.0
"""3x3 convolution of a feature plus a flow, with bias and ReLU, over a whole pyramid in one call."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spatialflow.ops.arrays import are_tensors, with_arrays
from spatialflow.ops.differentiable import DifferentiableOp, autocast, needs_gradient, without_gradient
from spatialflow.ops.fake import register_fake
from spatialflow.ops.layout import memory_format_of

_ALGORITHMS = {"auto": 0, "winograd": 1, "direct": 2, "tf32": 3, "tf32x3": 4}

_pack_conv3x3 = without_gradient("_pack_conv3x3")
_flow_conv2d_packed = without_gradient("_flow_conv2d_packed")
_flow_conv2d_group = without_gradient("_flow_conv2d_group")

# Number of elements that identifies the layout of packed weights on the CPU (packed_tag in csrc/ops/conv_algorithm.h).
_CPU_TAG = _pack_conv3x3(torch.empty((0, 0, 3, 3), dtype=torch.float32, device="cpu"), 2).numel()
CUDA_TAG = 2
_PACKED_UNIT = 288  # divides the length of packed weights without their tag


class PackedConv(NamedTuple):
    """A 3x3 convolution with its weights in the order that the kernels read, made by `pack_conv3x3`.

    The order depends on the instruction set, the device and the version of the package. A pickle or a deep copy
    therefore has `weight` alone, which is packed again on loading. Every operator refuses a `packed` that it would read
    in another order. `weight` also serves calls that need gradients and autocast.
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


def flow_conv2d(
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
            float16 or bfloat16, any strides. With a list of weights, one such entry for each.
        flow: added to `x`, in the same structure and shapes, or None.
        weight: (C_out, C_in, 3, 3), or a `PackedConv`, whose bias and algorithm are then used. A list of `PackedConv`
            is a list of independent convolutions, which on CUDA share one launch; `flow` must then be None.
        bias: (C_out,) or None.
        relu: whether to apply ReLU to the result; NaN stays NaN.
        algorithm: arithmetic of float32 (and of 16-bit types on the CPU); float64 is always direct. Errors below are
            relative to the largest output.
            "auto": on the CPU "winograd" from 32 input and 32 output channels on, unless all maps together are small
            and the weight is not packed, else "direct". On CUDA "tf32" if torch allows it for its own convolutions
            (`torch.backends.cudnn.conv.fp32_precision`, or `torch.backends.cudnn.allow_tf32`; the default), else
            "tf32x3". A compiled function keeps the setting at the time of tracing.
            "winograd": F(4x4, 3x3), a quarter of the multiplications, error about 3e-6; on CUDA as "tf32x3".
            "direct": multiply-adds in float32, exact up to the order of sums: error about 1e-6.
            "tf32": tensor cores; inputs and weights are rounded to TF32, 11 bits: error about 3e-4.
            "tf32x3": tensor cores, three products of TF32: error about 1e-6.
            The CPU computes the last two as "auto", so that one model serves both devices.
        active: (N,) bool, which images of the batch are computed, or None for all; with one `PackedConv` alone, and
            levels that all have N images. Results of the other images are zeros, whatever their features are. Writing
            the zeros is their only cost, and on CUDA the host does not wait for the flags.

    Returns:
        (N, C_out, H, W) in the structure of `x` and its dtype; each level channels-last if that level of `x` is.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit, naming the argument; packed weights in the order of
            another instruction set, device, dtype or version.
        ValueError: an unknown `algorithm`, or `x` and `flow` of different structure, or bias beside a `PackedConv`, or
            `active` without one, or a list of weights with another number of entries in `x`, with a `flow`, or of
            unpacked weights.

    Note:
        Sums are in float32 (float64 for float64). On the CPU x + flow is not rounded to 16 bits; on CUDA it is, as
        tensor cores read it. With "direct" and on CUDA, a NaN in one pixel reaches its 3x3 neighborhood. With
        "winograd" on the CPU it may reach all outputs of the 4x4 tiles whose 6x6 input tiles have the pixel, and an
        infinity may become NaN there. "tf32" turns values from 3.4e38 on into infinity, "tf32x3" turns an infinity into
        NaN. On CUDA the weight gradient of a channel with such a value at the border of its map may be NaN in all taps.
        Empty maps and no levels give empty results.

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
        levels = [level for entry in _as_levels(x) for level in _as_levels(entry)]
        weights, biases = [], []
        for conv in weight:
            is_packed = isinstance(conv, PackedConv)
            weights += conv[:2] if is_packed else [conv]
            biases += (conv.bias, conv.packed_bias) if is_packed else ()
        if not are_tensors(*levels, *weights, optional=(*biases, active)):
            return with_arrays(flow_conv2d, locals())
        if active is not None:
            raise ValueError("flow_conv2d: active must be None when weight is a list")
        return _convolve_group(x, flow, list(weight), bias, relu)
    levels, flows = _as_levels(x), [] if flow is None else _as_levels(flow)
    is_packed = isinstance(weight, PackedConv)
    weights, biases = (weight[:2], (weight.bias, weight.packed_bias)) if is_packed else ([weight], (bias,))
    if not are_tensors(*levels, *flows, *weights, optional=(*biases, active)):
        return with_arrays(flow_conv2d, locals())
    if active is not None and not is_packed:
        raise ValueError("flow_conv2d: active must be None unless weight is a PackedConv")
    algorithm_code("flow_conv2d", algorithm)
    single = isinstance(x, Tensor)
    if flow is not None and isinstance(flow, Tensor) != single:
        raise ValueError("flow_conv2d: flow must have the structure of x: both one tensor, or both a list of levels")
    levels, flows = [autocast(level) for level in levels], [autocast(level) for level in flows]
    if is_packed:
        if bias is not None:
            raise ValueError("flow_conv2d: bias must be None when weight is a PackedConv, which has its own")
        conv, weight, bias, algorithm = weight, weight.weight, weight.bias, weight.algorithm
        code = algorithm_code("flow_conv2d", algorithm, *levels[:1])
        if not needs_gradient([*levels, *flows, weight, bias]):
            call = (levels, flows, conv.packed, conv.packed_bias, weight.shape[0], bool(relu), code)
            outputs = _flow_conv2d_packed(*call) if active is None else _flow_conv2d_packed(*call, active)
            return outputs[0] if single else list(outputs)
        if active is not None:
            _check_active("flow_conv2d", active, levels)
            levels, flows = _only_active(levels, active), _only_active(flows, active)
    bias = None if bias is None else autocast(bias)
    code = algorithm_code("flow_conv2d", algorithm, *levels[:1])
    outputs = _flow_conv2d(levels, flows, autocast(weight), bias, bool(relu), code) if levels else []
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
        float32 inputs. Do not change `weight` in place afterwards: calls with gradients or under autocast read it, all
        others its packed copy.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit, naming the argument.
        ValueError: an unknown `algorithm`.
    """
    if not are_tensors(weight, optional=(bias,)):
        return with_arrays(pack_conv3x3, locals())
    code = algorithm_code("pack_conv3x3", algorithm)
    packed = _pack_conv3x3(weight, code)
    check_packed_bias("pack_conv3x3", bias, weight)
    packed_bias = None if bias is None else bias.detach().to(packed.dtype).contiguous()
    return PackedConv(packed, weight, bias, algorithm, packed_bias)


def check_packed_bias(op: str, bias: Tensor | None, weight: Tensor) -> None:
    """Raise RuntimeError, as the operators do, if the bias of a weight to be packed does not fit it."""
    if bias is None:
        return
    if bias.shape != weight.shape[:1]:
        raise RuntimeError(f"{op}: bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    if not bias.is_floating_point():
        raise RuntimeError(f"{op}: bias must be of a floating dtype, got {str(bias.dtype).removeprefix('torch.')}")
    if bias.device != weight.device:
        raise RuntimeError(f"{op}: bias must be on the device of weight, {weight.device}, got {bias.device}")


def _convolve_group(x: Any, flow: Any, weights: list[PackedConv], bias: Any, relu: bool) -> list[Any]:
    """Call `flow_conv2d` for a list of weights."""
    if flow is not None or bias is not None:
        raise ValueError("flow_conv2d: flow and bias must be None when weight is a list")
    if not isinstance(x, (list, tuple)) or len(x) != len(weights):
        found = f"{len(x)} entries" if isinstance(x, (list, tuple)) else type(x).__name__
        raise ValueError(f"flow_conv2d: x must be a list with an entry for each of {len(weights)} weights, got {found}")
    for index, conv in enumerate(weights):
        if not isinstance(conv, PackedConv):
            raise ValueError(f"flow_conv2d: weight[{index}] must be a PackedConv, got {type(conv).__name__}")
    entries = [_as_levels(entry) for entry in x]
    maps = [autocast(level) for entry in entries for level in entry]
    parameters = [t for conv in weights for t in (conv.weight, conv.bias)]
    if not entries or not all(entries) or needs_gradient([*maps, *parameters]):
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


def algorithm_code(op: str, algorithm: str, x: Tensor | None = None, without: str | None = None) -> int:
    """Return the number of `algorithm` in the schemas; for float32 `x` on CUDA, "auto" is "tf32" if torch allows TF32.

    `without` is a name that `op` does not accept.
    """
    if not isinstance(algorithm, str) or algorithm not in _ALGORITHMS or algorithm == without:
        names = ", ".join(repr(name) for name in _ALGORITHMS if name != without)
        reason = ", which does not apply here" if algorithm == without else ""
        raise ValueError(f"{op}: algorithm must be one of {names}, got {algorithm!r}{reason}")
    if algorithm == "auto" and x is not None and _may_use_tf32(x):
        algorithm = "tf32"
    return _ALGORITHMS[algorithm]


def _as_levels(x: Tensor | list[Tensor]) -> list[Tensor]:
    return list(x) if isinstance(x, (list, tuple)) else [x]


def _may_use_tf32(x: Tensor) -> bool:
    return x.device.type == "cuda" and x.dtype == torch.float32 and _allows_tf32()


def _allows_tf32() -> bool:
    """Return whether torch lets cuDNN round float32 convolutions to TF32."""
    return torch.backends.cudnn.conv.fp32_precision == "tf32"


# The attribute that torch.compiler.assume_constant_result sets. Calling it would import torch's compiler, which takes a
# second.
_allows_tf32._dynamo_marked_constant = True


def _check_levels(op: str, name: str, levels: list[Tensor], channels: Any) -> None:
    for index, level in enumerate(levels):
        where, shape = f"{op}: {name}[{index}]", tuple(level.shape)
        torch._check(level.dim() == 4, partial(str, f"{where} must be (N, C, H, W), got {shape}"))
        torch._check(
            level.shape[1] == channels, partial(str, f"{where} must have {channels} channels, got shape {shape}")
        )


def _check_active(op: str, active: Tensor, levels: list[Tensor]) -> None:
    """Raise as the operator does, for calls that torch composes from other operators."""
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


def _empty_levels(x: list[Tensor], channels: Any) -> list[Tensor]:
    outputs = []
    for level in x:
        size = (level.shape[0], channels, level.shape[2], level.shape[3])
        outputs.append(torch.empty(size, dtype=level.dtype, device=level.device, memory_format=memory_format_of(level)))
    return outputs


@register_fake("flow_conv2d")
def _(
    x: list[Tensor], flow: list[Tensor], weight: Tensor, bias: Tensor | None, relu: bool, algorithm: int
) -> list[Tensor]:
    torch._check(weight.dim() == 4, lambda: f"flow_conv2d: weight must be (O, C, 3, 3), got {tuple(weight.shape)}")
    _check_levels("flow_conv2d", "x", x, weight.shape[1])
    _check_levels("flow_conv2d", "flow", flow, weight.shape[1])
    return _empty_levels(x, weight.shape[0])


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
    return _empty_levels(x, out_channels)


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
    rest, results = list(x), []
    for count, channels in zip(counts, out_channels, strict=True):
        results += _empty_levels(rest[:count], channels)
        del rest[:count]
    return results


@register_fake("_pack_conv3x3")
def _(weight: Tensor, algorithm: int) -> Tensor:
    out_channels, in_channels = weight.shape[0], weight.shape[1]
    is_double = weight.dtype == torch.float64
    winograd = not is_double and (
        algorithm == _ALGORITHMS["winograd"]
        or (algorithm != _ALGORITHMS["direct"] and in_channels >= 32 and out_channels >= 32)
    )
    size = (36 if winograd else 9 if is_double else 18) * in_channels * ((out_channels + 31) // 32 * 32)
    dtype = torch.float64 if is_double else torch.float32
    return weight.new_empty((size + packed_tag(weight.device, dtype),), dtype=dtype)


def packed_tag(device: torch.device, dtype: torch.dtype) -> int:
    """Return the number of elements behind packed weights of a dtype, which identifies their layout (csrc/ops)."""
    return (CUDA_TAG if device.type == "cuda" else _CPU_TAG) + (dtype == torch.float64)


def check_packed_layout(op: str, packed: Tensor) -> None:
    """Refuse, in fake kernels, weights packed for another back end, as the operators do."""
    tag, wanted = packed.shape[0] % _PACKED_UNIT, packed_tag(packed.device, packed.dtype)
    torch._check(
        tag == wanted,
        lambda: (
            f"{op}: the packed weight has the layout of another instruction set, device, dtype or version "
            f"(tag {tag}, here {wanted}); pack the weight again, by pack_conv3x3 or pack_subnets"
        ),
    )


@register_fake("_flow_conv2d_weight_gradient")
def _(x: list[Tensor], flow: list[Tensor], grad_output: list[Tensor], algorithm: int) -> Tensor:
    return x[0].new_empty((grad_output[0].shape[1], x[0].shape[1], 3, 3))


# Without ReLU the operator is linear in (x, flow) and in (weight, bias). Every derivative is therefore one of two
# operators. One is the convolution itself, with weights rotated by 180 degrees for gradients of the inputs. The other
# is the weight gradient. ReLU only masks.
def _rotated(weight: Tensor) -> Tensor:
    return weight.flip(2, 3).transpose(0, 1)


def _relu_gradient(gradients: list[Tensor], outputs: list[Tensor]) -> list[Tensor]:
    """Apply the gradient of ReLU, given its outputs.

    Outputs are detached: torch would differentiate their sign to zeros, and turn NaN in them to NaN gradients.
    """
    masks = [output.detach() for output in outputs]
    return [
        torch.ops.aten.threshold_backward(gradient, mask, 0) for gradient, mask in zip(gradients, masks, strict=True)
    ]


def _bias_gradient(gradients: list[Tensor]) -> Tensor:
    wide = torch.float64 if gradients[0].dtype == torch.float64 else torch.float32
    return sum(gradient.sum((0, 2, 3), dtype=wide) for gradient in gradients).to(gradients[0].dtype)


def _setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
    x, flow, weight, bias, ctx.relu, ctx.algorithm = inputs
    ctx.levels, ctx.flows, ctx.has_bias = len(x), len(flow), bias is not None
    saved = [weight, *x, *flow, *(output if ctx.relu else ())]
    ctx.save_for_backward(*saved)
    ctx.save_for_forward(*saved)
    ctx.set_materialize_grads(False)  # otherwise NaN would multiply tangents of zeros


def _saved(ctx: Any) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    weight, *levels = ctx.saved_tensors
    x, flow = levels[: ctx.levels], levels[ctx.levels : ctx.levels + ctx.flows]
    return weight, x, flow, levels[ctx.levels + ctx.flows :]


def _any_needed(needs: Any) -> bool:
    return any(map(_any_needed, needs)) if isinstance(needs, (list, tuple)) else bool(needs)


def _backward(ctx: Any, needs: Any, *grad_outputs: Any) -> tuple:
    weight, x, flow, outputs = _saved(ctx)
    gradients = list(grad_outputs[0]) if isinstance(grad_outputs[0], (list, tuple)) else list(grad_outputs)
    if all(gradient is None for gradient in gradients):
        return (None,) * 6
    gradients = [
        level.new_zeros((level.shape[0], weight.shape[0], *level.shape[2:])) if gradient is None else gradient
        for gradient, level in zip(gradients, x, strict=True)
    ]
    gradients = _relu_gradient(gradients, outputs) if ctx.relu else gradients
    grad_x = grad_weight = grad_bias = None
    if _any_needed(needs[0]) or _any_needed(needs[1]):
        grad_x = list(_flow_conv2d(gradients, [], _rotated(weight), None, False, ctx.algorithm))
    if needs[2]:
        grad_weight = _flow_conv2d_weight_gradient(x, flow, gradients, ctx.algorithm)
    if needs[3]:
        grad_bias = _bias_gradient(gradients)
    return grad_x, grad_x if ctx.flows else None, grad_weight, grad_bias, None, None


def _sum_levels(*terms: list[Tensor] | None) -> list[Tensor] | None:
    present = [term for term in terms if term is not None]
    return [sum(parts[1:], parts[0]) for parts in zip(*present, strict=True)] if present else None


def _with_zeros(tangents: Any, like: list[Tensor]) -> list[Tensor] | None:
    """Replace missing tangents of a list of levels by zeros; return None if all are missing."""
    if not isinstance(tangents, (list, tuple)) or all(t is None for t in tangents):
        return None
    return [torch.zeros_like(level) if t is None else t for t, level in zip(tangents, like, strict=True)]


def _jvp(ctx: Any, x_t: Any, flow_t: Any, weight_t: Tensor | None, bias_t: Tensor | None, *_: Any) -> tuple:
    weight, x, flow, outputs = _saved(ctx)
    x_t, flow_t = _with_zeros(x_t, x), _with_zeros(flow_t, flow)
    terms = []
    if x_t is not None or flow_t is not None:
        first, second = (x_t, flow_t or []) if x_t is not None else (flow_t, [])
        terms.append(_flow_conv2d(first, second, weight, None, False, ctx.algorithm))
    if weight_t is not None:
        terms.append(_flow_conv2d(x, flow, weight_t, bias_t, False, ctx.algorithm))
    elif bias_t is not None:
        terms.append([bias_t.view(-1, 1, 1).expand(t.shape[0], -1, t.shape[2], t.shape[3]) for t in x])
    tangents = _sum_levels(*(list(term) for term in terms))
    return tuple(_relu_gradient(tangents, outputs) if ctx.relu else tangents)


def _gradient_setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, flow, grad_output, ctx.algorithm = inputs
    ctx.levels, ctx.flows = len(x), len(flow)
    ctx.save_for_backward(*x, *flow, *grad_output)
    ctx.save_for_forward(*x, *flow, *grad_output)
    ctx.set_materialize_grads(False)


def _gradient_saved(ctx: Any) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    levels = list(ctx.saved_tensors)
    return levels[: ctx.levels], levels[ctx.levels : ctx.levels + ctx.flows], levels[ctx.levels + ctx.flows :]


def _gradient_backward(ctx: Any, needs: Any, grad_weight: Tensor) -> tuple:
    x, flow, gradients = _gradient_saved(ctx)
    grad_x = grad_gradients = None
    if grad_weight is None:
        return None, None, None, None
    if _any_needed(needs[0]) or _any_needed(needs[1]):
        grad_x = list(_flow_conv2d(gradients, [], _rotated(grad_weight), None, False, ctx.algorithm))
    if _any_needed(needs[2]):
        grad_gradients = list(_flow_conv2d(x, flow, grad_weight, None, False, ctx.algorithm))
    return grad_x, grad_x if ctx.flows else None, grad_gradients, None


def _gradient_jvp(ctx: Any, x_t: Any, flow_t: Any, gradients_t: Any, *_: Any) -> Tensor:
    x, flow, gradients = _gradient_saved(ctx)
    x_t, flow_t, gradients_t = _with_zeros(x_t, x), _with_zeros(flow_t, flow), _with_zeros(gradients_t, gradients)
    terms = []
    if x_t is not None or flow_t is not None:
        first, second = (x_t, flow_t or []) if x_t is not None else (flow_t, [])
        terms.append(_flow_conv2d_weight_gradient(first, second, gradients, ctx.algorithm))
    if gradients_t is not None:
        terms.append(_flow_conv2d_weight_gradient(x, flow, gradients_t, ctx.algorithm))
    return sum(terms[1:], terms[0])


_flow_conv2d = DifferentiableOp("flow_conv2d", setup_context=_setup_context, backward=_backward, jvp=_jvp)
_flow_conv2d_weight_gradient = DifferentiableOp(
    "_flow_conv2d_weight_gradient",
    setup_context=_gradient_setup_context,
    backward=_gradient_backward,
    jvp=_gradient_jvp,
)
