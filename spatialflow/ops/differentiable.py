# SPDX-License-Identifier: Apache-2.0
"""Gradients for raw operators, once for eager mode, `torch.func` and `torch.compile`.

`torch.library.register_autograd` alone gives reverse mode, but forward-mode AD then returns zeros without a word and
`torch.func` transforms fail. An `autograd.Function` with `setup_context`, `jvp` and `vmap` does all of them, but
`torch.compile` does not trace one that defines `jvp`. So an operator gets both from one description, and calls choose.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

Nested = Any  # a tensor, a list of tensors, or a plain value


def _flatten(args: Sequence[Nested]) -> tuple[tuple[int, ...], list]:
    """Lists become their elements; the layout has a list's length, or -1 for an argument that is none."""
    layout, flat = [], []
    for arg in args:
        if isinstance(arg, (list, tuple)) and any(isinstance(item, torch.Tensor) for item in arg):
            layout.append(len(arg))
            flat.extend(arg)
        else:
            layout.append(-1)
            flat.append(arg)
    return tuple(layout), flat


def _nest(layout: tuple[int, ...], flat: Sequence) -> list[Nested]:
    nested, position = [], 0
    for length in layout:
        if length < 0:
            nested.append(flat[position])
            position += 1
        else:
            nested.append(list(flat[position : position + length]))
            position += length
    return nested


def _slice(arg: Nested, dim: Any, index: int) -> Nested:
    if isinstance(arg, (list, tuple)) and isinstance(dim, (list, tuple)):
        return [_slice(item, item_dim, index) for item, item_dim in zip(arg, dim)]
    return arg if dim is None else arg.select(dim, index)


def _stack(outputs: list) -> tuple[Any, Any]:
    first = outputs[0]
    if isinstance(first, torch.Tensor):
        return torch.stack(outputs), 0
    stacked = [torch.stack(parts) for parts in zip(*outputs)]
    return (stacked, [0] * len(stacked)) if isinstance(first, list) else (tuple(stacked), (0,) * len(stacked))


class DifferentiableOp:
    """A raw operator with reverse mode, forward mode, `vmap` and `torch.compile`; call it like the operator.

    Args:
        name: operator in the namespace `spatialflow`.
        setup_context: `(ctx, inputs, output) -> None`; keeps what the gradients need with `ctx.save_for_backward`
            (and `ctx.save_for_forward` for `jvp`), plain values as attributes.
        backward: `(ctx, needs, *grad_outputs) -> gradients`, one per input (None for those that have none, a list for
            a list of tensors); `needs` says in the same structure which are wanted.
        jvp: `(ctx, *tangents) -> output tangents`; a tangent is None for an input without one.
    """

    def __init__(
        self, name: str, *, setup_context: Callable[..., None], backward: Callable[..., Any], jvp: Callable[..., Any]
    ) -> None:
        qualified = f"spatialflow::{name}"
        op = getattr(torch.ops.spatialflow, name).default
        self.op = op
        returns = op._schema.returns
        self._returns_list = len(returns) == 1 and isinstance(returns[0].type, torch.ListType)

        def forward_flat(layout: tuple[int, ...], *flat: Any) -> Any:
            outputs = op(*_nest(layout, flat))
            return tuple(outputs) if isinstance(outputs, list) else outputs

        def setup_flat(ctx: Any, inputs: tuple, output: Any) -> None:
            ctx.layout = inputs[0]
            setup_context(ctx, tuple(_nest(ctx.layout, inputs[1:])), output)

        def backward_flat(ctx: Any, *grads: Any) -> tuple:
            gradients = backward(ctx, _nest(ctx.layout, ctx.needs_input_grad[1:]), *grads)
            flat: list = [None]
            for length, gradient in zip(ctx.layout, gradients):
                if length < 0:
                    flat.append(gradient)
                else:
                    flat.extend([None] * length if gradient is None else gradient)
            return tuple(flat)

        def jvp_flat(ctx: Any, _layout: Any, *tangents: Any) -> Any:
            return jvp(ctx, *_nest(ctx.layout, tangents))

        def vmap_flat(info: Any, in_dims: tuple, layout: tuple[int, ...], *flat: Any) -> tuple[Any, Any]:
            outputs = [
                self.function.apply(layout, *(_slice(arg, dim, i) for arg, dim in zip(flat, in_dims[1:])))
                for i in range(info.batch_size)
            ]
            return _stack(outputs)

        def vmap_raw(info: Any, in_dims: tuple, *args: Any) -> tuple[Any, Any]:
            return _stack(
                [op(*(_slice(arg, dim, i) for arg, dim in zip(args, in_dims))) for i in range(info.batch_size)]
            )

        def backward_raw(ctx: Any, *grads: Any) -> Any:
            needs = ctx.needs_input_grad
            gradients = backward(ctx, needs, *grads)
            # A list of tensors wants a list, also where none of them has a gradient.
            return tuple(
                [None] * len(need) if gradient is None and isinstance(need, (list, tuple)) else gradient
                for need, gradient in zip(needs, gradients)
            )

        self.function = type(
            name,
            (torch.autograd.Function,),
            {
                "forward": staticmethod(forward_flat),
                "setup_context": staticmethod(setup_flat),
                "backward": staticmethod(backward_flat),
                "jvp": staticmethod(jvp_flat),
                "vmap": staticmethod(vmap_flat),
            },
        )
        torch.library.register_autograd(qualified, backward_raw, setup_context=setup_context)
        torch.library.register_vmap(qualified, vmap_raw)

    def __call__(self, *args: Nested) -> Any:
        if torch.compiler.is_compiling():
            return self.op(*args)
        layout, flat = _flatten(args)
        result = self.function.apply(layout, *flat)
        return list(result) if self._returns_list else result


def autocast(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` in the autocast dtype of its device where autocast is on; float64 and integers stay as they are."""
    kind = tensor.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind) and tensor.dtype in (torch.float32, torch.float16, torch.bfloat16):
        return tensor.to(torch.get_autocast_dtype(kind))
    return tensor
