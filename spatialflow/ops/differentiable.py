# SPDX-License-Identifier: Apache-2.0
"""Gradients of raw operators, written once for eager mode, `torch.func` and `torch.compile`.

`torch.library.register_autograd` alone gives reverse mode only. Forward mode then returns zeros without an error,
compiled or not, and the derivatives of `torch.func` fail. A `torch.autograd.Function` with a `jvp`, applied in Python,
supports all of them, but `torch.compile` does not trace it. Therefore the operator's autograd kernel applies the
`Function`, as the autograd kernels of torch's operators do. Every caller reaches the kernel through the dispatcher, and
a graph contains the operator alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from spatialflow import _library as libraries
from spatialflow.ops._torch_private import (
    AFTER_AUTOGRAD,
    AutoDispatchBelowAutograd,
    OpOverload,
    SingleLevelFunction,
    are_functorch_transforms_active,
    enable_single_level_autograd_function,
    is_any_autocast_enabled,
    is_forward_ad_active,
    is_forward_grad_enabled,
    is_torch_function_mode_enabled,
    set_forward_grad_enabled,
    unpack_dual,
)

libraries.load()  # registers the raw operators

Nested = Any  # a tensor, a list of tensors, or a plain value

_library = torch.library.Library("spatialflow", "FRAGMENT")  # registrations live as long as this object
_VALUE_TYPES = frozenset({int, float, bool, type(None)})


def _flatten(args: Sequence[Nested]) -> tuple[tuple[int, ...], list[Any]]:
    """Replace lists of tensors by their elements; the layout has the length of a list, -1 for any other argument."""
    layout: list[int] = []
    flat: list[Any] = []
    for arg in args:
        if isinstance(arg, (list, tuple)) and any(isinstance(item, torch.Tensor) for item in arg):
            layout.append(len(arg))
            flat.extend(arg)
        else:
            layout.append(-1)
            flat.append(arg)
    return tuple(layout), flat


def _needs_no_derivative(args: Sequence[Nested]) -> bool:
    """Return whether no derivative can be requested: no input requires one, and no forward mode or transform is active.

    A traced argument counts as one that requires a derivative.
    """
    if are_functorch_transforms_active() or is_forward_ad_active():
        return False
    return _are_constants(args, torch.is_grad_enabled())


def _are_constants(args: Sequence[Nested], gradients: bool) -> bool:
    """Return whether all arguments are plain values or plain tensors.

    If `gradients` is true, a tensor that requires a gradient does not count.
    """
    for arg in args:
        kind = type(arg)
        if kind is torch.Tensor or kind is torch.nn.Parameter:
            if gradients and arg.requires_grad:
                return False
        elif kind is list or kind is tuple:
            if not _are_constants(arg, gradients):
                return False
        elif kind not in _VALUE_TYPES:  # a subclass of Tensor, or a tensor or number that is being traced
            return False
    return True


def needs_gradient(tensors: Sequence[torch.Tensor | None]) -> bool:
    """Return whether a derivative may be requested of a result computed from `tensors`; also works while tracing."""
    if are_functorch_transforms_active() or (not torch.compiler.is_compiling() and is_forward_ad_active()):
        return True
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _nest(layout: tuple[int, ...], flat: Sequence[Any]) -> list[Nested]:
    """Undo `_flatten`."""
    nested: list[Nested] = []
    position = 0
    for length in layout:
        if length < 0:
            nested.append(flat[position])
            position += 1
        else:
            nested.append(list(flat[position : position + length]))
            position += length
    return nested


def _slice(arg: Nested, dim: Any, index: int) -> Nested:
    """Select an index of the mapped dimension of an argument of `vmap`; `dim` None: the argument is not mapped."""
    if isinstance(arg, (list, tuple)) and isinstance(dim, (list, tuple)):
        return [_slice(item, item_dim, index) for item, item_dim in zip(arg, dim, strict=True)]
    return arg if dim is None else arg.select(dim, index)


def _stack(outputs: list[Any]) -> tuple[Any, Any]:
    """Stack the results of all slices; return them with their mapped dimensions, as `register_vmap` expects."""
    first = outputs[0]
    if isinstance(first, torch.Tensor):
        return torch.stack(outputs), 0
    stacked = [torch.stack(parts) for parts in zip(*outputs, strict=True)]
    return (stacked, [0] * len(stacked)) if isinstance(first, list) else (tuple(stacked), (0,) * len(stacked))


class _KernelCall(NamedTuple):
    """Dispatch keys, argument layout and modes of differentiation of one call of an autograd kernel."""

    keyset: Any
    layout: tuple[int, ...]
    reverse_enabled: bool
    forward_enabled: bool

    @contextlib.contextmanager
    def modes(self) -> Iterator[None]:
        """Enable the modes of differentiation as the caller had them; an `autograd.Function` disables both.

        Outer transforms of `torch.func` then record what is computed inside.
        """
        with torch.set_grad_enabled(self.reverse_enabled), set_forward_grad_enabled(self.forward_enabled):
            yield


class _PrimalContext:
    """The context of an `autograd.Function`, with saved tensors that have no tangents.

    `jvp` runs with forward mode enabled and must not differentiate the saved tensors too.
    """

    def __init__(self, ctx: Any) -> None:
        self._ctx = ctx

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)

    @property
    def saved_tensors(self) -> tuple[torch.Tensor | None, ...]:
        """Primals of the tensors that `setup_context` saved."""
        return tuple(None if tensor is None else unpack_dual(tensor, level=0)[0] for tensor in self._ctx.saved_tensors)


class DifferentiableOp:
    """A raw operator with reverse mode, forward mode, `vmap` and `torch.compile`; called like the operator.

    Args:
        name: operator in the namespace `spatialflow`.
        setup_context: `(ctx, inputs, output) -> None`; saves the tensors that derivatives need by
            `ctx.save_for_backward` (and `ctx.save_for_forward` for `jvp`), and plain values as attributes.
        backward: `(ctx, needs, *grad_outputs) -> gradients`, one per input: None for an input without one, a list for
            a list of tensors. `needs` has the same structure and tells which gradients are needed.
        jvp: `(ctx, *tangents) -> output tangents`; a tangent is None for an input without one.
    """

    def __init__(
        self, name: str, *, setup_context: Callable[..., None], backward: Callable[..., Any], jvp: Callable[..., Any]
    ) -> None:
        op = getattr(torch.ops.spatialflow, name).default
        self.op = op
        returns = op._schema.returns
        returns_list = len(returns) == 1 and isinstance(returns[0].type, torch.ListType)

        def forward_flat(ctx: Any, call: _KernelCall, *flat: Any) -> Any:
            ctx.call = call
            args = _nest(call.layout, flat)
            with AutoDispatchBelowAutograd(), call.modes():
                output = op.redispatch(call.keyset & AFTER_AUTOGRAD, *args)
            setup_context(ctx, tuple(args), output)
            return tuple(output) if returns_list else output

        def backward_flat(ctx: Any, *grads: Any) -> tuple[Any, ...]:
            gradients = backward(ctx, _nest(ctx.call.layout, ctx.needs_input_grad[1:]), *grads)
            flat: list[Any] = [None]
            for length, gradient in zip(ctx.call.layout, gradients, strict=True):
                if length < 0:
                    flat.append(gradient)
                else:
                    flat.extend([None] * length if gradient is None else gradient)
            return tuple(flat)

        def jvp_flat(ctx: Any, _: Any, *tangents: Any) -> Any:
            with ctx.call.modes():
                return jvp(_PrimalContext(ctx), *_nest(ctx.call.layout, tangents))

        # The base class of torch.autograd.Function without the functorch handling, which the dispatcher has already
        # done at this point.
        function: Any = type(
            name,
            (SingleLevelFunction,),
            {
                "forward": staticmethod(forward_flat),
                "backward": staticmethod(backward_flat),
                "jvp": staticmethod(jvp_flat),
            },
        )

        def autograd_kernel(keyset: Any, *args: Nested) -> Any:
            if _needs_no_derivative(args):  # a Function would cost 20 to 50 us of host time
                with AutoDispatchBelowAutograd():
                    return op.redispatch(keyset & AFTER_AUTOGRAD, *args)
            layout, flat = _flatten(args)
            call = _KernelCall(keyset, layout, torch.is_grad_enabled(), is_forward_grad_enabled())
            with enable_single_level_autograd_function():
                result = function.apply(call, *flat)
            return list(result) if returns_list else result

        def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
            if info.batch_size == 0:
                raise NotImplementedError(f"{name}: vmap over a dimension of size 0 is not supported")
            return _stack(
                [
                    op(*(_slice(arg, dim, i) for arg, dim in zip(args, in_dims, strict=True)))
                    for i in range(info.batch_size)
                ]
            )

        _library.impl(name, autograd_kernel, "Autograd", with_keyset=True)
        torch.library.register_vmap(f"spatialflow::{name}", vmap)

    def __call__(self, *args: Nested) -> Any:
        """Call the operator; skip autograd where no derivative can be requested."""
        if (
            torch.compiler.is_compiling()
            or torch.is_inference_mode_enabled()  # the dispatcher itself skips autograd
            or is_torch_function_mode_enabled()  # such a mode may compute with gradients around the call
            or not _needs_no_derivative(args)
        ):
            return self.op(*args)
        with AutoDispatchBelowAutograd():  # as the autograd kernel does, without its 5 us
            return self.op(*args)


def without_gradient(name: str) -> OpOverload:
    """Return the raw operator `name`, whose results have no derivative: the dispatcher skips the Autograd key."""
    _library.impl(name, torch.library.fallthrough_kernel, "Autograd")
    op: OpOverload = getattr(torch.ops.spatialflow, name).default
    return op


def autocast(tensor: torch.Tensor) -> torch.Tensor:
    """Cast `tensor` to the autocast dtype of its device if autocast is enabled; float64 and integers stay unchanged."""
    if not is_any_autocast_enabled():
        return tensor
    kind = tensor.device.type
    if (
        kind != "meta"
        and torch.is_autocast_enabled(kind)
        and tensor.dtype in (torch.float32, torch.float16, torch.bfloat16)
    ):
        return tensor.to(torch.get_autocast_dtype(kind))
    return tensor
