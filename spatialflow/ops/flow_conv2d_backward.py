# SPDX-License-Identifier: Apache-2.0
"""Derivatives of `flow_conv2d`, to any order.

Without ReLU the operator is affine in (x, flow) and linear in (weight, bias). Derivatives therefore need only two
operators, apart from sums and broadcasts for the bias. One is the convolution itself, with weights rotated by 180
degrees for gradients of the inputs. The other is the weight gradient. The derivative of ReLU is a mask.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from spatialflow.ops.differentiable import DifferentiableOp
from spatialflow.ops.fake import register_fake


@register_fake("_flow_conv2d_weight_gradient")
def _(x: list[Tensor], flow: list[Tensor], grad_output: list[Tensor], algorithm: int) -> Tensor:
    return x[0].new_empty((grad_output[0].shape[1], x[0].shape[1], 3, 3))


def _rotated(weight: Tensor) -> Tensor:
    return weight.flip(2, 3).transpose(0, 1)


def _relu_gradient(gradients: list[Tensor], outputs: list[Tensor]) -> list[Tensor]:
    """Apply the gradient of ReLU, given its outputs.

    Outputs are detached. Otherwise torch would also differentiate with respect to them. That derivative is zero,
    but gives NaN gradients where outputs are NaN.
    """
    masks = [output.detach() for output in outputs]
    return [
        torch.ops.aten.threshold_backward(gradient, mask, 0) for gradient, mask in zip(gradients, masks, strict=True)
    ]


def _bias_gradient(gradients: list[Tensor]) -> Tensor:
    wide = torch.float64 if gradients[0].dtype == torch.float64 else torch.float32
    total = cast("Tensor", sum(gradient.sum((0, 2, 3), dtype=wide) for gradient in gradients))
    return total.to(gradients[0].dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, flow, weight, bias, ctx.relu, ctx.algorithm = inputs
    ctx.levels, ctx.flows, ctx.has_bias = len(x), len(flow), bias is not None
    saved = [weight, *x, *flow, *(output if ctx.relu else ())]
    ctx.save_for_backward(*saved)
    ctx.save_for_forward(*saved)
    ctx.set_materialize_grads(False)  # absent gradients stay None, so that their levels are left out


def _saved(ctx: Any) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    weight, *levels = ctx.saved_tensors
    x, flow = levels[: ctx.levels], levels[ctx.levels : ctx.levels + ctx.flows]
    return weight, x, flow, levels[ctx.levels + ctx.flows :]


def _any_needed(needs: Any) -> bool:
    return any(map(_any_needed, needs)) if isinstance(needs, (list, tuple)) else bool(needs)


def _backward(ctx: Any, needs: Any, *grad_outputs: Any) -> tuple[Any, ...]:
    weight, x, flow, outputs = _saved(ctx)
    gradients = list(grad_outputs[0]) if isinstance(grad_outputs[0], (list, tuple)) else list(grad_outputs)
    # Levels without a gradient add nothing to sums: zeros times values that are not finite would be NaN.
    used = [level for level, gradient in enumerate(gradients) if gradient is not None]
    if not used:
        return (None,) * 6
    gradients = [gradients[level] for level in used]
    used_x, used_flow, used_outputs = ([levels[i] for i in used] if levels else [] for levels in (x, flow, outputs))
    gradients = _relu_gradient(gradients, used_outputs) if ctx.relu else gradients
    grad_x = grad_weight = grad_bias = None
    if _any_needed(needs[0]) or _any_needed(needs[1]):
        grad_used = differentiable_flow_conv2d(gradients, [], _rotated(weight), None, False, ctx.algorithm)
        by_level = dict(zip(used, grad_used, strict=True))
        grad_x = [by_level[i] if i in by_level else torch.zeros_like(level) for i, level in enumerate(x)]
    if needs[2]:
        grad_weight = _flow_conv2d_weight_gradient(used_x, used_flow, gradients, ctx.algorithm)
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


def _jvp(ctx: Any, x_t: Any, flow_t: Any, weight_t: Tensor | None, bias_t: Tensor | None, *_: Any) -> tuple[Any, ...]:
    weight, x, flow, outputs = _saved(ctx)
    x_t, flow_t = _with_zeros(x_t, x), _with_zeros(flow_t, flow)
    terms = []
    if x_t is not None or flow_t is not None:
        first, second = (x_t, flow_t or []) if x_t is not None else (flow_t, [])
        terms.append(differentiable_flow_conv2d(first, second, weight, None, False, ctx.algorithm))
    if weight_t is not None:
        terms.append(differentiable_flow_conv2d(x, flow, weight_t, bias_t, False, ctx.algorithm))
    elif bias_t is not None:
        terms.append([bias_t.view(-1, 1, 1).expand(t.shape[0], -1, t.shape[2], t.shape[3]) for t in x])
    tangents = cast("list[Tensor]", _sum_levels(*(list(term) for term in terms)))
    return tuple(_relu_gradient(tangents, outputs) if ctx.relu else tangents)


def _gradient_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, flow, grad_output, ctx.algorithm = inputs
    ctx.levels, ctx.flows = len(x), len(flow)
    ctx.save_for_backward(*x, *flow, *grad_output)
    ctx.save_for_forward(*x, *flow, *grad_output)
    ctx.set_materialize_grads(False)


def _gradient_saved(ctx: Any) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    levels = list(ctx.saved_tensors)
    return levels[: ctx.levels], levels[ctx.levels : ctx.levels + ctx.flows], levels[ctx.levels + ctx.flows :]


def _gradient_backward(ctx: Any, needs: Any, grad_weight: Tensor) -> tuple[Any, ...]:
    x, flow, gradients = _gradient_saved(ctx)
    grad_x = grad_gradients = None
    if grad_weight is None:
        return None, None, None, None
    if _any_needed(needs[0]) or _any_needed(needs[1]):
        grad_x = list(differentiable_flow_conv2d(gradients, [], _rotated(grad_weight), None, False, ctx.algorithm))
    if _any_needed(needs[2]):
        grad_gradients = list(differentiable_flow_conv2d(x, flow, grad_weight, None, False, ctx.algorithm))
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


differentiable_flow_conv2d = DifferentiableOp("flow_conv2d", setup_context=_setup_context, backward=_backward, jvp=_jvp)
_flow_conv2d_weight_gradient = DifferentiableOp(
    "_flow_conv2d_weight_gradient",
    setup_context=_gradient_setup_context,
    backward=_gradient_backward,
    jvp=_gradient_jvp,
)
