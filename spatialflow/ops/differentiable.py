# SPDX-License-Identifier: Apache-2.0
"""Gradients for raw operators, once for eager mode, `torch.func` and `torch.compile`.

`torch.library.register_autograd` alone gives reverse mode; forward-mode AD then returns zeros without a word, compiled
or not, and the derivatives of `torch.func` fail. An `autograd.Function` that has a `jvp` and is applied in Python does
all of them, but `torch.compile` does not trace it. So the `Function` is applied below, in the operator's autograd
kernel, where torch applies those of its own operators: every caller finds it there, and a graph holds the operator
alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

Nested = Any  # a tensor, a list of tensors, or a plain value

_kernels = torch.library.Library("spatialflow", "FRAGMENT")  # registrations last as long as it does
_transforms_are_active = torch._C._are_functorch_transforms_active
_VALUES = frozenset({int, float, bool, type(None)})


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


def _concerns_the_kernel_alone(args: Sequence[Nested]) -> bool:
    """Whether no derivative can be asked for: no input requires it, no forward mode, no transform, no trace."""
    if _transforms_are_active() or forward_ad._current_level >= 0:
        return False
    return _are_plain(args, torch.is_grad_enabled())


def _are_plain(args: Sequence[Nested], gradients: bool) -> bool:
    for arg in args:
        kind = type(arg)
        if kind is torch.Tensor or kind is torch.nn.Parameter:
            if gradients and arg.requires_grad:
                return False
        elif kind is list or kind is tuple:
            if not _are_plain(arg, gradients):
                return False
        elif kind not in _VALUES:  # a subclass, a tensor or a number of a trace
            return False
    return True


def needs_gradient(tensors: Sequence[torch.Tensor | None]) -> bool:
    """Whether reverse or forward mode may look at a result computed from `tensors`; asked while tracing, too."""
    if _transforms_are_active() or (not torch.compiler.is_compiling() and forward_ad._current_level >= 0):
        return True
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


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


class _Call(NamedTuple):
    """How an autograd kernel was called."""

    keyset: Any
    layout: tuple[int, ...]
    reverse: bool  # modes of differentiation: whether they are enabled
    forward: bool

    @contextlib.contextmanager
    def modes(self) -> Iterator[None]:
        """A Function disables both modes; transforms around this one find them as the caller left them."""
        with torch.set_grad_enabled(self.reverse), forward_ad._set_fwd_grad_enabled(self.forward):
            yield


class _Primals:
    """A context for `jvp`: with forward mode enabled, what was saved must not bring along tangents of its own."""

    def __init__(self, ctx: Any) -> None:
        self._ctx = ctx

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)

    @property
    def saved_tensors(self) -> tuple:
        return tuple(
            None if tensor is None else torch._VF._unpack_dual(tensor, level=0)[0] for tensor in self._ctx.saved_tensors
        )


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
        op = getattr(torch.ops.spatialflow, name).default
        self.op = op
        returns = op._schema.returns
        returns_list = len(returns) == 1 and isinstance(returns[0].type, torch.ListType)

        def forward_flat(ctx: Any, call: _Call, *flat: Any) -> Any:
            ctx.call = call
            args = _nest(call.layout, flat)
            with torch._C._AutoDispatchBelowAutograd(), call.modes():
                output = op.redispatch(call.keyset & torch._C._after_autograd_keyset, *args)
            setup_context(ctx, tuple(args), output)
            return tuple(output) if returns_list else output

        def backward_flat(ctx: Any, *grads: Any) -> tuple:
            gradients = backward(ctx, _nest(ctx.call.layout, ctx.needs_input_grad[1:]), *grads)
            flat: list = [None]
            for length, gradient in zip(ctx.call.layout, gradients):
                if length < 0:
                    flat.append(gradient)
                else:
                    flat.extend([None] * length if gradient is None else gradient)
            return tuple(flat)

        def jvp_flat(ctx: Any, _: Any, *tangents: Any) -> Any:
            with ctx.call.modes():
                return jvp(_Primals(ctx), *_nest(ctx.call.layout, tangents))

        # What `torch.autograd.Function` is without its own treatment of `torch.func`: here the dispatcher has peeled
        # off the transforms around this one.
        function = type(
            name,
            (torch.autograd.function._SingleLevelFunction,),
            {
                "forward": staticmethod(forward_flat),
                "backward": staticmethod(backward_flat),
                "jvp": staticmethod(jvp_flat),
            },
        )

        def autograd_kernel(keyset: Any, *args: Nested) -> Any:
            if _concerns_the_kernel_alone(args):  # a Function would cost 20 to 50 us of the host's time
                with torch._C._AutoDispatchBelowAutograd():
                    return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)
            layout, flat = _flatten(args)
            call = _Call(keyset, layout, torch.is_grad_enabled(), torch._C._is_fwd_grad_enabled())
            with enable_single_level_autograd_function():
                result = function.apply(call, *flat)
            return list(result) if returns_list else result

        def vmap(info: Any, in_dims: tuple, *args: Any) -> tuple[Any, Any]:
            if info.batch_size == 0:
                raise NotImplementedError(f"{name}: vmap over a dimension of size 0 is not supported")
            return _stack(
                [op(*(_slice(arg, dim, i) for arg, dim in zip(args, in_dims))) for i in range(info.batch_size)]
            )

        _kernels.impl(name, autograd_kernel, "Autograd", with_keyset=True)
        torch.library.register_vmap(f"spatialflow::{name}", vmap)

    def __call__(self, *args: Nested) -> Any:
        if (
            torch.compiler.is_compiling()
            or torch.is_inference_mode_enabled()  # the dispatcher leaves autograd out itself
            or torch._C._is_torch_function_mode_enabled()  # what such a mode computes may need autograd
            or not _concerns_the_kernel_alone(args)
        ):
            return self.op(*args)
        with torch._C._AutoDispatchBelowAutograd():  # as the autograd kernel would, without its 5 us
            return self.op(*args)


def without_gradient(name: str) -> torch._ops.OpOverload:
    """The raw operator `name`, whose results have no derivative: the dispatcher goes past autograd to the kernel."""
    _kernels.impl(name, torch.library.fallthrough_kernel, "Autograd")
    return getattr(torch.ops.spatialflow, name).default


def autocast(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` in the autocast dtype of its device where autocast is on; float64 and integers stay as they are."""
    if not torch._C._is_any_autocast_enabled():
        return tensor
    kind = tensor.device.type
    if (
        kind != "meta"
        and torch.is_autocast_enabled(kind)
        and tensor.dtype in (torch.float32, torch.float16, torch.bfloat16)
    ):
        return tensor.to(torch.get_autocast_dtype(kind))
    return tensor
