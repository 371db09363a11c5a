# SPDX-License-Identifier: Apache-2.0
"""Derivatives of `deform_conv2d`: to second order through the offset, to any order through the other operands.

The output without bias is linear in `input`, `weight` and `mask`. With a tangent of the offset (`offset_tangent`), the
operator gives the output's tangent in that direction, which is linear in `offset_tangent`. Therefore the derivatives,
except those of the bias, are sums of results of the three raw operators. In each term, one operand is replaced:

- for the tangent of a result, an operand by its tangent;
- for the gradient of a gradient, an operand by the cotangent of its gradient.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from spatialflow.ops.differentiable import DifferentiableOp
from spatialflow.ops.fake import register_fake
from spatialflow.ops.layout import memory_format_of


class _Operands(NamedTuple):
    """Tensors that the raw operators and their derivatives take; None where an operator has no such operand."""

    grad_output: Any = None  # (N, C_out, H_out, W_out)
    input: Any = None  # (N, C, H, W)
    offset: Any = None  # (N, 2 * offset_groups * kernel_h * kernel_w, H_out, W_out)
    weight: Any = None  # (C_out, C / groups, kernel_h, kernel_w)
    mask: Any = None  # (N, offset_groups * kernel_h * kernel_w, H_out, W_out), or None (version 1)
    offset_tangent: Any = None  # as offset, or None: the operator itself instead of its tangent


class _Gradients(NamedTuple):
    """Gradients with respect to input, offset and mask; None where not needed."""

    input: Tensor | None
    offset: Tensor | None
    mask: Tensor | None


Settings = tuple[int, ...]  # stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w, algorithm


def _output(operands: _Operands, settings: Settings) -> Tensor:
    """Return the operator's result without bias."""
    o = operands
    result: Tensor = differentiable_deform_conv2d(
        o.input, o.offset, o.weight, None, o.mask, o.offset_tangent, *settings
    )
    return result


def _data_gradients(operands: _Operands, settings: Settings, need_input: bool, need_sampling: bool) -> _Gradients:
    """Return the gradient of input if `need_input`, and those of offset and mask if `need_sampling`."""
    if not (need_input or need_sampling):
        return _Gradients(None, None, None)
    deterministic = torch.are_deterministic_algorithms_enabled()
    gradients = _backward_data(*operands, *settings, need_input, need_sampling, deterministic)
    return _Gradients(
        gradients[0] if need_input else None,
        gradients[1] if need_sampling else None,
        gradients[2] if need_sampling and operands.mask is not None else None,
    )


def _offset_tangent_gradient(operands: _Operands, settings: Settings) -> Tensor | None:
    """Return the gradient of `offset_tangent`, which is the operator's gradient of `offset`."""
    return _data_gradients(operands._replace(offset_tangent=None), settings, False, True).offset


def _weight_gradient(operands: _Operands, settings: Settings, kernel: tuple[int, ...]) -> Tensor:
    """Return the gradient of weight; `kernel` is (C / groups, kernel_h, kernel_w)."""
    o = operands
    gradient: Tensor = _backward_weight(o.grad_output, o.input, o.offset, o.mask, o.offset_tangent, *settings, *kernel)
    return gradient


def _replaced(operands: _Operands, **replacements: Tensor | None) -> dict[str, _Operands]:
    """Map the name of each replacement that is not None to the operands with that operand replaced."""
    return {name: operands._replace(**{name: new}) for name, new in replacements.items() if new is not None}


def _sum(terms: list[Tensor | None]) -> Tensor | None:
    present = [term for term in terms if term is not None]
    return sum(present[1:], present[0]) if present else None


def _mark_non_finite(operands: _Operands, replacement: Tensor | None) -> Tensor | None:
    """Return a replacement of the mask with NaN where the mask itself is not finite in the type it is used in.

    The operators skip samples whose mask is not finite, so the derivatives skip them too.
    """
    if replacement is None:
        return None
    mask = operands.mask if operands.input.dtype == torch.float64 else operands.mask.float()
    return torch.where(torch.isfinite(mask), replacement, torch.nan)


def _refuse_third_derivative(operands: _Operands, *tangents: Tensor | None) -> None:
    """Raise if a tangent of the offset or of `offset_tangent` would need a third derivative through the offset."""
    if operands.offset_tangent is not None and any(tangent is not None for tangent in tangents):
        raise NotImplementedError(
            "deform_conv2d: third derivatives through the offset, and forward mode over forward mode, are not available"
        )


def _save(ctx: Any, operands: _Operands, settings: tuple[Any, ...]) -> None:
    ctx.save_for_backward(*operands)
    ctx.save_for_forward(*operands)
    ctx.set_materialize_grads(False)
    ctx.settings = tuple(settings)


def _saved(ctx: Any) -> _Operands:
    return _Operands(*ctx.saved_tensors)


def _tangent_terms(
    operands: _Operands, offset_t: Any, mask_t: Any, offset_tangent_t: Any, **tangents: Tensor | None
) -> list[_Operands]:
    """List the operands of each term of a tangent: one operand is replaced by its tangent.

    The tangent of `offset` becomes the operand `offset_tangent`.
    """
    _refuse_third_derivative(operands, offset_t)
    replaced = _replaced(
        operands,
        **tangents,
        mask=_mark_non_finite(operands, mask_t),
        offset_tangent=offset_t if offset_tangent_t is None else offset_tangent_t,
    )
    return list(replaced.values())


# The operator: (input, offset, weight, bias, mask, offset_tangent, *settings) -> output.


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, offset, weight, _bias, mask, offset_tangent, *settings = inputs
    _save(ctx, _Operands(None, input, offset, weight, mask, offset_tangent), tuple(settings))


def _backward(ctx: Any, needs: Any, grad_output: Tensor | None) -> tuple[Any, ...]:
    settings = ctx.settings
    if grad_output is None:
        return (None,) * (6 + len(settings))
    need_input, need_offset, need_weight, need_bias, need_mask, need_tangent = needs[:6]
    operands = _saved(ctx)._replace(grad_output=grad_output)
    data = _data_gradients(operands, settings, need_input, need_offset or need_mask)
    return (
        data.input,
        data.offset,
        _weight_gradient(operands, settings, tuple(operands.weight.shape[1:])) if need_weight else None,
        grad_output.sum((0, 2, 3)) if need_bias else None,
        data.mask,
        _offset_tangent_gradient(operands, settings) if need_tangent else None,
        *(None,) * len(settings),
    )


def _jvp(
    ctx: Any, input_t: Any, offset_t: Any, weight_t: Any, bias_t: Any, mask_t: Any, offset_tangent_t: Any, *_: Any
) -> Tensor | None:
    operands = _saved(ctx)
    changed = _tangent_terms(operands, offset_t, mask_t, offset_tangent_t, input=input_t, weight=weight_t)
    terms: list[Tensor | None] = [_output(term, ctx.settings) for term in changed]
    if bias_t is not None:
        size = (operands.input.shape[0], operands.weight.shape[0], *operands.offset.shape[2:])
        terms.append(bias_t[:, None, None].expand(size))
    return _sum(terms)


# Gradients of input, offset and mask: (*operands, *settings, need_input, need_sampling, deterministic) -> 3 tensors.


def _data_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *arguments, need_input, need_sampling, _deterministic = inputs
    _save(ctx, _Operands(*arguments[:6]), tuple(arguments[6:]))
    ctx.need_input, ctx.need_sampling = need_input, need_sampling


def _data_backward(ctx: Any, needs: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
    settings, operands = ctx.settings, _saved(ctx)
    has_mask = operands.mask is not None
    offset_cotangent = cotangents[1] if ctx.need_sampling else None
    _refuse_third_derivative(operands, offset_cotangent)
    if needs[5]:
        _refuse_third_derivative(operands, operands.offset_tangent)
    changed = _replaced(
        operands,
        input=cotangents[0] if ctx.need_input else None,
        offset_tangent=offset_cotangent,
        mask=_mark_non_finite(operands, cotangents[2]) if ctx.need_sampling and has_mask else None,
    )
    need_grad_output, need_input, need_offset, need_weight, need_mask = needs[:5]
    terms: list[_Operands] = []
    for name, term in changed.items():
        wants_mask = need_mask and name != "mask"
        data = _data_gradients(term, settings, need_input and name != "input", need_offset or wants_mask)
        terms.append(
            _Operands(
                grad_output=_output(term, settings) if need_grad_output else None,
                input=data.input,
                offset=data.offset,
                weight=_weight_gradient(term, settings, tuple(operands.weight.shape[1:])) if need_weight else None,
                mask=data.mask if wants_mask else None,
            )
        )
    sums = (_sum([term[index] for term in terms]) for index in range(len(operands)))
    return (*sums, *(None,) * (len(settings) + 3))


def _data_jvp(
    ctx: Any,
    grad_output_t: Any,
    input_t: Any,
    offset_t: Any,
    weight_t: Any,
    mask_t: Any,
    offset_tangent_t: Any,
    *_: Any,
) -> tuple[Tensor, ...]:
    operands = _saved(ctx)
    _refuse_third_derivative(operands, offset_t, offset_tangent_t)
    changed = _replaced(
        operands,
        grad_output=grad_output_t,
        input=input_t,
        offset_tangent=offset_t,
        weight=weight_t,
        mask=_mark_non_finite(operands, mask_t),
    )
    terms = []
    for name, term in changed.items():  # the gradient of an operand does not depend on that operand
        data = _data_gradients(term, ctx.settings, ctx.need_input and name != "input", ctx.need_sampling)
        terms.append(data._replace(mask=None) if name == "mask" else data)
    has_mask = operands.mask is not None
    needed = (ctx.need_input, ctx.need_sampling, ctx.need_sampling and has_mask)
    like = (operands.input, operands.offset, operands.mask if has_mask else operands.offset)
    tangents = []
    for index, (is_needed, tensor) in enumerate(zip(needed, like, strict=True)):
        total = _sum([term[index] for term in terms])
        if total is None:
            total = torch.zeros_like(tensor) if is_needed else tensor.new_zeros((0,))
        tangents.append(total)
    return tuple(tangents)


# Gradient of weight: (grad_output, input, offset, mask, offset_tangent, *settings, *kernel) -> tensor like the weight.


def _weight_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad_output, input, offset, mask, offset_tangent, *settings = inputs
    _save(ctx, _Operands(grad_output, input, offset, None, mask, offset_tangent), tuple(settings[:-3]))
    ctx.kernel = tuple(settings[-3:])


def _weight_backward(ctx: Any, needs: Any, cotangent: Tensor | None) -> tuple[Any, ...]:
    settings = ctx.settings
    no_gradients = (None,) * (len(settings) + 3)
    if cotangent is None:
        return (None,) * 5 + no_gradients
    need_grad_output, need_input, need_offset, need_mask, need_tangent = needs[:5]
    operands = _saved(ctx)._replace(weight=cotangent)
    data = _data_gradients(operands, settings, need_input, need_offset or need_mask)
    return (
        _output(operands, settings) if need_grad_output else None,
        *data,
        _offset_tangent_gradient(operands, settings) if need_tangent else None,
        *no_gradients,
    )


def _weight_jvp(
    ctx: Any, grad_output_t: Any, input_t: Any, offset_t: Any, mask_t: Any, offset_tangent_t: Any, *_: Any
) -> Tensor | None:
    operands = _saved(ctx)
    changed = _tangent_terms(operands, offset_t, mask_t, offset_tangent_t, grad_output=grad_output_t, input=input_t)
    return _sum([_weight_gradient(term, ctx.settings, ctx.kernel) for term in changed])


differentiable_deform_conv2d = DifferentiableOp(
    "deform_conv2d", setup_context=_setup_context, backward=_backward, jvp=_jvp
)
_backward_data = DifferentiableOp(
    "_deform_conv2d_backward_data", setup_context=_data_setup_context, backward=_data_backward, jvp=_data_jvp
)
_backward_weight = DifferentiableOp(
    "_deform_conv2d_backward_weight", setup_context=_weight_setup_context, backward=_weight_backward, jvp=_weight_jvp
)


def _empty(like: Tensor, needed: bool) -> Tensor:
    if not needed:
        return like.new_empty((0,))
    return torch.empty(like.shape, dtype=like.dtype, device=like.device, memory_format=memory_format_of(like))


@register_fake("_deform_conv2d_backward_data")
def _(
    grad_output: Tensor,
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    offset_tangent: Tensor | None,
    *settings: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    *_, need_input, need_sampling, _deterministic = settings
    return (
        _empty(input, need_input),
        _empty(offset, need_sampling),
        _empty(offset if mask is None else mask, need_sampling and mask is not None),
    )


@register_fake("_deform_conv2d_backward_weight")
def _(
    grad_output: Tensor,
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    offset_tangent: Tensor | None,
    *settings: Any,
) -> Tensor:
    *_, group_channels, kernel_h, kernel_w = settings
    return input.new_empty((grad_output.shape[1], group_channels, kernel_h, kernel_w))
